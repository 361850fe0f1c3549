"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Tests run in parallel processes, and start more: threads that wait for each other's cores would slow all of them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if TYPE_CHECKING:
    from training_runs import Starter

SHARED_DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data sets beside the checkout; the test skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data sets are absent: no folder {SHARED_DATA}")
    return SHARED_DATA.resolve()


class Clock:
    """A clock that only the test moves: in place of ``time.perf_counter``, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    """A clock that only the test moves; the test says in whose place."""
    return Clock()


@pytest.fixture(scope="session")
def start() -> Iterator[Starter]:
    """Starts small training runs in processes of their own."""
    path = os.environ.get("PYTHONPATH")
    # The fork server is not told where this process imports from, and passes over what it cannot import.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), path]))
    from training_runs import Starter  # heavy, and few tests need it

    yield Starter()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path


@pytest.fixture
def device() -> str:
    """Where CUDA kernels run: a GPU, or the CPU in Triton's interpreter."""
    from kernel_cases import INTERPRETED

    if INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("no CUDA device; test_in_the_interpreter runs this on the CPU")


@pytest.fixture
def cuda() -> str:
    """A GPU."""
    from kernel_cases import INTERPRETED

    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
