"""What the tests of CUDA kernels share: the interpreter, and compilation for GPUs that are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETED
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed (CPU-only torch): nothing to test")


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
