"""The drafter's graph and engine of every family, against drafts made slowly in PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.decode import EngineSet
from dash_export.backends.host.drafting import BoundDrafter
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.records import DRAFTER
from dash_export.core.policy import no_policy
from dash_export.core.units import Unit
from dash_export.models import Checkpoint
from dash_export.models.bypasses import pruned
from tests.drafts import expected_drafts
from tests.graphs.test_families import CASES
from tests.tiny import drafter_only, random_drafter, random_ids, tiny_checkpoint, tiny_policy

pytestmark = [
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated"),  # in some versions of transformers
]
IDS, DRAFTS = random_ids(24), 4


def drafts(root: Path, target: str) -> tuple[list[tuple[int, float]], np.ndarray]:
    """Drafts after IDS, and the last of their states."""
    engines = DashRuntime.load(root, target).engines
    assert isinstance(engines, EngineSet)
    cache, known = engines.cache(64), len(IDS) - 1
    cache.reserve(known + DRAFTS)
    step = engines.step(cache, known, teacher_forced=True, mixes=False)
    step.prefill(IDS[:-1])
    bound = BoundDrafter(engines, cache)
    ask, found = bound.asked(step.final_state[0, -1], known), [(int(IDS[-1]), 1.0)]
    while len(found) <= DRAFTS:
        found.append(ask(found[-1][0]))
    return found[1:], bound._states[DRAFTS % 2][0, 0]


def compare(checkpoint: Checkpoint, root: Path, *targets: str) -> None:
    expected = expected_drafts(checkpoint, random_drafter(checkpoint.spec), IDS, DRAFTS)
    for target in targets:
        found, state = drafts(root, target)
        assert [token for token, _ in found] == [each.token for each in expected], target
        np.testing.assert_allclose(
            [chance for _, chance in found], [each.chance for each in expected], atol=1e-4, err_msg=target
        )
        np.testing.assert_allclose(state, expected[-1].state, atol=1e-3, err_msg=target)


@pytest.mark.parametrize("case", CASES)
def test_family(case: str, tmp_path: Path) -> None:
    """Without units. Windows are shorter than the text."""
    family, options = CASES[case]
    checkpoint = tiny_checkpoint(tmp_path / "model", family, **options)
    bundle = export(checkpoint, tmp_path / "tiny.dash", drafter_only(checkpoint))
    made = [build(bundle, "cpu", weights="fp32", verify=True), build(bundle, "portable")]
    compare(checkpoint, bundle.root, *(each.target for each in made))
    verified = made[0].verification
    assert verified is not None
    assert verified.engines[DRAFTER].keys() == {"K/V", "chance", "state_out"}
    assert max(verified.engines[DRAFTER].values()) < 1e-4


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2-biases", "phi3-partial", "qwen3"])
def test_quantised(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    checkpoint = tiny_checkpoint(tmp_path / "model", family, **options)
    policy = replace(tiny_policy(checkpoint), drafter=random_drafter(checkpoint.spec))
    made = build(export(checkpoint, tmp_path / "tiny.dash", policy), "cpu", weights="int8", verify=True)
    assert made.verification is not None
    assert 0 < max(made.verification.engines[DRAFTER].values()) < 0.04


def test_beside_units(tmp_path: Path) -> None:
    """The engines of units are those of a bundle without drafter. A build for a device has no drafter so far."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    policy = tiny_policy(checkpoint, "linear")
    drafting = replace(policy, drafter=random_drafter(checkpoint.spec))
    bundle, without = (
        export(checkpoint, tmp_path / name, each) for name, each in (("a.dash", drafting), ("b.dash", policy))
    )
    made, other = (build(each, "cpu", weights="fp32").engines for each in (bundle, without))
    assert made.keys() - other.keys() == {DRAFTER}
    assert all(made[name].key == other[name].key for name in other)
    compare(checkpoint, bundle.root, "cpu-fp32")
    session = DashRuntime.load(bundle.root, "cpu-fp32").session("static", skip=(2, 3))
    assert session.decode_one(3)[1].tolist() == [0] * 6
    on_device = build(bundle, "cuda", verify=True)
    assert DRAFTER not in on_device.engines
    assert on_device.verification is not None
    assert DRAFTER not in on_device.verification.engines


def test_updates_of_pruned_units_are_the_models_alone(tmp_path: Path) -> None:
    whole = tiny_checkpoint(tmp_path / "model")
    checkpoint = pruned(whole, tiny_policy(whole, "linear", units=(Unit(5, 5),)), [Unit(5, 5)])
    assert checkpoint.spec.updates == (4,)
    assert not any("update" in name for name in checkpoint.spec.drafter_shapes())
    bundle = export(
        checkpoint, tmp_path / "tiny.dash", replace(no_policy(5, ()), drafter=random_drafter(checkpoint.spec))
    )
    compare(checkpoint, bundle.root, build(bundle, "cpu", weights="fp32").target, build(bundle, "portable").target)


def test_another_drafter_is_another_bundle(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    policy, root = drafter_only(checkpoint), tmp_path / "tiny.dash"
    assert policy.drafter is not None
    keys = set()
    for drafter in (
        policy.drafter,
        replace(policy.drafter, slope=0.7),
        replace(policy.drafter, tokens=np.arange(40)),
        random_drafter(checkpoint.spec, 1),
    ):
        keys.add(export(checkpoint, root, replace(policy, drafter=drafter)).manifest.key)
    assert len(keys) == 4
