"""What a Hugging Face Hub holds and answers, without sockets: a request goes in, a response comes out.

Repositories are kept in memory: branches and tags of a `Repo` name commits, a `Commit` holds files, a `File` bytes. As
on the Hub, large files are stored apart from git and come from another host name: the client relies on it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from hashlib import sha1, sha256
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote

import yaml

OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_stranger"
ACCOUNTS = {OWNER: ("tester", "write"), READER: ("tester", "read"), STRANGER: ("stranger", "write")}
LARGE = 10 * 1024**2
LARGE_SUFFIXES = (
    ".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".ftz", ".gz", ".h5", ".joblib", ".model", ".msgpack", ".npy", ".npz",
    ".onnx", ".parquet", ".pb", ".pickle", ".pkl", ".pt", ".pth", ".rar", ".safetensors", ".tar", ".tflite", ".tgz",
    ".xz", ".zip",
)  # fmt: skip
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)


class Response(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}
    is_content: bool = False  # bytes of a file
    is_cut: bool = False  # the connection closes in the middle of them


def answer(value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class HubError(Exception):
    """An answer that says no; by `code`, or else the status, the client chooses its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] = {}) -> None:
        super().__init__(message)
        named = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.response = answer({"error": message}, status, named)


class Request(NamedTuple):
    method: str
    path: str  # quoted: a branch may be called a/b
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""
    status: int = 0  # of the response; 0: the connection was closed without one

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def account(self) -> tuple[str | None, str | None]:
        """User and role ("write", "read") that the token stands for; None without a token."""
        sent = self.headers.get("authorization")
        if sent is None:
            return None, None
        try:
            return ACCOUNTS[sent.removeprefix("Bearer ")]
        except KeyError:
            raise HubError(401, "Invalid credentials in Authorization header") from None


@dataclass(frozen=True)
class File:
    content: bytes
    is_large: bool = False

    @cached_property
    def sha256(self) -> str:
        return sha256(self.content).hexdigest()

    @cached_property
    def oid(self) -> str:
        """Git's name of the blob, which for large files is but a pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.is_large else self.content
        return sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.oid

    def pointer(self, name_of_hash: str) -> dict[str, Any]:
        facts = {"size": len(self.content), name_of_hash: self.sha256, "pointerSize": 134}
        return {"lfs": facts} if self.is_large else {}


def is_large(path: str, size: int, start: bytes) -> bool:
    """Whether a file is kept outside of git: by size, by name, or because it isn't text."""
    return size > LARGE or path.endswith(LARGE_SUFFIXES) or b"\0" in start


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, File]
    author: str
    title: str
    message: str = ""
    parent: Commit | None = None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def oid(self) -> str:
        tree = [(path, file.oid) for path, file in sorted(self.files.items())]
        parent = self.parent and self.parent.oid
        return sha1(json.dumps([tree, self.title, self.message, self.date, parent]).encode()).hexdigest()

    @cached_property
    def folders(self) -> set[str]:
        return {str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."}

    def entry(self, path: str) -> dict[str, Any]:
        """A file or folder, as trees list it."""
        if path in self.folders:
            return {"type": "directory", "path": path, "oid": sha1(path.encode()).hexdigest(), "size": 0}
        file = self.files[path]
        return {"type": "file", "path": path, "oid": file.oid, "size": len(file.content), **file.pointer("oid")}


@dataclass
class Repo:
    name: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.move("main", Commit({".gitattributes": File(ATTRIBUTES.encode())}, self.owner, "initial commit"))

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def at(self, revision: str) -> Commit:
        for named in (self.branches, self.tags, self.commits):
            if revision in named:
                return named[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def move(self, branch: str, commit: Commit) -> Commit:
        self.branches[branch] = self.commits[commit.oid] = commit
        return commit


def card_of(readme: str) -> dict[str, Any]:
    """Metadata at the head of a card; ValueError if they are no YAML mapping."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n?---", readme, re.DOTALL)
    try:
        metadata = (yaml.safe_load(found[1]) if found else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"YAML is malformed: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata are to be a mapping, not {type(metadata).__name__}")
    return metadata


def content(whole: bytes, request: Request, headers: Mapping[str, str]) -> Response:
    """The bytes of a file, or the range of them that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Response(200, whole, headers, is_content=True)
    first, last = (int(number) if number else None for number in asked.groups())
    if first is None:  # the last bytes of the file
        first, last = max(len(whole) - (last or 0), 0), None
    stop = len(whole) if last is None else min(last + 1, len(whole))
    if first >= stop:
        return Response(416, b"", {**headers, "Content-Range": f"bytes */{len(whole)}"})
    span = {"Content-Range": f"bytes {first}-{stop - 1}/{len(whole)}"}
    return Response(206, whole[first:stop], headers | span, is_content=True)


Answer = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], bool, Answer]] = []
API = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+(?:/[^/]+)?)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+(?:/[^/]+)?)"
REVISION = r"/(?P<revision>[^/]+)"


