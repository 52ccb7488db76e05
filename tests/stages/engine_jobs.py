"""What the tests run in processes of their own (engine_launch.py), or `python engine_jobs.py JOB FOLDER SETTINGS`
under torchrun."""

import dataclasses
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from data_mix.loader import Loader as RealLoader
from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan
from mm.common import dist
from mm.common.errors import UserError
from mm.parallelize import parallelize
from mm.processor import Processor
from mm.tokenizer import Tokenizer
from stages import objectives
from stages.engine import train as engine
from stages.engine.train import Stopped, Turn, train
from stages.stage import Budget, Checkpoints, ObjectiveSpec, Optim
from tests.stages import engine_toy as toy


def run(folder: str, settings: str = "{}") -> None:
    """Train the toy stage. Settings: model, every (checkpoint), at (step -> what happens before it), within
    (the same, after its update), slow (largest sleep per step), recompute (activation checkpointing), bf16
    (whether the machine has it), and fields of the stage."""
    given = json.loads(settings)
    kind, at, slow = given.pop("model", "keye"), given.pop("at", {}), given.pop("slow", 0.0)
    within = given.pop("within", {})
    recompute, make, fingerprint = given.pop("recompute", False), toy.pack, given.pop("fingerprint", "toy")
    saving = {"every_steps": given.pop("every", 4), "keep": 2, "asynchronous": given.pop("asynchronous", True)}
    given["checkpoint"] = Checkpoints(**saving)
    if (able := given.pop("bf16", None)) is not None:
        torch.cpu.get_capabilities = lambda: {"avx512_bf16": able}
    if kind == "contrastive":
        given["objective"] = ObjectiveSpec("contrastive")
        make = lambda p: toy.pairs(3 * p, 1 + p % 3)  # an unequal number of pairs in each micro-batch
    # eps: a gradient of nothing but rounding noise (a key's bias has none) must not become a whole step
    optim = Optim(name=given.pop("optimizer", "adamw"), lr=given.pop("lr", 1e-2), warmup_steps=2, eps=1e-4)
    stage = toy.stage(optim=optim, **given)
    model = toy.contrastive() if kind == "contrastive" else toy.keye(config=recomputing() if recompute else toy.KEYE)
    loader = EventfulLoader(stage.budget.packs_per_step, make=make, fingerprint=fingerprint, at=at, slow=slow)
    judge = engine.judge

    def judge_late(stage, counters, fine, step, *rest):
        loader.happen(within.get(str(step), ""))
        return judge(stage, counters, fine, step, *rest)

    engine.judge = judge_late
    try:
        train(stage, folder, model=model, loader=loader, hand_on=toy.hand_on)
    except Stopped as e:
        print("STOPPED", e)
    except UserError as e:
        print("USER ERROR", e)


def recomputing():
    on = {"activation_checkpointing": True}
    return dataclasses.replace(
        toy.KEYE, decoder=dataclasses.replace(toy.KEYE.decoder, **on), vision=dataclasses.replace(toy.VISION, **on)
    )


class EventfulLoader(toy.Loader):
    """Something happens just before step `at` is handed out: "term", "int", "die" (on its last rank, at a first
    attempt), "full" (no file may grow), "room" (they may again)."""

    def __init__(self, per_step: int, *, slow: float, at: dict[str, str], **kwargs):
        super().__init__(per_step, **kwargs)
        self.slow, self.at = slow, at

    def __iter__(self):
        for batches in super().__iter__():
            time.sleep(self.slow * random.random())
            self.happen(self.at.get(str(self.position // self.per_step), ""))
            yield batches

    def happen(self, event: str) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if event in ("full", "room"):
            time.sleep(1.0)  # whatever is being saved has met the disk as it was
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if event == "full" else hard, hard))
        elif event == "die":
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and dist.rank() == dist.world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        elif event and dist.is_main():
            os.kill(os.getpid(), {"term": signal.SIGTERM, "int": signal.SIGINT}[event])


def gradients(folder: str, settings: str) -> None:
    """Loss and gradients of one step: {"model", "splits": per rank a list of micro-batches}, where a
    micro-batch is [first, n] pairs (of "words" and "told_features": pictures), or a pack number. Rank 0 writes them
    whole."""
    given = json.loads(settings)
    kind, cpu = given["model"], torch.device("cpu")
    options = given.get("options", {})
    stage = toy.stage(objective=ObjectiveSpec("next_token" if kind == "keye" else kind, options))
    config = recomputing() if given.get("recompute") else toy.KEYE
    whole = {"keye": lambda: toy.keye(config=config), "told_features": toy.aligned}.get(kind, toy.contrastive)()
    model = parallelize(whole, device=cpu)
    make = {"keye": toy.pack, "contrastive": lambda m: toy.pairs(*m)}.get(kind, lambda m: toy.regions(*m, end=59))
    batches = [make(m) for m in given["splits"][dist.rank()]]
    everything = dict.fromkeys(dict(model.named_parameters()), "*")
    turn = Turn("main", model, everything, objectives.make(stage.objective), stage)
    terms, _ = turn.gradients(batches, cpu)
    sums = dist.sum_tensor(torch.tensor([[float(v) for v in terms[k]] for k in terms], dtype=torch.float64))
    grads = {}
    for name, p in model.named_parameters():
        g = torch.zeros_like(p) if p.grad is None else p.grad
        grads[name] = (g.full_tensor() if hasattr(g, "full_tensor") else g).clone()
    if dist.is_main():
        means = dict(zip(terms, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        torch.save({"loss": means, "grads": grads}, Path(folder) / "grads.pt")


def real(folder: str, settings: str) -> None:
    """Train on a source folder through the real loader: {"source", "workers", "steps"}."""
    given = json.loads(settings)
    source = Path(given["source"])
    tokenizer = Tokenizer.load(source.parent / "tokenizer")
    config = dataclasses.replace(
        toy.KEYE, vision=dataclasses.replace(toy.VISION, patch_size=14, image_size=56),
        decoder=dataclasses.replace(toy.KEYE.decoder, vocab_size=512),
    ).bound(tokenizer)  # fmt: skip
    stage = toy.stage(
        model=config, optim=Optim(lr=1e-2, eps=1e-4), checkpoint=Checkpoints(every_steps=3),
        budget=Budget(tokens=192, visual_tokens=48, packs_per_step=4, steps=given["steps"]),
    )  # fmt: skip
    processor = Processor(image_max_tokens=16)
    plan = PackPlan(Mix([SourceSpec(source, unit="samples")]), processor, tokenizer, 192, 48)
    sizes = {"rank": dist.rank(), "ranks": dist.world_size(), "workers": given["workers"]}
    with RealLoader(plan, packs_per_step=4, **sizes) as loader:
        slow = SlowSteps(loader, given.get("slow", 0.0))
        train(stage, folder, model=toy.keye(config=config), loader=slow, hand_on=toy.hand_on)


class SlowSteps:
    """A loader whose steps take a random time, so that a kill may meet any moment."""

    def __init__(self, loader: RealLoader, slow: float):
        self.loader, self.slow, self.state, self.load = loader, slow, loader.state, loader.load

    def __iter__(self):
        for batches in self.loader:
            time.sleep(self.slow * random.random())
            yield batches


if __name__ == "__main__":
    dist.init("cpu")
    globals()[sys.argv[1]](*sys.argv[2:])
    dist.shutdown()
