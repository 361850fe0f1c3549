"""The test server is a Hub to the real clients: huggingface_hub, timm and transformers, in processes of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path

import pytest
from hub_server import OWNER, READER, STRANGER, HubServer, run_python

CLIENT = """
import json, os, sys
from hashlib import sha256
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api = HfApi()

def outcome(call, *args, **options):
    try:
        return call(*args, **options)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        return f"{type(error).__name__} {status}".strip()

def digest(path):
    return sha256(Path(path).read_bytes()).hexdigest()
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: sha256(content).hexdigest() for path, content in files.items()}


def asked(hub: HubServer, method: str, end: str) -> list[tuple[int, str | None]]:
    """Status and range of the requests of a method for paths with an end."""
    return [(r.status, r.headers.get("range")) for r in hub.requests if r.method == method and r.path.endswith(end)]


def test_what_one_process_uploads_another_downloads(hub: HubServer, tmp_path: Path) -> None:
    pushed = run_python(
        CLIENT
        + """
files = {
    "README.md": b"---\\nlicense: mit\\npipeline_tag: image-classification\\ntags: [a, b]\\n---\\n# Card\\n",
    "model.safetensors": b"small, but large by name",
    "deep/er/caf\\u00e9 au lait.txt": b"hello",
    "letters.txt": b"0123456789abcdef" * 700_000,
    "binary.dat": b"\\0\\1\\2",
    "empty.txt": b"",
}
for path, content in files.items():
    Path("folder", path).parent.mkdir(parents=True, exist_ok=True)
    Path("folder", path).write_bytes(content)
Path("bad.md").write_text("---\\nlicense: [mit\\n---\\n")
url = api.create_repo("pushed")
result = {
    "user": api.whoami()["name"],
    "url": str(url), "name": url.repo_id,
    "again": outcome(api.create_repo, "tester/pushed"),
    "again, if need be": api.create_repo("tester/pushed", exist_ok=True).repo_id,
    "other's": outcome(api.create_repo, "stranger/pushed"),
    "commit": api.upload_folder(folder_path="folder", repo_id="tester/pushed").oid,
    "nothing new": api.upload_folder(folder_path="folder", repo_id="tester/pushed").oid,
    "bad card": outcome(api.upload_file, path_or_fileobj="bad.md", path_in_repo="README.md", repo_id="tester/pushed"),
}
api.create_repo("tester/data", repo_type="dataset")
api.upload_file(path_or_fileobj=b"a,b", path_in_repo="t.csv", repo_id="tester/data", repo_type="dataset")
print(json.dumps(result))
""",
        hub,
        tmp_path / "pusher",
    ).result
    commit = pushed.pop("commit")
    assert pushed == {
        "user": "tester",
        "url": f"{hub.url}/tester/pushed",
        "name": "tester/pushed",
        "again": "HfHubHTTPError 409",
        "again, if need be": "tester/pushed",
        "other's": "HfHubHTTPError 403",
        "nothing new": commit,
        "bad card": "ValueError",
    }
    files = hub.files("tester/pushed")
    large = ["binary.dat", "letters.txt", "model.safetensors"]
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        *large[:1],
        "deep/er/café au lait.txt",
        "empty.txt",
        *large[1:],
    ]
    uploads = [request.path for request in hub.requests if request.method == "PUT"]
    assert sorted(uploads) == sorted(f"/storage/{sha256(files[path]).hexdigest()}" for path in large)

    hub.requests.clear()
    loaded = run_python(
        CLIENT
        + """
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
folder = Path(snapshot_download("tester/pushed"))
info = api.model_info("tester/pushed", files_metadata=True)
tree = api.list_repo_tree("tester/pushed", recursive=True)
print(json.dumps({
    "files": {p.relative_to(folder).as_posix(): digest(p) for p in folder.rglob("*") if p.is_file()},
    "commit": [folder.name, info.sha],
    "one": digest(hf_hub_download("tester/pushed", "er/caf\\u00e9 au lait.txt", subfolder="deep")),
    "listed": api.list_repo_files("tester/pushed"),
    "blobs": {s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in info.siblings},
    "card": [info.pipeline_tag, info.tags, info.card_data.license],
    "top": [entry.path for entry in api.list_repo_tree("tester/pushed")],
    "below": [entry.path for entry in api.list_repo_tree("tester/pushed", "deep", recursive=True)],
    "tree": {entry.path: entry.lfs and entry.lfs.sha256 for entry in tree if hasattr(entry, "lfs")},
    "paths": [type(entry).__name__ for entry in api.get_paths_info("tester/pushed", ["deep", "empty.txt", "none"])],
    "exists": [api.file_exists("tester/pushed", "README.md"), api.file_exists("tester/pushed", "README.txt")],
    "absent": [outcome(hf_hub_download, "tester/pushed", "none.txt"),
               try_to_load_from_cache("tester/pushed", "none.txt") is _CACHED_NO_EXIST],
    "data": Path(hf_hub_download("tester/data", "t.csv", repo_type="dataset")).read_text(),
}))
""",
        hub,
        tmp_path / "loader",
    ).result
    sums = digests(files)
    assert loaded == {
        "files": sums,
        "commit": [commit, commit],
        "one": sums["deep/er/café au lait.txt"],
        "listed": sorted(files),
        "blobs": {path: [len(files[path]), sums[path] if path in large else None] for path in sorted(files)},
        "card": ["image-classification", ["a", "b"], "mit"],
        "top": sorted([*(path for path in files if "/" not in path), "deep"]),
        "below": ["deep/er", "deep/er/café au lait.txt"],
        "tree": {path: sums[path] if path in large else None for path in files},
        "paths": ["RepoFolder", "RepoFile"],
        "exists": [True, False],
        "absent": ["RemoteEntryNotFoundError 404", True],
        "data": "a,b",
    }
    fetched = [request for request in hub.requests if request.path.startswith("/storage/")]
    assert len(fetched) == len(large)
    assert not any("authorization" in request.headers for request in fetched), "a token left the Hub"


