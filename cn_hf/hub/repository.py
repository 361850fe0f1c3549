"""A checkpoint's folder, wherever it is: on disk, in the Hub's cache, or to be downloaded; and the way up to the Hub.

What huggingface_hub raises becomes one ``CheckpointError`` that says what to do. Downloads go through its cache, which
takes up an interrupted file where it stopped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cn_hf.errors import CheckpointError, InputTypeError
from cn_hf.hub.staging import settled

__all__ = ["CARD_FILE", "CHECKPOINT", "HubOptions", "checkpoint_folder", "hub_errors", "upload"]

CARD_FILE = "README.md"
CHECKPOINT = "checkpoint"
"""The folder within that of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Options of requests to the Hub, in the words of transformers.

    Attributes:
        revision: branch, tag or commit; None for the default branch.
        token: of the user, True for the stored one, None for the stored one if there is any.
        cache_dir: folder of the cache; None for huggingface_hub's.
        local_files_only: do not ask the Hub.
        force_download: download even what the cache has.
        subfolder: folder inside the repository, or inside the local folder; empty for the top.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    def __post_init__(self) -> None:
        """Refuse a subfolder that leads out of the repository.

        Raises:
            CheckpointError: it does.
        """
        path = PurePosixPath(self.subfolder)
        if path.is_absolute() or ".." in path.parts or "\\" in self.subfolder:
            raise CheckpointError(f"subfolder must lie inside the checkpoint, received {self.subfolder!r}.")

    def download_options(self) -> dict[str, Any]:
        """Arguments that huggingface_hub's download functions share."""
        return {
            "token": self.token,
            "cache_dir": None if self.cache_dir is None else Path(self.cache_dir),
            "local_files_only": self.local_files_only,
            "force_download": self.force_download,
        }


def checkpoint_folder(
    id_or_folder: str | os.PathLike[str],
    options: HubOptions,
    *,
    description_file: str,
    files_of: Callable[[Path], Iterable[str]],
) -> Path:
    """A local folder that holds the checkpoint.

    Args:
        id_or_folder: a folder, also of a run that holds one, or ``"user/name"`` on the Hub.
        options: how the Hub is asked.
        description_file: the file that a checkpoint cannot be without; it is fetched first.
        files_of: from the path of the description to the other files to fetch, as patterns relative to it.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be had.
    """
    if not isinstance(id_or_folder, (str, os.PathLike)):
        raise InputTypeError(f"Expected a folder or the id of a repository, received {id_or_folder!r}.")
    path = Path(id_or_folder)
    if path.is_dir():
        folder, inside = settled(path / options.subfolder), settled(path / options.subfolder / CHECKPOINT)  # of a run
        return inside if not (folder / description_file).exists() and (inside / description_file).exists() else folder
    name = str(id_or_folder)
    if path.is_absolute() or name.startswith((".", "~")) or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise CheckpointError(f"There is no folder {name}, and it is no id of a repository on the Hub (user/name).")
    import huggingface_hub

    with hub_errors(name, options, what="is no folder here, and cannot be had from"):
        description = huggingface_hub.hf_hub_download(
            name,
            description_file,
            subfolder=options.subfolder or None,
            revision=options.revision,
            **options.download_options(),
        )
    folder = Path(description).parent
    prefix = f"{options.subfolder}/" if options.subfolder else ""
    patterns = [f"{prefix}{pattern}" for pattern in files_of(Path(description))]
    commit = folder
    for _ in PurePosixPath(options.subfolder).parts:
        commit = commit.parent
    with hub_errors(name, options):  # the commit of the description, whatever is pushed meanwhile
        huggingface_hub.snapshot_download(
            name, revision=commit.name, allow_patterns=patterns, **options.download_options()
        )
    return folder


def upload(
    folder: Path,
    repo_id: str,
    *,
    card: Callable[[str], str] | None,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    replaced: Iterable[str],
) -> Any:
    """Create the repository if need be, and upload a folder as one commit.

    Args:
        folder: its files, all of them.
        repo_id: ``"user/name"``.
        card: from the repository's full id to the text of a card, for a repository that has none; None for no card.
        private: whether a repository made here is private; None for the account's default.
        token: of the user.
        revision: branch to commit to, made if need be; None for the default one.
        create_pr: open a pull request instead.
        commit_message: of the commit.
        replaced: patterns of files that the commit deletes where the folder has none of that name.

    Returns:
        huggingface_hub's ``CommitInfo``.

    Raises:
        CheckpointError: the Hub refuses, or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with hub_errors(repo_id, HubOptions(revision=revision, token=token), what="cannot be pushed to"):
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if card is not None and not api.file_exists(repository, CARD_FILE, revision=revision):
            (folder / CARD_FILE).write_text(card(repository), encoding="utf-8")
        return api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            delete_patterns=list(replaced),
        )


@contextmanager
def hub_errors(name: str, options: HubOptions, *, what: str = "cannot be had from") -> Iterator[None]:
    """Turn what huggingface_hub raises into one ``CheckpointError`` that says what to do."""
    from huggingface_hub import errors

    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of whichever HTTP library its version uses
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, errors.EntryNotFoundError, transport) as error:
        cause = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        reason = str(cause).strip().splitlines()
        told = reason[0] if reason else repr(cause)
        raise CheckpointError(f"{name} {what} the Hub: {_advice(cause, options)} [{told}]") from error


def _advice(error: BaseException, options: HubOptions) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated; ask for access on its page and pass token=."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or it is private: check the id, log in with `hf auth login` or pass token=."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {options.revision!r}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "it may not be asked (HF_HUB_OFFLINE)."
    if isinstance(error, errors.LocalEntryNotFoundError):
        if options.local_files_only or constants.HF_HUB_OFFLINE:
            return "it is not in the cache, and the Hub may not be asked (local_files_only or HF_HUB_OFFLINE)."
        return "it is not in the cache, and the Hub cannot be reached: check the connection and try again."
    if isinstance(error, errors.EntryNotFoundError):
        where = f"folder {options.subfolder!r} of it" if options.subfolder else "it"
        return f"{where} holds no checkpoint of cn_hf (no context_norm.json)."
    if isinstance(error, errors.HFValidationError):
        return "the id is not of the form user/name."
    if isinstance(error, errors.HfHubHTTPError):
        status = int(getattr(error.response, "status_code", 0))
        known = {
            401: "the token is missing or wrong: log in with `hf auth login` or pass token=.",
            403: "the token has no right to do this: use one with write access to this repository.",
            412: "the repository changed meanwhile; try again.",
        }
        return known.get(status, f"it answered with status {status}; try again later.")
    return "the transfer failed; run it again, it goes on where it stopped."
