"""Shared by all tests: where real data may lie, and calm threading."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real media and oracles beside the checkout; the test is skipped, saying so, where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("real media (../shared/data) are not here")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
