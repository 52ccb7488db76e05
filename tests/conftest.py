"""Shared by all tests: where real data may lie, one small world, calm threading."""

from pathlib import Path

import psutil
import pytest
import torch

from data_mix.world.make import make_world

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real media and oracles beside the checkout; the test is skipped, saying so, where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("real media (../shared/data) are not here")
    return SHARED


@pytest.fixture(scope="session")
def micro_world(tmp_path_factory) -> Path:
    """A world with a few of everything, seed 0, to be read and not written."""
    folder = tmp_path_factory.mktemp("micro") / "world"
    make_world(folder, size="micro", workers=1, quiet=True)
    return folder


@pytest.fixture
def left_over():
    """() -> processes begun since the test did, and alive."""
    before = psutil.Process().children()
    return lambda: [p for p in psutil.Process().children() if p not in before]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
