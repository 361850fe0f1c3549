"""A contact sheet: rows of small pictures under one another, each row named."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from cn_hf.errors import ConfigError
from cn_hf.files import write_whole

__all__ = ["write_contact_sheet"]

_GAP, _MARGIN, _APART = 4, 8, 12
_FONT_SIZE = 13


def write_contact_sheet(
    blocks: Sequence[Mapping[str, Sequence[PIL.Image.Image]]],
    path: str | Path,
    *,
    title: str,
    height: int = 90,
    width: int = 128,
) -> Path:
    """Draw blocks of rows of pictures as a PNG of 256 colours, which keeps the file small.

    Args:
        blocks: Name of each row, and its pictures, equally many in all of them.
        path: The PNG.
        title: Above all.
        height: Of a picture, in pixels; proportions are kept.
        width: Of a picture at most.

    Returns:
        The path.

    Raises:
        ConfigError: There is nothing to draw, or a row has another number of pictures than the first.
    """
    rows = [(name, pictures, block) for block, named in enumerate(blocks) for name, pictures in named.items()]
    columns = {len(pictures) for _, pictures, _ in rows}
    if len(columns) != 1 or columns == {0}:
        counts = [len(pictures) for _, pictures, _ in rows]
        raise ConfigError(f"rows of a contact sheet need equally many pictures, got {counts}")
    (count,) = columns
    font = PIL.ImageFont.load_default(_FONT_SIZE)
    heading = PIL.ImageFont.load_default(_FONT_SIZE + 3)
    measure = PIL.ImageDraw.Draw(PIL.Image.new("RGB", (1, 1)))
    labels = [name.replace(", ", ",\n") for name, _, _ in rows]
    left = 2 * _MARGIN + int(max(measure.multiline_textbbox((0, 0), label, font=font)[2] for label in labels))
    apart = (len(blocks) - 1) * _APART
    size = (left + count * (width + _GAP) + _MARGIN, 36 + len(rows) * (height + _GAP) + apart + _MARGIN)
    sheet = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 8), title, fill="black", font=heading)
    for number, (label, (_, pictures, block)) in enumerate(zip(labels, rows, strict=True)):
        top = 36 + number * (height + _GAP) + block * _APART
        draw.multiline_text((_MARGIN, top + height // 2), label, fill="black", font=font, anchor="lm", spacing=2)
        for column, picture in enumerate(pictures):
            small = _fitted(picture, width, height)
            x = left + column * (width + _GAP) + (width - small.width) // 2
            sheet.paste(small, (x, top + (height - small.height) // 2))
    content = io.BytesIO()
    colours = sheet.quantize(256)
    sheet.quantize(palette=colours, dither=PIL.Image.Dither.FLOYDSTEINBERG).save(content, "PNG", optimize=True)
    return write_whole(path, content.getvalue())


def _fitted(picture: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    """The picture as large as the cell allows, in RGB."""
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.convert("RGB").resize(size, PIL.Image.Resampling.LANCZOS)
