"""``cn-hf push``, ``inspect`` and ``predict``: their options. What they do is imported only once these are known."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cn_hf.errors import ConfigError, DatasetFileError
from cn_hf.printing import for_terminal

if TYPE_CHECKING:
    from torch import nn

__all__ = ["inspect", "predict", "push"]

_MOST_NAMED = 100  # files, in an error message
_Token = Annotated[
    str | None, typer.Option(help="Hub token; else the stored one.", envvar="HF_TOKEN", show_envvar=False)
]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
_Subfolder = Annotated[str, typer.Option(help="Folder inside the repository or folder.")]


def push(
    run_folder: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    repo_id: Annotated[str, typer.Option(help="Where to: user/name; made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if need be.")] = None,
    token: _Token = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would go.")] = False,
) -> None:
    """Publish a finished run: weights, model card, context source, results and curves, in one commit."""
    from cn_hf.hub.publish import push_run, run_files

    if dry_run:
        found = run_files(run_folder, repo_id)
        print(f"would go to {for_terminal(repo_id)}:\n{found.listing()}\n\n--- README.md ---\n{found.card}")
        return
    commit = push_run(run_folder, repo_id, private=private or None, token=token, revision=revision)
    print(f"pushed to {commit.commit_url}")


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's or run's folder, or user/name on the Hub.")],
    revision: _Revision = None,
    subfolder: _Subfolder = "",
    token: _Token = None,
) -> None:
    """Show a checkpoint's contexts, slots, parameters added, sizes and results. No weights are downloaded."""
    from cn_hf.hub.inspection import inspect_checkpoint
    from cn_hf.hub.repository import HubOptions

    print(inspect_checkpoint(checkpoint, HubOptions(revision=revision, subfolder=subfolder, token=token)))


def predict(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or user/name on the Hub.")],
    paths: Annotated[
        list[str],
        typer.Argument(help="Image files, folders, patterns such as 'photos/**/*.jpg', or @FILE: a list, one a line."),
    ],
    context: Annotated[
        list[str] | None, typer.Option(help="Context of the images, by name or number; repeatable. Else unknown.")
    ] = None,
    all_contexts: Annotated[
        bool, typer.Option("--all-contexts", help="Each context in turn; first none, if the model allows that.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Classes shown.")] = 5,
    format: Annotated[
        str | None, typer.Option(help="csv or jsonl, with full paths; else text to read.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger images are refused.")] = 100_000_000,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on a terminal.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    revision: _Revision = None,
    subfolder: _Subfolder = "",
    token: _Token = None,
) -> None:
    """Classify image files: labels with probabilities, with a known context or without.

    Files that cannot be read are left out and named at the end; the exit code is then 1.
    """
    if context and all_contexts:
        raise ConfigError("--context and --all-contexts exclude each other.")
    if format not in (None, "csv", "jsonl"):
        raise ConfigError(f"Expected --format csv or jsonl, received {format!r}.")
    from tqdm import tqdm

    from cn_hf.hub import from_pretrained, prediction
    from cn_hf.hub.image_files import find_images
    from cn_hf.patching.inference import needs_ids
    from cn_hf.patching.routing import router_of

    images = find_images(paths)
    model = from_pretrained(checkpoint, revision=revision, subfolder=subfolder, token=token, device=device)
    _check_run(model, Path(checkpoint) / subfolder)
    contexts: list[str | None] = [*context] if context else [None]
    if all_contexts:
        router = router_of(model)
        contexts = [] if needs_ids(router.config, has_source=router.source is not None) else [None]
        contexts += prediction.context_names(model)
    unreadable: list[DatasetFileError] = []
    if isinstance(sys.stdout, io.TextIOWrapper):  # names need not be text
        sys.stdout.reconfigure(errors="backslashreplace" if format is None else "surrogateescape")
    with tqdm(images, unit="image", disable=None if progress else True, leave=False) as bar:
        found = prediction.predict_files(
            model,
            bar,
            contexts=contexts,
            top=top,
            batch_size=batch_size,
            max_pixels=max_pixels,
            unreadable=lambda _, error: unreadable.append(error),
        )
        for line in prediction.written_as(format, found):
            sys.stdout.write(line)
    sys.stdout.flush()
    if unreadable:
        shown = "\n".join(f"  {error}" for error in unreadable[:_MOST_NAMED])
        more = f"\n  and {len(unreadable) - _MOST_NAMED} more" if len(unreadable) > _MOST_NAMED else ""
        raise DatasetFileError(f"{len(unreadable)} of {len(images)} images were left out:\n{shown}{more}")


def _check_run(model: nn.Module, folder: Path) -> None:
    """Raise ``ConfigError`` if a checkpoint older than the field ``task`` lies in the folder of a Siamese run."""
    from cn_hf.hub.inspection import results_file_of
    from cn_hf.hub.publish import SIAMESE, kind_of_run, read_results
    from cn_hf.patching.routing import router_of

    if (
        router_of(model).task is None
        and (file := results_file_of(folder))
        and kind_of_run(read_results(file)) == SIAMESE
    ):
        raise ConfigError(
            f"Expected a classifier, received the network of a Siamese run ({file}). Give another checkpoint."
        )
