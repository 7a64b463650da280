"""Whatever a caller gives, the public API says what is wrong with it before anything is computed."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.errors import DashError, PolicyError, RequestError
from dash_export.runtime import Batch, Sampling, Session

LoadRuntime = Callable[..., DashRuntime]
NAN, INF = float("nan"), float("inf")


class Strange:
    """Nothing can be asked of it."""

    __hash__ = None  # type: ignore[assignment]

    def _refuse(self, *_: object) -> Any:
        raise ZeroDivisionError

    __repr__ = __iter__ = __len__ = __eq__ = __index__ = __float__ = __array__ = _refuse


ODD: list[Any] = [
    None, True, False, NAN, INF, -INF, -1, 0, 2**31, 2**64, 2**70, -(2**70), 10**400, 10**5000, 1.5, 1e-320, 1e308, 1j,
    "x", "", "\udc80", "a\0b", "0.9", "token", "y" * 300, b"x", bytearray(b"x"), memoryview(b"ab"), Path("x"),
    [], [[]], [[1], [2, 3]], [1.5], [True], [None], ["a"], [2**70], [-1], [1, "a"], [NAN], [1] * 600, range(3), {1}, {},
    {"a": 1}, deque([1]), object(), Strange(), Strange, Ellipsis, len, np.array(1), np.array([1.5]), np.array([[1]]),
    np.array([]), np.zeros((2, 6)), np.zeros((3, 6), np.int8), np.array(["a"]), np.array([None]), np.array([True]),
    np.array([2**64 - 1], np.uint64), np.zeros(2, [("a", int)]), np.float64(NAN), np.float16(INF), np.bool_(1),
    np.datetime64("2020"), np.bytes_(b"x"), [{"role": 1}], [{"role": "user", "content": b"x"}], [[("role", "user")]],
    [{}], {"role": "user", "content": "x"}, ({"role": object(), "content": "x"},), Sampling(), Setting(),
]  # fmt: skip


def calls(runtime: DashRuntime, session: Session, batch: Batch) -> dict[str, Callable[[Any], Any]]:
    """Every argument of every public entry point."""
    ids, messages = [1, 2], [{"role": "user", "content": "x"}]
    found: dict[str, Callable[[Any], Any]] = {
        "load.bundle": DashRuntime.load,
        "load.target": lambda odd: DashRuntime.load(runtime.bundle.root, odd),
        "load.dispatch": lambda odd: DashRuntime.load(runtime.bundle.root, "cpu-fp32", dispatch=odd, verify=False),
        "load.threads": lambda odd: DashRuntime.load(runtime.bundle.root, "cpu-fp32", threads=odd, verify=False),
        "load.verify": lambda odd: DashRuntime.load(runtime.bundle.root, "cpu-fp32", verify=odd),
        "session_with": runtime.session_with,
        "batch_with": runtime.batch_with,
        "batch.size": runtime.batch,
        "generate": lambda odd: runtime.generate(odd, 1),
        "generate.max_tokens": lambda odd: session.stream(ids, odd),
        "generate.sampling": lambda odd: runtime.generate(ids, 1, odd),
        "generate_batch": lambda odd: runtime.generate_batch(odd, 1),
        "generate_batch.prompt": lambda odd: runtime.generate_batch([odd], 1),
        "generate_batch.max_tokens": lambda odd: runtime.generate_batch([], odd),
        "generate_batch.sampling": lambda odd: runtime.generate_batch([ids], 1, odd),
        "chat": lambda odd: list(runtime.chat(odd, 1)),
        "chat.max_tokens": lambda odd: session.chat(messages, odd),
        "chat.sampling": lambda odd: session.chat(messages, 1, odd),
        "score": runtime.score,
        "score.prefix": lambda odd: session.score(ids, odd),
        "score.actions": lambda odd: session.score(ids, 2, odd),
        "score.keep_logits": lambda odd: session.score(ids, 2, None, odd),
        "logits": session.logits,
        "prefill": session.prefill,
        "restart": session.restart,
        "decode_one": session.decode_one,
        "batch.stream": lambda odd: list(batch.stream(odd, 1)),
        "batch.stream.prompt": lambda odd: list(batch.stream([ids, odd, ids], 2)),
        "batch.stream.max_tokens": lambda odd: batch.stream([ids], odd),
        "batch.stream.sampling": lambda odd: list(batch.stream([ids], 1, odd)),
        "batch.checked": batch.checked,
    }
    for name in Sampling.__dataclass_fields__:
        found[f"Sampling.{name}"] = lambda odd, name=name: runtime.generate(ids, 2, Sampling(**{"top_k": 9, name: odd}))
    for name in Setting.__dataclass_fields__:
        for kind in ("token", "static"):
            given = {"policy": kind} | ({"skipped": 1} if name in ("policy", "hold") else {})
            found[f"session.{name}.{kind}"] = lambda odd, name=name, given=given: runtime.generate(
                ids, 2, **given | {name: odd}
            )
    return found


def test_nothing_but_our_errors(tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime()
    session, batch = runtime.session(), runtime.batch(2)
    wrong = []
    for name, call in calls(runtime, session, batch).items():
        for number, odd in enumerate(ODD):
            session.reset()
            try:
                call(odd)
            except Exception as error:
                # OSError: a path that the system does not take.
                sound = isinstance(error, DashError | OSError if name.startswith("load.") else DashError)
                if not sound or len(str(error)) > 700:
                    wrong.append(f"{name}({number}: {type(odd).__name__}): {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    np.testing.assert_array_equal(session.generate([1, 2], 5).tokens, runtime.generate([1, 2], 5).tokens)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda _: Sampling(top_k=1.5), RequestError, "top_k must be a whole number; got 1.5"),
        (lambda _: Sampling(seed=True), RequestError, "seed must be a whole number or None; got True"),
        (lambda _: Setting(budget="0.9"), PolicyError, "budget must be a finite number or None; got '0.9'"),
        (lambda r: r.session(skip=5), PolicyError, "skip must be a list of whole numbers or None; got 5"),
        (lambda r: r.batch(1 << 40), RequestError, "size.* from 1 to 1024"),
        (lambda r: r.load(r.bundle.root, threads=-1), RequestError, "threads must be from 0"),
        (lambda r: r.session().stream([1], NAN), RequestError, "max_tokens must be a whole number or None; got nan"),
        (lambda r: r.score([1, True]), RequestError, r"ids must be .*; got \[1, True\]"),
        (lambda r: r.session().score([1, 2], 2, np.zeros((2, 5), np.int8)), PolicyError, r"must be \[2, 6\]"),
        (lambda r: r.chat("hello"), RequestError, "messages must be a list of messages {role, content}; got 'hello'"),
        (lambda r: r.chat([{"role": 1}]), RequestError, "both text"),
        (lambda r: r.batch(2).stream("hello"), RequestError, "prompts must be a list of prompts, not one text"),
        (lambda r: r.batch(2).stream([[1]], 0), RequestError, "max_tokens must be at least 1"),
        (lambda r: r.generate_batch("hello"), RequestError, "a list of prompts, not one text"),
    ],
)
def test_what_was_wrong_is_named(
    given: Callable[[DashRuntime], Any], error: type[DashError], message: str, tiny_runtime: LoadRuntime
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
    assert Sampling(top_k=np.int64(3), stop=["a"]) == Sampling(top_k=3, stop=("a",))
