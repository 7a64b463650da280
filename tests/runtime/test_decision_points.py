"""A policy that decides about several layers at once, in every dispatch, is what the oracle says.

Eight layers, of which 3, 4 and 6 are gated and decided by what enters layer 2: layer 5 runs between them. The same
policy for 4 and 6 alone, whose state lies inside a segment. And one that decides about 6 by what enters layer 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.build_record import check_build
from dash_export.builders import build, gpu_graphs
from dash_export.builders.verify import verification
from dash_export.bundle import Bundle
from dash_export.decision import DecisionRule, decision_rule
from dash_export.errors import BundleError
from dash_export.exporting import export
from dash_export.manifest import PolicyFacts
from dash_export.polygraphy.engines import PortableEngine, find_engine
from dash_export.profiling.traffic import engine_bytes
from dash_export.reference import Oracle
from dash_export.runtime.backends import load_backend
from dash_export.runtime.plan import Plans
from dash_export.skip_policy import SkipPolicy, narrowed, untrained_policy
from tests.runtime.device.conftest import RECIPE
from tests.runtime.device.simulated import SimulatedDevice
from tests.tiny import tiny_checkpoint, with_compensation

GATED = (3, 4, 6)
IDS = np.random.default_rng(5).integers(0, 300, 60).astype(np.int64)
PROMPT = 20
STREAMS = ("main", "policy")
"""Which stream of a simulated device gets ahead where nothing orders them."""
HOST = [("cpu-fp32", "fused"), ("cpu-fp32", "sync"), ("portable", "sync")]
DEVICE = [(f"trt10, {first} first", dispatch) for first in STREAMS for dispatch in ("overlapped", "sync", "device")]
TOLERANCE = 1e-4


class Case:
    """One policy: its oracle, its builds, and a rule that skips about half of what is gated."""

    def __init__(self, folder: Path, gated: tuple[int, ...], reads: tuple[int, ...]) -> None:
        checkpoint = tiny_checkpoint(folder / "model", num_hidden_layers=8)
        policy = replace(untrained_policy(checkpoint.spec, GATED, width=0), reads=reads)
        self.policy: SkipPolicy = narrowed(with_compensation(policy, checkpoint.spec.hidden_size, "low_rank"), gated)
        self.oracle = Oracle(checkpoint, self.policy)
        self.bundle: Bundle = export(checkpoint, folder / "once.dash", self.policy)
        recipe = RECIPE.format(dialect="trt10")
        (folder / "trt10.toml").write_text(recipe)
        (folder / "turing.toml").write_text(recipe.replace('["9.0"]', '["7.5"]'))
        for target in ("cpu", "portable", str(folder / "trt10.toml"), str(folder / "turing.toml")):
            build(self.bundle, target, weights="fp32" if target == "cpu" else None)
        damage = self.oracle.forward(IDS).damage[:, list(gated)]
        cost = dict.fromkeys(gated, 0.1)
        self.rule: DecisionRule = decision_rule(8, gated, cost, float(np.median(damage)) / 0.1)
        self.expected = self.oracle.forward(IDS, self.rule, prefix=PROMPT)

    @cache  # noqa: B019 - lives as long as the tests do
    def runtime(self, target: str, dispatch: str) -> DashRuntime:
        target, _, order = target.partition(", ")
        if not order:
            return DashRuntime.load(self.bundle.root, target, dispatch=dispatch)
        device = SimulatedDevice(order.removesuffix(" first"))
        return DashRuntime(self.bundle, self.bundle.load_build(target), device, dispatch)


CASES = {"all": (GATED, (2, 2, 2)), "narrowed": (GATED[1:], (2, 2, 2)), "two points": (GATED, (2, 2, 4))}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("once"), *CASES[request.param])


def test_the_oracle_reads_one_state(case: Case) -> None:
    """What is decided by what enters layer 2 depends on nothing that happens after it."""
    early = list(case.policy.decision_points[2])
    everything = np.zeros((60, 8), np.int8)
    everything[2:, list(case.policy.gated)] = 1
    skipped, dense = (case.oracle.forward(IDS, actions=actions).damage for actions in (everything, None))
    np.testing.assert_array_equal(skipped[:, early], dense[:, early])
    ahead = Oracle.__new__(Oracle)
    ahead.__dict__ |= vars(case.oracle) | {"policy": replace(case.policy, reads=())}
    assert np.abs(ahead.forward(IDS).damage - dense)[:, 4].max() > 0.01


@pytest.mark.parametrize(("target", "dispatch"), [*HOST, *DEVICE])
def test_decode(target: str, dispatch: str, case: Case) -> None:
    session = case.runtime(target, dispatch).session_under(case.rule)
    session.prefill(IDS[:PROMPT])
    steps = [session.decode_one(int(token)) for token in IDS[PROMPT:]]
    actions = np.array([taken for _, taken in steps])
    np.testing.assert_array_equal(actions, case.expected.actions[PROMPT:])
    assert 0.2 < actions[:, list(case.policy.gated)].mean() < 0.8
    assert np.abs(np.array([logits for logits, _ in steps]) - case.expected.logits[PROMPT:]).max() < TOLERANCE


@pytest.mark.parametrize(("target", "dispatch"), [*HOST, *DEVICE])
def test_score(target: str, dispatch: str, case: Case) -> None:
    found = case.runtime(target, dispatch).session_under(case.rule).score(IDS, prefix=PROMPT, keep_logits=True)
    np.testing.assert_array_equal(found.actions, case.expected.actions)
    np.testing.assert_allclose(found.damage, case.expected.damage, atol=1e-5)
    assert np.abs(found.logits - case.expected.logits).max() < TOLERANCE  # type: ignore[operator]


@pytest.mark.parametrize(("target", "dispatch"), HOST)
def test_layers_of_a_stretch_are_weighed_together(
    target: str, dispatch: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the oracle, teacher-forced, worked out ahead and asked every time alike."""
    together = case.policy.decision_points[2]
    gated, limit = list(case.policy.gated), case.rule.limits[4]
    rule = replace(case.rule, breaking=((together, 0.3 * limit),))
    expected = case.oracle.forward(IDS, rule, prefix=PROMPT)
    own, before = (found.actions[PROMPT:, gated].sum() for found in (expected, case.expected))
    assert 0 < own < before, "some are no longer worth it, and some are"
    session = case.runtime(target, dispatch).session_under(rule)
    found = session.score(IDS, prefix=PROMPT, keep_logits=True)
    np.testing.assert_array_equal(found.actions, expected.actions)
    assert np.abs(found.logits - expected.logits).max() < TOLERANCE  # type: ignore[operator]
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(Plans, "plan", lambda *_: None)
        session.restart(IDS[:PROMPT])
        steps = [session.decode_one(int(token))[1] for token in IDS[PROMPT:]]
        np.testing.assert_array_equal(steps, expected.actions[PROMPT:])


