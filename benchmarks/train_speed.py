"""Training speed in real tokens a second: our engine against transformers.Trainer, on the same text.

Compared, round by round in one process, each as its user would run it:

    ours            stages.engine.train: packs by best fit, one segment per sample, SDPA per segment
    padded          Trainer, random batches padded to their longest sample, SDPA
    padding-free    Trainer, DataCollatorWithFlattening, SDPA. Without flash-attn (there is none for a CPU)
                    transformers keeps the samples apart by a block mask it derives from position_ids
    + our attention the same, with an attention function that a user would have to write and register:
                    SDPA per sample from the collator's cu_seq_lens (what flash-attn does on a GPU)

The same decoder (Qwen3, same weights at the start: the losses of both on one pack are compared first), the same
samples and labels, precision, fused AdamW, clipping, and on average the same real tokens a step. Samples are
tokenized before the clock starts on both sides; collating and everything else between two optimizer steps
counts, logging too. Ours also runs Keye's tower on its grey dummy picture, as on every step without media.
Speeds are given by the clock and by the CPU seconds that this process used: on a machine where others work, the
second is what can be compared.

    python benchmarks/train_speed.py --world WORLD --size tiny --mix text
    python benchmarks/train_speed.py --size 100m --mix heavy --tokens 1024 --steps 2 --warmup 1
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from data_mix.pack import best_fit
from mm.common.attention import varlen_attention
from mm.common.errors import UserError
from mm.decoder import DecoderConfig
from mm.keye import Keye, KeyeConfig
from mm.prompt import Example, join, prepare
from mm.sizes import PROCESSORS, TINY
from stages.engine.train import train
from stages.stage import Budget, Checkpoints, Optim, Stage

SIZES = {
    "tiny": TINY,
    "100m": replace(TINY, decoder=DecoderConfig(
        vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, mrope_section=(8, 12, 12),
    )),
}  # fmt: skip
OPTIM = Optim(name="adamw", lr=1e-4, schedule="constant")
PEERS = ("padded", "padding-free", "+ our attention")
GOALS = {"padded": 1.5, "padding-free": 1.0}
SAMPLES = 4000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = harness.parser(__doc__)
    p.add_argument("--world", type=Path, help="a world folder; needed by --mix text")
    p.add_argument("--size", choices=list(SIZES), default="tiny")
    p.add_argument("--mix", choices=["text", "heavy"], default="heavy",
                   help="text: samples and labels of the stage keye.text, 70 %% text and 30 %% chat by tokens. "
                        "heavy: random ids, all trained, lognormal lengths (median 150, sigma 1)")  # fmt: skip
    p.add_argument("--tokens", type=int, default=2048, help="of a pack, and on average of a peer's batch")
    p.add_argument("--steps", type=int, default=8, help="timed steps of each in a round")
    p.add_argument("--warmup", type=int, default=2, help="steps before the timed ones in every round")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="bf16: autocast over fp32 weights")
    return p.parse_args(argv)


# ---- the samples


def world_text(world: Path, most: int) -> list[Example]:
    """Tokenized samples of `text` and `text_chat`, seven to three by tokens, none longer than `most`."""
    tokenizer, processor, found = harness.world_tokenizer(world), PROCESSORS["tiny"], []
    for name, share in (("text", 0.7), ("text_chat", 0.3)):
        source, left = harness.source(world, name), share * SAMPLES * 60
        for i in range(len(source)):
            example = prepare(source.sample(i)["messages"], processor, tokenizer, _no_media)
            if len(example) <= most and left > 0:
                found.append(example)
                left -= len(example)
    return found


def _no_media(part: dict[str, Any]) -> Any:
    raise UserError(f"text samples have no {part['type']}")


def heavy_tail(most: int) -> list[Example]:
    """Plain-text ids only: those from 2000 on are special in the tiny vocabulary."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(150), 1.0, SAMPLES), 8, most).astype(int)
    return [_made(random.integers(0, 2000, n)) for n in lengths]


def _made(ids: np.ndarray) -> Example:
    n = len(ids)
    mask = torch.ones(n, dtype=torch.bool)
    mask[0] = False
    return Example(
        input_ids=torch.from_numpy(ids), loss_mask=mask, position_ids=torch.arange(n).expand(3, -1).contiguous(),
        pixel_values=torch.zeros(0, 588, dtype=torch.uint8), grid_thw=torch.zeros(0, 3, dtype=torch.int64), turns=1,
    )  # fmt: skip


# ---- ours

def speed(tokens: list[int], start: harness.Moment, end: harness.Moment) -> harness.Moment:
    """Tokens a second of each kind."""
    return sum(tokens) / (end[0] - start[0]), sum(tokens) / (end[1] - start[1])


class Enough(Exception):
    """The timed steps are over."""


