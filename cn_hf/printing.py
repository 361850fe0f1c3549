"""Names that others chose (contexts, classes, files), made safe to print in a terminal and in Markdown."""

from __future__ import annotations

import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["as_code", "for_markdown", "for_terminal", "plain_warnings"]

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (also those that turn the writing), surrogates, newlines
_JOINERS = "\u200c\u200d"  # parts of words in Persian and Hindi, and of emoji


def for_terminal(text: object) -> str:
    r"""Return ``text`` on one line, with escapes such as ``\x1b`` for what a terminal would obey or cannot encode."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _INVISIBLE and character not in _JOINERS
        else character
        for character in str(text)
    )


def for_markdown(text: object) -> str:
    """Return ``text`` as one line of Markdown, also of a table's cell, that shows it literally: no markup, no HTML."""
    escaped = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", for_terminal(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")


def as_code(text: object) -> str:
    """Return ``text`` as a code span of Markdown; it is for paragraphs and lists, not for tables."""
    shown = for_terminal(text)
    if "`" not in shown:
        return f"`{shown}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", shown))))
    return f"{fence} {shown} {fence}"


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of the block as ``warning: ...`` on stderr, without the line of code that they come from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {for_terminal(message)}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
