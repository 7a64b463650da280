"""`dash-export serve` as a process."""

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.commands.helpers import environment, free_port, refused
from tests.serve.test_door import certificate

FP32 = ("--target", "cpu-fp32")


@contextmanager
def served(root: Path, *start: str, options: tuple[object, ...] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address, and its process."""
    command = [sys.executable, *start, "serve", str(root), *FP32, "--port", str(free_port()), *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    try:
        yield process.stderr.readline().partition(" at ")[2].partition("/ ")[0], process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stopped(
    root: Path, *start: str, options: tuple[str, ...] = (), after: float = 0
) -> Iterator[tuple[list[str], subprocess.Popen[str]]]:
    """What a stream tells whose server gets SIGTERM in the middle of it, and the server's process."""
    with served(root, *start, options=options) as (address, process):
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            threading.Timer(after, process.send_signal, [signal.SIGTERM]).start()
            told = [line for line in lines if line]
        yield told, process


def test_it_serves_and_drains(tiny_root: Path) -> None:
    """SIGTERM in the middle of an answer lets it end. The log has its figures, and no text."""
    with stopped(tiny_root, "-m", "dash_export", options=("--log",), after=0.05) as (told, process):
        assert told[-1] == "data: [DONE]"
        ended = json.loads(told[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert ended in ("length", "stop")
        log = process.communicate(timeout=20)[1]
        assert process.returncode == 0
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
from dash_export.backends.host.decode import BoundStep
sound = BoundStep.decode_batch
BoundStep.decode_batch = lambda *arguments: (time.sleep(0.05), sound(*arguments))
main()
"""


def megabytes(process: subprocess.Popen[str], what: str) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


def pile_up(address: str, first: bytes, piece: bytes, size: int) -> None:
    url = httpx.URL(address)
    with suppress(OSError), socket.create_connection((url.host, url.port or 80), timeout=20) as client:
        client.sendall(first)
        for _ in range(size // len(piece)):
            client.sendall(piece)


def test_nothing_is_piled_up_before_the_key_is_asked_for(tiny_root: Path) -> None:
    """100 MB over 20 connections, in every way in which headers can be sent. The server's memory is measured."""
    get, post = (f"{method} /v1/models HTTP/1.1\r\nHost: localhost\r\n".encode() for method in ("GET", "POST"))
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    ways = {
        "short headers": (get, b"a:\r\n" * 50_000),
        "a long header": (get + b"x: ", b"y" * 200_000),
        "a long path": (b"GET /", b"y" * 200_000),
        "whole heads": (b"", get + b"a:\r\n" * 10_000 + b"\r\n"),
        "short requests": (b"", (get + b"\r\n") * 5000),
        "trailers": (chunked + b"0\r\n", b"a:\r\n" * 50_000),
        "lines of chunks": (chunked + b"1;", b"y" * 200_000),
    }
    with served(tiny_root, "-m", "dash_export", options=("--api-key", "secret")) as (address, process):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        for way, (first, piece) in ways.items():
            before = megabytes(process, "VmRSS")
            with ThreadPoolExecutor(20) as pool:
                for _ in range(20):
                    pool.submit(pile_up, address, first, piece, 5_000_000)
            assert httpx.get(f"{address}/health", timeout=20).status_code == 200
            assert megabytes(process, "VmHWM") - before < 30, way
        process.terminate()
        assert process.communicate(timeout=20)[1] == "", "nothing is logged of strangers"
        assert process.returncode == 0


def test_names_context_keys_and_tls(tiny_root: Path, tmp_path: Path) -> None:
    keys, (cert, key) = tmp_path / "keys", certificate(tmp_path)
    keys.write_text("first\n\n second \n")
    options = ("--served-model-name", "small", "--ctx-size", 20, "--api-key", "third", "--api-key-file", keys,
               "--ssl-certfile", cert, "--ssl-keyfile", key)  # fmt: skip
    with served(tiny_root, "-m", "dash_export", options=options) as (address, _):
        assert address.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=address.replace("127.0.0.1", "localhost"),
                          verify=ssl.create_default_context(cafile=str(cert))) as client:  # fmt: skip
            for given, status in (("first", 200), ("second", 200), ("third", 200), ("fourth", 401)):
                found = client.get("/v1/models", headers={"authorization": f"Bearer {given}"})
                assert found.status_code == status, given
            client.headers["authorization"] = "Bearer third"
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["small"]
            for tokens, status in ((17, 200), (18, 400)):
                body = {"model": "small", "prompt": [5, 6, 7], "max_tokens": tokens}
                assert client.post("/v1/completions", json=body).status_code == status


def test_what_cannot_be_served(tiny_root: Path, tmp_path: Path) -> None:
    assert "give an --api-key" in refused("serve", tiny_root, *FP32, "--host", "0.0.0.0")
    assert "a folder that is no bundle" in refused("serve", tmp_path)
    assert "Two bundles are called tiny" in refused("serve", tiny_root, tiny_root, *FP32)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused("serve", tiny_root, *FP32, "--port", taken.getsockname()[1])
        assert "cannot be listened to: address already in use" in said
    keys = tmp_path / "keys"
    assert "There is no text file" in refused("serve", tiny_root, *FP32, "--api-key-file", keys)
    assert "it is not a regular file" in refused("serve", tiny_root, *FP32, "--api-key-file", "/dev/zero")
    for origin in ("http://[", "models.example", "https://models.example/page"):
        assert f"--cors {origin} is no web page's origin" in refused("serve", tiny_root, *FP32, "--cors", origin)
    keys.write_text("\n")
    assert "An API key is empty" in refused("serve", tiny_root, *FP32, "--api-key-file", keys)
    assert "1 bundles have 2 names" in refused("serve", tiny_root, *FP32, *("--served-model-name", "a") * 2)
    assert "--ctx-size 99999 is more than the" in refused("serve", tiny_root, *FP32, "--ctx-size", 99999)
    assert "--ssl-certfile that it belongs to" in refused("serve", tiny_root, *FP32, "--ssl-keyfile", keys)
    assert f"{keys} and its key cannot be used" in refused("serve", tiny_root, *FP32, "--ssl-certfile", keys)
