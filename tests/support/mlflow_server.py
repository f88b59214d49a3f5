"""The part of MLflow's server that a mirror uses, for tests."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ID = "glua_bench.id"


class Server(ThreadingHTTPServer):
    """The part of MLflow's server that a mirror uses; it refuses chosen runs.

    Attributes:
        runs: MLflow's id → run, as in its answers.
        refuses: run id → HTTP status.
        status: if not 200, the answer to every request.
        seen: runs for which a copy was created.
        said: paths and bodies of all requests.
        authorized: whether a request had a user and a password.
    """

    daemon_threads = True

    def __init__(self, artifacts: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.artifacts = artifacts
        self.runs: dict[str, dict[str, Any]] = {}
        self.refuses: dict[str, int] = {}
        self.status = 200
        self.seen: list[str] = []
        self.said: list[str] = []
        self.authorized = False

    def complete(self) -> set[str]:
        """Return the ids of runs whose copies are complete."""
        tags = [{tag["key"]: tag["value"] for tag in r["data"]["tags"]} for r in self.runs.values()]
        return {own[ID] for own in tags if "glua_bench.mirrored" in own}

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        experiment = {
            "experiment_id": "1",
            "name": "glua-bench/phantom",
            "lifecycle_stage": "active",
            "artifact_location": str(self.artifacts),
        }
        own = {tag["key"]: tag["value"] for tag in asked.get("tags", [])}.get(ID, "")
        if self.status != 200 or own in self.refuses:
            return self.refuses.get(own, self.status), {"error_code": "NO", "message": f"no {own}"}
        if path == "experiments/get-by-name":
            return 200, {"experiment": experiment}
        if path == "experiments/search":
            return 200, {"experiments": [experiment]}
        if path == "runs/search":
            wanted = re.findall(r"= '(\w+)'", asked["filter"])[0]
            tag = {"key": ID, "value": wanted}
            return 200, {"runs": [r for r in self.runs.values() if tag in r["data"]["tags"]]}
        if path == "runs/create":
            self.seen.append(own)
            number = f"{len(self.runs):032x}"
            info = {
                "run_id": number,
                "experiment_id": "1",
                "status": "RUNNING",
                "artifact_uri": str(self.artifacts / number),
                "lifecycle_stage": "active",
            }
            self.runs[number] = {"info": info, "data": {"tags": asked["tags"]}}
            return 200, {"run": self.runs[number]}
        if path == "runs/get":
            return 200, {"run": self.runs[asked["run_id"]]}
        if path == "runs/set-tag":
            tag = {"key": asked["key"], "value": asked["value"]}
            self.runs[asked["run_id"]]["data"]["tags"].append(tag)
        if path == "runs/delete":
            del self.runs[asked["run_id"]]
        if path == "runs/update":
            return 200, {"run_info": self.runs[asked["run_id"]]["info"]}
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        place = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        asked = json.loads(self.rfile.read(length) or b"{}")
        asked |= {name: values[0] for name, values in parse_qs(place.query).items()}
        server: Any = self.server
        server.authorized |= "Authorization" in self.headers
        server.said += [self.path, json.dumps(asked, ensure_ascii=False)]
        status, answer = server.answer(place.path.partition("/mlflow/")[2], asked)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PATCH = do_GET

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""
