"""Pattern groups, schedules and the table of what trains."""

import pytest
import torch
from rich.console import Console

from mm.common.errors import UserError
from stages.engine import optim
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
