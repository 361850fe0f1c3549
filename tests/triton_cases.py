"""What the tests of CUDA kernels share: the device or the interpreter, inputs in all layouts, compilation for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed (CPU-only torch): nothing to test")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def run_in_the_interpreter(tests: str) -> None:
    """GPU tests of a file, in a process of its own: Triton decides at its import whether kernels are interpreted."""
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "not real_size"]
    command = [sys.executable, "-m", "pytest", *options, tests]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(command, env=env | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout
    assert " skipped" not in run.stdout, run.stdout


class Case(NamedTuple):
    shape: tuple[int, ...]
    feature_dim: int
    layout: str = "contiguous"


MAPS = {
    "map": Case((3, 5, 16, 16), 1),
    "map-8x8": Case((8, 40, 8, 8), 1),
    "map-7x7": Case((4, 33, 7, 7), 1),
    "map-14x14": Case((2, 6, 14, 14), 1),
    "map-row-longer-than-a-tile": Case((2, 3, 50, 52), 1),
    "map-one-channel": Case((3, 1, 9, 9), 1),
    "map-one-pixel": Case((3, 70, 1, 1), 1),
    "sequence": Case((3, 5, 37), 1),
    "volume": Case((2, 3, 4, 5, 6), 1),
    "vectors": Case((37, 45), -1),
    "vectors-many": Case((300, 10), 1),
    "channels_last": Case((2, 64, 12, 12), 1, "channels_last"),
    "channels_last-3": Case((2, 3, 17, 19), 1, "channels_last"),
    "channels_last-197": Case((2, 197, 3, 3), 1, "channels_last"),
    "channels_last-many-programs": Case((70, 16, 3, 3), 1, "channels_last"),
    "volume-channels_last": Case((2, 6, 3, 4, 5), 1, "channels_last_3d"),
    "map-transposed": Case((2, 6, 5, 9), 1, "transposed"),
    "map-strided": Case((2, 6, 5, 9), 1, "strided"),
    "tokens": Case((3, 50, 96), -1),
    "tokens-segments": Case((2, 140, 97), -1),
    "tokens-768": Case((2, 17, 768), -1),
    "tokens-2d": Case((2, 5, 7, 24), -1),
    "tokens-channels-first": Case((2, 9, 9, 20), -1, "channels_first"),
    "tokens-strided": Case((2, 9, 20), -1, "strided"),
    "tokens-one": Case((5, 1, 12), -1),
    "tokens-one-feature": Case((3, 11, 1), -1),
}


def arranged(values: Tensor, layout: str) -> Tensor:
    """The same values, in another order in memory."""
    if layout.startswith("channels_last"):
        return values.to(memory_format=getattr(torch, layout))
    if layout == "channels_first":
        return values.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack((values, values), dim=-1)[..., 0]
    return values.contiguous()


def draw(case: Case, dtype: torch.dtype, device: str, mean: float = 0.5) -> tuple[Tensor, Tensor]:
    x, grad = (torch.randn(case.shape, device=device, dtype=torch.float64) for _ in range(2))
    return arranged((x * 2 + mean).to(dtype), case.layout), arranged(grad.to(dtype), case.layout)


class Recorder:
    """Stands in for a kernel and compiles what would be launched, from the arguments' types, for a GPU not there."""

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability, self.compiled = kernel, capability, []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.compile

    def compile(self, *arguments: Any, **options: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for place, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(place,)] = "constexpr", value
                continue
            tensor = isinstance(value, Tensor)
            signature[parameter.name] = (
                self.types[value.dtype] if tensor else "i32" if isinstance(value, int) else "fp32"
            )
            if tensor or (isinstance(value, int) and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.compiled.append(triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options))


def stack_bytes(binary: bytes, folder: Path) -> int:
    """Local memory of a thread: none, unless registers were spilled."""
    (folder / "kernel.cubin").write_bytes(binary)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)
    assert found, usage.stdout + usage.stderr
    return int(found[1])
