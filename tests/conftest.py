"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Tests run in parallel processes, and start more: threads that wait for each other's cores would slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data sets beside the checkout; the test skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data sets are absent: no folder {SHARED_DATA}")
    return SHARED_DATA.resolve()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