def route(method: str, pattern: str, *, write: bool = False) -> Callable[[Answer], Answer]:
    """Registers an answer. It receives the named groups of the path; for a repository's name, the Repo."""

    def register(function: Answer) -> Answer:
        ROUTES.append((method, re.compile(pattern), write, function))
        return function

    return register


class Hub:
    """Repositories and accounts, and the answer to every request.

    Attributes:
        url: The Hub's address.
        storage_url: The address of large files, on another host name.
    """

    def __init__(self, url: str, storage_url: str) -> None:
        self.url, self.storage_url = url, storage_url
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("model", "dataset", "space") and name
        self.stored: dict[str, bytes] = {}  # large files by SHA-256

    def respond(self, request: Request) -> Response:
        for method, pattern, write, function in ROUTES:
            match = pattern.fullmatch(request.path)
            if match and method == request.method.replace("HEAD", "GET"):
                # Only the kind may be absent: addresses of models do not name it.
                groups: dict[str, Any] = {name: unquote(text) for name, text in match.groupdict("models").items()}
                try:
                    if "name" in groups:
                        groups["repo"] = self.find(request, groups.pop("kind"), groups.pop("name"), write)
                    return function(self, request, **groups)
                except HubError as error:
                    return error.response
        return answer({"error": "Sorry, we can't find the page you are looking for."}, 404)

    def find(self, request: Request, kind: str, name: str, write: bool) -> Repo:
        """The repository, if the sender may see it (or write to it); a private one looks like none to others."""
        user, role = request.account
        repo = self.repos.get((kind.removesuffix("s"), name))
        is_hidden = repo is None or (repo.private and user != repo.owner)
        if user is None and (is_hidden or write):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or is_hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and (user != repo.owner or role != "write"):
            raise HubError(403, f"Authorization error: you have no right to write to {name}")
        return repo

    def named(self, request: Request) -> tuple[str, str]:
        """Kind and name of a repository that the sender wants to create or delete, and may."""
        user, role = request.account
        if user is None:
            raise HubError(401, "Invalid username or password.")
        kind, owner = request.json.get("type") or "model", request.json.get("organization") or user
        if role != "write" or owner != user:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        return kind, f"{owner}/{request.json['name']}"

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request) -> Response:
        user, role = request.account
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": role}}
        return answer({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request) -> Response:
        kind, name = self.named(request)
        url = f"{self.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.repos:
            return answer({"error": f"You already created this {kind} repo", "url": url}, 409)
        private = request.json.get("private") or request.json.get("visibility") == "private"
        self.repos[kind, name] = Repo(name, private)
        return answer({"url": url, "name": name, "id": name})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request) -> Response:
        if self.repos.pop(self.named(request), None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Response(200)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Response:
        try:
            card = card_of(request.json["content"])
        except ValueError as error:
            return answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return answer({"errors": [], "warnings": warnings})

    @route("POST", f"{API}/preupload{REVISION}", write=True)
    def preupload(self, request: Request, repo: Repo, revision: str) -> Response:
        held, modes = repo.at(revision).files, []
        for file in request.json["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path, file["size"], base64.b64decode(file["sample"])) else "regular"
            oid = held[path].etag if path in held else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return answer({"files": modes})

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/batch", write=True)
    def batch(self, request: Request, repo: Repo) -> Response:
        objects = request.json["objects"]
        for asked in objects:
            if asked["oid"] not in self.stored:
                upload, verify = f"{self.storage_url}/storage/{asked['oid']}", f"{self.url}/api/verify"
                asked["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/storage/(?P<oid>[0-9a-f]{64})")
    def store(self, request: Request, oid: str) -> Response:
        if sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The uploaded bytes are not those that were announced")
        self.stored[oid] = request.body
        return Response(200)

    @route("GET", "/storage/(?P<oid>[0-9a-f]{64})/(?P<path>.+)")
    def fetch(self, request: Request, oid: str, path: str) -> Response:
        return content(self.stored[oid], request, {"ETag": f'"{oid}"'})

    @route("POST", "/api/verify")
    def verify(self, request: Request) -> Response:
        if len(self.stored.get(request.json["oid"], b"")) != request.json["size"]:
            raise HubError(400, "No such upload, or of another size")
        return Response(200)

    @route("POST", f"{API}/commit{REVISION}", write=True)
    def commit(self, request: Request, repo: Repo, revision: str) -> Response:
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *changes = (json.loads(line) for line in request.body.splitlines())
        about, parent = header["value"], repo.branches[revision]
        if not parent.oid.startswith(about.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for change in changes:
            self.change(files, change["key"], change["value"])
        author = str(request.account[0])
        made = repo.move(revision, Commit(files, author, about["summary"], about.get("description", ""), parent))
        return answer(
            {"success": True, "commitOid": made.oid, "commitUrl": f"{self.url}/{repo.name}/commit/{made.oid}"}
        )

    def change(self, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
        """One line of a commit, applied to the files of its parent."""
        path = value["path"].rstrip("/")
        if not {"", ".", "..", ".git"}.isdisjoint(path.split("/")):
            raise HubError(400, f"Invalid path: {path}")
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.stored:
                raise HubError(400, f"LFS pointer of {path} points to a file that was never uploaded")
            files[path] = File(self.stored[value["oid"]], is_large=True)
        else:
            inside = f"{path}/" if key == "deletedFolder" else ""
            deleted = [name for name in files if (name.startswith(inside) if inside else name == path)]
            if not deleted:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in deleted:
                del files[name]

    @route("GET", f"{API}/commits{REVISION}")
    def history(self, request: Request, repo: Repo, revision: str) -> Response:
        commits: list[dict[str, Any]] = []
        commit: Commit | None = repo.at(revision)
        while commit:
            facts = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            commits.append({**facts, "authors": [{"user": commit.author}]})
            commit = commit.parent
        return answer(commits)

    @route("GET", f"{API}/refs")
    def refs(self, request: Request, repo: Repo) -> Response:
        def listed(folder: str, named: Mapping[str, Commit]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.oid} for n, c in named.items()]

        return answer({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})

    @route("POST", f"{API}/branch{REVISION}", write=True)
    def create_branch(self, request: Request, repo: Repo, revision: str) -> Response:
        return self.point(repo.branches, revision, repo.at(request.json.get("startingPoint", "main")))

    @route("POST", f"{API}/tag{REVISION}", write=True)
    def create_tag(self, request: Request, repo: Repo, revision: str) -> Response:
        return self.point(repo.tags, request.json["tag"], repo.at(revision))

    def point(self, named: dict[str, Commit], name: str, commit: Commit) -> Response:
        if name in named:
            raise HubError(409, f"Reference already exists: {name}")
        named[name] = commit
        return Response(200)

    @route("DELETE", f"{API}/(?P<of>branch|tag){REVISION}", write=True)
    def delete_reference(self, request: Request, repo: Repo, of: str, revision: str) -> Response:
        if (of, revision) == ("branch", "main"):
            raise HubError(403, "The branch main can't be deleted")
        if (repo.branches if of == "branch" else repo.tags).pop(revision, None) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return Response(200)

    @route("GET", f"{API}/tree{REVISION}(?P<folder>(?:/.+)?)")
    def tree(self, request: Request, repo: Repo, revision: str, folder: str) -> Response:
        commit, prefix = repo.at(revision), f"{folder[1:]}/" if folder else ""
        paths = sorted(path for path in {*commit.files, *commit.folders} if path.startswith(prefix))
        if folder and not paths:
            raise HubError(404, f"{folder[1:]} does not exist on {revision}", "EntryNotFound")
        if request.query.get("recursive") != ["true"]:
            paths = [path for path in paths if "/" not in path[len(prefix) :]]
        return answer([commit.entry(path) for path in paths])

    @route("POST", f"{API}/paths-info{REVISION}")
    def paths_info(self, request: Request, repo: Repo, revision: str) -> Response:
        commit = repo.at(revision)
        asked = [path.rstrip("/") for path in parse_qs(request.body.decode())["paths"]]
        return answer([commit.entry(path) for path in asked if path in commit.files or path in commit.folders])

    @route("GET", API)
    @route("GET", f"{API}/revision{REVISION}")
    def info(self, request: Request, repo: Repo, revision: str = "main") -> Response:
        commit, siblings = repo.at(revision), []
        for path, file in sorted(commit.files.items()):
            blob = {"size": len(file.content), "blobId": file.oid, **file.pointer("sha256")}
            siblings.append({"rfilename": path, **(blob if "blobs" in request.query else {})})
        readme = commit.files.get("README.md", File(b""))
        card = card_of(readme.content.decode())
        from_card = {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        return answer({
            "id": repo.name, "author": repo.owner, "sha": commit.oid, "lastModified": commit.date, "gated": False,
            "private": repo.private, "disabled": False, "downloads": 0, "likes": 0, "siblings": siblings,
            "cardData": card, "tags": card.get("tags", []), **from_card,
        })  # fmt: skip

    @route("GET", f"{PAGE}/resolve{REVISION}/(?P<path>.+)")
    def resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if not file.is_large:
            return content(file.content, request, headers | {"ETag": f'"{file.etag}"'})
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-Etag": f'"{file.etag}"'}
        location = f"{self.storage_url}/storage/{file.sha256}/{quote(repo.name)}/{quote(path)}"
        return Response(302, b"Found", {**headers, **linked, "Location": location})
