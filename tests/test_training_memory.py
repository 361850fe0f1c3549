"""Peak memory, and finding the batch that fits: against limits that are known, and under a real one."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from cn_hf.errors import ConfigError
from cn_hf.training.config import TrainingConfig
from cn_hf.training.memory import (
    largest_fitting_batch,
    memory_in_words,
    out_of_memory,
    out_of_memory_message,
    peak_memory,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and reports memory as Linux does")


def run_python(code: str) -> str:
    # One arena, and blocks of a tensor's size given back at once, so that a limit means the same in every run.
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    environment = os.environ | malloc | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def full(limit: int) -> None:
    """What an allocation too many does."""
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate more than {limit}")


# ------------------------------------------------------------------------------------------------------------- peaks


def test_peak_memory_only_grows() -> None:
    before = peak_memory("cpu")
    block = np.ones(before // 8 + 10_000_000)  # more than ever before, in bytes
    peak = peak_memory(torch.device("cpu"))
    assert peak >= block.nbytes > before
    del block
    assert peak_memory() > 0.99 * peak  # Linux counts pages core by core, and adds up roughly


@linux
def test_peak_memory_is_not_that_of_the_program_that_started_this_one() -> None:
    size = 3_000_000_000
    child = "from cn_hf.training.memory import peak_memory; print(peak_memory())"
    parent = f"import os, sys; block = b'1' * {size}; os.execv(sys.executable, [sys.executable, '-c', {child!r}])"
    assert 50_000_000 < int(run_python(parent)) < size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_of_a_gpu() -> None:
    block = torch.empty(100_000_000, dtype=torch.uint8, device="cuda")
    assert peak_memory("cuda") >= block.numel()
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert out_of_memory(raised.value)


FREED = """
import resource, torch
from cn_hf.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back, kept = faults(), keep_freed_memory()
faults()
print(int(kept), given_back, faults())
"""


def test_freed_memory_is_kept() -> None:
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    kept, before, after = map(int, run.stdout.split())
    if not kept:
        pytest.skip(f"the C library of {platform.platform()} has no mallopt")
    assert after < before / 20, (before, after)


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 MB"), (1_499_999, "1 MB"), (640_000_000, "640 MB"), (999_400_000, "999 MB"), (999_600_000, "1.0 GB"),
        (1_310_000_000, "1.3 GB"), (9_940_000_000, "9.9 GB"), (9_960_000_000, "10 GB"), (81_000_000_000, "81 GB"),
        (999_600_000_000, "1.0 TB"), (25_000_000_000_000, "25 TB"),
    ],
)  # fmt: skip
def test_memory_in_words(num_bytes: int, words: str) -> None:
    assert memory_in_words(num_bytes) == words


# ------------------------------------------------------------------------------------------------------- telling errors


def test_real_errors_of_too_little_memory() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**55, dtype=np.uint8)
    assert type(of_torch.value) is RuntimeError
    assert out_of_memory(of_torch.value)
    assert out_of_memory(of_numpy.value)
    assert out_of_memory(torch.OutOfMemoryError("HIP"))
    assert out_of_memory(RuntimeError("could not create a primitive"))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as of_shapes:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not out_of_memory(of_shapes.value)
    assert not out_of_memory(ValueError("out of memory"))
    assert not out_of_memory(KeyboardInterrupt())


# ------------------------------------------------------------------------------------------------------- what would fit


@pytest.mark.parametrize(
    ("failed", "limit"),
    [(1, 0), (2, 0), (2, 1), (3, 2), (17, 5), (32, 16), (512, 0), (512, 255), (512, 256), (512, 511), (1000, 333)],
)
def test_search_against_a_known_limit(failed: int, limit: int) -> None:
    tried: list[int] = []

    def try_batch(images: int) -> None:
        tried.append(images)
        if images > limit:
            full(limit)

    found = largest_fitting_batch(try_batch, failed)
    assert found is not None
    assert found in tried or found == 0
    assert limit / (1 + 1 / 16) - 1 < found <= limit
    assert found == limit or limit > 16  # few are found exactly
    assert 0 not in tried
    assert len(set(tried)) == len(tried) <= math.log2(failed) + 5


def test_kernels_that_do_not_recover() -> None:
    """Nothing is concluded from oneDNN's failures, which may come of an earlier one."""
    tried: list[int] = []

    def try_batch(images: int) -> None:
        tried.append(images)
        if images > 10:
            raise RuntimeError("could not create a primitive")

    assert largest_fitting_batch(try_batch, 64) is None
    assert tried == [32]
    assert largest_fitting_batch(try_batch, 16) == 8