def test_history(hub: HubServer, tmp_path: Path) -> None:
    result = run_python(
        CLIENT
        + """
from huggingface_hub import CommitOperationDelete
repo = "tester/history"
api.create_repo(repo)
def put(text, **options):
    return api.upload_file(path_or_fileobj=text.encode(), path_in_repo="a/x.txt", repo_id=repo, **options)
def read(revision=None):
    return Path(hf_hub_download(repo, "a/x.txt", revision=revision)).read_text()
def delete(path):
    return api.create_commit(repo, [CommitOperationDelete(path)], commit_message="delete")
one = put("one", commit_message="first", commit_description="why").oid
api.create_tag(repo, tag="v1")
api.create_branch(repo, branch="side/line")
two = put("two", parent_commit=one).oid
stale = outcome(put, "three", parent_commit=one)
side = put("side", revision="side/line").oid
result = {
    "stale": stale, "unchanged": read(),
    "texts": [read("main"), read("v1"), read("side/line"), read(one), read(two[:40])],
    "shas": [api.model_info(repo, revision=name).sha == oid
             for name, oid in (("main", two), ("v1", one), ("side/line", side), (one, one))],
    "titles": [commit.title for commit in api.list_repo_commits(repo)],
    "oids": [commit.commit_id for commit in api.list_repo_commits(repo)][:2] == [two, one],
    "why": api.list_repo_commits(repo, revision="v1")[0].message,
    "snapshot": Path(snapshot_download(repo, revision="v1"), "a/x.txt").read_text(),
    "branch again": outcome(api.create_branch, repo, branch="side/line"),
    "tag again": outcome(api.create_tag, repo, tag="v1"),
    "to a tag": outcome(put, "four", revision="v1"),
    "branch of none": outcome(api.create_branch, repo, branch="new", revision="none"),
    "absent revision": [outcome(read, "v2"), outcome(snapshot_download, repo, revision="0" * 40),
                        outcome(api.list_repo_commits, repo, revision="v2")],
    "absent folder": outcome(lambda: list(api.list_repo_tree(repo, "b"))),
    "delete absent": outcome(delete, "b.txt"),
}
delete("a/")
result["deleted"] = api.list_repo_files(repo)
result["kept"] = [api.list_repo_files(repo, revision="v1"), read(one)]
api.delete_tag(repo, tag="v1")
api.delete_branch(repo, branch="side/line")
refs = api.list_repo_refs(repo)
result["refs"] = [[branch.name for branch in refs.branches], refs.tags]
result["delete main"] = outcome(api.delete_branch, repo, branch="main")
api.delete_repo(repo)
result["delete again"] = outcome(api.delete_repo, repo)
print(json.dumps(result))
""",
        hub,
        tmp_path,
    ).result
    assert result == {
        "stale": "HfHubHTTPError 412",
        "unchanged": "two",
        "texts": ["two", "one", "side", "one", "two"],
        "shas": [True] * 4,
        "titles": ["Upload a/x.txt with huggingface_hub", "first", "initial commit"],
        "oids": True,
        "why": "why",
        "snapshot": "one",
        "branch again": "HfHubHTTPError 409",
        "tag again": "HfHubHTTPError 409",
        "to a tag": "RevisionNotFoundError 404",
        "branch of none": "RevisionNotFoundError 404",
        "absent revision": ["RevisionNotFoundError 404"] * 3,
        "absent folder": "RemoteEntryNotFoundError 404",
        "delete absent": "RemoteEntryNotFoundError 404",
        "deleted": [".gitattributes"],
        "kept": [[".gitattributes", "a/x.txt"], "one"],
        "refs": [["main"], []],
        "delete main": "HfHubHTTPError 403",
        "delete again": "RepositoryNotFoundError 404",
    }


