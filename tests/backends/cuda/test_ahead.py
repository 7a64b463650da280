"""Tokens that are launched before the host knows them: the same as the CPU's, whatever is done to the session."""

import gc
import logging
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from dash_export import Sampling
from dash_export.backends.cuda.cuda import MAIN, Cuda, Mirror
from dash_export.backends.cuda.cuda_graph import CudaGraph
from dash_export.backends.cuda.kernels import PART
from dash_export.backends.cuda.step import DeviceStep
from dash_export.core.rule import Rule, static_rule
from dash_export.core.sampling import Draw, Sampler
from dash_export.errors import BackendError
from dash_export.runtime.session import Session
from tests.backends.cuda.conftest import BUILDS, IDS, ORDERS, SAMPLED, TOGETHER, TOLERANCE, Host, MakeOnCard, OnCard
from tests.standin.ordered_streams import Call

TOKENS = 14
GREEDY = Sampler(Sampling()).draw
RULES: dict[str, Callable[[Host], Rule]] = {
    "dense": lambda _: static_rule(()),
    "static": lambda _: static_rule((0,)),
    "token": lambda host: host.rule,
}
TOKEN: list[Call] = [
    (MAIN, "record", "ended"),
    (MAIN, "launch", "graph"),
    (MAIN, "record", "ended ahead"),
    ("host", "wait", "ended"),
]
"""What the host does for a token that runs already: it launches the next one, and waits for the end of this one."""


def answer(
    session: Session, ids: np.ndarray = IDS[:20], many: int = TOKENS, sampling: Sampling | None = None
) -> tuple[list[int], list[bytes]]:
    responses = [*session.stream(ids.tolist(), many, sampling)]
    return [one.token for one in responses], [one.actions.tobytes() for one in responses]


