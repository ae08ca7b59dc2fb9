"""A Hugging Face Hub on the loopback interface: what the real clients ask of a kernel repository, and no more.

    with LoopbackHub() as hub:
        hub.trusted.add("org")
        hub.commit("org/name", "v1", {"README.md": b"..."})
        run_a_client(env={"HF_ENDPOINT": hub.url})

Branches point to commits, a commit is ``{path: bytes}``. ``hub.requests`` has each request; what is not known here is
answered by 404.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from typing import Any

Files = dict[str, bytes]


class LoopbackHub:
    def __init__(self) -> None:
        self.trusted: set[str] = set()  # organisations that may publish kernels
        self.branches: dict[str, dict[str, str]] = {}  # repository -> branch -> commit
        self.commits: dict[str, Files] = {}
        self.requests: list[str] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str, branch: str, files: Files) -> str:
        """Make ``files`` all that the branch holds, and return the commit."""
        listed = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())
        commit = hashlib.sha1(json.dumps([repository, listed]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def files(self, repository: str, revision: str) -> tuple[str, Files] | None:
        commit = self.branches.get(repository, {}).get(revision, revision)
        return (commit, self.commits[commit]) if repository in self.branches and commit in self.commits else None


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(
            {"organization": self._organization, "refs": self._refs, "revision": self._info}
            | {"tree": self._tree, "file": self._file}
        )

    do_HEAD = do_GET  # noqa: N815  # http.server's name

    def do_POST(self) -> None:
        self._answer(
            {"create": self._create, "yaml": self._yaml, "branch": self._branch, "preupload": self._preupload}
            | {"commit": self._commit}
        )

    def _answer(self, answers: dict[str, Any]) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for name, pattern in _PATHS.items():
            match = re.fullmatch(pattern, urllib.parse.unquote(path))
            if match and name in answers:
                return answers[name](*match.groups(), **({"query": query} if name == "tree" else {}), **_with(body))
        self._send({"error": "not found"}, 404)

    # -- reading -----------------------------------------------------------------------------------------------------

    def _organization(self, name: str) -> None:
        self._send({"name": name, "fullname": name, "trustedKernelPublisher": name in self.hub.trusted})

    def _refs(self, repository: str) -> None:
        branches = self.hub.branches.get(repository)
        if branches is None:
            return self._missing("RepoNotFound")
        listed = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in branches.items()]
        self._send({"branches": listed, "tags": [], "converts": []})

    def _info(self, repository: str, revision: str) -> None:
        found = self.hub.files(repository, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        self._send({"id": repository, "sha": found[0], "siblings": [{"rfilename": path} for path in found[1]]})

    def _tree(self, repository: str, revision: str, folder: str | None, query: str) -> None:
        found = self.hub.files(repository, revision)
        if found is None:
            return self._missing("RevisionNotFound")
        prefix = f"{folder}/" if folder else ""
        below = {path: content for path, content in found[1].items() if path.startswith(prefix)}
        entries: dict[str, dict[str, Any]] = {}
        for path, content in sorted(below.items()):
            parts = path.removeprefix(prefix).split("/")
            folders = range(1, len(parts)) if "recursive=true" in query.lower() else range(1, min(2, len(parts)))
            for depth in folders:
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
            if len(parts) == 1 or "recursive=true" in query.lower():
                oid = hashlib.sha1(content).hexdigest()
                entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
        self._send(list(entries.values()))

    def _file(self, repository: str, revision: str, path: str) -> None:
        found = self.hub.files(repository, revision)
        if found is None or path not in found[1]:
            return self._missing("EntryNotFound" if found else "RevisionNotFound")
        content = found[1][path]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": found[0]}
        self._send(content, 200, headers | {"Content-Type": "application/octet-stream"})

    # -- writing -----------------------------------------------------------------------------------------------------

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repository = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if repository in self.hub.branches:
            return self._send({"error": "exists", "url": f"{self.hub.url}/kernels/{repository}"}, 409)
        self.hub.commit(repository, "main", {})
        self._send({"url": f"{self.hub.url}/kernels/{repository}", "id": repository})

    def _yaml(self, body: bytes) -> None:
        self._send({"errors": [], "warnings": []})

    def _branch(self, repository: str, branch: str, body: bytes) -> None:
        branches = self.hub.branches[repository]
        if branch in branches:
            return self._send({"error": "exists"}, 409)
        branches[branch] = branches["main"]
        self._send({})

    def _preupload(self, repository: str, revision: str, body: bytes) -> None:
        asked = json.loads(body)["files"]
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
        self._send({"files": modes})

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = dict(self.hub.commits[self.hub.branches[repository][branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.commit(repository, branch, files)
        self._send(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/kernels/{repository}/commit/{commit}"}
        )

    # -- answers -----------------------------------------------------------------------------------------------------

    def _missing(self, code: str) -> None:
        self._send({"error": code}, 404, {"X-Error-Code": code})

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *message: object) -> None:
        pass  # `requests` has them


_REPOSITORY, _REVISION = "([^/]+/[^/]+)", "([^/]+)"
_PATHS = {
    "organization": "/api/organizations/([^/]+)/overview",
    "refs": f"/api/kernels/{_REPOSITORY}/refs",
    "revision": f"/api/kernels/{_REPOSITORY}/revision/{_REVISION}",
    "tree": f"/api/kernels/{_REPOSITORY}/tree/{_REVISION}(?:/(.+))?",
    "file": f"/kernels/{_REPOSITORY}/resolve/{_REVISION}/(.+)",
    "create": "/api/repos/create",
    "yaml": "/api/validate-yaml",
    "branch": f"/api/kernels/{_REPOSITORY}/branch/(.+)",
    "preupload": f"/api/kernels/{_REPOSITORY}/preupload/{_REVISION}",
    "commit": f"/api/kernels/{_REPOSITORY}/commit/{_REVISION}",
}


def _with(body: bytes) -> dict[str, bytes]:
    return {"body": body} if body else {}