def test_who_may_do_what(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("tester/open", {"config.json": b"{}"})
    hub.push("tester/closed", {"config.json": b"{}", "model.safetensors": b"weights"}, private=True)
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", OWNER), ("HTTP_PROXY", "http://127.0.0.1:9")):
        monkeypatch.setenv(name, value)  # settings of this machine's user: the clients are not to see them
    code = """
def said(call, *args, **options):
    result = outcome(call, *args, **options)
    return result if isinstance(result, str) and "Error" in result else "fine"
def read(repo):
    calls = (api.model_info,), (snapshot_download,), (hf_hub_download, "config.json")
    return " or ".join(sorted({said(call, repo, *file) for call, *file in calls}))
def write(repo):
    return said(api.upload_file, path_or_fileobj=b"{}", path_in_repo="new.json", repo_id=repo)
repos = ["tester/open", "tester/closed", "tester/none"]
print(json.dumps([outcome(lambda: api.whoami()["name"]), *map(read, repos), read("none"), *map(write, repos)]))
"""
    none = "RepositoryNotFoundError"
    expected = {
        OWNER: ["tester", "fine", "fine", f"{none} 404", f"{none} 404", "fine", "fine", f"{none} 404"],
        READER: [
            "tester", "fine", "fine", f"{none} 404", f"{none} 404",
            "HfHubHTTPError 403", "HfHubHTTPError 403", f"{none} 404",
        ],
        STRANGER: [
            "stranger", "fine", f"{none} 404", f"{none} 404", f"{none} 404",
            "HfHubHTTPError 403", f"{none} 404", f"{none} 404",
        ],
        "hf_wrong": ["HfHubHTTPError 401"] * 8,
        None: ["LocalTokenNotFoundError", "fine", *[f"{none} 401"] * 6],
    }  # fmt: skip
    for token, outcomes in expected.items():
        assert run_python(CLIENT + code, hub, tmp_path / str(token), token=token).result == outcomes, token


def test_failures_on_the_way(hub: HubServer, tmp_path: Path) -> None:
    files = {
        f"{name}.txt": f"{name} ".encode() * 10_000 for name in ("flip", "truncate", "get500", "get429", "head503")
    }
    # The client writes and resumes by chunks of 10 MiB.
    hub.push("tester/faults", {**files, "drop.safetensors": b"0123456789abcdef" * 1_400_000})
    hub.fail_next("drop", path="*/drop.safetensors")
    hub.fail_next("flip", path="*/flip.txt")
    hub.fail_next("truncate", path="*/truncate.txt")
    hub.fail_next(500, path="*/get500.txt", method="GET")
    hub.fail_next(429, path="*/get429.txt", method="GET")
    hub.fail_next(503, path="*/head503.txt", method="HEAD")
    hub.fail_next(500, path="/api/models/tester/faults/revision/main")
    hub.fail_next(500, path="/storage/*", method="PUT")
    hub.fail_next("drop", path="/storage/*", method="PUT")
    hub.fail_next("drop", path="*/commit/main", method="POST")
    hub.requests.clear()
    home, expected = tmp_path / "home", digests(hub.files("tester/faults"))
    first = run_python(
        CLIENT
        + """
def get(name):
    return outcome(lambda: digest(hf_hub_download("tester/faults", name)))
def put():
    return outcome(api.upload_file, path_or_fileobj=b"large", path_in_repo="large.bin", repo_id="tester/faults")
print(json.dumps({"snapshot": outcome(snapshot_download, "tester/faults"), **{name: get(name) for name in sys.argv[1:]},
                  "put": put(), "again": put().oid}))
""",
        hub,
        home,
        *sorted(expected),
    ).result
    assert first.pop("snapshot") == "LocalEntryNotFoundError"
    assert first.pop("put") == "RemoteProtocolError"
    assert first.pop("again") == hub.repos["model", "tester/faults"].at("main").oid
    wrong = {"flip.txt": first["flip.txt"], "truncate.txt": "OSError", "get500.txt": "HfHubHTTPError 500"}
    assert first == {**expected, **wrong}
    assert first["flip.txt"] not in (expected["flip.txt"], "OSError"), "the client does not look at what it has read"
    assert asked(hub, "GET", "/drop.safetensors") == [(200, None), (206, "bytes=10485760-")]
    assert asked(hub, "HEAD", "/head503.txt") == [(503, None), (200, None)]
    assert [status for status, _ in asked(hub, "GET", "/get429.txt")] == [429, 200]
    assert [request.status for request in hub.requests if request.method == "PUT"] == [500, 0, 200]
    assert not hub.faults

    code = """
folder = Path(snapshot_download("tester/faults", **json.loads(sys.argv[1])))
print(json.dumps({path.name: digest(path) for path in folder.iterdir()}))
"""
    expected["large.bin"] = sha256(b"large").hexdigest()
    assert run_python(CLIENT + code, hub, home, "{}").result == {**expected, "flip.txt": first["flip.txt"]}
    assert run_python(CLIENT + code, hub, home, '{"force_download": true}').result == expected
    hub.requests.clear()
    assert run_python(CLIENT + code, hub, home, "{}", HF_HUB_OFFLINE="1").result == expected
    assert run_python(CLIENT + code, hub, home, '{"local_files_only": true}').result == expected
    assert not hub.requests
    with HubServer() as gone:
        pass
    assert run_python(CLIENT + code, gone, home, "{}").result == expected


def test_requests_that_no_client_makes(hub: HubServer) -> None:
    body = bytes(range(1, 101))
    hub.push("tester/raw", {"body.txt": body, "empty.txt": b""})
    port = hub.http.server_port

    def get(path: str, **headers: str) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        read = response.status, response.read()
        connection.close()
        return read

    address = "/tester/raw/resolve/main/body.txt"
    for span, part in (("10-19", body[10:20]), ("90-", body[90:]), ("-5", body[-5:]), ("95-200", body[95:])):
        assert get(address, Range=f"bytes={span}") == (206, part)
    assert get(address, Range="bytes=100-") == (416, b"")
    assert get("/no/such/page")[0] == 404
    hub.fail_next("flip", path="*/raw/*")
    assert get("/tester/raw/resolve/main/empty.txt") == (200, b"")
    assert get(address) == (200, body[:50] + bytes([body[50] ^ 1]) + body[51:])

    stored = dict(hub.stored)
    for sent, start in ((b"ten bytes!", b"HTTP/1.1 400"), (b"four", b"")):  # not what was announced; a killed client
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"PUT /storage/" + b"0" * 64 + b" HTTP/1.1\r\nContent-Length: 10\r\n\r\n" + sent)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(12) == start
    assert hub.stored == stored
    assert get(address) == (200, body)