def a_card_that_is_fast(made: OnCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was launched has ended when a wait of the host ends."""
    sound = Cuda.wait_for_event

    def wait(device: Cuda, event: str) -> None:
        sound(device, event)
        made.card.drain()

    monkeypatch.setattr(Cuda, "wait_for_event", wait)


CASES = [
    *(("trt10", kind, MAIN, False) for kind in RULES),
    *((target, "token", MAIN, False) for target in BUILDS if target != "trt10"),
    *(("trt10", "token", first, True) for first in ORDERS),
]


@pytest.mark.parametrize(("target", "kind", "first", "fast"), CASES)
def test_an_answer(
    target: str,
    kind: str,
    first: str | int,
    fast: bool,
    on_card: MakeOnCard,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, rule = on_card(target, "device", first), RULES[kind](host)
    if fast:
        a_card_that_is_fast(made, monkeypatch)
    expected = answer(host.runtime.session_under(rule))
    session = made.runtime.session_under(rule)
    assert answer(session) == expected
    assert len(made.card.recorded) == 3, "one that waits for its token, and two that do not, for two places of results"
    made.card.forget()
    assert answer(session, IDS[:7]) == answer(_after(host, rule), IDS[:7])
    tokens = made.card.log[-4 * (TOKENS - 3) :]
    assert tokens == TOKEN * (TOKENS - 3), "from the third on; the last one is launched in vain"


def _after(host: Host, rule: Rule) -> Session:
    session = host.runtime.session_under(rule)
    answer(session)
    return session


def test_a_static_set_is_launched_ahead_in_every_mode(on_card: MakeOnCard, host: Host) -> None:
    for dispatch in ("sync", "overlapped"):
        made = on_card("trt10", dispatch)
        session = made.runtime.session_under(static_rule((1,)))
        assert answer(session) == answer(host.runtime.session_under(static_rule((1,))))
        assert made.card.log[-4:] == TOKEN
        made.card.forget()
        assert answer(made.runtime.session_under(host.rule)) == answer(host.runtime.session_under(host.rule))
        assert not any(call == (MAIN, "launch", "graph") for call in made.card.log)


@pytest.mark.parametrize("sampling", SAMPLED[::2])
def test_a_sampled_answer(sampling: Sampling, on_card: MakeOnCard, host: Host) -> None:
    """The device draws by the number that the host draws with. Where it draws another token, by rounding, that one is
    decoded once more.
    """
    made = on_card("trt10")
    live = [each.session() for each in (host.runtime, made.runtime)]
    expected, found = (answer(session, sampling=sampling)[0] for session in live)
    assert found == expected
    assert len({*found}) > 5
    made.card.forget()
    assert answer(live[1], IDS[:7], sampling=sampling) == answer(live[0], IDS[:7], sampling=sampling)
    assert made.card.log.count(TOKEN[0]) >= TOKENS - 3
    assert made.card.log.count(("host", "synchronize", MAIN)) <= 6, "the prompt, the first two, and few in vain"


@pytest.mark.parametrize("sampling", [None, Sampling(repetition_penalty=1.3)])
def test_what_is_not_known_ahead_is_waited_for(sampling: Sampling | None, on_card: MakeOnCard, host: Host) -> None:
    """A rule that changes, as that of a budget that is held does with every token; a penalty of tokens before."""
    made = on_card("trt10", "device")
    live = [each.session_under(host.rule) for each in (host.runtime, made.runtime)]
    for session in live if sampling is None else ():
        session.rules.decoded = lambda _, rules=session.rules: setattr(rules, "rule", rules.rule.scaled(1.01))  # type: ignore[method-assign, misc]
    assert answer(live[1], sampling=sampling) == answer(live[0], sampling=sampling)
    assert (MAIN, "record", "ended") not in made.card.log


def left(session: Session, ids: np.ndarray = IDS[:20]) -> int:
    """An answer that is left in the middle, with a token launched ahead; the token that it would be."""
    answers = session.stream(ids.tolist(), TOKENS)
    for _ in range(6):
        token = next(answers).token
    return token


def another_token(session: Session) -> Any:
    """Than the likeliest, again and again."""
    session.prefill(IDS[:20])
    session.reserve(9)
    step = session.bound(1)
    for token in (3, 1, 4, 1, 5, 9):
        step.decode(token, session.rules.rule, GREEDY)
    return step.logits[0, 0].copy()


def another_text_as_long(session: Session) -> Any:
    """The same token follows at the same position."""
    token = left(session)
    session.reset()
    session.prefill(IDS[30:55])
    return session.decode_one(token)[0]


def another_rule(session: Session) -> Any:
    """For the very token that was launched."""
    session.prefill(IDS[:20])
    session.reserve(9)
    step, token = session.bound(1), 3
    for _ in range(4):
        step.decode(token, session.rules.rule, GREEDY)
        token = int(step.logits[0, 0].argmax())
    step.decode(token, static_rule((0, 1)), GREEDY)
    return step.logits[0, 0].copy()


def another_length(session: Session) -> Any:
    """Of the same text: the token is the one that was launched, further on."""
    token = left(session)
    session.rewind_to(session.tokens[:18])
    return session.decode_one(token)[0]


def what_a_fork_goes_on_with(session: Session) -> Any:
    left(session)
    twin = session.fork()
    return answer(twin, IDS[40:44])[0], answer(session, IDS[44:49])[0]


def another_prefix(session: Session) -> Any:
    """In whose place the same token is decoded."""
    token = left(session)
    other = session.fork()
    other.restart(IDS[30:55])
    session.load_prefix(other.tokens, other.cache)
    return session.decode_one(token)[0]


DONE = [another_token, another_text_as_long, another_rule, another_length, what_a_fork_goes_on_with, another_prefix]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("done", DONE)
def test_what_was_launched_in_vain(
    done: Callable[[Session], Any], fast: bool, on_card: MakeOnCard, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens here repeat, so that the same one follows other texts."""
    made = on_card("trt10")
    if fast:
        a_card_that_is_fast(made, monkeypatch)
    live = [each.session_under(static_rule((0,))) for each in (host.runtime, made.runtime)]
    expected, found = (done(session) for session in live)
    assert (MAIN, "record", "ended") in made.card.log
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=TOLERANCE)


