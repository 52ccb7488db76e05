"""Answers, token by token, for many prompts at once."""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from mm.batch import Batch
from mm.common.errors import UserError
from mm.common.seeds import derive
from mm.decoder import KVCache
from mm.keye import Keye
from mm.prompt import Example, join
from mm.tokenizer import Tokenizer

STOP = ("<|im_end|>", "<|endoftext|>")


def generate(
    model: Keye, examples: Sequence[Example], tokenizer: Tokenizer, *, max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | Sequence[int] = 0,
    stop: Sequence[str] = STOP, batch_size: int = 32,
) -> list[str]:  # fmt: skip
    """The text that follows each example's prompt, without the stop token; special tokens are kept as text.

    Args:
        examples: prompts (built with `generate=True`), on any device.
        temperature: 0 takes the likeliest token; else logits are divided by it, cut to `top_k` (0: all), then
            to the smallest set of probability `top_p`.
        seed: one number, or one per example. From one number each example gets its own stream, made of its
            tokens and pixels (and how many equal ones came before it), so that neighbours change nothing.
        batch_size: prompts decoded together; the answers do not depend on it.
    """
    stop_ids = {tokenizer.id(s) for s in stop}
    seeds = _seeds(seed, examples)
    texts = []
    for i in range(0, len(examples), batch_size):
        batch = join(list(examples[i : i + batch_size])).to(model.head_weight.device)
        answers = generate_ids(
            model, batch, max_new_tokens=max_new_tokens, stop_ids=stop_ids, temperature=temperature, top_p=top_p,
            top_k=top_k, seeds=seeds[i : i + batch_size], vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        cut = [a[:-1] if a and a[-1] in stop_ids else a for a in answers]
        texts += [tokenizer.decode(a, skip_special=False) for a in cut]
    return texts


def _seeds(seed: int | Sequence[int], examples: Sequence[Example]) -> list[int]:
    if not isinstance(seed, int):
        if len(seed) != len(examples):
            raise UserError(f"{len(seed)} seeds for {len(examples)} examples; give one number or one per example")
        return list(seed)
    met: Counter[str] = Counter()
    seeds = []
    for e in examples:
        content = b"".join(x.cpu().contiguous().numpy().tobytes() for x in (e.input_ids, e.grid_thw, e.pixel_values))
        key = hashlib.blake2b(content, digest_size=16).hexdigest()
        seeds.append(derive(seed, "sample", key, met[key]))
        met[key] += 1
    return seeds


@torch.no_grad()
def generate_ids(
    model: Keye, batch: Batch, *, max_new_tokens: int, stop_ids: Collection[int], temperature: float = 0.0,
    top_p: float = 1.0, top_k: int = 0, seeds: Sequence[int] = (), vocab_size: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """New token ids of each segment of `batch`, the stop token included where one came.

    Placeholder tokens of images and videos are never drawn, nor ids at or above `vocab_size` (a model's table
    may be larger than its tokenizer). `seeds`: one per segment, needed when temperature is above 0.
    """
    cu = batch.cu_seqlens
    streams = [torch.Generator().manual_seed(s % 2**63) for s in seeds]
    if temperature > 0 and len(streams) != len(cu) - 1:
        raise UserError(f"sampling needs one seed per prompt: {len(cu) - 1} prompts, {len(streams)} seeds")
    cache = KVCache(int(cu.diff().max()) + max_new_tokens)
    last = model.model(model.embed(batch), batch.position_ids, cu, cache)[cu[1:].long() - 1]  # [S, D]
    top = batch.position_ids.amax(0)
    position = torch.stack([s.max() for s in top.split(cu.diff().tolist())]) + 1  # [S]
    alive, answers = list(range(len(cu) - 1)), [[] for _ in range(len(cu) - 1)]  # type: list[int], list[list[int]]
    for step in range(max_new_tokens):
        logits = _allowed(model, model.logits(last), vocab_size)
        if temperature > 0:
            tokens = sample(logits, [streams[i] for i in alive], temperature=temperature, top_p=top_p, top_k=top_k)
        else:
            tokens = logits.argmax(-1)
        for i, token in zip(alive, tokens.tolist(), strict=True):
            answers[i].append(token)
        going = [row for row, i in enumerate(alive) if answers[i][-1] not in stop_ids]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=tokens.device)
            cache.keep(rows)
            tokens, position, alive = tokens[rows], position[rows], [alive[r] for r in going]
        each = torch.arange(len(alive) + 1, device=tokens.device, dtype=torch.int32)
        last = model.model(model.model.embed_tokens(tokens), position.expand(3, -1), each, cache)
        position = position + 1
    return answers


def _allowed(model: Keye, logits: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    logits[:, [model.config.image_token_id, model.config.video_token_id]] = -torch.inf
    if vocab_size is not None:
        logits[:, vocab_size:] = -torch.inf
    return logits


def sample(
    logits: torch.Tensor, streams: Sequence[torch.Generator], *, temperature: float, top_p: float, top_k: int
) -> torch.Tensor:
    """One token per row, int64 [S], from fp32 logits [S, V]: temperature, then top-k, then top-p, then one
    uniform number of the row's own stream, looked up in the cumulated probabilities."""
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        logits[:, top_k:] = -torch.inf
    p = logits.double().softmax(-1)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= top_p, 0.0)  # the first token always stays
    u = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in streams]).to(p.device)
    rank = torch.searchsorted(p.cumsum(-1), (u * p.sum(-1))[:, None], right=True)
    return order.gather(1, rank.clamp(max=p.shape[-1] - 1))[:, 0]
