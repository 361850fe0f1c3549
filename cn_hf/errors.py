"""Every failure a user of cn_hf can meet, on one page.

Each class is a ``CnHfError`` and the builtin a Python user would have caught anyway: ``ValueError`` for wrong values,
names and states, ``TypeError`` for wrong types, ``OSError`` for files and the Hub. Messages say what was received, what
was expected and what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "CnHfError",
    "ConfigError",
    "ConfigTypeError",
    "ContextIdError",
    "ContextSourceError",
    "DatasetError",
    "DatasetFileError",
    "DivergedError",
    "InputDeviceError",
    "InputShapeError",
    "InputTypeError",
    "PatchError",
    "PatchedAttributeError",
    "TrainingError",
    "TrainingInterruptedError",
    "nearest",
]

_MOST_TOLD, _MOST_COMPARED, _LONGEST = 120, 10_000, 200  # of known names: an error is to be read, and soon
_ENDLESS = re.compile(r"\S{5000,}")  # longer than any path


class CnHfError(Exception):
    """Base class of every error raised by cn_hf on purpose.

    Attributes:
        said_elsewhere: True if another process of the run raises the same error, and prints it.
    """

    said_elsewhere: bool = False

    def __str__(self) -> str:
        """Return the message, in which a word of more than 5,000 characters is shortened."""
        return _ENDLESS.sub(lambda word: f"{word[0][:200]}… ({len(word[0]):,} characters)", super().__str__())


class ConfigError(CnHfError, ValueError):
    """An option is unknown or out of range."""


class ConfigTypeError(ConfigError, TypeError):
    """An option has the wrong type."""


class ContextIdError(CnHfError, ValueError):
    """Context ids are missing, or of a wrong length, dtype, range or name."""


class PatchError(CnHfError, ValueError):
    """A model cannot be patched, unpatched, calibrated or folded as asked; the model is unchanged."""


class PatchedAttributeError(PatchError, AttributeError):
    """An attribute of the original module has no meaning once the module is patched."""


class InputTypeError(CnHfError, TypeError):
    """An argument has the wrong type, or a tensor the wrong dtype or layout."""


class InputShapeError(CnHfError, ValueError):
    """A tensor has the wrong shape."""


class InputDeviceError(CnHfError, ValueError, RuntimeError):
    """Tensors that belong together are on different devices; a RuntimeError too, as torch's own norms raise."""


class ContextSourceError(CnHfError, ValueError):
    """A context source is not fitted, or cannot name the contexts of what it was given."""


class DatasetError(CnHfError, ValueError):
    """A dataset lacks a column or split, or holds a value out of range."""


class DatasetFileError(CnHfError, OSError):
    """A dataset, or an image in it, cannot be read."""


class CheckpointError(CnHfError, OSError):
    """A checkpoint is missing, truncated, newer than this version, or belongs to another model."""


class TrainingError(CnHfError, ValueError):
    """A run cannot start or go on as asked."""


class DivergedError(TrainingError):
    """The training loss is no longer a finite number; every process of the run meets this error."""


class TrainingInterruptedError(CnHfError, InterruptedError):
    """A run was asked to stop by a signal, and did so at the end of a step."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Words for an error message: the valid name nearest to ``name`` if one is near, then the valid names."""
    options = sorted(known)
    close = difflib.get_close_matches(name[:_LONGEST], options[:_MOST_COMPARED], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? Valid" if close else "valid"
    more = f" and {len(options) - _MOST_TOLD} more" if len(options) > _MOST_TOLD else ""
    return f"{hint}: {', '.join(map(repr, options[:_MOST_TOLD]))}{more}."
