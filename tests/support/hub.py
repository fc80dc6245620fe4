"""A Hugging Face hub on this machine: the part of its API with which a folder is uploaded."""

import base64
import json
import os
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_the_tests"
ignores_uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""A mark for tests that upload: huggingface_hub 1.0 calls httpx in a deprecated way."""


class Hub(ThreadingHTTPServer):
    """Repositories in memory."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}  # the files of each, by path
        self.private: set[str] = set()
        self.refused = ""  # a repository to which nothing can be committed
        self.requests: list[str] = []  # method and path
        self.uploaded: dict[str, bytes] = {}  # by sha256

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def connect(self, monkeypatch):
        """Make this the hub of this process, with a token; without hf_xet, whose protocol is not public."""
        changes = {"ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in (changes | {"HF_TOKEN_PATH": os.devnull}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as hub:
        hub.connect(monkeypatch)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):  # a storage service, which gets no token
            self.server.uploaded[path.removeprefix("/lfs/")] = body
            return self._answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        for pattern, answer in _ANSWERS.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, body, *found.groups())
        return self._answer({"error": "Not found"}, 404)

    do_GET = do_POST = do_PUT = _handle

    def create(self, body):
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        exists = repo_id in self.server.repositories
        if not exists and (asked.get("private") or asked.get("visibility") == "private"):
            self.server.private.add(repo_id)
        self.server.repositories.setdefault(repo_id, {})
        self._answer({"url": f"{self.server.url}/{repo_id}"}, 409 if exists else 200)

    def info(self, body, repo_id):
        if repo_id not in self.server.repositories:
            return self._answer({"error": "Repository not found"}, 404)
        return self._answer({"id": repo_id, "private": repo_id in self.server.private, "siblings": []})

    def tree(self, body, repo_id):
        file = {"type": "file", "size": 1, "oid": "0"}
        self._answer([file | {"path": name} for name in self.server.repositories[repo_id]])

    def validate(self, body):
        self._answer({"errors": [], "warnings": []})

    def preupload(self, body, repo_id):
        modes = {True: "lfs", False: "regular"}
        paths = [file["path"] for file in json.loads(body)["files"]]
        files = [(path, modes[path.endswith(".safetensors")]) for path in paths]
        self._answer({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in files]})

    def batch(self, body, repo_id):
        objects = json.loads(body)["objects"]
        lfs = f"{self.server.url}/lfs"
        self._answer({"objects": [o | {"actions": {"upload": {"href": f"{lfs}/{o['oid']}"}}} for o in objects]})

    def commit(self, body, repo_id):
        if repo_id == self.server.refused:
            return self._answer({"error": "You have no permission to write."}, 403)
        files = self.server.repositories[repo_id]
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        return self._answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/1", "commitOid": "1"})


_ID = r"([\w.-]+/[\w.-]+)"
_ANSWERS = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    f"GET /api/models/{_ID}": _Handler.info,
    f"GET /api/models/{_ID}/tree/main": _Handler.tree,
    f"POST /api/models/{_ID}/preupload/main": _Handler.preupload,
    f"POST /api/models/{_ID}/commit/main": _Handler.commit,
    f"POST /{_ID}\\.git/info/lfs/objects/batch": _Handler.batch,
}
