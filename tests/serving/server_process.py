"""`persona-pruner serve` as a process of its own, as users start it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import requests

API_KEY = "key-of-the-tests"
REFRESH_SECONDS = 0.5
START_SECONDS = 600


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, **options: object) -> openai.AsyncOpenAI:
        settings = {"base_url": f"{self.url}/v1", "api_key": API_KEY, "max_retries": 0, "timeout": 120} | options
        return openai.AsyncOpenAI(**settings)  # type: ignore[arg-type]

    def request(self, method: str, path: str, key: str = API_KEY, **options: object) -> requests.Response:
        headers = {"authorization": f"Bearer {key}"}
        return requests.request(method, f"{self.url}{path}", headers=headers, timeout=120, **options)  # type: ignore[arg-type]

    def refreshed(self) -> None:
        """Wait until masks that were read before are old."""
        time.sleep(REFRESH_SECONDS + 0.1)


@contextlib.contextmanager
def running_server(output: Path, backbone: Path, engine: str, log: Path, *arguments: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-c", "from persona_pruner.cli import main; main()", "serve", str(output),
        "--backbone", str(backbone), "--engine", engine, "--address", f"127.0.0.1:{port}",
        "--refresh-seconds", str(REFRESH_SECONDS), "--api-key", API_KEY, *arguments,
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        server = Server(f"http://127.0.0.1:{port}", process, log)
        _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{server.url}/ready", timeout=10).status_code == 200:
                return
        time.sleep(0.3)
    raise AssertionError(f"not ready after {START_SECONDS} s:\n{server.log.read_text()[-3000:]}")
