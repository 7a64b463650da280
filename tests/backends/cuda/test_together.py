"""Several sequences on a device: what each gets is what a CPU gives where all do what every one of them would do."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda.engines import ALIGNED
from dash_export.backends.host.decode import BoundStep
from dash_export.core.kinds import SessionRules
from dash_export.core.rule import DENSE, Rule, skips_for, static_rule
from dash_export.runtime import Response
from dash_export.runtime.results import Generation
from dash_export.runtime.rows import Rows
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import Request
from tests.backends.cuda.conftest import DISPATCH, IDS, ORDERS, TOGETHER, TOLERANCE, Host, MakeOnCard
from tests.serve.test_scheduler import until_the_last

PROMPTS = (IDS[:20], IDS[20:29], IDS[3:36], IDS[30:35])


@pytest.fixture(autouse=True)
def agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's rows decide together, too."""

    def decode_batch(step: BoundStep, tokens: Sequence[int], rules: Sequence[Rule], _greedy: bool = False) -> None:
        def decide(state: Any) -> Any:
            each = [skips_for(rule, state, slice(row, row + 1)) for row, rule in enumerate(rules)]
            return np.repeat(np.logical_and.reduce(each), len(rules), axis=1)

        step.input_ids[:, 0] = tokens
        step._advance(decide)

    monkeypatch.setattr(BoundStep, "decode_batch", decode_batch)


def rows_of(runtime: DashRuntime, many: int = 4) -> Rows:
    """The first prompts, in the places of a cache for four."""
    rows, prompt = Rows(runtime.engines, 4, 256), runtime.session()
    rows.cache.reserve(96)
    for slot, ids in enumerate(PROMPTS[:many]):
        prompt.restart(ids)
        rows.cache.take(slot, prompt.cache)
    return rows


CASES = [
    *((*case, first) for case in product(TOGETHER, DISPATCH[1:]) for first in ORDERS[1:3]),
    *((target, "sync", "main") for target in TOGETHER),
]


@pytest.mark.parametrize(("target", "dispatch", "first"), CASES)
def test_rows_decode_together(target: str, dispatch: str, first: str | int, on_card: MakeOnCard, host: Host) -> None:
    """Rows at different positions, under every kind of rule, and with some gone."""
    made = on_card(target, dispatch, first)
    both = [rows_of(runtime) for runtime in (host.runtime, made.runtime)]
    kinds: dict[str, list[Rule]] = {
        "token": [host.rule.scaled(factor) for factor in (1.0, 1.5, 2.0, 3.0)],
        "static": [static_rule((0,))] * 4,
        "one is dense": [host.rule, deepcopy(DENSE), host.rule, host.rule],
        "one is fixed": [host.rule.scaled(2.0), static_rule((1,)), host.rule.scaled(3.0), host.rule.scaled(2.0)],
    }
    for many in (4, 3, 1):
        taken = {kind: list[bool]() for kind in kinds}
        for token in range(3):
            for kind, rules in kinds.items():
                steps = [rows.steps.bound(1, batch=many) for rows in both]
                for step in steps:
                    step.decode_batch((IDS[token : token + many] + many).tolist(), rules[:many])
                np.testing.assert_array_equal(steps[1].skipped, steps[0].skipped)
                assert np.abs(steps[1].logits - steps[0].logits).max() < TOLERANCE
                if kind == "token":
                    np.testing.assert_allclose(steps[1].damage, steps[0].damage, atol=1e-5)
                if kind == "one is dense" and many > 1:
                    assert not steps[1].damage.any(), "nobody asked"
                taken[kind] += steps[1].skipped.ravel().tolist()
        assert any(taken["token"]), "some are skipped"
        assert not all(taken["token"]), "not all"
        assert any(taken["static"])
        assert not any(taken["one is dense"]) or many == 1
    assert len(made.card.recorded) >= (dispatch == "device")


@pytest.mark.parametrize(("target", "dispatch"), zip(TOGETHER, ("overlapped", "device"), strict=True))
def test_a_batch(target: str, dispatch: str, on_card: MakeOnCard, host: Host) -> None:
    """The next prompt takes the place of one that ended, and prompts go on from one another."""
    runtime = on_card(target, dispatch).runtime
    settings: list[dict[str, Any]] = [{}, {"policy": "static", "skip": [2, 3]}]
    for setting in settings:
        one, other = ([each.tolist() for each in asked] for asked in (PROMPTS, (IDS[:12], IDS[:14])))
        expected, found = (
            [made.tokens.tolist() for made in each.generate_batch([*one, *other], 9, size=4, **setting)]
            for each in (host.runtime, runtime)
        )
        assert found == expected
    batch = runtime.batch(3)
    batch.prompts.rules = SessionRules(host.rule)
    assert all(response.error is None for _, response in batch.stream([each.tolist() for each in PROMPTS], 5))


def test_a_server_answers_from_a_device(on_card: MakeOnCard, host: Host) -> None:
    """More requests than rows; what they have in common is computed once."""
    scheduler = Scheduler(on_card("trt10-together", "device").runtime)
    assert (scheduler.size, scheduler.context) == (4, 96)
    asked = [np.concatenate([IDS[:40], IDS[at : at + 3]]) for at in range(7)]
    scheduler.start()
    try:
        told: list[SimpleQueue[Response]] = [SimpleQueue() for _ in asked]
        for ids, queue in zip(asked, told, strict=True):
            scheduler.submit(Request(ids, 8), queue.put)
        found = [Generation.gathered(until_the_last(queue)).tokens.tolist() for queue in told]
        assert scheduler.figures["known_tokens"] > 0
    finally:
        scheduler.close(10)
    assert found == [host.runtime.generate(ids.tolist(), 8).tokens.tolist() for ids in asked]


def test_caches_copy_what_they_hold(on_card: MakeOnCard) -> None:
    engines: Any = on_card("trt10-together").runtime.engines
    rng, device = np.random.default_rng(0), engines.device
    source, target = engines.cache(0, 2), engines.cache(0, 3)
    source.reserve(1)
    target.reserve(1)
    held = rng.integers(0, 255, source.keys[2].nbytes).astype(np.uint8)
    device.copy("main", source.keys[2], held)
    source.lengths = [5, 7]
    alone = source.alone(1)
    assert (alone.capacity, alone.length) == (7, 7)
    assert alone.nbytes == 7 * alone.position_nbytes
    assert alone.sequence_bytes % ALIGNED > 0
    assert all(memory.address % ALIGNED == 0 for memory in (*alone.keys, *alone.values)), "as engines want it"
    target.take(2, alone)
    found = np.zeros(target.keys[2].nbytes, np.uint8)
    device.copy("main", found, target.keys[2])
    device.synchronize("main")
    shape = (-1, engines.model.num_kv_heads, 96, engines.model.head_dim * 4)
    expected = np.zeros(found.shape, np.uint8).reshape(shape)
    expected[2, :, :7] = held.reshape(shape)[1, :, :7]
    np.testing.assert_array_equal(found.reshape(shape), expected)
    assert target.lengths == [0, 0, 7]
