"""Requests that come, wait, decode together and end: each gets what it gets alone."""

import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from unittest.mock import Mock

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.cache import KVCache
from dash_export.backends.host.decode import BoundStep
from dash_export.core.kinds import Setting
from dash_export.errors import BackendError, ContextLengthError, PolicyError, RequestError
from dash_export.runtime import Response, Sampling
from dash_export.runtime.results import Turn
from dash_export.runtime.rows import Rows
from dash_export.runtime.session import Session
from dash_export.serve.tickets import BusyServerError, DeadlineError, Request
from tests.serve.conftest import MakeScheduler, slow_down, stream
from tests.tiny import random_ids

DENSE = Setting("dense")
SETTINGS = (DENSE, Setting("static", skip=(2, 3)), Setting("token", trade_off=0.6), Setting("token", trade_off=0.1))


def asked(number: int) -> Request:
    sampling = Sampling(1.0, top_p=0.9, seed=number) if number % 3 == 2 else Sampling()
    prompt = random_ids(3 + 7 * (number % 5), seed=number % 7)
    return Request(prompt, 4 + number % 11, sampling, SETTINGS[number % len(SETTINGS)])


def alone(runtime: DashRuntime, request: Request) -> list[int]:
    assert request.setting is not None
    session = runtime.session_with(request.setting)
    return [step.token for step in session.stream(request.prompt, request.max_tokens, request.sampling)]


def until_the_last(queue: SimpleQueue[Response]) -> list[Response]:
    told = [queue.get(timeout=20)]
    while told[-1].finish_reason is None:
        told.append(queue.get(timeout=20))
    return told


