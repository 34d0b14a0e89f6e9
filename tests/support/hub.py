"""A local stand-in for the hub's HTTP API: repositories in memory, large files by LFS as on the real one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

OWNER = "me"
COMMIT = "0" * 40
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
#: Those of the hub that heads of ours can have.
TASKS = {
    "feature-extraction", "fill-mask", "image-classification", "image-feature-extraction", "multiple-choice",
    "question-answering", "text-classification", "token-classification",
}  # fmt: skip


def card_errors(content: str) -> list[str]:
    """What is wrong with the front matter of a card, by the rules of the hub that are documented."""
    data = ModelCard(content).data.to_dict()
    errors = []
    if isinstance(data.get("base_model"), str) and not re.fullmatch(
        r"[\w.-]+(/[\w.-]+)?", data["base_model"]
    ):
        errors.append(f"base_model: not a name on the hub: {data['base_model']}")
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f"base_model_relation: not one of {sorted(RELATIONS)}")
    if data.get("pipeline_tag", "fill-mask") not in TASKS:
        errors.append(f"pipeline_tag: not a task: {data['pipeline_tag']}")
    for name in ("tags", "datasets", "metrics"):
        if not all(isinstance(value, str) for value in data.get(name, [])):
            errors.append(f"{name}: not a list of texts")
    for model in data.get("model-index", []):
        for result in model["results"]:
            named = [result["task"], result["dataset"], *result["metrics"]]
            if (
                not all(isinstance(part.get("type"), str) for part in named)
                or "name" not in result["dataset"]
            ):
                errors.append(f"model-index: a type or a name is missing in {result}")
            if not all(isinstance(metric["value"], (int, float)) for metric in result["metrics"]):
                errors.append(f"model-index: a value is not a number in {result}")
    return errors


class Hub:
    """Serves until it is closed.

    Attributes:
        repositories: name -> path -> content.
        history: name and files after each commit, the first one first.
        validated: cards that were validated.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.history: list[tuple[str, dict[str, bytes]]] = []
        self.validated: list[str] = []
        self.objects: dict[str, bytes] = {}
        hub = self

        class Bound(_Handler):
            store = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    store: Hub

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, data: Any, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            self._answer(
                {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            )
        elif parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            files = self.store.repositories.get(name)
            if files is None:
                self._missing("RepoNotFound")
            elif parts[4:5] == ["tree"]:
                folder = "/".join(parts[6:])
                found = [path for path in files if path.startswith(folder)]
                if found:
                    entries = [
                        {"type": "file", "path": p, "size": len(files[p]), "oid": COMMIT} for p in found
                    ]
                    self._answer(entries)
                else:
                    self._missing("EntryNotFound")
            else:
                siblings = [{"rfilename": path} for path in files]
                self._answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif "resolve" in parts:
            at = parts.index("resolve")
            files = self.store.repositories.get("/".join(parts[:at]))
            content = None if files is None else files.get("/".join(parts[at + 2 :]))
            if content is None:
                self._missing("EntryNotFound" if files is not None else "RepoNotFound")
            else:
                self._answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self._missing("EntryNotFound")

    def do_PUT(self) -> None:
        self.store.objects[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            data = json.loads(body)
            name = f"{data.get('organization') or OWNER}/{data['name']}"
            exists = name in self.store.repositories
            self.store.repositories.setdefault(name, {})
            status = 409 if exists else 200
            self._answer({"url": f"{self.store.url}/{name}", "name": name, "id": name}, status)
        elif parts == ["api", "validate-yaml"]:
            content = json.loads(body)["content"]
            self.store.validated.append(content)
            errors = [{"message": error} for error in card_errors(content)]
            self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif "preupload" in parts:
            asked = json.loads(body)["files"]
            large = (".safetensors", ".bin", ".pt", ".pth")
            modes = ["lfs" if file["path"].endswith(large) else "regular" for file in asked]
            files = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(asked, modes, strict=True)
            ]
            self._answer({"files": files})
        elif parts[-2:] == ["objects", "batch"]:
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.store.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "commit" in parts:
            files = self.store.repositories["/".join(parts[2:4])]
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.store.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    files.pop(value["path"], None)
            self.store.history.append(("/".join(parts[2:4]), dict(files)))
            url = f"{self.store.url}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
            self._answer({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._missing("EntryNotFound")