@pytest.mark.parametrize(("target", "dispatch"), [*HOST, *DEVICE])
def test_a_ceiling_counts_the_layers_that_ran(target: str, dispatch: str, case: Case) -> None:
    """Such a rule is asked layer by layer, also where all scores are there at once."""
    cost = dict.fromkeys(case.policy.gated, 0.1)
    rule = decision_rule(8, case.policy.gated, cost, 1e-6, max_layers=9 - len(cost))
    session = case.runtime(target, dispatch).session_under(rule)
    session.prefill(IDS[:PROMPT])
    assert {int((session.decode_one(int(token))[1] == 0).sum()) for token in IDS[PROMPT:]} == {9 - len(cost)}


@pytest.mark.parametrize("launch", [0.0, 0.01])
@pytest.mark.parametrize(("target", "dispatch"), HOST)
def test_a_batch_as_alone(target: str, dispatch: str, launch: float, case: Case) -> None:
    runtime = case.runtime(target, dispatch)
    build = replace(runtime.build, cost=replace(runtime.cost, launch=launch))
    runtime = DashRuntime(runtime.bundle, build, load_backend("onnxruntime", 0), dispatch)
    amount = {"policy": "token", "trade_off": case.rule.limits[4] / runtime.cost.cost[4]}
    prompts = [IDS[:12].tolist(), IDS[12:30].tolist(), IDS[30:37].tolist()]
    alone = [runtime.generate(prompt, 10, **amount) for prompt in prompts]
    together = runtime.generate_batch(prompts, 10, size=3, **amount)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.actions, other.actions)
    assert any(one.actions.any() for one in alone)


def test_engines_agree_with_their_portable_graphs(case: Case) -> None:
    for target in ("cpu-fp32", "trt10", "turing", "portable"):
        verification(case.bundle, case.bundle.load_build(target))


