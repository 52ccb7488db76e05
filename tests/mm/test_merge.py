"""The average of checkpoints is the average of their weights, and only of models of one kind."""

import pytest
import torch

from mm import formats
from mm.common.errors import UserError
from mm.keye import Keye
from mm.merge import average
from mm.sizes import PROCESSORS, SIZES
from mm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    tokenizer = Tokenizer.train(["a red ring slides left."], 400)
    for seed in (0, 1):
        model = Keye(SIZES["tiny"].bound(tokenizer))
        model.init_weights(seed)
        formats.save(root / str(seed), model, PROCESSORS["tiny"], tokenizer)
    return root


def test_mean_of_every_weight(folders, tmp_path):
    average([folders / "0", folders / "1"], tmp_path / "mean", shares=[0.25, 0.75])
    a, b, mean = (formats.load(f)[0].state_dict() for f in (folders / "0", folders / "1", tmp_path / "mean"))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    for k in a:
        torch.testing.assert_close(mean[k], 0.25 * a[k] + 0.75 * b[k])
    average([folders / "0"], tmp_path / "one")
    assert all(torch.equal(v, a[k]) for k, v in formats.load(tmp_path / "one")[0].state_dict().items())


def test_what_cannot_be_averaged(folders, tmp_path):
    with pytest.raises(UserError, match="nothing to average"):
        average([], tmp_path / "x")
    with pytest.raises(UserError, match="sum to 1"):
        average([folders / "0", folders / "1"], tmp_path / "x", shares=[1, 1])
    other = Tokenizer.train(["another text altogether"], 400)
    model = Keye(SIZES["tiny"].bound(other))
    model.init_weights(0)
    formats.save(tmp_path / "other", model, PROCESSORS["tiny"], other)
    with pytest.raises(UserError, match=r"\.json differs"):
        average([folders / "0", tmp_path / "other"], tmp_path / "x")
