"""``cn-hf adapt``: its options. What it does is imported only once they are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cn_hf.printing import plain_warnings

__all__ = ["adapt"]


def adapt(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's or run's folder, or user/name on the Hub.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Unlabelled images of the new domain: files, folders, patterns or @LIST; or a data set: a folder or "
            "a Hub id."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the new checkpoint; with --norms-only a file.")
    ] = ...,  # type: ignore[assignment]  # required
    name: Annotated[str | None, typer.Option(help="Name of the new context, e.g. fog.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What it is measured relative to: a context's name, images that the model was trained on, or "
            "NAME=IMAGES; else 'source', or the mean of all contexts."
        ),
    ] = None,
    prior: Annotated[float, typer.Option(help="Images that the reference counts for.")] = 4.0,
    max_images: Annotated[int, typer.Option(help="Images used, evenly spaced.")] = 512,
    split: Annotated[str | None, typer.Option(help="Split of a data set; else train, or the only one.")] = None,
    from_: Annotated[
        list[Path] | None, typer.Option("--from", help="Add the context of a file instead (repeatable).")
    ] = None,
    norms_only: Annotated[
        bool, typer.Option("--norms-only", help="Write the new context alone, some KB, for others' --from.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder inside the repository or folder.")] = "",
    token: Annotated[
        str | None, typer.Option(help="Hub token; else the stored one.", envvar="HF_TOKEN", show_envvar=False)
    ] = None,
) -> None:
    """Give a trained checkpoint a context for a new domain, measured on unlabelled images; nothing is trained.

    The contexts it had keep their outputs bit for bit.
    """
    from cn_hf.adaptation.checkpoint import adapt_checkpoint
    from cn_hf.hub.repository import HubOptions

    with plain_warnings():
        told = adapt_checkpoint(
            checkpoint,
            images or [],
            output,
            name=name,
            files=from_ or [],
            reference=reference,
            prior=prior,
            max_images=max_images,
            split=split,
            norms_only=norms_only,
            device=device,
            options=HubOptions(revision=revision, subfolder=subfolder, token=token),
        )
    print(told)
