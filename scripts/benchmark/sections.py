"""The sections of the benchmark, in their order, and what each plans to measure on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from cn_hf.errors import ConfigError, nearest
from scripts.benchmark import mixture, models, networks, ops, pipeline, plus, scale
from scripts.benchmark.rows import Row, Trial
from scripts.benchmark.settings import Settings

__all__ = ["DEVICES", "SECTIONS", "Section", "chosen_sections", "left_out", "planned_rows"]

DEVICES = {"cpu": "CPU", "cuda": "GPU"}


class Section(NamedTuple):
    """A title, and what gives the trials for settings."""

    title: str
    trials: Callable[[Settings], list[Trial]]


SECTIONS: dict[str, Section] = {
    "ops": Section("Context normalization alone", ops.trials),
    "plus": Section("CN+, for unknown contexts", plus.trials),
    "mixture": Section("Mixture normalization", mixture.trials),
    "models": Section("Whole networks", models.trials),
    "scale": Section("Contexts of a large data set", scale.trials),
    "pipeline": Section("The input pipeline", pipeline.trials),
    "networks": Section("Training steps of the paper's networks", networks.trials),
}

NOT_IN_QUICK = ("pipeline", "networks")


def chosen_sections(names: list[str] | None, settings: Settings) -> list[str]:
    """The sections named, in their order; none named: all, or those of a quick run.

    Raises:
        ConfigError: There is no such section.
    """
    for name in names or ():
        if name not in SECTIONS:
            raise ConfigError(f"unknown section {name!r}; {nearest(name, SECTIONS)}")
    if names:
        return [name for name in SECTIONS if name in names]
    return [name for name in SECTIONS if settings.size != "quick" or name not in NOT_IN_QUICK]


def planned_rows(section: str, device: str, size: str = "full") -> list[Row]:
    """The rows, without values, that a section measures on a kind of device, which need not be here."""
    settings = Settings(device=torch.device(device), size=size)
    return [row for trial in SECTIONS[section].trials(settings) for row in trial.rows]


def left_out(section: str, settings: Settings) -> list[str]:
    """Return the rows of a full run that a run of this size leaves out, by name and dtype."""
    planned = [(row.what, row.dtype) for row in planned_rows(section, settings.device.type)]
    measured = {(row.what, row.dtype) for trial in SECTIONS[section].trials(settings) for row in trial.rows}
    return [f"{what} ({dtype})" for what, dtype in dict.fromkeys(planned) if (what, dtype) not in measured]
