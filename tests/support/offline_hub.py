"""As much of the Hugging Face hub as the tests need, on this machine."""

from __future__ import annotations

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KIND = re.compile("^/api/(datasets|models)/")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as takes a commit of small files; knows one user by the token `good`."""

    server: ThreadingHTTPServer
    repositories: dict[str, dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer good":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            # As on the hub, a repository that exists stays as it is.
            self.repositories.setdefault(name, {"asked": asked, "private": private, "files": {}})
            self._answer({"url": f"{self._address}/datasets/{name}", "name": name, "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._answer({"files": files})
        elif self.path.endswith("/commit/main"):
            name = KIND.sub("", self.path).removesuffix("/commit/main")
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "deletedFile":
                    del self.repositories[name]["files"][entry["value"]["path"]]
                if entry["key"] == "file":
                    self.repositories[name]["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer({"commitUrl": f"{self._address}/datasets/{name}/commit/abc", "commitOid": "abc", "success": True})
        else:
            self._answer({"error": f"no such address {self.path}"}, 404)

    def do_GET(self) -> None:
        name = KIND.sub("", self.path).partition("/tree/")[0].partition("/revision/")[0]
        if name not in self.repositories:
            self._answer({"error": f"no such address {self.path}"}, 404)
        elif "/tree/" in self.path:
            files = self.repositories[name]["files"]
            self._answer([{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files])
        else:
            siblings = [{"rfilename": path} for path in self.repositories[name]["files"]]
            private = self.repositories[name]["private"]
            self._answer({"id": name, "private": private, "sha": "0" * 40, "siblings": siblings, "tags": [], "downloads": 0})

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, document: Any, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
