"""A stand-in for the hub on this machine: repositories of models by the hub's HTTP interface, as its client uses it.

Files whose names end in .safetensors are uploaded as large ones (git LFS's basic transfer), all others within the
commit, which is what the hub asks of its client where that does without Xet.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.utils import validate_repo_id

TOKEN = "hf_of_the_stand_in"
OWNER = "someone"  # the token's account
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """commits: sha -> the files of that revision, in order. gated: what it is is shown, its files are not."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.head if revision == "main" else revision)

    def commit(self, files: dict[str, bytes]) -> str:
        spelled = json.dumps([(name, hashlib.sha1(content).hexdigest()) for name, content in files.items()])
        sha = hashlib.sha1(f"{len(self.commits)}{spelled}".encode()).hexdigest()
        self.commits[sha] = files
        return sha


class Hub:
    """The server; `with Hub() as hub`. refused: paths that hold it get 403. asked: (method, path) of each request.

    knows_large_files: see above; otherwise every file is within the commit.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.refused: str | None = None
        self.knows_large_files = True
        self.asked: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: object) -> dict[str, str]:
        """Variables with which a process takes this for the hub; the client's own files lie below `home`."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip


class _Refused(Exception):  # noqa: N818
    def __init__(self, status: int, code: str = "", said: str = "", **more: str) -> None:
        self.status, self.code, self.said, self.more = status, code, said, more


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it


def _name(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(".safetensors") else _blob(content)


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.state.asked.append((self.command, path))
        try:
            if self.state.refused is not None and self.state.refused in path:
                raise _Refused(403, said="You may not write to this repository.")
            for (method, pattern), handle in _ROUTES.items():
                if self.command in method.split("|") and (found := re.fullmatch(pattern, path)):
                    answer = handle(self, body, **found.groupdict())
                    break
            else:
                raise _Refused(404, "EntryNotFound")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.said}
            self._send(refused.status, json.dumps({"error": refused.said, **refused.more}).encode(), headers)
            return
        content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        self._send(200, content, {"Content-Type": "application/json", **headers})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(HTTPStatus(status))
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, writes: bool = False) -> Repository:
        found = self.state.repositories.get(name)
        if found is None or ((found.private or writes) and not self._authorised()):
            raise _Refused(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
        return found

    def _files(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self._repository(name)
        files = repository.files(revision)
        if files is None:
            raise _Refused(404, "RevisionNotFound")
        return repository, repository.head if revision == "main" else revision, files

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        if not self._authorised():
            raise _Refused(401, said="Invalid credentials in Authorization header")
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if name.split("/")[0] != OWNER:
            raise _Refused(403, said=f"You don't have the rights to create a model under {name.split('/')[0]}")
        if name in self.state.repositories:
            raise _Refused(409, said="You already created this model repo", url=f"{self.state.endpoint}/{name}")
        made = self.state.repositories[name] = Repository(asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return {"url": f"{self.state.endpoint}/{name}", "name": name, "id": "0"}

    def validate(self, body: bytes) -> Any:
        text = json.loads(body)["content"]
        _check_metadata(text)
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        files = self._repository(repo, writes=True).files(revision) or {}
        asked = json.loads(body)["files"]

        def is_large(name: str) -> bool:
            return self.state.knows_large_files and name.endswith(".safetensors")

        return {"files": [
            {"path": one["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if is_large(one["path"]) else "regular",
             "oid": _name(one["path"], files[one["path"]]) if one["path"] in files else None}
            for one in asked
        ]}  # fmt: skip

    def batch(self, body: bytes, repo: str) -> Any:
        self._repository(repo, writes=True)
        objects = [
            {"oid": one["oid"], "size": one["size"],
             "actions": {"upload": {"href": f"{self.state.endpoint}/large/{one['oid']}", "header": {}}}}
            for one in json.loads(body)["objects"]
        ]  # fmt: skip
        return {"transfer": "basic", "objects": objects}

    def put_large(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, said="the content is not what its name says")
        self.state.large[oid] = body
        return {}

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        repository = self._repository(repo, writes=True)
        files = dict(repository.files(revision) or {})
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.large[value["oid"]]
        if "README.md" in files:
            _check_metadata(files["README.md"].decode())
        sha = repository.commit(files)
        url = f"{self.state.endpoint}/{repo}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    def info(self, body: bytes, repo: str, revision: str = "main") -> Any:
        repository, sha, files = self._files(repo, revision)
        names = [{"rfilename": name} for name in files]
        return {"id": repo, "modelId": repo, "sha": sha, "private": repository.private, "siblings": names, "tags": []}

    def tree(self, body: bytes, repo: str, revision: str) -> Any:
        _, _, files = self._files(repo, revision)
        return [{"type": "file", "path": name, "size": len(content), "oid": _blob(content)}
                for name, content in files.items()]  # fmt: skip

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> Any:
        repository, sha, files = self._files(repo, revision)
        if repository.gated:
            raise _Refused(403, "GatedRepo", f"Access to model {repo} is restricted")
        if file not in files:
            raise _Refused(404, "EntryNotFound")
        return files[file], {"ETag": f'"{_blob(files[file])}"', "X-Repo-Commit": sha,
                             "Content-Type": "application/octet-stream"}  # fmt: skip


def _check_metadata(text: str) -> None:
    """The hub's rules, as far as we know them: a mapping, and ids where it wants ids."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    try:
        for name in [data.get("base_model"), *(data.get("datasets") or [])]:
            if name is not None:
                validate_repo_id(name)
    except ValueError as error:
        raise _Refused(400, said=str(error)) from None


_ROUTES = {
    ("POST", "/api/repos/create"): _Handler.create,
    ("POST", "/api/validate-yaml"): _Handler.validate,
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)"): _Handler.preupload,
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch"): _Handler.batch,
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})"): _Handler.put_large,
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)"): _Handler.commit,
    ("GET", rf"/api/models/{_REPO}"): _Handler.info,
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)"): _Handler.info,
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)"): _Handler.tree,
    ("GET|HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)"): _Handler.resolve,
}
