"""A server in a process of its own, for benchmarks and attacks."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx

Process = subprocess.Popen[bytes]


@contextmanager
def serving(
    bundles: Sequence[Path], target: str, *options: str, output: IO[str] | None = None
) -> Iterator[tuple[str, Process]]:
    """A server's address, once it answers, and its process. What it prints goes to `output`."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    address, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "dash_export", "serve", *map(str, bundles)]
    command += ["--target", target, "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit("The server has ended.")
            time.sleep(0.1)
        yield address, process
    finally:
        process.kill()
        process.wait()