class Packs:
    """Best-fit packs of the examples, in the form the engine takes; notes when each step asks for its data."""

    def __init__(self, examples: list[Example], tokens: int, steps: int, seed: int):
        random = np.random.default_rng(seed)
        self.examples = [examples[i] for i in random.permutation(len(examples))]
        self.bins = best_fit([(len(e), 0) for e in self.examples], (tokens, 1), random)
        self.order, self.steps = random.permutation(len(self.bins)), steps
        self.asked: list[harness.Moment] = []
        self.tokens: list[int] = []

    def __iter__(self) -> Iterator[list[Any]]:
        for k in range(self.steps + 1):
            self.asked.append(harness.now())
            if k == self.steps:
                raise Enough
            chosen = self.bins[self.order[k % len(self.bins)]]
            batch = join([self.examples[i] for i in chosen], [f"sample/{i}" for i in chosen])
            self.tokens.append(len(batch.input_ids))
            yield [batch]

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        raise UserError("the benchmark does not resume")



def ours(
    a: argparse.Namespace, config: KeyeConfig, model: Keye, examples: list[Example], seed: int
) -> harness.Moment:
    packs = Packs(examples, a.tokens, a.warmup + a.steps, seed)
    stage = Stage(
        name="benchmark", size=a.size, model=config, train={"model.*": 1.0, "lm_head.*": 1.0}, optim=OPTIM,
        budget=Budget(tokens=a.tokens, visual_tokens=1, steps=10**6), precision=a.precision,
        checkpoint=Checkpoints(every_steps=0),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        train(stage, folder, model=model, loader=packs, hand_on=lambda *_: None, device=device(), quiet=True)
    return speed(packs.tokens[a.warmup :], packs.asked[a.warmup], packs.asked[-1])


# ---- the peers


def peer_model(config: KeyeConfig, attention: str) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    d = config.decoder
    qwen = Qwen3Config(
        vocab_size=d.vocab_size, hidden_size=d.hidden_size, intermediate_size=d.intermediate_size,
        num_hidden_layers=d.num_hidden_layers, num_attention_heads=d.num_attention_heads,
        num_key_value_heads=d.num_key_value_heads, head_dim=d.head_dim, rms_norm_eps=d.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta}, use_cache=False,
        tie_word_embeddings=d.tie_word_embeddings,
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(qwen, attn_implementation=attention)


def per_sample_attention(module, q, k, v, attention_mask, *, scaling=None, cu_seq_lens_q=None, **_: Any):
    """Ours behind transformers' interface: q [1, heads, L, d] -> ([1, L, heads, d], None)."""
    q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))
    return varlen_attention(q, k, v, cu_seq_lens_q.flatten().int(), causal=True, scale=scaling)[None], None


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right padding to the longest of the batch."""
    longest = max(len(r["input_ids"]) for r in rows)

    def fill(key: str, value: int) -> torch.Tensor:
        return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": torch.tensor(mask)}


@dataclass
class Peer:
    model: Any
    collate: Callable[[list[dict[str, list[int]]]], dict[str, Any]]


def peers(config: KeyeConfig, model: Keye) -> dict[str, Peer]:
    """All start from our weights, name by name."""
    from transformers import AttentionInterface, DataCollatorWithFlattening

    AttentionInterface.register("per_sample", per_sample_attention)
    flat = DataCollatorWithFlattening()
    with_lengths = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    made = {
        "padded": Peer(peer_model(config, "sdpa"), pad),
        "padding-free": Peer(peer_model(config, "sdpa"), flat),
        "+ our attention": Peer(peer_model(config, "per_sample"), with_lengths),
    }
    weights = {k: v for k, v in model.state_dict().items() if k.startswith(("model.", "lm_head."))}
    for peer in made.values():
        peer.model.load_state_dict(weights, strict=True)
    return made


def rows_of(examples: list[Example]) -> list[dict[str, list[int]]]:
    """Examples as transformers takes them: lists of ids and of labels."""
    return [
        {"input_ids": e.input_ids.tolist(), "labels": torch.where(e.loss_mask, e.input_ids, -100).tolist()}
        for e in examples
    ]


def theirs(a: argparse.Namespace, peer: Peer, rows: list[dict[str, list[int]]], seed: int) -> harness.Moment:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    begun: list[harness.Moment] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begun.append(harness.now())

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        tokens.append(sum(len(r["input_ids"]) for r in batch))
        return peer.collate(batch)

    mean = sum(len(r["input_ids"]) for r in rows) / len(rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=max(round(a.tokens / mean), 1),
            max_steps=a.warmup + a.steps + 1, optim="adamw_torch_fused", learning_rate=OPTIM.lr,
            adam_beta1=OPTIM.betas[0], adam_beta2=OPTIM.betas[1], weight_decay=OPTIM.weight_decay,
            max_grad_norm=OPTIM.grad_clip, lr_scheduler_type="constant", bf16=a.precision == "bf16", seed=seed,
            use_cpu=device().type == "cpu", report_to="none", disable_tqdm=True, save_strategy="no",
            remove_unused_columns=False, dataloader_pin_memory=device().type != "cpu", logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model=peer.model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    first, last = a.warmup, a.warmup + a.steps
    return speed(tokens[first:last], begun[first], begun[last])


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- the comparison


@torch.no_grad()
def loss_differences(model: Keye, others: dict[str, Peer], examples: list[Example]) -> dict[str, float]:
    """Relative difference of the mean loss on one fp32 batch, before anything is trained."""
    total, n = model.loss(join(examples))
    want = float(total) / n
    rows = rows_of(examples)
    return {k: abs(float(p.model(**p.collate(rows)).loss) - want) / want for k, p in others.items()}


def padding(a: argparse.Namespace, rows: list[dict[str, list[int]]]) -> float:
    """Share of real tokens in random padded batches."""
    lengths = np.array([len(r["input_ids"]) for r in rows])
    size = max(round(a.tokens / lengths.mean()), 1)
    random = np.random.default_rng(0)
    drawn = random.choice(lengths, (1000, size))
    return float(drawn.sum() / (drawn.max(1) * size).sum())


def measure(a: argparse.Namespace) -> tuple[dict[str, list[harness.Moment]], harness.Json]:
    config = SIZES[a.size]
    if a.mix == "text" and a.world is None:
        raise UserError("--mix text needs --world FOLDER; make one with: mm data make-world FOLDER")
    examples = world_text(a.world, a.tokens) if a.mix == "text" else heavy_tail(a.tokens)
    model = Keye(config)
    model.init_weights(0)
    others, rows = peers(config, model), rows_of(examples)
    facts = {
        "parameters": sum(p.numel() for p in others["padded"].model.parameters()), "samples": len(rows),
        "mean_length": sum(len(r["input_ids"]) for r in rows) / len(rows), "padded_real_share": padding(a, rows),
        "loss_differences": loss_differences(model, others, examples[:6]),
    }  # fmt: skip
    arms: dict[str, Callable[[int], harness.Moment]] = {"ours": lambda seed: ours(a, config, model, examples, seed)}
    arms |= {name: partial(theirs, a, peer, rows) for name, peer in others.items()}
    speeds: dict[str, list[harness.Moment]] = {name: [] for name in arms}
    for r in range(a.rounds):
        names = list(arms)
        for name in names[r % len(names) :] + names[: r % len(names)]:  # each goes first in turn
            speeds[name].append(arms[name](r))
    return speeds, facts


def main(argv: Sequence[str] | None = None) -> harness.Json:
    a = parse(argv)
    harness.begin(a)
    about = harness.machine()
    speeds, facts = measure(a)
    settings = {k: getattr(a, k) for k in ("size", "mix", "tokens", "steps", "warmup", "rounds", "precision")}
    by = {kind: {name: [m[i] for m in speeds[name]] for name in speeds} for i, kind in enumerate(("clock", "cpu"))}
    ratio = {kind: {n: harness.ratios(by[kind]["ours"], by[kind][n]) for n in PEERS} for kind in by}
    figures: harness.Json = {"speeds": by, "facts": facts, "ratios": ratio, "settings": settings}
    rows = [("ours", harness.shown(harness.spread(by["clock"]["ours"]), ".0f"), "", "", "", "")]
    for name in PEERS:
        goal, clock, cpu = GOALS.get(name), ratio["clock"][name], ratio["cpu"][name]
        end = ("", "") if goal is None else (f">= {goal}", harness.judged(clock["median"], goal))
        rows.append((name, harness.shown(harness.spread(by["clock"][name]), ".0f"), harness.shown(clock),
                     harness.shown(cpu), *end))  # fmt: skip
    notes = [
        f"{facts['parameters'] / 1e6:.1f} M trained parameters, {a.precision}, {a.tokens} tokens a step, "
        f"{facts['samples']} samples of {facts['mean_length']:.0f} tokens on average; real tokens in random padded "
        f"batches: {facts['padded_real_share']:.0%}",
        "the same loss from the same weights, relative difference: "
        + ", ".join(f"{k} {v:.0e}" for k, v in facts["loss_differences"].items()),
    ]
    columns = ("", "real tokens/s (least to most)", "ours / this, by clock", "by CPU time", "goal", "by clock")
    title = f"training speed, {a.size}, mix {a.mix}"
    return harness.report(a, title, about, columns, rows, figures, notes)


if __name__ == "__main__":
    harness.run(main)