def test_other_errors_pass_through() -> None:
    def try_batch(images: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        largest_fitting_batch(try_batch, 8)
    with pytest.raises(ConfigError, match="1 or more; got 0"):
        largest_fitting_batch(try_batch, 0)


def test_memory_is_free_before_every_trial() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def forward(images: int) -> None:
        activations = torch.ones(images)
        loop = [activations]
        loop.append(loop)  # type: ignore[arg-type]  # only the garbage collector frees it
        alive.append(weakref.ref(activations))
        full(0)

    def try_batch(images: int) -> None:
        assert not [reference for reference in alive if reference() is not None]
        forward(images)

    found = None
    try:
        forward(8)
    except RuntimeError:
        held = alive[0]() is not None  # by the frames of the error being handled
        found = largest_fitting_batch(try_batch, 8)
    assert held
    assert found == 0
    assert len(alive) == 4
    assert alive[-1]() is None


UNDER_A_LIMIT = """
import resource
import timm, torch
from cn_hf.training.memory import largest_fitting_batch, out_of_memory

torch.backends.mkldnn.set_flags(False)  # its kernels need memory of their own, and fail for good without
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10)

def step(images):
    try:
        model(torch.randn(images, 3, 32, 32)).sum().backward()
    finally:
        model.zero_grad()

step(2)
(size,) = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:")]
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 250_000_000,) * 2)
try:
    step(1024)
except (RuntimeError, MemoryError) as error:
    assert out_of_memory(error), error
    found = largest_fitting_batch(step, 1024)
step(found * 9 // 10)
print(found)
"""


@linux
def test_vit_under_a_real_limit() -> None:
    assert 64 <= int(run_python(UNDER_A_LIMIT)) < 1024


# ------------------------------------------------------------------------------------------------------------- message


def config(**options: object) -> TrainingConfig:
    return TrainingConfig.from_dict({"model": "m", "dataset": ["d"], **options})


def test_message_says_what_to_give() -> None:
    words = out_of_memory_message(config(batch_size=512), images=512, fitting=200)
    for part in ("batch_size is 512", "512 images at once", "about 200 would fit", "accumulation_steps 3 ", "bf16"):
        assert part in words
    assert "at most 180" in words


@pytest.mark.parametrize("fitting", [1, 2, 3, 40, 200])
@pytest.mark.parametrize(("batch_size", "processes"), [(512, 1), (512, 2), (7, 3), (1000, 8)])
def test_advice_fits(batch_size: int, processes: int, fitting: int) -> None:
    failed = math.ceil(batch_size / processes)
    words = out_of_memory_message(
        config(batch_size=batch_size), images=failed, fitting=fitting, num_processes=processes
    )
    steps = int(words.split("accumulation_steps ")[1].split()[0])
    smaller = int(words.split("at most ")[1].split(",")[0])
    assert math.ceil(math.ceil(batch_size / steps) / processes) <= fitting
    assert math.ceil(smaller / processes) <= fitting


def test_message_where_nothing_fits_or_nothing_was_tried() -> None:
    several = config(batch_size=64, accumulation_steps=4, mixed_precision="bf16")
    words = out_of_memory_message(several, images=1, fitting=0, num_processes=2)
    assert "over 2 processes in 4 parts" in words
    assert "1 image at once" in words
    assert "not even one fits" in words
    assert "bf16" not in words
    words = out_of_memory_message(several, images=8, fitting=None)
    assert "a smaller batch_size, more accumulation_steps, a smaller image_size" in words
    words = out_of_memory_message(several, images=8, fitting=None, divisible=False)
    assert "a smaller batch_size, a smaller image_size" in words
