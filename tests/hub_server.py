"""A Hugging Face Hub for tests: the unmodified client talks to it over HTTP, from a process of its own.

`HubServer` listens while its context is open; `run_python` runs a client; `HubServer.fail_next` lets something go
wrong; `HubServer.requests` tells what was asked. What is answered stands in hub_protocol.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from hub_protocol import OWNER, READER, STRANGER, Commit, File, Hub, HubError, Repo, Request, Response, is_large

__all__ = ["OWNER", "READER", "STRANGER", "Finished", "HubServer", "run_python"]

FOREIGN = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS|PYTORCH_TRANSFORMERS)_.*|.*_proxy|TORCH_HOME", re.IGNORECASE)


class Fault(NamedTuple):
    what: int | str
    path: str
    method: str | None

    @property
    def is_of_content(self) -> bool:
        return isinstance(self.what, str) and self.method in (None, "GET")

    def befalls(self, request: Request) -> bool:
        return self.method in (None, request.method) and fnmatchcase(unquote(request.path), self.path)


class Handler(BaseHTTPRequestHandler):
    """Reads requests and writes responses; what lies between is the hub's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: HubServer, *connection: Any) -> None:
        self.hub = hub
        super().__init__(*connection)  # serves the whole connection

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client was killed, or gave up
            super().handle()

    def exchange(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        response = self.hub.respond(Request(self.command, url.path, parse_qs(url.query), headers, body))
        self.close_connection |= response.is_cut
        if response.status == 0:
            return
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if response.is_cut else response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = exchange  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        pass


class HubServer(Hub):
    """A Hub that listens while its context is open.

    Attributes:
        url: Its address.
        requests: What was asked, in order, with the status of the response, without bodies and with plain paths.
    """

    def __init__(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        super().__init__(f"http://127.0.0.1:{self.http.server_port}", f"http://localhost:{self.http.server_port}")
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fail_next(
        self,
        what: int | Literal["drop", "truncate", "flip"],
        *,
        path: str = "*",
        method: str | None = None,
        times: int = 1,
    ) -> None:
        """Lets the next requests that match go wrong.

        Args:
            what: A status (429, 500, 503) to answer with, doing nothing. Or, for the next download of a file's bytes,
                "drop": the connection closes half-way; "truncate": the first half is served as if it were all; "flip":
                a bit in the middle is wrong. "drop" with another `method` than GET: the connection closes unanswered.
            path: Pattern (of `fnmatch`) of the URL's path, which ends in the file's name, for large files too.
            method: Of the request; None: any.
            times: How many requests.
        """
        with self.lock:
            self.faults += [Fault(what, path, method)] * times

    def respond(self, request: Request) -> Response:
        with self.lock:
            response = self.faulty(request)
            path = unquote(request.path)
            self.requests.append(request._replace(path=path, body=b"", status=response.status))
            return response

    def faulty(self, request: Request) -> Response:
        """The response, with the fault that a test asked for."""
        what = self.fault(request, of_content=False)
        if what == "drop":
            return Response(0, is_cut=True)
        if isinstance(what, int):
            return HubError(what, "A failure for a test").response
        response = super().respond(request)
        if not (response.is_content and response.body and request.method == "GET"):
            return response
        what, body, middle = self.fault(request, of_content=True), response.body, len(response.body) // 2
        if what == "truncate":
            body = body[:middle]
        elif what == "flip":
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        return response._replace(body=body, is_cut=what == "drop")

    def fault(self, request: Request, *, of_content: bool) -> int | str | None:
        """Takes the first fault that is meant for the request; the client's questions about itself have none."""
        for number, fault in enumerate(self.faults):
            if fault.is_of_content == of_content and fault.befalls(request) and request.path != "/api/agent-harnesses":
                return self.faults.pop(number).what
        return None

    def push(self, name: str, files: Mapping[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """Commits files to a model, created if need be, without a client; returns the commit's oid."""
        with self.lock:
            repo = self.repos.setdefault(("model", name), Repo(name, private))
            held = {path: File(content, is_large(path, len(content), content[:512])) for path, content in files.items()}
            self.stored |= {file.sha256: file.content for file in held.values() if file.is_large}
            parent = repo.branches[branch]
            return repo.move(branch, Commit({**parent.files, **held}, repo.owner, "pushed by a test", "", parent)).oid

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a model's repository holds, by path."""
        with self.lock:
            return {path: file.content for path, file in self.repos["model", name].at(revision).files.items()}

    def environment(self, home: Path, token: str | None = OWNER) -> dict[str, str]:
        """Variables for a client's process: this hub, and none of this machine's settings of the Hub.

        Args:
            home: The client's HF_HOME, with its cache.
            token: OWNER (user "tester"), READER (the same, but may only read), STRANGER (user "stranger"), any other
                text (a wrong token), or None.
        """
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
        root = str(Path(__file__).resolve().parents[1])
        return {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")])),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            **({"HF_TOKEN": token} if token else {}),
        }


class Finished(NamedTuple):
    """A client's process that has ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """The last line of its output, as JSON."""
        return json.loads(self.stdout.splitlines()[-1])


def run_python(
    code: str | Path,
    hub: HubServer,
    home: Path,
    *arguments: str | Path,
    token: str | None = OWNER,
    check: bool = True,
    timeout: float = 300,
    **variables: str,
) -> Finished:
    """Runs a client of the hub in a process of its own.

    Args:
        code: Python source, indented or not; or the path of a file of it.
        hub: The hub to talk to.
        home: The client's HF_HOME and working folder, created if absent.
        *arguments: The client's `sys.argv[1:]`.
        token: Who the client is, as in `HubServer.environment`.
        check: Whether the client's failure is an error.
        timeout: Seconds until the client is killed.
        **variables: More environment variables.

    Raises:
        AssertionError: Saying what the client wrote, if it failed.
    """
    home.mkdir(parents=True, exist_ok=True)
    source = [str(code)] if isinstance(code, Path) else ["-c", textwrap.dedent(code)]
    command = [sys.executable, *source, *map(str, arguments)]
    environment = {**hub.environment(home, token), **variables}
    run = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=timeout)
    if check and run.returncode != 0:
        raise AssertionError(f"the client ended with {run.returncode}\n{run.stdout}\n{run.stderr}")
    return Finished(run.returncode, run.stdout, run.stderr)
