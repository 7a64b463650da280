"""`dash-export serve` as a process."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from dash_export.building import build
from dash_export.exporting import export
from dash_export.policy import no_policy
from tests.commands.helpers import environment, free_port, refused
from tests.tiny import tiny_checkpoint

FP32 = ("--target", "cpu-fp32")


@contextmanager
def stopped(
    root: Path, *start: str, options: tuple[str, ...] = (), after: float = 0
) -> Iterator[tuple[list[str], subprocess.Popen[str]]]:
    """What a stream tells whose server gets SIGTERM in the middle of it, and the server's process."""
    port = free_port()
    command = [sys.executable, *start, "serve", str(root), *FP32, "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    try:
        assert f"http://127.0.0.1:{port}/" in process.stderr.readline()
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            threading.Timer(after, process.send_signal, [signal.SIGTERM]).start()
            told = [line for line in lines if line]
        yield told, process
    finally:
        process.kill()


def test_it_serves_and_drains(tiny_root: Path) -> None:
    """SIGTERM in the middle of an answer lets it end. The log has its figures, and no text."""
    with stopped(tiny_root, "-m", "dash_export", options=("--log",), after=0.05) as (told, process):
        assert told[-1] == "data: [DONE]"
        ended = json.loads(told[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert ended in ("length", "stop")
        log = process.communicate(timeout=20)[1]
        assert process.returncode in (0, -signal.SIGTERM)
    (line,) = (json.loads(line) for line in log.splitlines() if line.startswith("{"))
    assert (line["operation"], line["model"], line["ended"]) == ("text_completion", "tiny", ended)
    assert line["tokens"] == len(told), "the first event was taken before, and the last is no token"
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert 0 < line["layers_per_token"] <= 6
    assert line.keys() == {
        *("time", "operation", "model", "ended", "prompt_tokens", "tokens", "seconds", "first_token_seconds"),
        *("layers_per_token", "tokens_per_second", "prefill_seconds", "time_of_dense"),
    }


def test_answers_that_do_not_end_in_time(tiny_root: Path) -> None:
    """They end with an error that their client sees, and the server with no traceback."""
    with stopped(tiny_root, "-c", SLOW, options=("--drain", "0")) as (told, process):
        assert "The server is closing" in told[-2]
        assert "Traceback" not in process.communicate(timeout=20)[1]


SLOW = """
import time
from dash_export.cli import main
from dash_export.runtime.decode import BoundStep
sound = BoundStep.decode_batch
BoundStep.decode_batch = lambda *arguments: (time.sleep(0.05), sound(*arguments))
main()
"""


def test_what_cannot_be_served(tiny_root: Path, tmp_path: Path) -> None:
    assert "give an --api-key" in refused("serve", tiny_root, *FP32, "--host", "0.0.0.0")
    assert "a folder that is no bundle" in refused("serve", tmp_path)
    assert "Two bundles are called tiny" in refused("serve", tiny_root, tiny_root, *FP32)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be listened to" in refused("serve", tiny_root, *FP32, "--port", taken.getsockname()[1])


def test_a_pace_beside_a_bundle_without_a_policy(tiny_root: Path, tmp_path: Path) -> None:
    """Alone it cannot keep one. Beside another it is the one that answers what that has no time for."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    dense = export(checkpoint, tmp_path / "dense.dash", no_policy(checkpoint.spec.num_layers, ()))
    build(dense, "cpu", weights="fp32")
    paced = (*FP32, "--pace", "50", "--budget", "0.9")
    for options in (("--pace", "50"), ("--budget", "0.9")):
        assert "Train one (about 1 minutes" in refused("serve", dense.root, *FP32, *options)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = ("--port", taken.getsockname()[1])
        assert "cannot be listened to" in refused("serve", tiny_root, dense.root, *paced, *port)
