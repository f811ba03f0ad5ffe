"""A stand-in for the Hugging Face hub: the few requests of its HTTP interface that huggingface_hub makes here.

Repositories live in memory, as lists of commits. huggingface_hub itself talks to it, over HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """`endpoint` for clients; `commit` and `files` from the side of the tests; `requests` (method, path, token)."""

    def __init__(self) -> None:
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, object] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.commits: list[dict] = []  # headers of the commits that came over HTTP
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, changes: dict[str, bytes]) -> str:
        """A new commit with these files added or replaced; its hash."""
        commits = self.repos.setdefault(repo, [])
        files = (commits[-1][1] if commits else {}) | changes
        text = repr(
            (repo, len(commits), sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()))
        )
        commits.append((hashlib.sha1(text.encode()).hexdigest(), files))
        return commits[-1][0]

    def commit_folder(self, repo: str, folder: Path) -> str:
        return self.commit(repo, {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()})

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1][1]

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo) or []
        if revision == "main":
            return commits[-1] if commits else ("0" * 40, {})
        return next((commit for commit in commits if commit[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, body: object = b"", status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            repo, what, revision = "/".join(parts[2:4]), *(parts[4:6] or ["revision", "main"])
            return self.about(repo, what, revision)
        if len(parts) > 4 and parts[2] == "resolve":
            return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.reply(status=404)

    do_HEAD = do_GET

    def about(self, repo: str, what: str, revision: str) -> None:
        found = self.hub.find(repo, revision)
        if repo not in self.hub.repos:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if found is None:
            return self.reply({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        commit, files = found
        if what == "tree":
            return self.reply(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        return self.reply({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files], "tags": []})

    def file(self, repo: str, revision: str, name: str) -> None:
        found = self.hub.find(repo, revision)
        if repo not in self.hub.repos:
            return self.reply(status=404, X_Error_Code="RepoNotFound")
        if found is None:
            return self.reply(status=404, X_Error_Code="RevisionNotFound")
        commit, files = found
        if name not in files:
            return self.reply(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = '"' + hashlib.sha1(files[name]).hexdigest() + '"'
        return self.reply(files[name], X_Repo_Commit=commit, ETag=etag)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.hub.requests.append(("POST", path, self.headers.get("Authorization")))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = path.split("/")
        if path == "api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repos:
                return self.reply({"error": "exists", "url": f"{self.hub.endpoint}/{repo}"}, 409)
            self.hub.repos[repo] = []
            self.hub.private[repo] = asked.get("visibility")
            return self.reply({"url": f"{self.hub.endpoint}/{repo}", "id": repo})
        if path == "api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        repo, what = "/".join(parts[2:4]), parts[4]
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.reply({"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        changes = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        self.hub.commits.append(lines[0]["value"])
        commit = self.hub.commit(repo, changes)
        return self.reply(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}"}
        )
