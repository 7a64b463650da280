"""One token at a time equals one pass over all: prefilled in one piece, in chunks, and after the cache has grown."""

import mmap
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host import decode
from dash_export.backends.host.decode import BoundStep
from dash_export.core.rule import ForcedRule
from dash_export.core.units import unit_skips
from dash_export.runtime import Session
from tests.runtime.prompts import prompts
from tests.tiny import random_actions, random_ids

PREFILLS = {"one-piece": (256, 512), "chunks": (256, 7), "growing": (16, 512), "both": (16, 5)}


class Case(NamedTuple):
    """A runtime with token ids, how many of them are the prompt, and the logit difference allowed."""

    runtime: DashRuntime
    ids: np.ndarray
    prompt: int
    tolerance: float


def cases(name: str, values: Iterable[str], real: str) -> pytest.MarkDecorator:
    """Parameters: tiny models with all values, the real one with one of them."""
    tiny = [(model, value) for model in ("tiny", "tiny-portable") for value in values]
    parameters = [*tiny, pytest.param("smollm2", real, marks=pytest.mark.model)]
    return pytest.mark.parametrize(("case", name), parameters, indirect=["case"])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "smollm2":
        runtime = request.getfixturevalue("smollm2_runtime")("cpu-fp32")
        ids = prompts(runtime)[1]
        tail = runtime.text.encode(" and then she told him what had happened at the house on the hill, in 1815.")
        return Case(runtime, np.concatenate([ids, tail]), len(ids), 1e-3)
    target = "portable" if request.param.endswith("portable") else "cpu-fp32"
    return Case(request.getfixturevalue("tiny_runtime")(target), random_ids(70), 41, 2e-5)


def session(runtime: DashRuntime, kv_step: int, prefill_chunk: int) -> Session:
    made = runtime.session()
    made.kv_step, made.prefill_chunk = kv_step, prefill_chunk
    made.__post_init__()
    return made


def forced_decode(live: Session, ids: np.ndarray, prompt: int, actions: np.ndarray) -> np.ndarray:
    """Logits [tokens from the prompt's last on, vocab]: prefill, then each known token with its actions."""
    rows = [live.prefill(ids[:prompt])]
    skipped = unit_skips(actions, live.engines.units)
    for position in range(prompt, len(ids)):
        logits, taken = live.decode_one(int(ids[position]), ForcedRule(skipped[:, position : position + 1]))
        np.testing.assert_array_equal(taken, actions[position])
        rows.append(logits)
    return np.stack(rows)


def actions_of(case: Case) -> np.ndarray:
    engines = case.runtime.engines
    actions = random_actions(len(case.ids), engines.model.num_layers, engines.units)
    actions[: case.prompt] = 0
    return actions


@cases("how", PREFILLS, "both")
def test_decode_equals_one_pass(case: Case, how: str) -> None:
    """In chunks and in one piece."""
    actions = actions_of(case)
    whole = session(case.runtime, *PREFILLS[how]).logits(case.ids, actions=actions)
    live = session(case.runtime, *PREFILLS[how])
    stepwise = forced_decode(live, case.ids, case.prompt, actions)
    assert np.abs(stepwise - whole[case.prompt - 1 :]).max() < case.tolerance
    if how == "both":
        assert live.cache.capacity > 32
        assert np.abs(whole - case.runtime.session().logits(case.ids, actions=actions)).max() < case.tolerance


@cases("kind", ["static", "token", "bounded"], "bounded")
def test_score_equals_decode_under_a_policy(kind: str, case: Case) -> None:
    num_layers, units = case.runtime.engines.model.num_layers, case.runtime.engines.units
    dial = case.runtime.build.dial
    setting: dict[str, Any] = {
        "static": {"skip": tuple(units[0].layers)},
        "token": {"trade_off": dial[len(dial) // 2].trade_off},
        "bounded": {"trade_off": dial[1].trade_off, "max_layers": num_layers - 1},
    }[kind]
    score = case.runtime.session(**setting).score(case.ids, prefix=case.prompt)
    live = case.runtime.session(**setting)
    logits, likelihoods, taken = live.prefill(case.ids[: case.prompt]), [], []
    for token in case.ids[case.prompt :].tolist():
        likelihoods.append(float(logits[token] - np.logaddexp.reduce(logits.astype(np.float64))))
        logits, actions = live.decode_one(token)
        taken.append(actions)
    assert 0 < np.sum(taken) < np.size(taken)
    np.testing.assert_array_equal(score.actions[case.prompt :], taken)
    np.testing.assert_allclose(score.log_likelihoods[case.prompt - 1 :], likelihoods, atol=case.tolerance)


def test_over_long_caches_passes_are_shorter(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the attention scores of one stay small."""
    ids, sizes, sound = random_ids(40), [], BoundStep.prefill
    expected = runtime.session().prefill(ids)

    def prefill(step: BoundStep, tokens: np.ndarray) -> None:
        sizes.append(len(tokens))
        sound(step, tokens)

    monkeypatch.setattr(BoundStep, "prefill", prefill)
    monkeypatch.setattr(decode, "SCORES", 4 * runtime.engines.model.num_heads * 48 * 15)
    np.testing.assert_allclose(session(runtime, 48, 512).prefill(ids), expected, atol=2e-5)
    assert sizes == [15, 15, 10]


def test_a_kept_sequence_leaves_no_gap_in_the_heap(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """It equals the sequence and has a mapping of its own, which the system takes back with the array."""
    live = runtime.session()
    live.prefill(random_ids(9))
    kept = live.cache.alone(0)
    np.testing.assert_array_equal(kept.keys, live.cache.keys[..., :9, :])
    np.testing.assert_array_equal(kept.values, live.cache.values[..., :9, :])
    assert (kept.length, kept.capacity, kept.nbytes) == (9, 9, 9 * live.cache.position_nbytes)
    memory = kept.keys
    while isinstance(memory, np.ndarray):
        memory = memory.base
    assert isinstance(memory.obj if isinstance(memory, memoryview) else memory, mmap.mmap)

    def full(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(MemoryError):
        live.cache.alone(0)
