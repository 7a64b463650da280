"""Passes of a prompt and steps: how long they are, and what one leaves that breaks off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.serve.reading import Prefixes
from tests.runtime.test_batch import answers
from tests.runtime.test_session import FIRST, SECOND, tokens_of
from tests.tiny import random_ids, tiny_bundle


@pytest.mark.parametrize("where", ["decode", "token"])
def test_an_interrupt_in_a_step_leaves_a_session_that_goes_on(
    where: str, runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C that an application catches: the next answer is what it would be without the interrupted step."""
    session = runtime.session()
    stream = session.stream(FIRST, 6)
    taken = [next(stream).token, next(stream).token]

    class Interrupting(list[int]):
        def append(self, token: int) -> None:
            super().append(token)
            raise KeyboardInterrupt

    step = session.bound(1)
    sound = step.decode_batch

    def decode(*given: Any) -> None:
        sound(*given)
        raise KeyboardInterrupt

    if where == "decode":
        monkeypatch.setattr(step, "decode_batch", decode)
    else:
        session.tokens = Interrupting(session.tokens)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    session.tokens = list(session.tokens)
    assert session.generate(SECOND, 10).tokens.tolist() == tokens_of(runtime, FIRST, taken, SECOND)


def test_an_interrupt_while_the_cache_grows(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step stays bound to the memory that was there before; of a batch neither."""
    session, batch = runtime.session(), runtime.batch(2)
    kv_step = session.kv_step
    expected = [runtime.generate(ids, 12).tokens.tolist() for ids in (FIRST, SECOND)]
    session.generate(FIRST, 12)
    list(batch.stream([SECOND, FIRST], 12))
    for cache in (session.cache, batch.rows.cache):
        sound = cache.reserve

        def reserve(rows: int, sound: Any = sound) -> None:
            sound(rows)
            raise KeyboardInterrupt

        monkeypatch.setattr(cache, "reserve", reserve)
    with pytest.raises(KeyboardInterrupt):
        session.generate(random_ids(kv_step), 2)
    with pytest.raises(KeyboardInterrupt):
        list(batch.stream([random_ids(kv_step)], 2))
    monkeypatch.undo()
    session.reset()
    assert session.generate(SECOND, 12).tokens.tolist() == expected[1]
    assert answers(batch, [FIRST, SECOND], 12) == dict(enumerate(expected))


def test_no_pass_of_a_prompt_has_its_last_token_alone(
    tiny_runtime: Callable[..., DashRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for one row may round otherwise: with what is known of it the same prompt would have another answer."""
    live = tiny_runtime().session()
    monkeypatch.setattr(type(live), "chunk", 32)
    assert [live.next_pass_length(left) for left in (1, 2, 32, 33, 34, 65)] == [1, 2, 32, 16, 32, 32]
    passes, sound = list[int](), live.bound
    monkeypatch.setattr(live, "bound", lambda rows: passes.append(rows) or sound(rows))
    logits = live.prefill(random_ids(65))
    assert passes == [32, 16, 17]
    np.testing.assert_allclose(logits, tiny_runtime().session().logits(random_ids(65))[-1], atol=1e-4)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("target", ["cpu-nearest", "cpu-int8", "cpu-fp32"])
def test_a_prompt_known_in_part_gives_what_a_new_one_gives(target: str, tmp_path: Path) -> None:
    """Bit for bit, however much of it is known: int4 kernels round the last of an odd number of rows otherwise."""
    bundle, ids = tiny_bundle(tmp_path, target), random_ids(120)
    runtime = DashRuntime.load(bundle)
    prefixes = Prefixes(1 << 30)
    for length in (2, 3, 15, 16, 17, 18, 19, 33, 34, 37, 64, 77, 78, 97, 119):
        new = runtime.session().restart(ids[:length])
        for known in (ids[:length], ids[: length - 1], ids[: length // 2], np.concatenate([ids[:length], SECOND])):
            live = runtime.session()
            live.restart(known if len(known) else ids)
            np.testing.assert_array_equal(live.restart(ids[:length]), new, err_msg=f"{length}, of which {len(known)}")
            live.restart(known if len(known) else ids)
            prefixes.keep(live.tokens, live.cache, 0)
            other = runtime.session()
            held = prefixes.restore(other, ids[:length])
            np.testing.assert_array_equal(other.prefill(ids[held:length]), new)


def test_what_an_interrupted_pass_leaves_is_known(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tokens` are what the cache holds, so that the next prompt continues from there and not from less."""
    ids, live, passes = random_ids(70), runtime.session(), []
    monkeypatch.setattr(type(live), "chunk", 32)
    bound = live.bound

    def interrupted(*args: Any) -> Any:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return bound(*args)

    monkeypatch.setattr(live, "bound", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.prefill(ids)
    assert live.tokens == ids[:64].tolist()
    np.testing.assert_allclose(live.prefill(ids[64:]), runtime.session().prefill(ids), atol=1e-4)