def test_a_build_with_a_policy_engine_for_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier versions made them."""
    single = [(layer,) for layer in GATED]
    monkeypatch.setattr(PolicyFacts, "decided_from", lambda _, layer: (layer,) if layer in GATED else ())
    monkeypatch.setattr(gpu_graphs, "portable_graphs", partial(gpu_graphs.portable_graphs, policies=single))
    case = Case(tmp_path, GATED, (2, 2, 2))
    for target in ("cpu-fp32", "trt10"):
        engines = case.bundle.load_build(target).engines
        assert {f"policy_{layer:02d}" for layer in GATED} <= set(engines)
    for target, dispatch in (*HOST, *DEVICE):
        test_decode(target, dispatch, case)
        test_score(target, dispatch, case)


@pytest.mark.parametrize("target", ["cpu-fp32", "trt10"])
def test_a_build_with_some_of_the_policy_engines(target: str, case: Case) -> None:
    build, layers = case.bundle.load_build(target), case.policy.decision_points[2]
    strange = replace(build, engines=build.engines | {f"policy_{layers[1]:02d}": build.engines["skip_04"]})
    if len(layers) > 2:
        with pytest.raises(BundleError, match="nobody asks the engine policy_04"):
            check_build(strange, case.bundle.manifest, "here")
    without = {name: engine for name, engine in build.engines.items() if name != f"policy_{layers[0]:02d}"}
    with pytest.raises(BundleError, match="no engine policy_"):
        check_build(replace(build, engines=without), case.bundle.manifest, "here")


def test_polygraphy_sees_the_damage_of_all_that_an_engine_decides(case: Case) -> None:
    build = case.bundle.load_build("cpu-fp32")
    name = f"{build.segments[0].name}.policy"
    facts = find_engine(case.bundle, build, name)
    assert facts.decides == case.policy.decision_points[2]
    backend = load_backend("onnxruntime", 0)
    engine = PortableEngine(
        backend.load(case.bundle.path(build.engines[name].file)), facts, case.bundle.manifest.model, build.policy_bias
    )
    caches = {key: shape for key, (_, shape) in engine.inputs.items() if key.startswith("past_")}
    feed = {key: np.zeros([size or 12 for size in shape], np.float32) for key, shape in caches.items()}
    found, _ = engine(feed | {"input_ids": IDS[None, :9], "position_ids": np.arange(9)[None]})
    expected = case.oracle.forward(IDS[:9]).damage[:, list(facts.decides)]
    np.testing.assert_allclose(found["damage"].reshape(expected.shape), expected, atol=1e-5)


def test_bytes_are_of_what_is_asked_there(case: Case) -> None:
    """Policies that are engines count where they are asked: before the segment that follows what they read."""
    runtime = case.runtime("cpu-fp32", "sync")
    segments, found = runtime.build.segments, engine_bytes(runtime).policy.tolist()
    expected = [0] * len(segments)
    for read, layers in case.policy.decision_points.items():
        after = next(index for index, segment in enumerate(segments) if read in segment.layers) + 1
        expected[after] = runtime.build.engines[f"policy_{layers[0]:02d}"].bytes
    assert found == expected
    assert not any(engine_bytes(case.runtime("cpu-fp32", "fused")).policy)


def test_a_device_s_host_waits_once_a_point(case: Case) -> None:
    """And for the end of the token."""
    runtime = case.runtime("trt10, main first", "overlapped")
    session = runtime.session_under(case.rule)
    session.prefill(IDS[:PROMPT])
    step = session._bound(1)
    waits: list[str] = []

    def noting(part: object, wait: Callable[[], None]) -> Callable[[], None]:
        return lambda: (waits.append(part.engines.segment.name), wait())[1]  # type: ignore[attr-defined]

    for part in step.parts:  # type: ignore[attr-defined]
        if part.decided is not None:
            part.decided.wait = noting(part, part.decided.wait)
    device = runtime.engines.device  # type: ignore[union-attr]
    before = len(device.log)
    session.decode_one(int(IDS[PROMPT]))
    assert len(waits) == len(case.policy.decision_points)
    asked = [name for _, what, name in device.log[before:] if what == "run" and name.startswith("policy_")]
    assert asked == [f"policy_{layers[0]:02d}" for layers in case.policy.decision_points.values()]


def test_a_policy_stage_for_every_point(case: Case) -> None:
    """All that one state decides is compared before any of it is launched."""
    runtime = case.runtime("cpu-fp32", "fused")
    session = runtime.session_under(case.rule)
    session.prefill(IDS[:PROMPT])
    for token in IDS[PROMPT : PROMPT + 3]:
        session.decode_one(int(token))
    step = session._bound(1)
    plan = step._plans.plan(case.rule, step.segments)  # type: ignore[attr-defined]
    everything = [stage.answers[(1 << len(stage.choices)) - 1][1] for stage in plan.stages]
    assert [skipped for skipped in everything if skipped] == list(case.policy.decision_points.values())
