"""``cn-hf restyle``: its options. What it does is imported only once they are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cn_hf.printing import for_terminal

__all__ = ["restyle"]


def restyle(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, of any size and format.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model with CN-Channels on its input.")],
    to: Annotated[str, typer.Option(help="Context the images are to look like, e.g. night.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; for one image also a file.")],
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", help="Context the images are of; else the model's context source tells, or of two the other."
        ),
    ] = None,
    slot: Annotated[str | None, typer.Option(help="Slot whose statistics are used, of several on the input.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; else a GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger images are refused.")] = 100_000_000,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Turn day into night: give images the statistics of another context, as a model learned them.

    Sizes, orientation and alpha stay. Results have the names of the images, in the folder given.
    """
    from cn_hf.hub.restyle_files import restyle_files

    written = restyle_files(
        images,
        model,
        output,
        source=from_,
        target=to,
        slot=slot,
        device=device,
        overwrite=overwrite,
        max_pixels=max_pixels,
        progress=progress,
    )
    print(f"{len(written)} image{'' if len(written) == 1 else 's'} written to {for_terminal(output)}")
