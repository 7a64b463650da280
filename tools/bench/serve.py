"""A server under load: tokens per second of several streams beside a batch of this process, by the scheduler alone and
over HTTP, and first tokens.

    python tools/bench/serve.py BUNDLE [--beside http://127.0.0.1:8001]

Variants take turns. Batch, scheduler and server share this process and its engines, because the same weights in another
process lie elsewhere in memory and are read up to 5 % faster or slower; the clients are threads of a process of their
own.
`--beside` is another server of the same model with OpenAI's API, such as `python -m llama_cpp.server --model M.gguf
--interrupt_requests False`.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from threading import Thread
from typing import Any

import click
import numpy as np
from common import held_out, print_json

from dash_export.commands.tables import print_table
from dash_export.core.kinds import Setting
from dash_export.runtime import DashRuntime
from dash_export.runtime.results import Response
from dash_export.serve.app import Server
from dash_export.serve.door import HttpServer
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import Request

PROMPT, TOKENS = 64, 96
DENSE = {"dash": {"policy": "dense"}}


@dataclass
class Stream:
    """One answer: seconds from asking to its first token, then from token to token."""

    first: float
    steps: list[float]


@contextmanager
def server_here(scheduler: Scheduler) -> Iterator[str]:
    app = Server({scheduler.runtime.bundle.name: scheduler}).app
    running, listener = HttpServer(app), socket.create_server(("127.0.0.1", 0))
    thread = Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server has ended"
        time.sleep(0.1)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


def stream(address: str, prompt: list[int] | str, body: dict[str, Any]) -> Stream:
    """Ask, and read with little work: this client's processors are the server's. Tokens that come together share the
    time.
    """
    asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True, "seed": 1, **body}
    connection, came, began = HTTPConnection(address.removeprefix("http://"), timeout=600), [], time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    with connection.getresponse() as reply:
        while piece := reply.read1():
            came.append((time.perf_counter(), piece))
    connection.close()
    if reply.status != 200:
        raise RuntimeError(f"the server answered {reply.status}: {came}")
    times, left = list[float](), b""
    for now, piece in came:
        *lines, left = (left + piece).split(b"\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        last = times[-1] if times else now
        tokens = sum(bool(chunk["choices"]) for chunk in chunks)
        times += [last + (now - last) * (number + 1) / tokens for number in range(tokens)]  # those that come together
    return Stream(times[0] - began, [after - before for before, after in pairwise(times)])


Round = tuple[float, list[Stream]]


def together(address: str, prompts: Sequence[list[int] | str], body: dict[str, Any]) -> Round:
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(lambda prompt: stream(address, prompt, body), prompts))
    return time.perf_counter() - began, streams


def joining(address: str, others: Sequence[list[int]], prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token of a prompt that comes while others decode, and how many still did then."""
    together(address, others, {**DENSE, "max_tokens": 1})
    before = 0.5  # their prompts are known now: they decode at once, for seconds
    with ThreadPoolExecutor(len(others)) as pool:
        running = [pool.submit(stream, address, other, DENSE) for other in others]
        time.sleep(before)
        first = stream(address, prompt, DENSE).first
        ended = [one.result().first + sum(one.result().steps) for one in running]
    return first, sum(end > before + first for end in ended)


def batched(runtime: DashRuntime, prompts: list[list[int]]) -> float:
    began = time.perf_counter()
    for _ in runtime.batch(len(prompts)).stream(prompts, TOKENS):
        pass
    return time.perf_counter() - began


def scheduled(scheduler: Scheduler, prompts: list[list[int]]) -> float:
    began, ended = time.perf_counter(), SimpleQueue[Response]()
    for prompt in prompts:
        request = Request(prompt, TOKENS, setting=Setting())
        scheduler.submit(request, lambda response: ended.put(response) if response.finish_reason else None)
    assert all(ended.get().error is None for _ in prompts)
    return time.perf_counter() - began


