"""A server before which 10,000 connections crowd: silent, slow or greedy ones (headers, small chunks, a body), none
with the key. All come back when they are closed. Meanwhile `/health` must answer within half a second.

    python tools/attack/crowd.py my.dash --connections 10000 --seconds 60

The crowd is a process of its own. Both need a file for each connection (`ulimit -n`).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import click
import httpx
import numpy as np
from shared import finish, resident
from started_server import serving

from dash_export.commands.serve import raise_open_file_limit

LIMIT = 0.5
"""Seconds that an answer of `/health` may take."""
PATIENCE, PAUSE = 60.0, 10.0
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
SLOW = b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 1000
GREEDY = (
    POST + b"a:\r\n" * 250_000,
    POST + b"x: " + b"y" * 1_000_000,
    POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 150_000,
    POST + b"Content-Length: 9999999999\r\n\r\n" + b"y" * 1_000_000,
    (POST + b"\r\n") * 20_000,
)


async def one(port: int, kind: Callable[..., Awaitable[None]], number: int, seconds: float) -> None:
    """Be a client of the crowd for `seconds`."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        with suppress(OSError, asyncio.TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.wait_for(kind(reader, writer, number), left)
            finally:
                writer.transport.abort()
        await asyncio.sleep(PAUSE if kind is greedy else 0)


async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter, _number: int) -> None:
    await reader.read()


async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    for place in range(len(SLOW)):
        writer.write(SLOW[place : place + 1])
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(1), 3 + number % 5)
            return


async def greedy(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    writer.transport.set_write_buffer_limits(high=0)
    sent = memoryview(GREEDY[number % len(GREEDY)])
    for start in range(0, len(sent), 1 << 16):
        writer.write(sent[start : start + (1 << 16)])
        await writer.drain()


KINDS = (silent, slow, slow, slow, greedy)


def crowd(port: int, count: int, rate: int, seconds: float) -> None:
    """Open `count` connections, `rate` a second, and keep them up for `seconds` in all."""
    raise_open_file_limit()

    async def come() -> None:
        began, clients = time.monotonic(), list[asyncio.Task[None]]()
        for number, kind in zip(range(count), cycle(KINDS), strict=False):
            left = seconds - (time.monotonic() - began)
            clients.append(asyncio.create_task(one(port, kind, number // len(KINDS), left)))
            if number % 50 == 0:
                await asyncio.sleep(max(0.0, number / rate - (time.monotonic() - began)))
        await asyncio.gather(*clients)

    asyncio.run(come())


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--connections", default=10_000, show_default=True)
@click.option("--rate", default=500, show_default=True, help="New connections a second, until all have come.")
@click.option("--seconds", default=60.0, show_default=True)
def main(bundle: Path, target: str, connections: int, rate: int, seconds: float) -> None:
    """Ask while the crowd is there."""
    waits, most, faults = list[float](), 0.0, list[str]()
    with (
        tempfile.TemporaryFile("w+") as told,
        serving([bundle], target, "--api-key", "secret", output=told) as (address, process),
    ):
        before, held = resident(process.pid), 0
        people = get_context("spawn").Process(target=crowd, args=(httpx.URL(address).port, connections, rate, seconds))

        people.start()
        while people.is_alive():
            began = time.monotonic()
            if httpx.get(f"{address}/health", timeout=PATIENCE).status_code != 200:  # on a connection of its own
                faults.append("/health is not well")
            waits.append(time.monotonic() - began)
            most, held = max(most, resident(process.pid)), max(held, len([*Path(f"/proc/{process.pid}/fd").iterdir()]))
            time.sleep(0.1)
        process.terminate()
        faults += [] if process.wait(PATIENCE) == 0 else ["the server did not end well"]
        told.seek(0)
        faults += [line for line in told.read().splitlines() if "Traceback" in line]
    faults += [f"/health took {max(waits):.2f} s"] if max(waits) > LIMIT else []
    figures = {
        "connections": held, "health_median_s": round(float(np.median(waits)), 3),
        "health_worst_s": round(max(waits), 3), "memory_mb": round(most - before),
    }  # fmt: skip
    finish("crowd", faults, **figures, answers=len(waits))


if __name__ == "__main__":
    main()
