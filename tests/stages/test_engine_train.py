"""The loop on one rank: what it skips, when it stops, what it leaves, what it tells."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from mm.common.errors import UserError
from stages import objectives
from stages.engine.log import line, lineage
from stages.engine.train import Turn, dry_step, train
from stages.objectives.next_token import NextToken
from stages.objectives.objective import Objective
from stages.stage import Budget, Checkpoints, Log, ObjectiveSpec, Optim
from tests.stages import engine_toy as toy


class Hurt(NextToken):
    """Next-token prediction whose loss is not a number at some steps."""

    def __init__(self, bad=(), of="nan"):
        self.bad, self.worth, self.step = bad, float(of), -1  # the dry step is step 0

    def accumulate(self, model, batches, denominators, phase="main"):
        self.step += 1
        terms = super().accumulate(model, batches, denominators, phase)
        if self.step in self.bad:
            model.lm_head.weight.grad[0, 0] = self.worth
        return terms


@pytest.fixture
def hurt(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "hurt", Hurt)


def go(folder, stage, **kwargs):
    model = kwargs.pop("model", None) or toy.keye()
    loader = kwargs.pop("loader", None) or toy.Loader(stage.budget.packs_per_step)
    return train(stage, folder, model=model, loader=loader, hand_on=toy.hand_on, **kwargs)


@pytest.mark.parametrize("worth", ["nan", "inf"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(tmp_path, hurt, capsys, worth):
    stage = toy.stage(steps=5, objective=ObjectiveSpec("hurt", {"bad": [2, 3], "of": worth}))
    go(tmp_path, stage)
    out = capsys.readouterr().out
    assert f"WARNING: step 2: gradient norm {worth}" in out and "toy/4-0#0" in out and "toy/7-2#0" in out
    rows = lineage(tmp_path, "log.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2, 2]
    weights = torch.load(tmp_path / "model" / "weights.pt")
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_too_many_in_a_row_stop_the_run(tmp_path, hurt):
    options = {"bad": [2, 3, 4, 5]}
    stage = toy.stage(steps=9, objective=ObjectiveSpec("hurt", options), optim=Optim(lr=1e-2, bad_steps=2))
    with pytest.raises(UserError, match=r"step 4: .*3 in a row .*lower optim.lr") as e:
        go(tmp_path, stage)
    assert "toy/12-0#0" in str(e.value)


def test_the_dry_step_changes_nothing(tmp_path):
    stage, model = toy.stage(), toy.keye()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    turn = Turn("main", model, dict.fromkeys(dict(model.named_parameters()), "*"), NextToken(), stage)
    random = torch.get_rng_state()
    dry_step(stage, NextToken(), model, [turn], torch.device("cpu"))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not v.any() for state in turn.optimizer.state.values() for v in state.values())


def test_the_dry_step_runs_the_largest_shape():
    budget = Budget(tokens=100, visual_tokens=36)
    batch = NextToken().shaped(toy.keye(), budget)
    assert batch.input_ids.shape == (100,) and batch.grid_thw.tolist() == [[1, 12, 12]]
    assert int((batch.input_ids == toy.IMAGE).sum()) == 36 and int(batch.target_mask().sum()) == 63
    pairs = objectives.Contrastive().shaped(toy.contrastive(), budget, 4)
    assert pairs.grid_thw.tolist() == [[1, 6, 6]] * 4 and pairs.cu_seqlens.tolist() == [0, 16, 32, 48, 64]


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError(NO_MEMORY), MemoryError()])
def test_what_does_not_fit_is_told_before_the_first_step(tmp_path, monkeypatch, error):
    def loss(self, batch):
        raise error

    monkeypatch.setattr(toy.Keye, "loss", loss)
    with pytest.raises(UserError, match=r"does not fit on cpu: one pack of budget.tokens=32.*Lower them"):
        go(tmp_path, toy.stage())
    assert not (tmp_path / "log.jsonl").read_text()


def test_data_that_end_too_early_are_an_error(tmp_path):
    class Short(toy.Loader):
        def __iter__(self):
            for step, batches in enumerate(super().__iter__()):
                if step == 3:
                    return
                yield batches

    with pytest.raises(UserError, match=r"ended before step 4; lower budget.steps"):
        go(tmp_path, toy.stage(), loader=Short(4))


class Duel(Objective):
    """Two players, each with its own optimizer and turn: one raises what the other lowers."""

    phases = ("first", "second")

    def counts(self, batches):
        return {"duel": float(len(batches))}

    def accumulate(self, model, batches, denominators, phase="main"):
        value = (model.first.weight.sum() - model.second.weight.sum()) ** 2
        loss = value if phase == "first" else -value
        (loss * len(batches) / denominators["duel"]).backward()
        return {phase: (value.detach() * len(batches), float(len(batches)))}

    def shaped(self, model, budget, pieces=1):
        return toy.pack(0)

    def owns(self, phase, name):
        return name.startswith(phase)


def test_phases_have_optimizers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "duel", Duel)
    model = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3, bias=False)})
    for p in model.parameters():
        p.data.fill_(1.0)
    model["second"].weight.data.fill_(0.5)
    stage = toy.stage(steps=3, model=None, objective=ObjectiveSpec("duel"), optim=Optim(lr=0.01, weight_decay=0.0))
    go(tmp_path, stage, model=_Players(model))
    rows = lineage(tmp_path, "log.jsonl")
    assert set(rows[0]["loss"]) == {"first", "second"}
    weights = torch.load(tmp_path / "model" / "weights.pt")
    assert weights["first.weight"][0, 0] < 1.0 and weights["second.weight"][0, 0] < 0.5  # each went its own way
    about = json.loads((tmp_path / "checkpoints" / "step-3" / "COMPLETE.json").read_text())
    assert about["schedules"] == {"first": 3, "second": 3}


class _Players(nn.Module):
    def __init__(self, players):
        super().__init__()
        self.first, self.second = players["first"], players["second"]


# the log


def test_a_line_reads_well_and_the_jsonl_has_every_step(tmp_path, capsys):
    go(tmp_path, toy.stage(steps=6, log=Log(every_steps=3, tensorboard=True)))
    lines = [text for text in capsys.readouterr().out.splitlines() if text.startswith("step")]
    assert [text.split()[1] for text in lines] == ["3/6", "6/6"]
    assert all(word in lines[0] for word in ("50%", "next_token", "grad", "lr", "tok/s", "wait", "mem", "left"))
    rows = lineage(tmp_path, "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[0]["tokens"] == sum(len(toy.pack(p).input_ids) for p in range(4)) and rows[0]["mfu"] is None
    assert list((tmp_path / "tb").glob("events*"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["optim"]["lr"] == 1e-2 and config["model"]["decoder"]["hidden_size"] == 32


def test_utilisation_and_skips_are_told_when_there_are_any():
    row = {"step": 5, "loss": {"a": 1.0}, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 2.5e6, "mfu": 0.415,
           "wait_share": 0.02, "memory_gb": 3.0, "skipped": 2, "seconds_left": 4000.0}  # fmt: skip
    text = line(row, 10)
    assert "MFU 41.5%" in text and "2 skipped" in text and "2.50M tok/s" in text and "1h06m left" in text


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_used_when_asked_and_named_when_missing(tmp_path, monkeypatch, name):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **k: calls.append(("init", k["project"])), log=lambda row: calls.append(("log", row["step"])),
        finish=lambda: calls.append(("finish", None)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, name, fake)
    stage = toy.stage(steps=2, log=Log(tensorboard=False, tracker=name))
    go(tmp_path / "there", stage)
    assert calls == [("init", "mmstack"), ("log", 1), ("log", 2), ("finish", None)]
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"pip install 'mmstack\[{name}\]'"):
        go(tmp_path / "missing", stage)


def test_synchronous_checkpoints_too(tmp_path):
    go(tmp_path, toy.stage(steps=4, checkpoint=Checkpoints(every_steps=1, keep=2, asynchronous=False)))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-4"]


def test_unknown_objectives_and_options_are_named():
    with pytest.raises(UserError, match="did you mean 'next_token'"):
        objectives.make(ObjectiveSpec("next_tokn"))
    with pytest.raises(UserError, match=r"objective.options of next_token"):
        objectives.make(ObjectiveSpec("next_token", {"weight": 1}))
