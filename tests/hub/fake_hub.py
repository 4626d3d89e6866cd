"""A small Hub on the loopback interface, for the real `huggingface_hub` client: repositories, commits, large files, faults on demand.

It remembers everything that was sent to it, so that a test can search it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "planted0token0of0the0tests"
LARGE = (".safetensors", ".png", "tokenizer.json")


@dataclass
class Repo:
    private: bool
    gated: str | bool = False
    licence: str | None = None
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)  # commit -> path -> (large or small, content)
    large: dict[str, bytes] = field(default_factory=dict)

    def commit(self, files: dict[str, tuple[str, bytes]], branch: str) -> str:
        text = f"{len(self.commits)}{branch}{sorted(files)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass
class Fault:
    method: str
    path: str
    status: int
    times: int
    headers: dict[str, str]
    message: str
    after: bool = False
    """Do what was asked first, and lose the answer."""
    cut: bool = False
    """Read half of what is sent, then close the connection without a word."""


class FakeHub:
    """Start with `with FakeHub() as hub`; `hub.url` is the endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.role: str = "write"
        self.fine_grained: dict[str, Any] | None = None
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.uploads = 0
        self.part_bytes: int | None = None
        """Files larger than this go up in parts, each to an address of its own."""
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, private: bool = True, files: dict[str, bytes] | None = None) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit({".gitattributes": ("small", b""), **{name: ("small", data) for name, data in (files or {}).items()}}, "main")
        return repo

    def fail(self, method: str, path: str, status: int, times: int = 1, message: str = "", after: bool = False, **headers: str) -> None:
        self.faults.append(Fault(method, path, status, times, {k.replace("_", "-"): v for k, v in headers.items()}, message, after))

    def cut(self, method: str, path: str, times: int = 1) -> None:
        """Close the connection in the middle of a request's body."""
        self.faults.append(Fault(method, path, 0, times, {}, "", cut=True))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return {path: data for path, (_, data) in repo.commits[repo.branches.get(revision, revision)].items() if path != ".gitattributes"}

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path in self.requests)

    def whoami(self) -> dict[str, Any]:
        token: dict[str, Any] = {"displayName": "tests", "role": self.role}
        if self.fine_grained is not None:
            token = {"displayName": "tests", "role": "fineGrained", "fineGrained": self.fine_grained}
        orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]
        return {"type": "user", "name": "me", "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


def _blob(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        length = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            cut = next((f for f in self.hub.faults if f.cut and f.times > 0 and f.method == self.command and re.search(f.path, self.route)), None)
            if cut:
                cut.times -= 1
                self.hub.requests.append((f"CUT {self.command}", self.route))
        if cut:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self.rfile.read(length)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.route))
            self.hub.bodies.append(self.path.encode() + b"\n" + self.body + _decoded(self.body))
            fault = next((f for f in self.hub.faults if not f.cut and f.times > 0 and f.method == self.command and re.search(f.path, self.route)), None)
            if fault:
                fault.times -= 1
                if fault.after:
                    self.silent = True
                    self._answer()
                    self.silent = False
                self._send(fault.status, {"error": fault.message}, **({"X-Error-Message": fault.message} if fault.message else {}), **fault.headers)
            else:
                self._answer()

    silent = False

    def _send(self, status: int, value: Any = None, **headers: str) -> None:
        if self.silent:
            return
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        length = headers.pop("Content-Length", str(len(data)))
        for name, text in {"Content-Type": "application/json", "Content-Length": length, **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _absent(self) -> None:
        self._send(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _answer(self) -> None:
        if self.route == "/api/whoami-v2":
            return self._send(200, self.hub.whoami()) if self._authorised() else self._send(401, {"error": "Invalid"})
        if self.route == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self.route == "/api/repos/create":
            return self._create()
        if match := re.fullmatch(r"/large/(.+)/([0-9a-f]{64})", self.route):
            self.hub.repos[match[1]].large[match[2]] = self.body
            self.hub.uploads += 1
            return self._send(200, {})
        if match := re.fullmatch(r"/part/(.+)/([0-9a-f]{64})/(\d+)", self.route):
            self.hub.parts[match[2], int(match[3])] = self.body
            self.hub.uploads += 1
            return self._send(200, {}, ETag=hashlib.md5(self.body, usedforsecurity=False).hexdigest())
        if match := re.fullmatch(r"/complete/(.+)/([0-9a-f]{64})", self.route):
            return self._complete(match[1], match[2])
        if match := re.fullmatch(r"/content/(.+)/([0-9a-f]{64})", self.route):
            return self._send(200, self.hub.repos[match[1]].large[match[2]])
        if match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", self.route):
            return self._batch(match[1])
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.+))?)?", self.route):
            return self._api(match[1], match[2] or "revision", match[3] or "main")
        if match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self.route):
            return self._resolve(*match.groups())
        return self._send(404, {"error": f"no route {self.command} {self.route}"})

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", "url": url})
        self.hub.add(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self._send(200, {"url": url, "name": repo_id})

    def _batch(self, repo_id: str) -> None:
        repo, objects, wanted = self.hub.repos[repo_id], [], json.loads(self.body)
        in_parts = self.hub.part_bytes if "multipart" in wanted["transfers"] else None
        for item in wanted["objects"]:
            oid, size = item["oid"], int(item["size"])
            if oid in repo.large:
                objects.append(item)
            elif in_parts and size > in_parts:
                count = -(-size // in_parts)
                header = {"chunk_size": str(in_parts), **{f"{n:05d}": f"{self.hub.url}/part/{repo_id}/{oid}/{n}" for n in range(1, count + 1)}}
                objects.append({**item, "actions": {"upload": {"href": f"{self.hub.url}/complete/{repo_id}/{oid}", "header": header}}})
            else:
                objects.append({**item, "actions": {"upload": {"href": f"{self.hub.url}/large/{repo_id}/{oid}"}}})
        self._send(200, {"transfer": "multipart" if in_parts else "basic", "objects": objects})

    def _complete(self, repo_id: str, oid: str) -> None:
        """Put the parts together, if they are all there, in order, and make the file that was announced."""
        told = json.loads(self.body)
        parts = [self.hub.parts.get((oid, part["partNumber"])) for part in told["parts"]]
        whole = b"".join(part or b"" for part in parts)
        tags = [part["etag"].strip('"') for part in told["parts"]]
        if told["oid"] != oid or None in parts or hashlib.sha256(whole).hexdigest() != oid:
            return self._send(400, {"error": "the parts are not the file"})
        if tags != [hashlib.md5(part or b"", usedforsecurity=False).hexdigest() for part in parts]:
            return self._send(400, {"error": "the tags are not the parts'"})
        self.hub.repos[repo_id].large[oid] = whole
        return self._send(200, {})

    def _api(self, repo_id: str, what: str, rest: str) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._authorised()):
            return self._absent()
        if what == "branch":
            if rest in repo.branches:
                return self._send(409, {"error": "Reference already exists"})
            repo.branches[rest] = repo.branches["main"]
            return self._send(200, {})
        name = next((name for name in (*repo.branches, *repo.commits) if rest == name or rest.startswith(f"{name}/")), None)
        if name is None:
            return self._send(404, {"error": "no revision"}, **{"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        sha = repo.branches.get(name, name)
        files = repo.commits[sha]
        match what:
            case "revision":
                more = {"gated": repo.gated, "cardData": {"license": repo.licence} if repo.licence else {}}
                return self._send(
                    200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": [{"rfilename": p} for p in files], "tags": [], "downloads": 0, **more}
                )
            case "tree":
                folder = rest.removeprefix(name).strip("/")
                entries = [_entry(path, *item) for path, item in files.items() if path.startswith(f"{folder}/" if folder else "")]
                if folder and not entries:
                    return self._send(404, {"error": "no entry"}, **{"X-Error-Code": "EntryNotFound", "X-Error-Message": "not there"})
                return self._send(200, entries)
            case "paths-info":
                paths = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode()).get("paths", [])
                return self._send(200, [_entry(path, *files[path]) for path in paths if path in files])
            case "preupload":
                found = []
                for item in json.loads(self.body)["files"]:
                    old = files.get(item["path"])
                    mode = "lfs" if item["path"].endswith(LARGE) else "regular"
                    oid = None if old is None else hashlib.sha256(old[1]).hexdigest() if old[0] == "large" else _blob(old[1])
                    found.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
                return self._send(200, {"files": found})
            case "commit":
                return self._commit(repo_id, repo, name, dict(files))
            case "refs":
                refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo.branches.items()]
                return self._send(200, {"branches": refs, "tags": [], "converts": []})
        return self._send(404, {"error": f"no route {self.route}"})

    def _commit(self, repo_id: str, repo: Repo, branch: str, files: dict[str, tuple[str, bytes]]) -> None:
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "file":
                    files[value["path"]] = ("small", base64.b64decode(value["content"]))
                case "lfsFile":
                    files[value["path"]] = ("large", repo.large[value["oid"]])
                case "deletedFile":
                    del files[value["path"]]
        pull = "create_pr" in self.query
        branch = "refs/pr/1" if pull else branch
        sha = repo.commit(files, branch)
        url = f"{self.hub.url}/{repo_id}/discussions/1" if pull else None
        self._send(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": url})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._authorised()):
            return self._absent()
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            return self._send(404, {}, **{"X-Error-Code": "RevisionNotFound"})
        if path not in repo.commits[sha]:
            return self._send(404, {}, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        kind, data = repo.commits[sha][path]
        if kind == "small":
            return self._send(200, data, **{"ETag": f'"{_blob(data)}"', "X-Repo-Commit": sha})
        oid = hashlib.sha256(data).hexdigest()
        # on another host name, as on the real Hub: the client keeps its token to itself there
        elsewhere = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/content/{repo_id}/{oid}"
        return self._send(302, b"", **{"Location": elsewhere, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": sha})


def _entry(path: str, kind: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if kind == "large":
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _decoded(body: bytes) -> bytes:
    """What small files in a commit really say: they travel in base64."""
    found = [base64.b64decode(text) for text in re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]+)"', body)]
    return b"\n".join(found)
