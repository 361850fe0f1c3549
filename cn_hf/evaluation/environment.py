"""The origin of a number: hardware, library versions and the command, for every results file.

Nothing that names a machine or a user is recorded: of a path outside the working folder only its last part stays.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cn_hf import __version__
from cn_hf.devices import usable_cores

__all__ = ["portable_command", "portable_path", "run_environment"]

LIBRARIES = (
    "torchvision", "timm", "transformers", "datasets", "accelerate", "huggingface_hub", "evaluate",
    "kornia", "scikit-learn", "numpy",
)  # fmt: skip


def run_environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Hardware, versions and command of this process, as JSON types.

    Args:
        command: program and arguments; this process's own if None.

    Returns:
        ``command``; ``device`` (accelerator name, or ``"CPU"``), ``num_devices``, ``cpu`` (model), ``cpu_cores``
        (usable by this process), ``threads`` (torch intra-op), ``processes``, ``platform``, ``python``, and
        ``versions`` of the libraries that decide results, with CUDA's and cuDNN's where there is one.
    """
    versions = {"cn_hf": __version__, "torch": str(torch.__version__)}
    versions |= {name: version for name in LIBRARIES if (version := _version(name)) is not None}
    if torch.version.cuda is not None and torch.cuda.is_available():
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]  # torch's
    return {
        "command": portable_command(sys.argv if command is None else command),
        "device": _device_name(),
        "num_devices": torch.accelerator.device_count() if torch.accelerator.is_available() else 0,
        "cpu": _cpu_model(),
        "cpu_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def portable_command(arguments: Sequence[str]) -> str:
    """A command line as another machine could run it.

    The program loses its folder, a script stays relative to the working folder. Of every other absolute path, also
    one after ``--option=``, the part below the working folder stays, or else the last part.
    """
    if not arguments:
        return ""
    program, rest = arguments[0], arguments[1:]
    words = ["python", portable_path(program)] if program.endswith(".py") else [Path(program).name]
    if Path(program).name == "__main__.py":  # of a package
        words = ["python", "-m", Path(program).parent.name]
    for argument in rest:
        option, separator, value = argument.partition("=")
        if separator and option.startswith("-"):
            words.append(f"{option}={portable_path(value)}")
        else:
            words.append(portable_path(argument))
    return shlex.join(words)


def portable_path(text: str) -> str:
    """An absolute path as the part of it below the working folder, or else its last part; other text as it is."""
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    if not path.is_absolute():
        return text
    working_folder = Path.cwd()
    if path.is_relative_to(working_folder):
        return path.relative_to(working_folder).as_posix()
    return path.name or text


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "CPU" if accelerator is None else str(accelerator.type).upper()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
