"""A hub on this machine: the answers that huggingface_hub needs to create a repository, to commit and to download.

Files travel inside of the commit, as small ones do. What large files need beside (LFS and Xet) is the library's own.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from vqgan.export.licences import HUB_LICENCES

TOKEN = "hf_of_this_test"
GIT_ATTRIBUTES = ".gitattributes"  # which every repository begins with

Files = dict[str, bytes]


@dataclass
class Repository:
    """The files after each commit, and which commit each branch or tag is."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        content = repr((sorted(files.items()), len(self.commits))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class HubServer(ThreadingHTTPServer):
    """A hub with one user, `ann`; `log` has method and path of all requests. `broken` are endings of paths that are answered by
    an error."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []
        self.broken: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: Files, private: bool = False) -> Repository:
        self.repositories[name] = Repository(private)
        self.repositories[name].commit({GIT_ATTRIBUTES: b"", **files})
        return self.repositories[name]


class Answers(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def reply(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def answer(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        path = self.path.split("?")[0]
        for ending, status in self.server.broken.items():
            if path.endswith(ending):
                self.refuse(status, "Broken")
                return
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            self.describe(match[1], match[3] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path):
            getattr(self, match[2])(match[1], match[3], body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.download(*match.groups())
        else:
            self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = answer

    @property
    def is_ann(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, name: str) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.is_ann):
            self.refuse(404 if self.is_ann else 401, "RepoNotFound")
            return None
        return repository

    def create(self, wanted: dict[str, Any]) -> None:
        if not self.is_ann:
            self.refuse(401, "Unauthorized")
        elif wanted.get("organization") not in (None, "ann"):
            self.refuse(403, "Forbidden")
        else:
            name = f"ann/{wanted['name']}"
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.server.add(name, {}, bool(private))
            self.reply(200, {"url": f"{self.server.url}/{name}", "name": name})

    def validate(self, card: str) -> None:
        """The rules of the hub that a card could break: a licence of its list, or "other" and a name."""
        metadata = yaml.safe_load(card.split("---\n")[1])
        errors = []
        if metadata["license"] not in HUB_LICENCES:
            errors.append({"message": f"license {metadata['license']} is none"})
        if "license_name" in metadata and not re.fullmatch(
            r"[a-z0-9.-]+", metadata["license_name"]
        ):
            errors.append({"message": f"license_name {metadata['license_name']}"})
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def describe(self, name: str, revision: str) -> None:
        if (repository := self.find(name)) is None:
            return
        if (sha := repository.resolve(revision)) is None:
            self.refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in repository.commits[sha]]
        self.reply(
            200,
            {"id": name, "sha": sha, "private": repository.private, "siblings": siblings},
        )

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        if self.find(name) is None:
            return
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self.reply(200, {"files": files})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        if (repository := self.find(name)) is None:
            return
        if not self.is_ann or not name.startswith("ann/"):
            self.refuse(403, "Forbidden")
            return
        files = dict(repository.commits[repository.refs[revision]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (
                None,
                repository.refs[revision],
            ):
                self.refuse(412, "PreconditionFailed")
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, revision)
        self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def download(self, name: str, revision: str, file: str) -> None:
        if (repository := self.find(name)) is None:
            return
        sha = repository.resolve(revision)
        content = None if sha is None else repository.commits[sha].get(file)
        if sha is None or content is None:
            self.refuse(404, "EntryNotFound")
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.reply(200, content, X_Repo_Commit=sha, ETag=etag)


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A hub that answers while the context lasts."""
    with HubServer() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connect_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that huggingface_hub talks to in a test, as its user, with an empty cache."""
    from huggingface_hub import constants

    with serve_hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        copy = "huggingface_hub.utils._cache_manager.HF_HUB_CACHE"  # of version 1.0
        monkeypatch.setattr(copy, str(tmp_path / "cache"), raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
