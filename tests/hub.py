"""A small Hugging Face Hub on this machine: repositories in memory, and the requests that uploads and downloads make.

It keeps what a client commits, file by file, and answers with nothing else; a request that it does not know is an error of the
client's. Files are sent inline in the commit, as the Hub takes small ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub:
    """Repositories by name.

    Attributes:
        commits: for each repository its commits' files, by commit; branches: the newest commit of each branch.
        private: names of private repositories.
        unknown: requests that were not understood.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.messages: list[str] = []
        self.private: set[str] = set()
        self.unknown: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: Files, branch: str = "main") -> str:
        """Commit these files, and no others; the commit."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def commit_of(self, repo: str, revision: str) -> str | None:
        known = self.commits.get(repo, {})
        return self.branches.get(repo, {}).get(revision) or (revision if revision in known else None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", path):
            repo, what, revision, under = found[1], found[2], found[3] or "main", found[4]
            commit = self.hub.commit_of(repo, revision)
            if commit is None:
                return self._missing(repo, revision)
            files = self.hub.commits[repo][commit]
            if what == "tree":
                files = {name: one for name, one in files.items() if not under or name.startswith(f"{under}/")}
                if under and not files:
                    return self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
                return self._json([_entry(name, content) for name, content in files.items()])
            listed = [{"rfilename": name} for name in files]
            return self._json({"id": repo, "sha": commit, "private": repo in self.hub.private, "siblings": listed})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups())
        if path == "/api/agent-harnesses":  # asked where an agent runs the client
            return self._json({}, 404)
        self._not_understood()

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.commits:
                return self._json({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409)
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self.hub.add(name, {".gitattributes": b""})
            return self._json({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path)
        if not found:
            return self._not_understood()
        repo, what, branch = found.groups()
        if what == "branch":
            self.hub.branches[repo].setdefault(branch, self.hub.branches[repo]["main"])
            return self._json({})
        if what == "preupload":
            names = [one["path"] for one in json.loads(body)["files"]]
            return self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        self._commit(repo, branch, [json.loads(line) for line in body.splitlines() if line])

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.commits[repo][self.hub.branches[repo][branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._not_understood()
        commit = self.hub.add(repo, files, branch)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self.hub.commit_of(repo, revision)
        if commit is None:
            return self._missing(repo, revision)
        content = self.hub.commits[repo][commit].get(name)
        if content is None:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self._send(content, 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})

    def _missing(self, repo: str, revision: str) -> None:
        code = "RevisionNotFound" if repo in self.hub.commits else "RepoNotFound"
        self._json({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": f"no {revision} of {repo}"})

    def _not_understood(self) -> None:
        self.hub.unknown.append(f"{self.command} {self.path}")
        self._json({"error": "not understood"}, 501)

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
