"""Texts in, vectors out: lengths regrouped, exits, the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import InferenceSession

from dash_export import DashRuntime
from dash_export.backends.onnxruntime.ort_engine import session_options
from dash_export.building import build
from dash_export.core.kinds import Setting
from dash_export.errors import BundleError, PolicyError, RequestError
from dash_export.measure.image_quality import image_quality
from dash_export.models import EncoderCheckpoint, open_model
from dash_export.train.image_policy import train_on_images
from tests.commands.helpers import done, refused
from tests.tiny_encoder import encoder_policy
from tests.tiny_texts import TEXTS, text_bundle

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> DashRuntime:
    return DashRuntime.load(text_bundle(tmp_path_factory.mktemp("texts")), "portable")


@pytest.mark.parametrize(
    "setting", [{}, {"policy": "static", "skip": (3, 4)}, {"policy": "static", "skip": (1, 2, 3, 4)},
                {"policy": "token", "trade_off": 0.5}],
)  # fmt: skip
def test_each_text_gets_what_it_gets_alone(runtime: DashRuntime, setting: dict[str, object]) -> None:
    """In a batch of several lengths, dense and where some leave early."""
    encoder = runtime.encoder(**setting)  # type: ignore[arg-type]
    together = encoder(TEXTS)
    alone = [encoder(text) for text in TEXTS]
    assert together.pooled.shape == (len(TEXTS), 32)
    for name in ("pooled", "damage"):
        expected = np.concatenate([getattr(one, name) for one in alone])
        np.testing.assert_allclose(getattr(together, name), expected, atol=2e-5)
    for name in ("actions", "guarded"):
        np.testing.assert_array_equal(getattr(together, name), np.concatenate([getattr(one, name) for one in alone]))
    streamed = np.concatenate([found.pooled for found in encoder.stream(iter(TEXTS), 2)])
    np.testing.assert_allclose(streamed, together.pooled, atol=2e-5)


def test_a_text_that_leaves_skips_what_is_behind(runtime: DashRuntime) -> None:
    dense = runtime.encoder()(TEXTS)
    assert not dense.actions.any()
    np.testing.assert_allclose(np.linalg.norm(dense.pooled, axis=1), 1, atol=1e-5)
    found = runtime.encoder("static", skip=(3, 4))(TEXTS)
    np.testing.assert_array_equal(found.actions, [[0, 0, 0, 1, 1]] * len(TEXTS))
    assert not np.allclose(found.pooled, dense.pooled, atol=1e-2)


def test_an_exit_reads_the_first_token_and_the_mean_of_the_others(tmp_path: Path) -> None:
    """The formula of core/exits.py, on the states that enter the first unit."""
    bundle = text_bundle(tmp_path)
    checkpoint = open_model(tmp_path / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    policy, runtime = encoder_policy(checkpoint), DashRuntime.load(bundle, "portable")
    encoder = runtime.encoder("static", skip=(1, 2, 3, 4))
    ((_, ids),) = encoder.processor.groups(TEXTS[:1])
    state = {"input_ids": ids}
    for name in ("embed", "layer_00"):
        (found,) = InferenceSession(bundle / f"onnx/{name}.onnx", session_options()).run(None, state)
        state = {"hidden": found}
    read = np.stack([found[:, 0], found[:, 1:].mean(1)], axis=1)
    read = (read - read.mean(-1, keepdims=True)) / np.sqrt(read.var(-1, keepdims=True) + checkpoint.spec.norm_eps)
    expected = read.reshape(1, -1) @ policy.bypasses[0]["weight"] + policy.bypasses[0]["bias"]
    np.testing.assert_allclose(encoder(TEXTS[0]).pooled, expected, atol=1e-4)


def test_it_writes_no_text(runtime: DashRuntime) -> None:
    for use in (runtime.session, runtime.batch, lambda: runtime.text):
        with pytest.raises(BundleError, match="is an encoder: it takes texts"):
            use()


def test_nothing_is_trained_or_measured_on_pictures(runtime: DashRuntime, tmp_path: Path) -> None:
    model = runtime.bundle.root.parent / "model"
    with pytest.raises(PolicyError, match="No policy can be trained for a text encoder"):
        train_on_images(model, tmp_path / "a.safetensors", [])
    assert "No policy can be trained for a text encoder" in refused("train", model, "-o", tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="takes no pictures"):
        image_quality(runtime, tmp_path, [])


def test_without_a_policy(tmp_path: Path) -> None:
    runtime = DashRuntime.load(text_bundle(tmp_path, policy=False), "portable")
    assert len(runtime.encoder()(TEXTS)) == len(TEXTS)
    assert runtime.recommended.policy == "dense"
    with pytest.raises(PolicyError, match="No policy can be trained for a text encoder"):
        runtime.encoder("token")
    assert DashRuntime.load(tmp_path / "tiny.dash").bundle.manifest.model.sizes()["texts"] == "up to 16 tokens"


def test_on_openvino(runtime: DashRuntime) -> None:
    """Costs of two builds differ, so decisions are compared by their damage."""
    pytest.importorskip("openvino")
    build(runtime.bundle.root, "openvino", weights="fp32")
    other = DashRuntime.load(runtime.bundle.root, "openvino")
    for setting in (Setting("static", skip=(3, 4)), Setting("token", trade_off=0.0)):
        expected, found = (one.encoder_with(setting)(TEXTS) for one in (runtime, other))
        np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-4)
        np.testing.assert_allclose(found.damage, expected.damage, atol=1e-4)


def test_the_command_line(runtime: DashRuntime, tmp_path: Path) -> None:
    bundle = (runtime.bundle.root, "--target", "portable")
    assert json.loads(done("run", *bundle, "A red fox.", "--json").stdout)["text"] == "A red fox."
    lines, output = tmp_path / "lines.txt", tmp_path / "features.npz"
    lines.write_text("\n".join(TEXTS))
    assert "A red fox." in done("run", *bundle, "--prompts", lines).stdout
    for _ in range(2):  # such a file is replaced
        told = done("run", *bundle, "--prompts", lines, "-o", output).stdout
    assert f"pooled vectors of {len(TEXTS)} texts; 5.0 layers" in told
    with np.load(output) as found:
        assert found["texts"].tolist() == TEXTS
        np.testing.assert_allclose(found["pooled"], runtime.encoder()(TEXTS).pooled, atol=2e-5)
    message = refused("run", *bundle, "a", "--gallery", tmp_path, code=2)
    assert "--gallery is of an encoder of pictures" in message
    done("inspect", runtime.bundle.root)


def test_commands_that_do_not_take_it(runtime: DashRuntime) -> None:
    bundle = (runtime.bundle.root, "--target", "portable")
    assert "is a text encoder, which nothing is measured for so far" in refused("eval", *bundle)
    assert "A text encoder is not profiled so far" in refused("profile", *bundle)
