"""However a step is split over ranks and micro-batches, the loss, the gradients and the weights are the same."""

import pytest
import torch

from mm.common import dist
from mm.common.errors import UserError
from mm.common.files import read_jsonl
from mm.common.precision import settle
from stages import objectives
from stages.engine import optim
from stages.engine.train import Turn
from stages.objectives import Words
from stages.stage import Optim
from tests.stages import engine_launch as launch
from tests.stages import engine_toy as toy


def gradients(folder, ranks, model, splits, **settings):
    launch.run("gradients", folder, ranks=ranks, model=model, splits=splits, **settings)
    return torch.load(folder / "grads.pt")


def compare(a, b, tolerance=1e-5):
    assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
    assert a["grads"].keys() == b["grads"].keys()
    worst = max((a["grads"][k] - b["grads"][k]).abs().max().item() for k in a["grads"])
    largest = max(g.abs().max().item() for g in b["grads"].values())
    assert largest > 1e-3  # the gradients compared are not all nothing
    assert worst < tolerance, worst


@pytest.fixture(scope="module")
def whole_pairs(tmp_path_factory):
    return gradients(tmp_path_factory.mktemp("pairs"), 1, "contrastive", [[[0, 12]]])


@pytest.fixture(scope="module")
def whole_packs(tmp_path_factory):
    return gradients(tmp_path_factory.mktemp("packs"), 1, "keye", [[0, 1, 2, 3]])


@pytest.mark.parametrize("splits", [
    [[[0, 5], [5, 4], [9, 3]]],
    [[[0, 5]], [[5, 7]]],
    [[[0, 2], [2, 3]], [[5, 7]]],
    [[[0, 12]], []],
    [[[0, 1]], [[1, 4], [5, 2]], [[7, 4]], [[11, 1]]],
])  # fmt: skip
def test_sigmoid_loss_does_not_depend_on_the_split(tmp_path, whole_pairs, splits):
    compare(gradients(tmp_path, len(splits), "contrastive", splits), whole_pairs)


@pytest.fixture(scope="module")
def whole_regions(tmp_path_factory):
    return gradients(tmp_path_factory.mktemp("regions"), 1, "words", [[[0, 12]]])


@pytest.mark.parametrize("splits", [
    [[[0, 5], [5, 4], [9, 3]]],
    [[[0, 2], [2, 3]], [[5, 7]]],
    [[[0, 12]], []],
])  # fmt: skip
def test_word_loss_does_not_depend_on_the_split(tmp_path, whole_regions, splits):
    compare(gradients(tmp_path, len(splits), "words", splits), whole_regions)


def test_what_is_told_does_not_depend_on_the_split(tmp_path):
    """With a rank that has no picture too; and it teaches the tower and the projector, never the words."""
    (tmp_path / "whole").mkdir()
    whole = gradients(tmp_path / "whole", 1, "told_features", [[[0, 12]]])
    compare(gradients(tmp_path, 3, "told_features", [[[0, 5], [5, 4]], [[9, 3]], []]), whole)
    moved = {name.split(".")[0] for name, g in whole["grads"].items() if g.any()}
    assert moved == {"visual", "mlp_AR"}


@pytest.mark.parametrize("term", ["silence", "places"])
def test_terms_weigh_in_the_loss_as_asked(tmp_path, whole_regions, term):
    """From nothing of a term through 1 to 3 the gradients go in a straight line, and they go."""
    at = {1.0: whole_regions["grads"]}
    for weight in (0.0, 3.0):
        (folder := tmp_path / str(weight)).mkdir()
        got = gradients(folder, 1, "words", [[[0, 12]]], options={term: weight})
        assert got["loss"] == pytest.approx(whole_regions["loss"])
        assert got["loss"].keys() == {"words", "silence", "places"}
        at[weight] = got["grads"]
    one = {k: at[1.0][k] - at[0.0][k] for k in at[1.0]}
    assert max(g.abs().max().item() for g in one.values()) > 1e-3
    assert max(((at[3.0][k] - at[0.0][k]) / 3 - one[k]).abs().max().item() for k in one) < 1e-5
    with pytest.raises(UserError, match="weight of 0 or more"):
        Words(**{term: -1.0})


