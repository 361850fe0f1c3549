"""``cn-hf push``: a finished run on the Hub: checkpoint, card, results and curves, in one commit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported at run time

from cn_hf.errors import CheckpointError
from cn_hf.files import read_json
from cn_hf.hub.card import run_card
from cn_hf.hub.checkpoint import OWN_FILES
from cn_hf.hub.description import CONFIG_FILE, read_description
from cn_hf.hub.repository import CARD_FILE, CHECKPOINT, HubOptions, hub_errors, upload
from cn_hf.hub.staging import settled, visible_files
from cn_hf.hub.weights import check_weights
from cn_hf.printing import for_terminal

__all__ = ["CLASSIFIER", "DEMO", "SIAMESE", "RunFiles", "kind_of_run", "push_run", "read_results", "run_files"]

CLASSIFIER, SIAMESE, DEMO = "a classifier's run", "a Siamese run", "the demonstration `cn-hf demo`"

RESULTS = "results.json"
EXTRAS = (
    "config.yaml", "table.md", "report.md", "curves.png", "protocols.png", "contexts.png", "contact_sheet.png", RESULTS,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The parts of a run that are published.

    Attributes:
        files: from the path in the repository to the local file.
        card: text of the card.
    """

    files: Mapping[str, Path]
    card: str

    def listing(self) -> str:
        """All files with their sizes, as text."""
        sizes = {for_terminal(name): path.stat().st_size for name, path in self.files.items()}
        sizes[CARD_FILE] = len(self.card.encode())
        width = max(map(len, sizes))
        lines = [f"{name.ljust(width)}  {size / 1000:>12,.1f} kB" for name, size in sorted(sizes.items())]
        return "\n".join([*lines, f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.2f} MB"])


def run_files(run_folder: Path, repo_id: str) -> RunFiles:
    """Collect and check what a finished run publishes.

    Args:
        run_folder: output folder of a run.
        repo_id: where it will go.

    Raises:
        CheckpointError: the run is not finished, has no patched checkpoint, or a file is damaged; or no repository can
            have such an id.
        ConfigError: its results lack what a card tells.
    """
    with hub_errors(repo_id, HubOptions(), what="cannot be pushed to"):
        validate_repo_id(repo_id)
    checkpoint, results_file = settled(run_folder / CHECKPOINT), run_folder / RESULTS
    if not results_file.is_file():
        raise CheckpointError(
            f"{run_folder} is not the folder of a finished run: {RESULTS} is missing. Finish it with --resume; a "
            "checkpoint without a run is pushed by cn_hf.push_to_hub."
        )
    results = read_results(results_file)
    if (kind := kind_of_run(results)) == DEMO:
        raise CheckpointError(
            f"{run_folder} is of {kind}, which is a check of the machinery and not published. Its checkpoint can be: "
            "cn_hf.push_to_hub(cn_hf.from_pretrained(folder), repo_id)."
        )
    card = str(run_card(results, repo_id))
    description = read_description(checkpoint / CONFIG_FILE)
    check_weights(checkpoint, description.weights)
    files = {name: checkpoint / name for name in visible_files(checkpoint)}  # a killed save leaves hidden ones
    files |= {name: run_folder / name for name in EXTRAS if (run_folder / name).is_file()}
    return RunFiles(files=files, card=card)


def read_results(file: Path) -> dict[str, Any]:
    """Return the content of a ``results.json``.

    Raises:
        CheckpointError: it cannot be read, or is no object of JSON.
    """
    try:
        results = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(results, dict):
        raise CheckpointError(f"{file} is no results file of cn_hf: it is no object. Finish the run again.")
    return results


def kind_of_run(results: Mapping[str, Any]) -> str | None:
    """Say in words which kind of run wrote these results; None for those of no kind that cn_hf knows."""
    if "accuracy_over_images" in results:
        return DEMO
    if "networks" in results:
        return SIAMESE if "held_out_split" in results else DEMO if "reloaded" in results else None
    return CLASSIFIER if "evaluation" in results else None


def push_run(
    run_folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> Any:
    """Publish a finished run, with a card made from its results.

    Args:
        run_folder: output folder of a run.
        repo_id: ``"user/name"``; made if need be.
        private: whether a repository made here is private.
        token: Hub token with write access; None for the stored one.
        revision: branch to push to, made if need be.

    Returns:
        huggingface_hub's ``CommitInfo``.

    Raises:
        CheckpointError: the run is not finished or damaged, or the Hub refuses.
        ConfigError: its results lack what a card tells.
    """
    found = run_files(run_folder, repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, path in found.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / CARD_FILE).write_text(found.card, encoding="utf-8")
        return upload(
            folder,
            repo_id,
            card=None,
            private=private,
            token=token,
            revision=revision,
            create_pr=False,
            commit_message="Upload a run of cn_hf",
            replaced=OWN_FILES,
        )
