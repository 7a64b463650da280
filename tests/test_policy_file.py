"""Policies on disk: what was saved comes back, and nothing else does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dash_export.commands.export import command as export
from dash_export.errors import PolicyError
from dash_export.models import Checkpoint, DecoderSpec
from dash_export.models.spec import RopeSpec
from dash_export.policy_file import METADATA, card_path, load_policy, policy_path, save_policy
from dash_export.resources import resource_folder
from dash_export.skip_policy import SkipPolicy, check_model, narrowed, untrained_policy
from tests.models.helpers import SAFETENSORS_LAYOUTS
from tests.tiny import with_compensation

HIDDEN = 32
SPEC = DecoderSpec("llama", 300, HIDDEN, 64, 6, 2, 1, 16, 512, 1e-5, RopeSpec(1e4, (1.0, 0.1)))


def policy_of(kind: str = "low_rank") -> SkipPolicy:
    made = with_compensation(untrained_policy(SPEC, width=8), HIDDEN, kind)
    norm = np.linspace(0.5, 2, HIDDEN, dtype=np.float32)
    return replace(made, origin="trained, seed 3", static_order=(4, 2, 3), cosine_order=(3, 4), final_norm=norm)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_policy(tmp_path / "p.safetensors", policy_of(), SPEC, {"seed": 3})
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize("kind", ["none", "scale", "low_rank"])
def test_round_trip(kind: str, tmp_path: Path) -> None:
    path, policy = tmp_path / "folder" / "p.safetensors", policy_of(kind)
    save_policy(path, policy, SPEC, {"seed": 3, "figures": {"kl": 0.1}})
    back = load_policy(path, SPEC)
    assert replace(back, network=None, compensation=policy.compensation) == replace(policy, network=None)
    assert back.compensation.kind == kind
    np.testing.assert_array_equal(back.final_norm, policy.final_norm)
    assert back.weights().keys() == policy.weights().keys()
    for name, array in policy.weights().items():
        assert back.weights()[name].dtype == np.float32
        np.testing.assert_array_equal(back.weights()[name], array)
    assert json.loads(card_path(path).read_text()) == {"seed": 3, "figures": {"kl": 0.1}}
    assert sorted(file.name for file in path.parent.iterdir()) == ["p.json", "p.safetensors"]


def test_what_half_precision_holds_is_stored_so(tmp_path: Path) -> None:
    """The rest is not rounded."""
    policy = policy_of("low_rank")
    rounded = replace(policy, compensation=policy.compensation.in_half())
    sizes = []
    for name, made in (("whole", policy), ("half", rounded)):
        path = tmp_path / f"{name}.safetensors"
        save_policy(path, made, SPEC, {})
        sizes.append(path.stat().st_size)
        for tensor, array in load_policy(path, SPEC).weights().items():
            np.testing.assert_array_equal(array, made.weights()[tensor])
    saved = sum(array.nbytes for array in policy.compensation.weights.values()) / 2
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=16)


def test_compensation_alone(tmp_path: Path) -> None:
    """A policy that only compensates and ranks: it serves static and cosine."""
    save_policy(tmp_path / "p.safetensors", replace(policy_of(), network=None), SPEC, {})
    assert load_policy(tmp_path / "p.safetensors", SPEC).network is None


def test_a_linear_network_is_one_too(tmp_path: Path) -> None:
    """Without a hidden layer the width is 1, and actions need not be read."""
    network = {"state": np.ones((3, HIDDEN, 1), np.float32), "bias": np.ones((3, 1), np.float32)}
    save_policy(tmp_path / "p.safetensors", replace(policy_of(), network=network), SPEC, {})
    assert load_policy(tmp_path / "p.safetensors", SPEC).network is not None
    wide = {"state": np.ones((3, HIDDEN, 2), np.float32), "bias": np.ones((3, 2), np.float32)}
    with pytest.raises(PolicyError, match=r"\[3, 32, 1\] was expected"):
        save_policy(tmp_path / "q.safetensors", replace(policy_of(), network=wide), SPEC, {})


def test_where_decisions_are_made(tmp_path: Path) -> None:
    """One state for several layers: kept in the file, and by a policy for fewer of them."""
    network = {"state": np.ones((3, HIDDEN, 1), np.float32), "bias": np.ones((3, 1), np.float32)}
    once = replace(policy_of(), network=network, reads=(1, 1, 3))
    save_policy(tmp_path / "p.safetensors", once, SPEC, {})
    back = load_policy(tmp_path / "p.safetensors", SPEC)
    assert back.decision_points == {1: (2, 3), 3: (4,)}
    assert narrowed(back, [3, 4]).decision_points == {1: (3,), 3: (4,)}
    for reads, said in (((1, 1), "2 layers to read for 3"), ((1, 3, 3), "layer 3 cannot read"), ((1, 0, 3), "layer 2")):
        with pytest.raises(PolicyError, match=said):
            save_policy(tmp_path / "q.safetensors", replace(once, reads=reads), SPEC, {})
    with pytest.raises(PolicyError, match="Only a linear network"):
        save_policy(tmp_path / "q.safetensors", replace(policy_of(), reads=(1, 1, 1)), SPEC, {})


def test_half_precision_is_read(saved: Path) -> None:
    rewrite(saved, lambda tensors, _: {name: array.astype(np.float16) for name, array in tensors.items()})
    back = load_policy(saved, SPEC).weights()
    assert all(array.dtype == np.float32 for array in back.values())
    np.testing.assert_allclose(back["network.state"], policy_of().weights()["network.state"], atol=2e-3)


Tensors = dict[str, np.ndarray]


def rewrite(path: Path, change: Callable[[Tensors, dict[str, Any]], Tensors | None]) -> None:
    """The file with other tensors or facts."""
    import safetensors

    tensors = load_file(path)
    with safetensors.safe_open(str(path), "np") as file:
        facts = json.loads(file.metadata()[METADATA])
    tensors = change(tensors, facts) or tensors
    save_file(tensors, path, {METADATA: json.dumps(facts)})


def number(tensors: Tensors, name: str, value: float) -> None:
    tensors[name].reshape(-1)[5] = value


def without(tensors: Tensors, name: str) -> Tensors:
    return {other: array for other, array in tensors.items() if other != name}


DAMAGE: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "nan": (lambda t, _: number(t, "network.state", float("nan")), "network.state holds NaN or infinity"),
    "inf": (lambda t, _: number(t, "compensation.up", float("inf")), "compensation.up holds NaN or infinity"),
    "wrong-shape": (lambda t, _: {**t, "network.out": t["network.out"][:, :-1].copy()}, "network.out has shape"),
    "one-layer-less": (lambda t, _: {n: a[1:].copy() for n, a in t.items()}, r"\[2, 32, 8\]; \[3, 32, 8\]"),
    "flat-bias": (lambda t, _: {**t, "network.bias": t["network.bias"][0].copy()}, "shape"),
    "scalar": (lambda t, _: {**t, "network.out_bias": np.array(1.0, np.float32)}, "a single number"),
    "integers": (lambda t, _: {**t, "network.bias": t["network.bias"].astype(np.int32)}, "dtype"),
    "missing": (lambda t, _: without(t, "network.bias"), "lacks network.bias"),
    "missing-out": (lambda t, _: without(t, "network.out"), "lacks network.out"),
    "missing-up": (lambda t, _: without(t, "compensation.up"), "lacks compensation.up"),
    "unknown-tensor": (lambda t, _: {**t, "network.extra": t["network.bias"]}, "network.extra"),
    "foreign-tensor": (lambda t, _: {**t, "model.norm": t["network.bias"]}, "model.norm"),
    "norm-shape": (lambda t, _: {**t, "model.final_norm": np.ones(31, np.float32)}, "final norm"),
    "norm-zero": (lambda t, _: {**t, "model.final_norm": np.zeros(HIDDEN, np.float32)}, "final norm"),
    "norm-nan": (lambda t, _: number(t, "model.final_norm", float("nan")), "final_norm holds NaN"),
    "unknown-key": (lambda _, f: f.update(surprise=1), "unknown 'surprise'"),
    "missing-key": (lambda _, f: f.pop("gated") and None, "missing gated"),
    "wrong-type": (lambda _, f: f.update(num_layers="6"), "num_layers must be int"),
    "newer": (lambda _, f: f.update(schema=9, new=1), "newer dash-export"),
    "compensation": (lambda _, f: f.update(compensation="magic"), "no compensation 'magic'"),
    "other-compensation": (lambda _, f: f.update(compensation="scale"), "lacks compensation.factor"),
    "layer-0": (lambda _, f: f.update(gated=[0, 2, 3]), "Layer 0"),
    "no-such-layer": (lambda _, f: f.update(gated=[2, 3, 9]), "do not exist"),
    "gated-twice": (lambda _, f: f.update(gated=[2, 3, 3]), "rising"),
    "order": (lambda _, f: f.update(static_order=[2, 5]), "static_order"),
    "order-twice": (lambda _, f: f.update(cosine_order=[2, 2]), "cosine_order"),
    "reads-itself": (lambda _, f: f.update(reads=[1, 3, 3]), "layer 3 cannot read"),
    "origin": (lambda _, f: f.update(origin="\x1b[2Jclear"), "printable"),
    "more-layers": (lambda _, f: f.update(num_layers=8), "this model is a llama of 6 layers"),
    "other-family": (lambda _, f: f.update(model_type="qwen3"), "policy of a qwen3"),
    "other-size": (lambda _, f: f.update(hidden_size=64), "hidden size 64"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, saved: Path) -> None:
    change, expected = DAMAGE[name]
    rewrite(saved, change)
    with pytest.raises(PolicyError, match=expected) as raised:
        load_policy(saved, SPEC)
    message = str(raised.value)
    assert str(saved) in message
    assert "train" in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [0, 4, 40, 600, -1])
def test_truncated(keep: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(PolicyError, match="not a sound safetensors file"):
        load_policy(saved, SPEC)


@pytest.mark.parametrize("name", SAFETENSORS_LAYOUTS)
def test_tensors_that_do_not_lie_one_after_another(name: str, saved: Path) -> None:
    saved.write_bytes(SAFETENSORS_LAYOUTS[name](saved.read_bytes()))
    with pytest.raises(PolicyError, match="not a sound safetensors file"):
        load_policy(saved, SPEC)


def test_names_of_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = resource_folder("calibration") / "smollm2-135m-instruct.safetensors"
    monkeypatch.chdir(tmp_path)
    Path(shipped.stem).mkdir()  # a model's folder, say
    assert policy_path(shipped.stem) == shipped
    Path(shipped.stem).rmdir()
    Path(shipped.stem).write_bytes(b"")
    assert policy_path(shipped.stem) == Path(shipped.stem)
    with pytest.raises(PolicyError, match="comes with this package: smollm2-135m-instruct, smollm2-135m-instruct-st"):
        policy_path(f"../{shipped.stem}")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="There is no policy file"):
        load_policy(tmp_path / "none.safetensors", SPEC)
    (tmp_path / "text.safetensors").write_text("not one")
    with pytest.raises(PolicyError, match="not a sound safetensors file"):
        load_policy(tmp_path / "text.safetensors", SPEC)
    save_file({"network.state": np.zeros((1, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(PolicyError, match="holds no skip policy"):
        load_policy(tmp_path / "model.safetensors", SPEC)
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "b.safetensors", {METADATA: "{"})
    with pytest.raises(PolicyError, match="not JSON"):
        load_policy(tmp_path / "b.safetensors", SPEC)


def test_nothing_unsound_is_saved(saved: Path) -> None:
    before = saved.read_bytes(), card_path(saved).read_bytes()
    policy = policy_of()
    assert policy.network is not None
    broken = replace(policy, network={**policy.network, "bias": np.full((3, 8), np.nan, np.float32)})
    with pytest.raises(PolicyError, match="NaN"):
        save_policy(saved, broken, SPEC, {})
    with pytest.raises(PolicyError, match="shape"):
        save_policy(saved, policy, replace(SPEC, hidden_size=64), {})
    with pytest.raises(PolicyError, match=r"NAME\.safetensors"):
        save_policy(saved.with_suffix(".bin"), policy, SPEC, {})
    with pytest.raises(ValueError, match="JSON compliant"):
        save_policy(saved, policy, SPEC, {"kl": float("nan")})
    assert (saved.read_bytes(), card_path(saved).read_bytes()) == before
    assert len(list(saved.parent.iterdir())) == 2


@pytest.mark.model
def test_shipped_policies(smollm2: Checkpoint) -> None:
    """Each is for SmolLM2, as its card says it was trained, and named where one looks for it."""
    folder = resource_folder("calibration")
    shipped = sorted(folder.glob("*.safetensors"))
    assert shipped
    for path in shipped:
        policy, card = load_policy(path, smollm2.spec), json.loads(card_path(path).read_text())
        assert list(policy.gated) == card["gated"]
        assert list(policy.static_order) == card["static_order"]
        assert policy.origin.startswith(f"{card['kind']} policy for {smollm2.name}, ")
        assert policy.final_norm is not None
        check_model(policy, smollm2)
    said = str(next(getattr(option, "help", "") for option in export.params if option.name == "policy"))
    listed = (folder / "README.md").read_text(encoding="utf-8")
    names = {path.stem for path in shipped}
    assert set(re.findall(r"smollm2[\w-]+", said)) == names
    assert set(re.findall(r"`(smollm2[\w-]+)\.safetensors`, ", listed)) == names