@pytest.mark.parametrize("splits", [
    [[0, 2], [1, 3]],
    [[0, 3], [1, 2]],  # packs 0 and 3 have no picture: the first rank sees none
    [[0, 1, 2], [3]],
    [[0], [1], [2], [3]],
    [[0, 1], [2], [3], []],
])  # fmt: skip
def test_token_loss_does_not_depend_on_the_split(tmp_path, whole_packs, splits):
    compare(gradients(tmp_path, len(splits), "keye", splits), whole_packs)


@pytest.mark.parametrize(("model", "sharding", "optimizer"), [
    ("keye", "full", "adamw"), ("contrastive", "full", "adamw"), ("keye", "replicate", "adamw"),
    ("keye", "full", "muon"), ("keye", "replicate", "muon"),
])  # fmt: skip
def test_ranks_do_not_change_the_run(tmp_path, model, sharding, optimizer):
    """Eight steps on 1, 2 and 4 ranks: losses and final weights agree to 1e-5."""
    runs = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        # eps of AdamW: gradients of nothing but rounding noise must not become whole steps of either sign
        launch.run(
            "run", folder, ranks=ranks, model=model, sharding=sharding, optimizer=optimizer, steps=8, every=4
        )
        runs[ranks] = (launch.losses(folder), launch.weights(folder))
    losses, weights = runs[1]
    assert losses[-1] != losses[0]
    for ranks in (2, 4):
        assert runs[ranks][0] == pytest.approx(losses, abs=1e-5)
        worst = max((runs[ranks][1][k] - weights[k]).abs().max().item() for k in weights)
        assert worst < 1e-5, (ranks, worst)


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputation_changes_nothing(tmp_path, whole_packs, ranks):
    splits = [[0, 1, 2, 3]] if ranks == 1 else [[0, 1], [2, 3]]
    compare(gradients(tmp_path, ranks, "keye", splits, recompute=True), whole_packs)


def test_bf16_is_near_fp32_on_one_and_two_ranks(tmp_path):
    found = {}
    for precision, ranks in (("fp32", 1), ("bf16", 1), ("bf16", 2)):
        folder = tmp_path / f"{precision}{ranks}"
        launch.run("run", folder, ranks=ranks, precision=precision, steps=6)
        found[precision, ranks] = launch.losses(folder)
        assert all(w.dtype == torch.float32 for w in launch.weights(folder).values())
    assert found["bf16", 1] != found["fp32", 1]
    for ranks in (1, 2):
        assert found["bf16", ranks] == pytest.approx(found["fp32", 1], abs=0.02)


def test_auto_precision_is_what_every_rank_has(monkeypatch):
    cpu = torch.device("cpu")
    for able, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able, "avx2": True})
        assert [settle(p, cpu) for p in ("auto", "fp32", "bf16")] == [name, "fp32", "bf16"]
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [mine, True])
    assert settle("auto", cpu) == "fp32"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_auto_precision_goes_on_where_it_is_another(tmp_path, optimizer):
    """Two ranks of a machine with bf16, stopped, then four of one without: written down, and near the run in fp32
    alone."""
    settings = {"optimizer": optimizer, "steps": 6, "every": 2, "precision": "auto"}
    launch.run("run", tmp_path / "both", ranks=2, bf16=True, at={"4": "term"}, **settings)
    launch.run("run", tmp_path / "both", ranks=4, bf16=False, **settings)
    launch.run("run", tmp_path / "alone", ranks=1, bf16=False, **settings)
    attempts = read_jsonl(tmp_path / "both" / "attempts.jsonl")
    assert [(row["ranks"], row["precision"]) for row in attempts] == [(2, "bf16"), (4, "fp32")]
    losses = launch.losses(tmp_path / "both")
    assert len(losses) == 6 and losses == pytest.approx(launch.losses(tmp_path / "alone"), abs=0.05)
    assert losses[0] != launch.losses(tmp_path / "alone")[0]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_muon_multiplies_as_the_stage_does(precision, dtype):
    stage, model = toy.stage(optim=Optim(name="muon"), precision=precision), toy.keye()
    turn = Turn("main", model, optim.select(model, stage.train), objectives.make(stage.objective), stage)
    assert turn.optimizer.parts[0].dtype == dtype