def test_a_client_that_fails(hub: HubServer, tmp_path: Path) -> None:
    code = "import sys; print('before'); sys.exit('the reason')"
    with pytest.raises(AssertionError, match=r"(?s)ended with 1.*before.*the reason"):
        run_python(code, hub, tmp_path)
    ended = run_python(code, hub, tmp_path, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "before\n", "the reason\n")
    program = tmp_path / "program.py"
    program.write_text("import json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:], os.environ['X']]))")
    assert run_python(program, hub, tmp_path / "home", "a", X="b").result == [str(tmp_path / "home"), ["a"], "b"]


@pytest.mark.slow
def test_timm_and_transformers(hub: HubServer, tmp_path: Path) -> None:
    code = """
import json, sys
import timm, torch
from timm.models import push_to_hf_hub
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTConfig
from transformers import ViTForImageClassification, ViTImageProcessor

def bits(model):
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        output = model.eval()(images)
    return getattr(output, "logits", output).flatten().tolist()

if sys.argv[1] == "push":
    small = timm.create_model("test_vit", img_size=32, num_classes=3)
    push_to_hf_hub(small, "tester/timm", private=True, model_config={"num_classes": 3}, model_args={"img_size": 32})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=32, num_labels=3)
    large = ViTForImageClassification(config)
    large.push_to_hub("tester/transformers", private=True)
    ViTImageProcessor(size={"height": 32, "width": 32}).push_to_hub("tester/transformers")
else:
    small = timm.create_model("hf-hub:tester/timm", pretrained=True)
    large = AutoModelForImageClassification.from_pretrained("tester/transformers")
    AutoModel.from_pretrained("tester/transformers", revision="main")
    assert AutoImageProcessor.from_pretrained("tester/transformers").size["height"] == 32
print(json.dumps([bits(small), bits(large)]))
"""
    pushed = run_python(code, hub, tmp_path / "pusher", "push").result
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("tester/timm"))
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(hub.files("tester/transformers"))
    hub.requests.clear()
    assert run_python(code, hub, tmp_path / "loader", "load").result == pushed
    absent = [request for request in hub.requests if request.status == 404]
    assert absent, "transformers looks for files that few repositories have"
    assert all("/resolve/" in request.path or "/tree/" in request.path for request in absent), absent
