"""The settings of a benchmark: device, size and rounds."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch

from cn_hf.devices import available_device
from cn_hf.errors import ConfigError, nearest

__all__ = ["SIZES", "NetworkOptions", "Settings", "usable_device"]

Choice = TypeVar("Choice")

SIZES = ("full", "quick", "smoke")
"""Everything at the sizes of the limits; about a minute on two CPU cores; seconds, to see that everything runs."""

ENOUGH_ROUNDS = 20
PRECISIONS = {"no": None, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """Options of the section ``networks``.

    Attributes:
        network: "convnet" (Table IV's, 32 x 32), "vit" (section IV-C's, 72 x 72), or None for both.
        batch_size: Images of a step; None: 256 and 32, less in a quick run.
        steps: In one turn; None: as many as a turn has time for.
        mixed_precision: "no" or "bf16".
        channels_last: Layout of images and convolutions.
        compile: ``torch.compile`` the networks.

    Raises:
        ConfigError: An unknown network or precision, or a number below 1.
    """

    network: str | None = None
    batch_size: int | None = None
    steps: int | None = None
    mixed_precision: str = "no"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.network not in (None, "convnet", "vit"):
            raise ConfigError(f"unknown network {self.network!r}; {nearest(str(self.network), ('convnet', 'vit'))}")
        if self.mixed_precision not in PRECISIONS:
            raise ConfigError(
                f"unknown mixed_precision {self.mixed_precision!r}; {nearest(self.mixed_precision, PRECISIONS)}"
            )
        for option in ("batch_size", "steps"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of all sections.

    Attributes:
        device: Where to measure.
        size: One of ``SIZES``.
        rounds: How often each contestant has its turn, after the ones that do not count.
        images: What the contexts are fitted on in ``scale``; None: 1,000,000, less in a quick run.
        networks: Options of the section of that name.
        progress: Show progress bars.

    Raises:
        ConfigError: An unknown size, or a number below 1.
    """

    device: torch.device
    size: str = "full"
    rounds: int = ENOUGH_ROUNDS
    images: int | None = None
    networks: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)
    progress: bool = True

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"unknown size {self.size!r}; {nearest(self.size, SIZES)}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")
        if self.images is not None and self.images < 3:
            raise ConfigError(f"images must be at least 3, one for each cluster; got {self.images}")

    @property
    def on_gpu(self) -> bool:
        """True if the device is a CUDA one."""
        return self.device.type == "cuda"

    @property
    def headline_dtype(self) -> torch.dtype:
        """Return the usual dtype of networks on such a device: the README's table shows these rows."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def of(self, *, full: Choice, quick: Choice, smoke: Choice, gpu: Choice | None = None) -> Choice:
        """The value for this size; ``gpu``, where given, is a GPU's for both the full and the quick one."""
        if self.on_gpu and gpu is not None and self.size != "smoke":
            return gpu
        return {"full": full, "quick": quick, "smoke": smoke}[self.size]


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None: a CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: There is no such device, or it is of a kind the benchmark cannot time.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = available_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} cannot be timed here; use 'cpu' or 'cuda'")
    if device.index:
        raise ConfigError(f"device {name!r} is not the first; choose a GPU by CUDA_VISIBLE_DEVICES")
    return device
