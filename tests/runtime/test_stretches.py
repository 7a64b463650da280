"""Engines of several layers give what those of one give, take fewer launches, and leave the same cache behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.builders import build, building
from dash_export.builders.verify import verification
from dash_export.bundle import Bundle
from dash_export.decision import decision_rule
from dash_export.errors import BundleError, PolicyError
from dash_export.runtime.backends.onnxruntime import OrtBackend
from dash_export.runtime.rules import DENSE, FixedRule, Rule
from dash_export.runtime.session import Session
from tests.forged import edit
from tests.tiny import random_ids

Load = Callable[[str], DashRuntime]
GATED = (2, 3, 4, 5, 6, 8, 9)
IDS = random_ids(60, seed=3)
PROMPT = 12


def alone(runtime: DashRuntime) -> DashRuntime:
    """The same engines without stretches."""
    build = replace(runtime.build, stretches=())
    return DashRuntime(runtime.bundle, build, OrtBackend(0), runtime.dispatch)


def token_rule(runtime: DashRuntime) -> Rule:
    """Skips about half of what it may."""
    damage = runtime.session("token", trade_off=0.0).score(IDS).damage[2:, list(GATED)]
    return decision_rule(10, GATED, dict.fromkeys(GATED, 0.1), 10 * float(np.median(damage)))


def decoded(session: Session, rules: list[Rule]) -> tuple[np.ndarray, np.ndarray]:
    session.prefill(IDS[:PROMPT])
    steps = [session.decode_one(int(token), rule) for token, rule in zip(IDS[PROMPT:], rules, strict=True)]
    return np.array([logits for logits, _ in steps]), np.array([actions for _, actions in steps])


@pytest.fixture(scope="module", params=["fused", "sync", "plain"])
def runtime(request: pytest.FixtureRequest, stretched_runtime: Load) -> DashRuntime:
    return stretched_runtime(request.param)


def rules_of(runtime: DashRuntime) -> dict[str, list[Rule]]:
    rng = np.random.default_rng(0)
    masks = rng.random((48, len(GATED))) < np.repeat([[0.2], [0.8]], 24, axis=0)
    found: dict[str, list[Rule]] = {
        "dense": [DENSE] * 48,
        "static": [FixedRule((3, 4, 5, 9))] * 48,
        "all": [FixedRule(GATED)] * 48,
        "random": [FixedRule(np.array(GATED)[mask].tolist()) for mask in masks],
    }
    return found if runtime.dispatch == "plain" else found | {"token": [token_rule(runtime)] * 48}


def test_as_layer_by_layer(runtime: DashRuntime) -> None:
    without = alone(runtime)
    for kind, rules in rules_of(runtime).items():
        compare(kind, rules, runtime.session(), without.session())


def compare(kind: str, rules: list[Rule], one: Session, other: Session) -> None:
    (logits, actions), (expected, expected_actions) = (decoded(session, rules) for session in (one, other))
    np.testing.assert_array_equal(actions, expected_actions)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    if kind == "token":
        assert 0.2 < actions[:, list(GATED)].mean() < 0.8
    caches = (session._cache for session in (one, other))  # type: ignore[attr-defined]
    (keys, values), (own_keys, own_values) = ((cache.keys, cache.values) for cache in caches)
    np.testing.assert_allclose(keys[..., : len(IDS), :], own_keys[..., : len(IDS), :], atol=2e-5)
    np.testing.assert_allclose(values[..., : len(IDS), :], own_values[..., : len(IDS), :], atol=2e-5)
    assert (np.abs(keys[:, 0, :, : len(IDS)]).max(axis=(1, 3)) > 0).all(), "every row of every layer is written"


def launched(runtime: DashRuntime, rule: Rule) -> list[str]:
    """The engines of a token, by name."""
    session = runtime.session()
    session.prefill(IDS[:PROMPT])
    step = session.decode_step(4)
    calls: list[str] = []
    names = {}
    for segment, own in zip(step.segments, runtime.build.segments, strict=True):  # type: ignore[union-attr]
        names[segment.run] = own.name
        names |= {segment.skip: f"skip_{own.first:02d}"} if segment.skip is not None else {}
        for item in segment.stretches:
            first, last = own.first, own.first + item.count - 1
            names[item.launch] = f"{'skips' if item.skips else 'layers'}_{first:02d}-{last:02d}"

    def noting(launch: Callable[[], None]) -> Callable[[], None]:
        return lambda: (calls.append(names[launch]), launch())[1]

    step.segments = [  # type: ignore[union-attr]
        replace(
            segment,
            run=noting(segment.run),
            skip=None if segment.skip is None else noting(segment.skip),
            stretches=tuple(replace(item, launch=noting(item.launch)) for item in segment.stretches),
        )
        for segment in step.segments  # type: ignore[union-attr]
    ]
    for token in IDS[PROMPT : PROMPT + 3]:
        calls.clear()
        step.decode(int(token), rule)
    return calls


def test_fewer_launches(runtime: DashRuntime) -> None:
    ends = ["layers_00-01", "layer_07", "head"]
    dense = launched(runtime, DENSE)
    assert dense == [ends[0], "layers_02-06", ends[1], "layers_08-09", ends[2]]
    static = launched(runtime, FixedRule((3, 4, 5, 9)))
    assert static == [
        ends[0],
        "layer_02",
        "skips_03-04",
        "skip_05",
        "layer_06",
        ends[1],
        "layer_08",
        "skip_09",
        ends[2],
    ]
    if runtime.dispatch == "plain":
        return
    everything = decision_rule(10, GATED, dict.fromkeys(GATED, 0.1), 1e9)
    skips = ["skips_02-03", "skips_04-05", "skip_06"]
    assert launched(runtime, everything) == [ends[0], *skips, ends[1], "skips_08-09", ends[2]]
    assert launched(runtime, decision_rule(10, GATED, dict.fromkeys(GATED, 0.1), 0.0)) == dense
    # A ceiling is one of layers: the last three are skipped.
    ceiling = decision_rule(10, GATED, dict.fromkeys(GATED, 0.1), 0.0, max_layers=7)
    assert launched(runtime, ceiling) == [
        ends[0],
        "layer_02",
        "layer_03",
        "layer_04",
        "layer_05",
        "skip_06",
        ends[1],
        "skips_08-09",
        ends[2],
    ]


def test_many_tokens_know_no_stretches(runtime: DashRuntime) -> None:
    session = runtime.session()
    assert not any(segment.stretches for segment in session.engines.step(session._cache, 4).segments)  # type: ignore[attr-defined]


def test_score_is_decode(stretched_runtime: Load) -> None:
    runtime = stretched_runtime("fused")
    rule = token_rule(runtime)
    logits, actions = decoded(runtime.session(), [rule] * 48)
    found = runtime.session_under(rule).score(IDS, PROMPT, keep_logits=True)
    np.testing.assert_array_equal(found.actions[PROMPT:], actions)
    assert found.logits is not None
    np.testing.assert_allclose(found.logits[PROMPT:], logits, atol=1e-4)


def test_budgets_know_what_a_launch_costs(stretched_runtime: Load) -> None:
    runtime = stretched_runtime("plain")
    cost = replace(runtime.cost, cost=dict.fromkeys(GATED, 0.05), launch=0.02)
    costly = DashRuntime(runtime.bundle, replace(runtime.build, cost=cost), OrtBackend(0), "plain")
    # 9 and 8 alone: 0.95 + one launch, 0.90; with 6 the stretch 2-6 falls apart.
    skipped = [costly.session("static", budget=budget).rule.skipped for budget in (0.97, 0.9, 0.88)]  # type: ignore[attr-defined]
    assert skipped == [{9}, {9, 8}, {9, 8, 6, 5}]
    with pytest.raises(PolicyError, match=r"takes 0\.\d+ of the dense time"):
        costly.session("static", budget=0.5)


def test_so_do_decisions(stretched_runtime: Load) -> None:
    runtime = stretched_runtime("fused")
    damage = runtime.session("token", trade_off=0.0).score(IDS).damage[2:, list(GATED)]
    amount = 11 * float(damage.mean(axis=0).max())
    taken = {}
    for launch in (0.0, 0.2):
        cost = replace(runtime.cost, cost=dict.fromkeys(GATED, 0.1), launch=launch)
        costly = DashRuntime(runtime.bundle, replace(runtime.build, cost=cost), OrtBackend(0), "fused")
        token = costly.session("token", trade_off=amount)
        prices = dict(token.rule.breaking)  # type: ignore[union-attr]
        assert prices == ({(2, 3, 4, 5, 6): amount * 4 * launch, (8, 9): amount * launch} if launch else {})
        held = costly.session("token", budget=0.9, hold=True).rule
        assert bool(held.breaking) == bool(launch)  # type: ignore[union-attr]
        sequence = costly.session("sequence", trade_off=amount)
        sequence.prefill(IDS)
        taken[launch] = len(sequence.rule.skipped)  # type: ignore[union-attr]
        assert not costly.session("token", trade_off=amount, max_layers=8).rule.breaking  # type: ignore[union-attr]
    assert taken[0.2] == 0 < taken[0.0]


def test_the_engines_are_their_portable_graphs(stretched_runtime: Load) -> None:
    runtime = stretched_runtime("plain")
    checked = verification(runtime.bundle, runtime.build)["engines"]
    assert {stretch.name for stretch in runtime.build.stretches} <= set(checked)


def test_no_weights_of_their_own(stretched_runtime: Load) -> None:
    runtime = stretched_runtime("plain")
    engines, root = runtime.build.engines, runtime.bundle.root
    for stretch in runtime.build.stretches:
        graph = root / engines[stretch.name].file
        assert graph.is_file()
        assert not graph.with_suffix(".data").exists()
        parts = [engines[f"{'skip' if stretch.skips else 'layer'}_{layer:02d}"] for layer in stretch.layers]
        assert engines[stretch.name].bytes == graph.stat().st_size + sum(part.bytes for part in parts)


def test_a_build_goes_on_where_it_stopped(stretched_runtime: Load, tmp_path: Path) -> None:
    root = Path(shutil.copytree(stretched_runtime("plain").bundle.root, tmp_path / "own.dash"))
    folder = root / "engines" / "cpu-fp32"
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "layers_02-06.onnx").unlink()
    build(root, "cpu", weights="fp32")
    made = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != kept[path.name]}
    assert made == {"layers_02-06.onnx", ".journal.json", "build.json"}


def test_large_layers_have_none(stretched_runtime: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights would be in memory twice, for launches that hardly count."""
    root = Path(shutil.copytree(stretched_runtime("plain").bundle.root, tmp_path / "own.dash"))
    monkeypatch.setattr(building, "LARGEST_IN_STRETCH", 1000)
    assert build(root, "cpu", weights="fp32").stretches == ()
    assert not list((root / "engines" / "cpu-fp32").glob("skips_*"))
    DashRuntime.load(root, "cpu-fp32")


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "one layer": ({"first": 3, "last": 3}, "a stretch is not of gated layers"),
    "backwards": ({"first": 4, "last": 3}, "a stretch is not of gated layers"),
    "a layer that always runs": ({"first": 6, "last": 8}, "a stretch is not of gated layers"),
    "far away": ({"first": 900, "last": 1 << 40}, "a stretch is not of gated layers"),
    "no engine": ({"first": 3, "last": 6}, "there is no engine layers_03-06"),
    "a number as text": ({"first": "3"}, "first"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_stretches(name: str, stretched_runtime: Load, tmp_path: Path) -> None:
    changed, message = FORGED[name]
    root = Path(shutil.copytree(stretched_runtime("plain").bundle.root, tmp_path / "own.dash"))
    file = root / "engines" / "cpu-fp32" / "build.json"
    edit(file, lambda record: record["stretches"][0].update(changed))
    with pytest.raises(BundleError, match=message):
        Bundle.open(root).load_build("cpu-fp32")


@pytest.mark.parametrize("cost", [-0.1, float("nan")])
def test_a_launch_costs_something(cost: float, stretched_runtime: Load, tmp_path: Path) -> None:
    root = Path(shutil.copytree(stretched_runtime("plain").bundle.root, tmp_path / "own.dash"))
    file = root / "engines" / "cpu-fp32" / "build.json"
    edit(file, lambda record: record["cost"].update(launch=cost))
    with pytest.raises(BundleError, match=r"the cost of a launch|cost\.launch must be"):
        Bundle.open(root).load_build("cpu-fp32")
