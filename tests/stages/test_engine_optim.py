"""Pattern groups, schedules and the table of what trains."""

import pytest
import torch
from rich.console import Console

from mm.common.errors import UserError
from stages.engine import muon, optim
from stages.engine.muon import Muon, orthogonal, owners
from stages.stage import Optim
from tests.stages import engine_toy as toy


def lr_of(optimizer, model, name):
    wanted = dict(model.named_parameters())[name]
    return next((g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"] if p is wanted)


def test_the_last_pattern_that_matches_rules():
    model = toy.keye()
    patterns = {"*": 1.0, "visual.*": 0.1, "visual.vision_model.embeddings.*": 0.0}
    selection = optim.select(model, patterns)
    optimizer = optim.build(model, selection, patterns, Optim(lr=1e-2, weight_decay=0.1))
    assert lr_of(optimizer, model, "model.layers.0.mlp.up_proj.weight") == (1e-2, 0.1)
    assert lr_of(optimizer, model, "visual.vision_model.encoder.layers.1.mlp.fc1.weight") == (1e-3, 0.1)
    assert lr_of(optimizer, model, "visual.vision_model.encoder.layers.1.mlp.fc1.bias") == (1e-3, 0.0)
    assert lr_of(optimizer, model, "model.embed_tokens.weight") == (1e-2, 0.0)
    assert lr_of(optimizer, model, "model.norm.weight") == (1e-2, 0.0)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".embeddings." in n}


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(UserError, match=r"'visul.\*' matches no parameter; did you mean 'visual'"):
        optim.select(toy.keye(), {"visul.*": 1.0})
    with pytest.raises(UserError, match="mlp_AR"):
        optim.select(toy.keye(), {"*": 1.0, "mlp_ar.*": 1.0})
    with pytest.raises(UserError, match="nothing would train"):
        optim.select(toy.keye(), {"*": 0.0})


def test_table_tells_what_each_pattern_matched():
    model, patterns = toy.keye(), {"mlp_AR.*": 1.0, "model.norm.*": 0.5}
    selection = optim.select(model, patterns)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(optim.table(model, selection, patterns, Optim(lr=1e-2)))
    lines = {row.split("│")[1].strip(): row for row in captured.get().splitlines() if row.startswith("│")}
    assert "0.01" in lines["mlp_AR.*"] and "0.005" in lines["model.norm.* (vectors, embeddings)"]
    assert "frozen" in lines["visual.*"] and "frozen" in lines["model.*"]


@pytest.mark.parametrize(("config", "want"), [
    (Optim(schedule="constant", warmup_steps=3), {0: 0.25, 2: 0.75, 3: 1.0, 99: 1.0}),
    (Optim(schedule="cosine", min_lr_ratio=0.1), {0: 1.0, 99: 0.1}),
    (Optim(schedule="cosine", min_lr_ratio=0.0, warmup_steps=1), {0: 0.5, 1: 1.0, 50: 0.5, 99: 0.0}),
    (Optim(schedule="wsd", min_lr_ratio=0.2, decay_share=0.2), {0: 1.0, 79: 1.0, 89: 0.6, 99: 0.2}),
])  # fmt: skip
def test_schedules(config, want):
    factor = optim.schedule(config, 100)
    assert {i: round(factor(i), 2) for i in want} == want
    values = [factor(i) for i in range(config.warmup_steps, 100)]
    assert values == sorted(values, reverse=True)


def test_the_same_step_as_torchs_adamw():
    model, other = toy.keye(), toy.keye()
    patterns = {"*": 1.0}
    optimizer = optim.build(model, optim.select(model, patterns), patterns, Optim(lr=1e-2, weight_decay=0.0))
    reference = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for m, o in ((model, optimizer), (other, reference)):
        for p in range(3):
            o.zero_grad()
            m.loss(toy.pack(p))[0].backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"min_lr_ratio": 2.0}, {"warmup_steps": 99}])
def test_numbers_that_make_no_sense_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        toy.stage(optim=Optim(**change)).check()


def test_muon_steps_as_torchs_does():
    """torch's orthogonalises in bf16: ours in bf16 is the same step but for rounding, in fp32 near it."""
    shapes, found = [(24, 8), (8, 24), (16, 16)], {}
    for kind in ("torch", torch.bfloat16, torch.float32):
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
        if kind == "torch":
            rule = torch.optim.Muon(params, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        else:
            rule = Muon([{"params": params, "lr": 1e-2, "weight_decay": 0.1}], 0.9, kind)
            rule.state.update({p: optim.blank_state(p, True) for p in params})
        start = [p.detach().clone() for p in params]
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g)
            rule.step()
        found[kind] = [p.detach() - s for p, s in zip(params, start, strict=True)]
    for kind, most in ((torch.bfloat16, 0.002), (torch.float32, 0.02)):
        for ours, theirs in zip(found[kind], found["torch"], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < most


def test_orthogonal_keeps_directions_and_makes_lengths_alike():
    u, _, v = torch.linalg.svd(torch.randn(12, 30, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    lengths = torch.logspace(0, -2.6, 12)  # the last 1/400 of the first
    inner = u.T @ orthogonal(u * lengths @ v, torch.float32) @ v.T  # what is left in the singular vectors' own frame
    assert float(inner.diagonal().min()) > 0.68 and float(inner.diagonal().max()) < 1.21
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-4


def test_what_travels_in_one_message_changes_nothing(monkeypatch):
    found = []
    for at_once in (muon.AT_ONCE, 70, 1):
        monkeypatch.setattr(muon, "AT_ONCE", at_once)
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in [(8, 4), (4, 8), (6, 6)]]
        rule = Muon([{"params": params, "lr": 1e-2, "weight_decay": 0.1}], 0.9, torch.float32)
        rule.state.update({p: optim.blank_state(p, True) for p in params})
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        rule.step()
        found.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_each_rank_gets_its_share_of_the_matrices():
    matrices = [torch.empty(s) for s in [(8, 8)] * 4 + [(8, 32)]]
    assert owners(matrices, 1) == [0] * 5 and sorted(owners(matrices, 2)) == [0, 1, 1, 1, 1]
    assert len(set(owners(matrices, 4))) == 4