def of_a_batch(number: int, batch: Callable[[], float], other: Callable[[], float]) -> float:
    """Return the seconds of a batch over those of the other; they take turns in going first."""
    if number % 2:
        seconds = other()
        return batch() / seconds
    return batch() / other()


def milliseconds(seconds: list[float], share: float) -> float:
    return round(1e3 * float(np.quantile(seconds, share)), 1)


def row(server: str, count: int, of_batch: Sequence[float | str], rounds: list[Round]) -> tuple[Any, ...]:
    """Return a row of the table. Tokens per second: those that came, by the clock of whole rounds, prompts included."""
    streams = [one for _, each in rounds for one in each]
    steps = [step for one in streams for step in one.steps]
    tokens = (len(streams) + len(steps)) / sum(seconds for seconds, _ in rounds)
    first = milliseconds([one.first for one in streams], 0.5)
    return server, count, round(tokens, 1), *of_batch, first, milliseconds(steps, 0.5), milliseconds(steps, 0.95)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--sizes", default="1,2,4,8", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--beside", help="Address of another server of the same model, whose prompts are text.")
def main(bundle: Path, target: str, sizes: str, rounds: int, beside: str | None) -> None:
    runtime = DashRuntime.load(bundle, target, verify=False)
    counts = [int(size) for size in sizes.split(",")]
    most, width = max(counts), 2 * sum(counts) + 2
    scheduler = Scheduler(runtime, rows=most)
    ids = held_out(runtime.text.encode, width * PROMPT * (rounds + 1)).reshape(rounds + 1, width, PROMPT)
    ids[..., 0] = 1000 + np.arange(ids[..., 0].size).reshape(ids.shape[:2])  # the text repeats: no prompt may be known
    texts = ids.tolist()
    rows, joined = [], []
    spawned = ProcessPoolExecutor(1, get_context("spawn"))  # a forked one would share this one's threads' locks
    with server_here(scheduler) as address, spawned as clients:

        def asked(where: str, prompts: Sequence[list[int] | str], body: dict[str, Any]) -> Round:
            return clients.submit(together, where, prompts, body).result()

        def over_http(prompts: Sequence[list[int] | str], rounds: list[Round]) -> float:
            rounds.append(asked(address, prompts, DENSE))
            return rounds[-1][0]

        for size, count in enumerate(counts):
            pairs, ours, others = [], list[Round](), list[Round]()
            for number in range(rounds + 1):  # the first is warm-up; other prompts each time: none is known already
                before = 2 * sum(counts[:size])
                prompts, more = (texts[number][at : at + count] for at in (before, before + count))

                by_itself = of_a_batch(number, partial(batched, runtime, more), partial(scheduled, scheduler, more))
                served = of_a_batch(number, partial(batched, runtime, prompts), partial(over_http, prompts, ours))
                pairs.append((by_itself, served))
                if beside:
                    others.append(asked(beside, [*map(runtime.text.decode, prompts)], {}))
            shares = [round(median(of), 3) for of in zip(*pairs[1:], strict=True)]
            rows.append(row("dash-export", count, shares, ours[1:]))
            if others:
                rows.append(row("the other", count, ("", ""), others[1:]))
        for prompts in texts[1:] if most > 1 else ():
            alone = asked(address, prompts[-1:], DENSE)[1][0].first
            joined.append((alone, *clients.submit(joining, address, prompts[: most - 1], prompts[-2]).result()))
    heads = ("streams", "tokens/s", "scheduler, of a batch", "all, of a batch", "first token ms", "token ms", "p95")
    print_table(f"{bundle.name}, {target}, dense, over HTTP", ("server",), heads, rows)
    if joined:
        apart, late = (milliseconds([each[place] for each in joined], 0.5) for place in (0, 1))
        still = [others for _, _, others in joined]
        print(f"First token of a new prompt: alone {apart} ms, while {min(still)} to {max(still)} decode {late} ms.")
    print_json("serve", {"target": target, "streams": rows, "first": joined})


if __name__ == "__main__":
    main()
