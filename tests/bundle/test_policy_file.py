"""Policies on disk: what was saved comes back, and nothing else does."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dash_export.bundle.policy_file import METADATA, card_path, load_policy, policy_path, save_policy
from dash_export.core.drafter import Drafter, check_drafter
from dash_export.core.policy import SkipPolicy, check_policy, narrowed, no_policy, untrained_policy
from dash_export.core.units import Unit, units_text
from dash_export.errors import OutputError, PolicyError
from dash_export.files.resources import resource_folder
from dash_export.models import Checkpoint, DecoderSpec
from dash_export.models.bypasses import check_model
from dash_export.models.config import decoder_spec
from tests.models.helpers import SAFETENSORS_LAYOUTS
from tests.tiny import TINY_UNITS, random_drafter, with_bypasses

HIDDEN = 32
SPEC = DecoderSpec(
    model_type="llama", vocab_size=300, hidden_size=HIDDEN, intermediate_size=64, num_layers=6, num_heads=2,
    num_kv_heads=1, head_dim=16, max_positions=512, rms_norm_eps=1e-5, rope_frequencies=(1.0, 0.1),
)  # fmt: skip


def policy_of(form: str = "linear") -> SkipPolicy:
    """`form`: none or linear."""
    norm = np.linspace(0.5, 2, HIDDEN, dtype=np.float32)
    policy = replace(untrained_policy(SPEC, TINY_UNITS), origin="trained", static_order=(1, 0), final_norm=norm)
    return policy if form == "none" else with_bypasses(policy, SPEC)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_policy(tmp_path / "p.safetensors", policy_of(), SPEC, {"seed": 3})
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize("form", ["none", "linear", "linear, no network"])
def test_round_trip(form: str, tmp_path: Path) -> None:
    form, _, alone = form.partition(", ")
    path, policy = tmp_path / "folder" / "p.safetensors", policy_of(form)
    policy = replace(policy, network=None) if alone else policy  # it serves static
    save_policy(path, policy, SPEC, {"seed": 3, "figures": {"kl": 0.1}})
    back = load_policy(path, SPEC)
    assert replace(back, network=None, bypasses=()) == replace(policy, network=None, bypasses=())
    assert back.form == policy.form == form
    np.testing.assert_array_equal(back.final_norm, policy.final_norm)
    assert back.weights().keys() == policy.weights().keys()
    for name, array in policy.weights().items():
        assert back.weights()[name].dtype == np.float32
        np.testing.assert_array_equal(back.weights()[name], array)
    assert json.loads(card_path(path).read_text()) == {"seed": 3, "figures": {"kl": 0.1}}
    assert sorted(file.name for file in path.parent.iterdir()) == ["p.json", "p.safetensors"]


def test_what_half_precision_holds_is_stored_so(tmp_path: Path) -> None:
    """The rest is not rounded."""
    policy = policy_of()
    sizes = []
    for name, made in (("whole", policy), ("half", policy.in_half())):
        path = tmp_path / f"{name}.safetensors"
        save_policy(path, made, SPEC, {})
        sizes.append(path.stat().st_size)
        for tensor, array in load_policy(path, SPEC).weights().items():
            np.testing.assert_array_equal(array, made.weights()[tensor])
    saved = sum(array.nbytes for name, array in policy.weights().items() if name.startswith("bypass")) / 2
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=16)


def test_numbers_that_half_precision_does_not_hold(tmp_path: Path, own_bundle: Path) -> None:
    """A bundle would cut them; training does, and a policy is not written into a bundle."""
    policy = policy_of()
    first = {name: 1e6 * array for name, array in policy.bypasses[0].items()}
    large = replace(policy, bypasses=(first, *policy.bypasses[1:]))
    with pytest.raises(PolicyError, match="holds numbers over 65504"):
        save_policy(tmp_path / "large.safetensors", large, SPEC, {})
    bounded = large.in_half()
    save_policy(tmp_path / "large.safetensors", bounded, SPEC, {})
    with pytest.raises(OutputError, match="would lie inside the bundle"):
        save_policy(own_bundle / "onnx" / "p.safetensors", bounded, SPEC, {})


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, lambda path: path.write_bytes(b"mine"), lambda path: save_file({"w": np.ones(2, np.float32)}, path)],
)
def test_what_is_no_policy_is_not_written_over(make: Callable[[Path], object], tmp_path: Path) -> None:
    """Nor does anybody wait for one who writes into a pipe."""
    path = tmp_path / "model.safetensors"
    make(path)
    before = path.stat()
    with pytest.raises(PolicyError, match="exists and is no skip policy: it will not be overwritten"):
        save_policy(path, policy_of(), SPEC, {})
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)


def test_a_policy_of_fewer_units() -> None:
    policy = policy_of()
    fewer = narrowed(policy, [4])
    assert (fewer.units, fewer.read, fewer.static_order) == ((Unit(4, 4),), policy.read, (0,))
    np.testing.assert_array_equal(fewer.network["weight"], policy.network["weight"][:, 1:])
    assert fewer.bypasses == policy.bypasses[1:]
    for layers in ([3, 4], [5]):
        with pytest.raises(PolicyError, match="not whole units"):
            narrowed(policy, layers)


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


KV = "bypass.02-03.weight"

DAMAGE: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "nan": (lambda t, _: number(t, "network.weight", float("nan")), "network.weight holds NaN or infinity"),
    "inf": (lambda t, _: number(t, KV, float("inf")), f"{KV} holds NaN or infinity"),
    "wrong-shape": (lambda t, _: {**t, "network.weight": t["network.weight"][:, :1].copy()}, r"\[32, 1\]; \[32, 2\]"),
    "no-second-layer": (lambda t, _: {**t, KV: t[KV][:, :HIDDEN].copy()}, r"\[32, 32\]; \[32, 64\]"),
    "integers": (lambda t, _: {**t, "network.bias": t["network.bias"].astype(np.int32)}, "dtype"),
    "missing": (lambda t, _: {name: t[name] for name in t if name != "network.bias"}, "lacks network.bias"),
    "unknown-tensor": (lambda t, _: {**t, "network.extra": t["network.bias"]}, "network.extra"),
    "foreign-tensor": (lambda t, _: {**t, "model.norm": t["network.bias"]}, "model.norm"),
    "norm-shape": (lambda t, _: {**t, "model.final_norm": np.ones(31, np.float32)}, "final_norm has shape"),
    "norm-zero": (lambda t, _: {**t, "model.final_norm": np.zeros(HIDDEN, np.float32)}, "final norm"),
    "unknown-key": (lambda _, f: f.update(surprise=1), "unknown 'surprise'"),
    "wrong-type": (lambda _, f: f.update(num_layers="6"), "num_layers must be int"),
    "newer": (lambda _, f: f.update(schema=9, new=1), "of schema 9.* pip install -U"),
    "older": (lambda _, f: f.update(schema=1), "of schema 1.*train it anew"),
    "reads-itself": (lambda _, f: f.update(read=2), "must be one before the first unit"),
    "order": (lambda _, f: f.update(static_order=[1, 2]), "static order"),
    "origin": (lambda _, f: f.update(origin="\x1b[2Jclear"), "printable"),
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


def with_drafter(spec: DecoderSpec = SPEC) -> SkipPolicy:
    return replace(no_policy(6, ()), final_norm=np.ones(HIDDEN, np.float32), drafter=random_drafter(spec))


def loaded(path: Path, spec: DecoderSpec = SPEC) -> Drafter:
    drafter = load_policy(path, spec).drafter
    assert drafter is not None
    return drafter


def test_a_drafter_is_kept_in_eight_bits(tmp_path: Path) -> None:
    """Within half a step of each block of 32 weights, the last of which may be shorter. Saved again it stays the same.
    A policy with units may have one, too.
    """
    spec, path = replace(SPEC, intermediate_size=72), tmp_path / "p.safetensors"
    policy = replace(policy_of(), drafter=random_drafter(spec))
    assert policy.drafter is not None
    policy.drafter.weights["layer.mlp.down_proj.weight"][3] = 0
    save_policy(path, policy, spec, {})
    back = load_policy(path, spec)
    assert (back.units, back.weights().keys()) == (policy.units, policy.weights().keys())
    first, known, kept = loaded(path, spec), policy.drafter, load_file(path)
    assert (first.slope, first.offset, first.origin) == (known.slope, known.offset, known.origin)
    np.testing.assert_array_equal(first.tokens, known.tokens)
    assert first.tokens.dtype == np.int64
    assert first.weights.keys() == known.weights.keys()
    for name, array in known.weights.items():
        found = first.weights[name]
        assert found.dtype == np.float32
        if array.ndim == 1:
            np.testing.assert_array_equal(found, array, err_msg=name)
            continue
        for start in range(0, array.shape[1], 32):
            one, other = array[:, start : start + 32], found[:, start : start + 32]
            steps = np.abs(one).max(axis=1, keepdims=True) / 127
            assert (np.abs(other - one) <= 0.57 * steps).all(), name  # half, and what 16 bits round of the scale
        assert kept[f"drafter.{name}"].dtype == np.int8
        assert kept[f"drafter.{name}.scales"].shape == (len(array), -(-array.shape[1] // 32))
    save_policy(again := tmp_path / "again.safetensors", back, spec, {})
    for name, array in loaded(again, spec).weights.items():
        np.testing.assert_array_equal(array, first.weights[name], err_msg=name)


def test_size_of_a_drafter(tmp_path: Path) -> None:
    spec = replace(SPEC, hidden_size=896, intermediate_size=4864, num_heads=14, num_kv_heads=2, head_dim=64)
    save_policy(tmp_path / "p.safetensors", replace(no_policy(6, ()), drafter=random_drafter(spec)), spec, {})
    assert (tmp_path / "p.safetensors").stat().st_size < 17.6e6


def test_a_file_without_drafter_is_read_by_versions_before(saved: Path) -> None:
    import safetensors

    with safetensors.safe_open(str(saved), "np") as file:
        facts = json.loads(file.metadata()[METADATA])
    assert facts["schema"] == 2
    assert "drafter" not in facts


Q = "layer.self_attn.q_proj.weight"
DRAFTER_DAMAGE: dict[str, tuple[Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "nan-scale": (lambda t, _: number(t, f"drafter.{Q}.scales", float("nan")), f"{Q} holds NaN"),
    "inf-scale": (lambda t, _: number(t, f"drafter.{Q}.scales", float("inf")), f"{Q} holds NaN, infinity"),
    "nan-norm": (lambda t, _: number(t, "drafter.norm.weight", float("nan")), "norm.weight holds NaN"),
    "no-scales": (lambda t, _: {n: t[n] for n in t if n != f"drafter.{Q}.scales"}, f"drafter.{Q}.scales is missing"),
    "scales-alone": (
        lambda t, _: {**t, "drafter.x.scales": np.ones((1, 1), np.float32)},
        "x.scales is missing, or the",
    ),
    "short-scales": (lambda t, _: {**t, f"drafter.{Q}.scales": np.ones((31, 1), np.float16)}, r"scales \[31, 1\]"),
    "codes-of-four-bytes": (lambda t, _: {**t, f"drafter.{Q}": t[f"drafter.{Q}"].astype(np.int32)}, "is missing"),
    "codes-of-two-bytes": (lambda t, _: {**t, f"drafter.{Q}": t[f"drafter.{Q}"].astype(np.int16)}, "dtype int16"),
    "float-tokens": (lambda t, _: {**t, "drafter.tokens": t["drafter.tokens"].astype(np.float32)}, "must be int32"),
    "cut": (lambda t, _: {name: t[name] for name in t if "down_proj" not in name}, "lacks layer.mlp.down_proj"),
    "more": (lambda t, _: {**t, "drafter.layer.extra": t["drafter.norm.weight"]}, "holds layer.extra"),
    "narrow": (lambda t, _: {**t, "drafter.norm.weight": np.ones(31, np.float32)}, r"\[31\]; \[32\] was expected"),
    "few-tokens": (lambda t, _: {**t, "drafter.tokens": t["drafter.tokens"][:15].copy()}, "list of 16 to 300"),
    "no-tokens": (lambda t, _: {name: t[name] for name in t if name != "drafter.tokens"}, "list of 16 to 300"),
    "falling": (lambda t, _: {**t, "drafter.tokens": t["drafter.tokens"][::-1].copy()}, "must rise"),
    "twice": (lambda t, _: number(t, "drafter.tokens", int(t["drafter.tokens"][4])), "must rise"),
    "other-vocabulary": (lambda t, _: {**t, "drafter.tokens": t["drafter.tokens"] + 200}, "below 300: another vocab"),
    "unsaid": (lambda _, f: f.pop("drafter") and None, "of which its metadata says nothing"),
    "slope": (lambda _, f: f["drafter"].update(slope="steep"), "slope must be float"),
    "key": (lambda _, f: f["drafter"].update(surprise=1), "unknown 'surprise'"),
    "nobody's": (lambda _, f: f["drafter"].update(origin=""), "does not say who made it"),
    "other-depth": (lambda _, f: f.update(num_layers=7), "policy of a llama of 7 layers"),
}


@pytest.mark.parametrize("name", DRAFTER_DAMAGE)
def test_damage_to_a_drafter_is_named(name: str, tmp_path: Path) -> None:
    path, (change, expected) = tmp_path / "p.safetensors", DRAFTER_DAMAGE[name]
    save_policy(path, with_drafter(), SPEC, {})
    rewrite(path, change)
    with pytest.raises(PolicyError, match=expected) as raised:
        load_policy(path, SPEC)
    assert "\n" not in str(raised.value)


def test_a_drafter_for_another_model() -> None:
    policy = with_drafter()
    assert policy.drafter is not None
    with pytest.raises(PolicyError, match=r"gate_proj.* \[64, 32\]; \[72, 32\] was expected"):
        check_policy(policy, replace(SPEC, intermediate_size=72))
    with pytest.raises(PolicyError, match="writes no text"):
        check_drafter(policy.drafter, {}, 0)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    **{f"cut at {keep}": lambda data, keep=keep: data[:keep] for keep in (0, 40, -1)},
    "a long header": lambda data: (1 << 21).to_bytes(8, "little") + b" " * (1 << 21) + data,
    **{name: change for name, change in SAFETENSORS_LAYOUTS.items() if name != "twice"},  # the only reader takes one
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_sound(name: str, saved: Path) -> None:
    saved.write_bytes(BROKEN[name](saved.read_bytes()))
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
    with pytest.raises(PolicyError, match=", smollm2-135m-instruct "):
        policy_path(f"../{shipped.stem}")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="There is no policy file"):
        load_policy(tmp_path / "none.safetensors", SPEC)
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
    broken = replace(policy, network={**policy.network, "bias": np.full(2, np.nan, np.float32)})
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


QWEN = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
QWEN |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}


@pytest.mark.model
def test_shipped_policies(smollm2: Checkpoint) -> None:
    """Each is for its model, as its card says it was trained, and named where one looks for it."""
    folder = resource_folder("calibration")
    specs = {"smollm2-135m-instruct": smollm2.spec, "qwen2.5-coder-0.5b-instruct": decoder_spec(QWEN)}
    assert specs.keys() == {path.stem for path in folder.glob("*.safetensors")}
    for name, spec in specs.items():
        path = folder / f"{name}.safetensors"
        policy, card = load_policy(path, spec), json.loads(card_path(path).read_text())
        assert units_text(policy.units) == card["units"]
        assert units_text(policy.units[place] for place in policy.static_order) == card["static_order"]
        assert policy.origin.startswith(f"{card['kind']} policy for ")
        assert policy.final_norm is not None
        if spec is smollm2.spec:
            check_model(policy, smollm2)
    listed = (folder / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([\w.-]+)\.safetensors`, ", listed)) == specs.keys()