def test_a_session_that_goes_in_a_recording(on_card: MakeOnCard, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for its step that was launched ahead, and not for a stream that is just recorded."""
    made, sound, errors = on_card("trt10", "device"), DeviceStep._record, list[Any]()
    gone = [made.runtime.session_under(static_rule((0,)))]
    answer(gone[0])
    assert gone[0].bound(1)._ahead is not None  # type: ignore[union-attr]

    def record(*given: Any) -> None:
        gone.clear()
        gc.collect()
        sound(*given)

    monkeypatch.setattr(DeviceStep, "_record", record)
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    assert answer(made.runtime.session_under(host.rule)) == answer(host.runtime.session_under(host.rule))
    assert not errors


def test_the_last_place_of_the_cache(on_card: MakeOnCard, host: Host) -> None:
    """Nothing is launched after what takes it: there is no row for that."""
    made = on_card("portable")
    steps, ids = [], np.resize(IDS, 90)
    for session in (host.runtime.session(), made.runtime.session()):
        token = int(session.prefill(ids).argmax())
        session.reserve(6)
        steps.append(session.bound(1))
        for _ in range(6):
            made.card.forget()
            steps[-1].decode(token, session.rules.rule, GREEDY)
            token = int(steps[-1].logits[0, 0].argmax())
    assert made.card.log == [("host", "synchronize", MAIN)], "it ran already, and nothing follows"
    np.testing.assert_allclose(steps[1].logits, steps[0].logits, atol=TOLERANCE)


def test_a_device_without_kernels(
    on_card: MakeOnCard, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its known actions are graphs all the same; it is asked once."""
    monkeypatch.setattr(CudaGraph, "follow", Mock(side_effect=BackendError("NVRTC is missing")))
    made = on_card("portable")
    with caplog.at_level(logging.INFO, "dash_export.backends.cuda.step"):
        for _ in range(2):
            assert answer(made.runtime.session()) == answer(host.runtime.session())
    assert [record.message for record in caplog.records] == ["no token is launched ahead here (NVRTC is missing)"]
    assert made.card.log[-2:] == [(MAIN, "launch", "graph"), ("host", "synchronize", MAIN)]


def test_what_ran_ahead_has_its_own_damage(on_card: MakeOnCard, host: Host) -> None:
    """Not that of the token before, which lies on the other side."""
    damages = []
    for runtime in (host.runtime, on_card("portable", "device").runtime):
        session = runtime.session_under(host.rule)
        token, found = int(session.prefill(IDS[:20]).argmax()), []
        session.reserve(6)
        step = session.bound(1)
        for _ in range(6):
            step.decode(token, host.rule, GREEDY)
            found.append(step.damage[:, 0].copy())
            token = int(step.logits[0, 0].argmax())
        damages.append(np.array(found))
    assert np.abs(np.diff(damages[0], axis=0)).max() > 1e-3
    np.testing.assert_allclose(damages[1], damages[0], atol=1e-5)


DRAWS = [
    (Draw(1.0, 0, 1.0, np.inf, 0.1), 0, 1),
    (Draw(1.0, 0, 1.0, np.inf, 0.45), PART - 1, 1),
    (Draw(1.0, 0, 1.0, np.inf, 0.55), PART, 1),
    (Draw(1.0, 0, 1.0, np.inf, 0.8), 2 * PART - 1, PART - 1),
    (Draw(1.0, 0, 1.0, np.inf, 0.94), 2 * PART - 1, PART),
    (Draw(1.0, 2, 1.0, np.inf, 0.94), 2 * PART - 1, PART - 1),
    (Draw(1.0, 0, 0.7, np.inf, 0.94), 2 * PART - 1, PART - 1),
    (Draw(1.0, 0, 1.0, 1.2, 0.94), 2 * PART - 1, PART - 1),
    (Draw(0.0, 0, 1.0, np.inf, 0.94), 0, 1),
]
"""(draw, the token of each of two rows): four tokens at the ends of two parts, of equal weight and each of 1/e."""


@pytest.mark.usefixtures("card")
def test_kernels_draw_from_all_parts() -> None:
    """Of a vocabulary of whole parts, again and again by one graph."""
    device, vocab = Cuda(), 2 * PART
    logits, draws = Mirror(device, (2, vocab), np.float32), Mirror(device, (2, len(Draw._fields)), np.float64)
    ids, positions = (Mirror(device, (2,), np.int64) for _ in range(2))

    def step(graph: CudaGraph) -> None:
        for each in (logits, draws):
            device.copy(MAIN, each.memory, each.host)
        graph.follow(MAIN, logits.memory, draws.memory, ids.memory, positions.memory)
        for each in (ids, positions):
            device.copy(MAIN, each.host, each.memory)

    logits.host[:] = -100
    logits.host[0, [0, PART - 1, PART, 2 * PART - 1]] = 2
    logits.host[1, [1, PART - 1, PART, 2 * PART - 1]] = 3, 2, 1, 0
    graph = device.graph(MAIN, 0, step)
    for count, (draw, *expected) in enumerate(DRAWS, 1):
        draws.host[:] = draw
        graph.launch(MAIN)
        device.synchronize(MAIN)
        assert ids.host.tolist() == expected, draw
        assert positions.host.tolist() == [count, count]


@pytest.mark.parametrize("target", TOGETHER)
def test_rows_together(target: str, on_card: MakeOnCard, host: Host) -> None:
    """Rows that end, one after another, and the next prompts in their place."""
    made = on_card(target)
    prompts, most = [IDS[start : start + 5 + start].tolist() for start in range(5)], (9, 5)
    for many in most:
        expected, found = (
            [one.tokens.tolist() for one in each.generate_batch(prompts, many, size=3)]
            for each in (host.runtime, made.runtime)
        )
        assert found == expected
    assert set(TOKEN) <= set(made.card.log)
