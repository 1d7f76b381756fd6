"""A stand-in for the Hugging Face hub: those calls that create_repo, list_repo_tree, hf_hub_download and upload_folder
make for files that are not large, over real HTTP. Nothing here knows git; the answers are what the hub's are."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlparse

from huggingface_hub.utils.sha import git_hash
from local_server import local_server

TOKEN = "hf_stand_in"


@dataclass
class HubServer:
    url: str = ""
    owner: str = "crew"
    """Who may be written for with TOKEN."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By repository and path."""
    commits: list[list[str]] = field(default_factory=list)
    """Paths that each commit has moved."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    state = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = urlparse(self.path).path
            if path == "/api/validate-yaml":
                return self._answer({})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._answer({"error": "Invalid username or password."}, 401)
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            _, _, _, owner, name, action, _ = path.split("/")
            if owner != state.owner:
                return self._answer({"error": "You don't have the rights"}, 403)
            repository = f"{owner}/{name}"
            if action == "preupload":
                return self._preupload(state.files[repository], json.loads(body))
            return self._commit(repository, body)

        def _create(self, wanted: dict) -> None:
            repository = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != state.owner:
                return self._answer({"error": "You don't have the rights"}, 403)
            if repository in state.files:
                return self._answer({"error": "You already created this", "url": f"{state.url}/{repository}"}, 409)
            state.files[repository] = {".gitattributes": b"*.bin lfs\n"}
            return self._answer({"url": f"{state.url}/{repository}"})

        def _preupload(self, files: dict[str, bytes], asked: dict) -> None:
            modes = [
                {
                    "path": one["path"], "uploadMode": "regular", "shouldIgnore": False,
                    "oid": git_hash(files[one["path"]]) if one["path"] in files else None,
                }
                for one in asked["files"]
            ]  # fmt: skip
            self._answer({"files": modes})

        def _commit(self, repository: str, body: bytes) -> None:
            files, moved = state.files[repository], []
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    moved.append(value["path"])
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            state.commits.append(moved)
            self._answer({"commitUrl": f"{state.url}/{repository}/commit/0", "commitOid": "0" * 40, "hookOutput": ""})

        def do_GET(self) -> None:
            parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
            if parts[0] == "api":
                files = state.files.get("/".join(parts[2:4]))
                if files is None:
                    return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                if parts[4:5] == ["tree"]:
                    tree = [
                        {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                        for path, data in files.items()
                    ]
                    return self._answer(tree)
                return self._answer({"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": []})
            data = state.files["/".join(parts[:2])]["/".join(parts[4:])]
            return self._send(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40})

        do_HEAD = do_GET

        def _answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

        def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            return

    with local_server(Handler) as state.url:
        yield state
