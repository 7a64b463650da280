"""Prompts and settings may come from anywhere: whatever they hold, the public API names what is wrong with it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.errors import DashError, PolicyError, RequestError
from dash_export.runtime import Sampling, Session

LoadRuntime = Callable[..., DashRuntime]
NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [
    None, True, False, NAN, INF, -INF, -1, 0, 2**31, 2**64, 2**70, -(2**70), 10**400, 10**5000, 1.5, 1e-320, 1e308, 1j,
    "x", "", "\udc80", "a\0b", "0.9", "token", "y" * 300, b"x", bytearray(b"x"), memoryview(b"ab"),
    [], [[]], [[1], [2, 3]], [1.5], [True], [None], ["a"], [2**70], [-1], [1, "a"], [NAN], [1] * 600, {1}, {},
    {"a": 1}, {1: NAN}, object(), Ellipsis, len, np.array(1), np.array([1.5]), np.array([[1]]), np.array([]),
    np.zeros((2, 6)), np.array(["a"]), np.array([True]), np.array([2**64 - 1], np.uint64), np.zeros(2, [("a", int)]),
    np.float64(NAN), np.float16(INF), np.bool_(1), np.datetime64("2020"), np.bytes_(b"x"), Sampling(), Setting(),
]  # fmt: skip


def calls(runtime: DashRuntime, session: Session) -> dict[str, Callable[[Any], Any]]:
    """Every prompt, and every field of a setting."""
    found: dict[str, Callable[[Any], Any]] = {
        "generate": lambda odd: runtime.generate(odd, 1),
        "generate_batch": lambda odd: runtime.generate_batch([odd], 1),
        "score": runtime.score,
        "score.actions": lambda odd: session.score([1, 2], 2, odd),
        "logits": session.logits,
        "prefill": session.prefill,
        "embeddings": lambda odd: session.prefill(embeddings=odd),
        "restart": session.restart,
        "decode_one": session.decode_one,
    }
    for name in Sampling.__dataclass_fields__:
        found[f"Sampling.{name}"] = lambda odd, name=name: runtime.generate(
            [1, 2], 2, Sampling(**{"top_k": 9, name: odd})
        )
    for name in Setting.__dataclass_fields__:
        for kind in ("token", "static"):
            given = {"policy": kind} | ({"skipped": 1} if name in ("policy", "hold") else {})
            found[f"session.{name}.{kind}"] = lambda odd, name=name, given=given: runtime.generate(
                [1, 2], 2, **given | {name: odd}
            )
    return found


def test_nothing_but_our_errors(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    session, wrong = runtime.session(), []
    for name, call in calls(runtime, session).items():
        for number, odd in enumerate(ODD):
            session.reset()
            try:
                call(odd)
            except Exception as error:
                ragged = isinstance(error, ValueError) and name in ("score.actions", "embeddings")  # numpy says so
                if not (ragged or isinstance(error, DashError)) or len(str(error)) > 700:
                    wrong.append(f"{name}({number}: {type(odd).__name__}): {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    np.testing.assert_array_equal(session.generate([1, 2], 5).tokens, runtime.generate([1, 2], 5).tokens)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda _: Sampling(top_k=1.5), RequestError, "top_k must be int, got 1.5"),
        (lambda _: Sampling(seed=True), RequestError, "seed must be int, got True"),
        (lambda _: Sampling(logit_bias={"a": 1}), RequestError, "a key of logit_bias must be int, got 'a'"),
        (lambda _: Setting(budget="0.9"), PolicyError, "budget must be float, got '0.9'"),
        (lambda r: r.session(skip=5), PolicyError, "skip must be a list, got 5"),
        (lambda r: r.batch(1 << 40), RequestError, "size.* from 1 to 1024"),
        (lambda r: r.load(r.bundle.root, threads=-1), RequestError, "threads must be from 0"),
        (lambda r: r.session().stream([1], 0), RequestError, "max_tokens must be at least 1"),
        (lambda r: r.session().stream([1], NAN), TypeError, "integer"),
        (lambda r: r.score([1.5, 2]), RequestError, "Token ids must be one list of integers"),
        (lambda r: r.session().score([1, 2], 2, np.zeros((2, 5), np.int8)), PolicyError, r"must be \[2, 6\]"),
        (lambda r: r.chat("hello"), RequestError, "must be a list of messages {role, content}, not one text"),
        (lambda r: r.chat([{"role": 1}]), RequestError, "both text"),
        (lambda r: r.batch(2).stream("hello"), RequestError, "a list of prompts, not one text"),
        (lambda r: r.generate_batch("hello"), RequestError, "a list of prompts, not one text"),
    ],
)
def test_what_was_wrong_is_named(
    given: Callable[[DashRuntime], Any], error: type[Exception], message: str, tiny_runtime: LoadRuntime
) -> None:
    with pytest.raises(error, match=message):
        given(tiny_runtime())


def test_numpy_s_numbers_become_python_s(tiny_runtime: LoadRuntime) -> None:
    """A small integer type must not overflow in a sum with others."""
    runtime = tiny_runtime()
    assert len(runtime.generate(np.arange(200, dtype=np.uint8), np.int8(100)).tokens) == 100
    setting = Setting(budget=np.float32(0.5), max_layers=np.int8(5), hold=np.bool_(False))  # type: ignore[arg-type]
    assert [type(getattr(setting, name)) for name in ("budget", "max_layers", "hold")] == [float, int, bool]
    assert Setting(skip=np.array([2, 3])) == Setting(skip=(2, 3))  # type: ignore[arg-type]
    sampled = Sampling(top_k=np.int64(3), stop=["a\n"], logit_bias={5: np.float32(0.5)})  # type: ignore[arg-type, dict-item]
    assert sampled == Sampling(top_k=3, stop=("a\n",), logit_bias={5: 0.5})