@pytest.mark.parametrize("place", ["take", "step", "tell"])
@pytest.mark.parametrize("error", [MemoryError, GeneratorExit, BackendError])
def test_nobody_waits_for_good(
    place: str, error: type[BaseException], scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails: each is told its end, by an error of ours; a row fails alone; others are answered as ever."""
    made, count = scheduler(rows=3), 0
    whole, name = {"take": (KVCache, "take"), "step": (BoundStep, "decode_batch"), "tell": (Turn, "respond")}[place]
    sound = getattr(whole, name)

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 9:
            raise error("no")
        return sound(*arguments)

    requests = [asked(number) for number in range(9)]
    with monkeypatch.context() as patch:
        patch.setattr(whole, name, failing)
        tickets: list[SimpleQueue[Response]] = [SimpleQueue() for _ in requests]
        for request, queue in zip(requests, tickets, strict=True):
            made.submit(request, queue.put)
        told = [until_the_last(queue) for queue in tickets]
    assert count >= 9
    assert made.alive
    assert (made.waiting, made.running) == (0, 0)
    errors = [str(responses[-1].error) for responses in told if responses[-1].error is not None]
    assert ("no" in errors) == (error is BackendError)
    if place == "tell" and error in (BackendError, MemoryError):
        assert len(errors) == 1
    for request, responses in zip(requests, told, strict=True):
        if responses[-1].error is None:
            assert [step.token for step in responses] == alone(made.runtime, request)
    assert [step.token for step in stream(made, requests[0])] == alone(made.runtime, requests[0])


def test_who_cannot_be_told_does_not_end_the_others(scheduler: MakeScheduler, runtime: DashRuntime) -> None:
    made = scheduler(rows=3)
    made.submit(asked(3), Mock(side_effect=RuntimeError("gone")))
    assert [step.token for step in stream(made, asked(1))] == alone(runtime, asked(1))


def test_each_gets_what_it_gets_alone(scheduler: MakeScheduler, runtime: DashRuntime) -> None:
    made = scheduler(rows=3)
    requests = [asked(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda request: [step.token for step in stream(made, request)], requests))
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == alone(runtime, request)
    assert (made.figures["finished"], made.figures["failed"], made.waiting, made.running) == (40, 0, 0, 0)
    assert made.figures["tokens"] == sum(map(len, found))
    assert made.figures["known_tokens"] > 0, "prompts come again, and go on from one another"
    assert not made._live


def test_a_chunk_between_two_steps(scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one prompt; several enter together where no row runs, with no more tokens than a chunk."""
    made, told = scheduler(start=False, rows=5), SimpleQueue[Response]()
    made._prompt.prefill_chunk, done = 32, list[int | str]()
    prefill, advance = Session.prefill, Rows.advance
    monkeypatch.setattr(Session, "prefill", lambda session, ids: done.append(len(ids)) or prefill(session, ids))
    monkeypatch.setattr(Rows, "advance", lambda rows, *some: done.append("step") or advance(rows, *some))
    for place, size in enumerate((10, 11, 9, 40, 5)):
        made.submit(Request(random_ids(size, seed=place), 8), told.put)
    made.start()
    while done.count("step") < 5:
        told.get(timeout=20)
    assert done[: done.index(5) + 3] == [10, 11, 9, "step", 32, "step", 8, "step", 5, "step", "step"]


def test_without_a_setting_it_follows_the_load(scheduler: MakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only row skips as was said, rows together are dense."""
    slow_down(0.005, monkeypatch)
    made = scheduler(rows=2, alone=Setting("static", skip=(2, 3)))
    one = [step.actions.tolist() for step in stream(made, Request(random_ids(4), 6))][1:]
    assert one == [[0, 0, 1, 1, 0, 0]] * 5
    second: SimpleQueue[Response] = SimpleQueue()
    taken = []
    for step in stream(made, Request(random_ids(4, seed=1), 40)):
        if step.statistics.tokens == 4:
            made.submit(Request(random_ids(5), 10), second.put)
        taken.append(step.actions.tolist())
    assert [0] * 6 in taken[1:]
    assert taken[1] == taken[-1] == [0, 0, 1, 1, 0, 0]


def test_a_full_queue(scheduler: MakeScheduler) -> None:
    made = scheduler(start=False, waiting=2)
    for _ in range(2):
        unbounded = made.submit(Request(random_ids(4)), lambda _: None)
        assert unbounded.max_tokens == made.context - 4 > 256, "without a limit an answer may fill the context"
    with pytest.raises(BusyServerError, match="has 2 requests waiting: ask again later"):
        made.submit(Request(random_ids(4), 3), lambda _: None)
    assert made.figures["refused"] == 1
    assert not made.close(), "what has not begun fails"
    assert made.close(), "nothing is left"


def test_what_cannot_be_answered_is_refused(scheduler: MakeScheduler) -> None:
    made = scheduler()
    for request, error in (
        (Request([]), RequestError),
        (Request([5000]), RequestError),
        (Request(random_ids(600)), ContextLengthError),
        (Request([5], 0), RequestError),
        (Request([5], setting=Setting("token", budget=0.001)), PolicyError),
    ):
        with pytest.raises(error):
            made.submit(request, lambda _: None)
    assert made.figures["requests"] == 0


def test_time_that_is_over(scheduler: MakeScheduler) -> None:
    made = scheduler(rows=1)
    with pytest.raises(DeadlineError):
        list(stream(made, Request(random_ids(4), 5, deadline=0.0)))
    with pytest.raises(DeadlineError):
        list(stream(made, Request(random_ids(4), 480, deadline=0.02, setting=DENSE)))
    assert len(list(stream(made, Request(random_ids(4), 5, deadline=60.0)))) == 5


def test_cancelled(scheduler: MakeScheduler, runtime: DashRuntime) -> None:
    """While it decodes, by leaving its stream; while it waits. The others go on."""
    made = scheduler(rows=1)
    answer = stream(made, Request(random_ids(4), 400, setting=DENSE))
    next(answer)
    waits: SimpleQueue[Response] = SimpleQueue()
    ticket = made.submit(Request(random_ids(4), 5), waits.put)
    made.cancel(ticket)
    assert "cancelled" in str(waits.get(timeout=10).error)
    answer.close()  # type: ignore[attr-defined]
    request = Request(random_ids(6), 9, setting=DENSE)
    assert [step.token for step in stream(made, request)] == alone(runtime, request)
    assert made.running == 0
    assert (made.figures["finished"], made.figures["failed"], made.figures["cancelled"]) == (1, 0, 2)


def test_closing_lets_answers_end(scheduler: MakeScheduler) -> None:
    """Or fails them, where they have no time."""
    for seconds, size in ((30.0, 20), (0.01, 400)):
        made, queues = scheduler(rows=1), [SimpleQueue[Response]() for _ in range(3)]
        for queue in queues:
            made.submit(Request(random_ids(4), size, setting=DENSE), queue.put)
        while not made.running:
            time.sleep(0.001)
        assert made.close(seconds) is (size == 20)
        last = [until_the_last(queue)[-1] for queue in queues]
        if size == 20:
            assert {response.finish_reason for response in last} == {"length"}
        else:
            assert {(type(one.error), str(one.error)) for one in last} == {(DeadlineError, "The server is closing.")}
        with pytest.raises(BusyServerError, match="is closing"):
            made.submit(Request(random_ids(4), 20), queues[0].put)


def test_idle_it_waits(scheduler: MakeScheduler) -> None:
    made = scheduler()
    list(stream(made, Request(random_ids(4), 3)))
    began = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - began < 0.1


def test_prompts_are_kept_up_to_so_many_bytes(scheduler: MakeScheduler) -> None:
    """Room for two: the least recently used goes; one that goes on from another takes its place."""
    starts = [random_ids(64, seed=seed) for seed in range(3)]
    one = 64 * 6 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, their size, bytes
    made = scheduler(rows=1, prefix_bytes=2 * one)

    def known(prompt: np.ndarray) -> int:
        before = made.figures["known_tokens"]
        list(stream(made, Request(prompt, 1)))
        return made.figures["known_tokens"] - before

    assert [known(start) for start in starts[:2]] == [0, 0]
    assert known(starts[0]) == 48, "whole tiles of all but the last two tokens"
    assert known(starts[2]) == 0
    assert known(starts[0]) == 48
    assert known(starts[1]) == 0, "it was the least recently used"
    branch = np.concatenate([starts[0][:40], random_ids(24, seed=5)])
    assert known(branch) == 32
    assert known(starts[0]) == 48, "what a branch begins with was used too"
    assert [known(random_ids(200, seed=9)), known(starts[0])] == [0, 48]
