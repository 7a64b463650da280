"""A hub of our own: what huggingface_hub asks of one, kept in memory."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.listening import listening


@dataclass
class FakeHub:
    """`files` of each repository; `fetched`, names of files in the order in which they were."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    address: str = ""

    def sha(self, repo: str) -> str:
        names = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files[repo].items())}
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    async def create(self, request: Request) -> Response:
        if "Authorization" not in request.headers:
            return JSONResponse({"error": "who are you?"}, 401)
        asked = await request.json()
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        self.files.setdefault(repo, {})
        return JSONResponse({"url": f"{self.address}/{repo}", "id": repo, "name": repo})

    async def info(self, request: Request) -> Response:
        repo = self._repo(request)
        if repo not in self.files:
            return JSONResponse({"error": "no such"}, 404, {"X-Error-Code": "RepoNotFound"})
        return JSONResponse(
            {"id": repo, "sha": self.sha(repo), "siblings": [{"rfilename": n} for n in self.files[repo]]}
        )

    async def tree(self, request: Request) -> Response:
        return JSONResponse(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files[self._repo(request)].items()
            ]
        )

    async def preupload(self, request: Request) -> Response:
        asked = (await request.json())["files"]
        return JSONResponse(
            {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
        )

    async def commit(self, request: Request) -> Response:
        repo = self._repo(request)
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del self.files[repo][value["path"]]
        sha = self.sha(repo)
        return JSONResponse({"commitUrl": f"{self.address}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    async def resolve(self, request: Request) -> Response:
        repo, name = self._repo(request), request.path_params["file"]
        content = self.files[repo].get(name)
        if content is None:
            return JSONResponse({"error": "no such"}, 404, {"X-Error-Code": "EntryNotFound"})
        if request.method == "GET":
            self.fetched.append(name)
        tag = hashlib.sha1(content).hexdigest()
        return Response(content, headers={"ETag": f'"{tag}"', "X-Repo-Commit": self.sha(repo)})

    @staticmethod
    def _repo(request: Request) -> str:
        return f"{request.path_params['org']}/{request.path_params['name']}"

    def app(self) -> Starlette:
        async def valid(_: Request) -> Response:
            return JSONResponse({"errors": [], "warnings": []})

        of = "/api/models/{org}/{name}"
        return Starlette(
            routes=[
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", valid, methods=["POST"]),
                Route(of, self.info),
                Route(of + "/revision/{rev}", self.info),
                Route(of + "/tree/{rev}", self.tree),
                Route(of + "/preupload/{rev}", self.preupload, methods=["POST"]),
                Route(of + "/commit/{rev}", self.commit, methods=["POST"]),
                Route("/{org}/{name}/resolve/{rev}/{file:path}", self.resolve),
            ]
        )


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens at `address`."""
    hub = FakeHub()
    with listening(hub.app()) as hub.address:
        yield hub
