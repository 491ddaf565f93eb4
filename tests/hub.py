"""A stand-in for the hub on loopback: repositories that are made, written to and read."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def commit_of(branch):
    """The hash of the commit that a branch is at."""
    return hashlib.sha1(branch.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for; `server.repos` has files by (repository, branch)."""

    def answer(self, content, code=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        """Make a repository or a branch, say how files are to come, take a commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen, repos = self.server.seen, self.server.repos
        seen.append((self.path, self.headers.get("Authorization")))
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization", "me"), asked["name"])))
            self.server.asked.append(asked)
            repos.setdefault((name, "main"), {})
            return self.answer({"url": f"{url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo, what, branch = re.fullmatch(
            r"/api/models/(.+)/(branch|preupload|commit)/([^/?]+).*", self.path
        ).groups()
        if what == "branch":
            repos.setdefault((repo, branch), {})
            return self.answer({})
        if what == "preupload":
            files = [{"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for x in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                repos[repo, branch][line["value"]["path"]] = content
        oid = commit_of(branch)
        return self.answer({"commitUrl": f"{url}/{repo}/commit/{oid}", "commitOid": oid})

    def do_GET(self):
        """Give a file."""
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        found = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", self.path)
        files = self.server.repos.get(found.groups()[:2], {}) if found else {}
        oid = commit_of(found[2] if found else "")
        if found is None or found[3] not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        content = files[found[3]]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(content, ETag=etag, X_Repo_Commit=oid)

    do_HEAD = do_GET

    def log_message(self, *args):
        """Nothing."""


@contextmanager
def hub():
    """A server with `repos`, `asked` (to be made) and `seen` (paths and tokens); its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked, server.seen = {}, [], []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
