"""A server under 64 streams for ten minutes: clients of all kinds, some of which leave in the middle; each answer is
the one that it gave when nothing else ran, memory stays flat, and SIGTERM ends all of them honestly.

    dash-export build MODEL -o my.dash --weights fp32    # what decodes together changes no token

    python tools/attack/streams.py my.dash --minutes 10 --streams 64
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import httpx
from shared import finish, growth, resident
from started_server import Process, serving

from dash_export.bundle.bundle import Bundle
from dash_export.files.resources import resource_folder
from dash_export.text.tokenizer import Text

ROWS, WAITING, DRAIN = 8, 40, 20
FLAT = 0.05
SETTINGS = ({"policy": "dense"}, {"policy": "static", "skipped": 2}, {"budget": 0.9}, {"budget": 0.85, "hold": False})
_GONE = (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError)


@dataclass
class Load:
    client: httpx.AsyncClient
    bodies: list[tuple[str, dict[str, Any]]]
    expected: list[str]
    closing: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def stream(self, number: int) -> None:
        random = Random(number)
        while len(self.faults) < 100:
            index, leaves = random.randrange(len(self.bodies)), random.choice((0, 0, 0, random.randint(1, 12)))
            try:
                text, ended = await asyncio.wait_for(self.answer(index, leaves), 300)
                expected = self.expected[index]
                if not (text == expected if ended == "answered" else expected.startswith(text)):
                    self.faults.append(f"{index}, {ended}: {text!r}, and alone {expected!r}")
            except _GONE as error:
                ended = "closed"
                self.faults += [] if self.closing else [f"{index}: {error!r}"]
            except asyncio.TimeoutError:
                ended = "hung"
                self.faults.append(f"{index}: no end within 300 s")
            self.counts[ended] += 1
            if ended == "told to wait":
                await asyncio.sleep(1 + random.random())
            elif ended in ("closed", "told that it closes"):
                return

    async def answer(self, index: int, leaves: int) -> tuple[str, str]:
        """The text, and how it ended. `leaves`: after so many chunks; 0: never."""
        path, body = self.bodies[index]
        text, chunks = "", 0
        async with self.client.stream("POST", path, json=body | {"stream": True}) as reply:
            if reply.status_code != 200:
                return "", self.told(reply.status_code, await reply.aread())
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    return text, "answered"
                if not line.startswith("data: "):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return text, self.told(500, chunk)
                choice = chunk["choices"][0]
                text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
                chunks += 1
                if chunks == leaves:
                    return text, "left"
        self.faults.append(f"{index}: cut after {text!r}")
        return text, "cut"

    def told(self, status: int, found: object) -> str:
        if self.closing:
            return "told that it closes"
        self.faults += [] if status == 429 else [f"{status}: {found}"]
        return "told to wait"


def drawn(random: Random, count: int, letters: int, chats: bool) -> list[tuple[str, dict[str, Any]]]:
    text = (resource_folder("calibration") / "prose.txt").read_text(encoding="utf-8")
    bodies: list[tuple[str, dict[str, Any]]] = []
    for _ in range(count):
        start = random.randrange(len(text) - 1000)
        words = text[start : start + random.randint(10, letters)]
        body: dict[str, Any] = {"max_tokens": random.randint(4, 48), "dash": random.choice(SETTINGS)}
        body |= {"temperature": random.choice((0, 0, 0.8)), "stop": random.choice((None, None, ["and"])), "seed": 7}
        if not chats or random.random() < 0.5:
            bodies.append(("/v1/completions", body | {"prompt": words}))
        else:
            bodies.append(("/v1/chat/completions", body | {"messages": [{"role": "user", "content": words}]}))
    return bodies


async def load(
    address: str, process: Process, bodies: list[tuple[str, dict[str, Any]]], minutes: float, streams: int
) -> tuple[Load, list[float]]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        found = Load(client, bodies, [])
        for index in range(len(found.bodies)):
            text, ended = await found.answer(index, 0)
            assert ended == "answered", ended
            found.expected.append(text)
        began = time.monotonic()
        clients = [asyncio.create_task(found.stream(number)) for number in range(streams)]
        sizes = []
        while time.monotonic() - began < 60 * minutes and not all(one.done() for one in clients):
            sizes.append(resident(process.pid))
            await asyncio.sleep(1)
        found.closing = True
        process.terminate()
        await asyncio.gather(*clients)
    return found, sizes


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu-fp32", show_default=True)
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--streams", default=64, show_default=True)
def main(bundle: Path, target: str, minutes: float, streams: int) -> None:
    """Ask alone, then with all."""
    opened = Bundle.open(bundle)
    letters = min(900, opened.manifest.decoder.max_positions // 4)
    bodies = drawn(Random(0), 60, letters, Text(opened.root).template is not None)
    options = ("--rows", str(ROWS), "--waiting", str(WAITING), "--drain", str(DRAIN))
    with serving([bundle], target, *options) as (address, process):
        done, sizes = asyncio.run(load(address, process, bodies, minutes, streams))
        code = process.wait(DRAIN + 10)
    done.faults += [] if code == 0 else [f"the server ended with {code}"]
    figures = growth(sizes, FLAT, done.faults)
    finish("streams", done.faults, streams=streams, minutes=minutes, done=done.counts, **figures)


if __name__ == "__main__":
    main()
