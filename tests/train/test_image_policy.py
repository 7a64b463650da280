"""A policy for an image encoder from unlabelled pictures: stages against the runtime, guard, resuming, refusals."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import ANSWERS
from dash_export.bundle.policy_file import load_policy
from dash_export.core.exits import leaving_damage, moves
from dash_export.core.input_table import held_out
from dash_export.core.rule import ForcedRule
from dash_export.core.units import Unit, units_text
from dash_export.errors import PolicyError, RequestError
from dash_export.models import open_model
from dash_export.train import image_policy
from dash_export.train.image_exits import applied, distances, fitted_exit, fitted_guard, fitted_scores
from dash_export.train.image_passes import divergence
from dash_export.train.image_policy import ImageSettings, exit_units, train_on_images
from tests.commands.helpers import dash, done
from tests.tiny import save_model
from tests.tiny_encoder import save_encoder

SETTINGS = ImageSettings(components=6)


def save_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Pictures of one kind: a smooth wave of one colour, with a little noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    waves = np.sin(np.linspace(0, 6, 42))[:, None] * np.ones(42)
    files = []
    for number in range(count):
        pixels = 128 + 60 * np.roll(waves, rng.integers(42), axis=0)[..., None] * [1, 0.6, 0.3]
        pixels = pixels + 8 * rng.standard_normal((42, 42, 1))
        files.append(folder / f"{number:03d}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(files[-1])
    return files


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pictures, a policy for both, and the bundle."""
    root = tmp_path_factory.mktemp("trained")
    save_encoder(root / "model", "vit-classes")
    files = save_pictures(root / "pictures", 64)
    train_on_images(root / "model", root / "line.safetensors", files, settings=SETTINGS)
    checkpoint = open_model(root / "model")
    policy = load_policy(root / "line.safetensors", checkpoint.spec)
    build(export(checkpoint, root / "line.dash", policy), "portable")
    return root


def test_the_table_is_what_the_runtime_does(trained: Path) -> None:
    runtime = DashRuntime.load(trained / "line.dash", "portable")
    units = runtime.bundle.manifest.policy.units
    table = held_out((trained / "line.dash" / ANSWERS).read_text(), len(units))
    files = sorted((trained / "pictures").iterdir())
    order = np.random.default_rng(SETTINGS.seed).permutation(64)
    encoder, asked = runtime.encoder(), runtime.encoder("token", trade_off=0.0)
    pixels = encoder.processor.batch([files[place] for place in order[: round(SETTINGS.held_out * 64)]])
    dense, policy = encoder.encode(pixels), asked.encode(pixels)
    np.testing.assert_array_equal(np.isinf(table.damage).any(axis=0), policy.guarded)
    np.testing.assert_allclose(table.damage.T[~policy.guarded], policy.damage[~policy.guarded], rtol=5e-3)
    for place in range(len(units) + 1):
        skipped = np.repeat(np.arange(len(units))[:, None] >= place, len(pixels), axis=1)
        encoder.rule = ForcedRule(skipped)
        found = encoder.encode(pixels)
        assert (table.of(skipped) == place).all()
        pooled = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (dense.pooled, found.pooled)]
        np.testing.assert_allclose(table.divergence[:, place], 1 - np.prod(pooled, axis=0).sum(axis=1), atol=2e-4)
        assert dense.probabilities is not None
        assert found.probabilities is not None
        assert table.changed is not None
        classes = found.probabilities.argmax(1) != dense.probabilities.argmax(1)
        assert (table.changed[:, place] == classes).mean() > 0.9


def test_foreign_pictures_are_guarded_and_dense(trained: Path) -> None:
    runtime = DashRuntime.load(trained / "line.dash", "portable")
    own = save_pictures(trained / "more", 24, seed=5)
    foreign = [np.random.default_rng(at).integers(0, 256, (42, 42, 3)).astype(np.uint8) for at in range(8)]
    encoder, dense = runtime.encoder("token", trade_off=1e6), runtime.encoder()
    found = encoder(foreign)
    assert found.guarded.all()
    np.testing.assert_array_equal(found.pooled, dense(foreign).pooled)
    assert encoder(own).guarded.mean() < 0.2


def test_a_killed_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(tmp_path / "model")
    files = save_pictures(tmp_path / "pictures", 60)
    passes: list[tuple[str, int]] = []

    def stop_after(stage: str, at: int = 0) -> None:
        def progress(name: str, done: int, _: int) -> None:
            passes.append((name, done))
            if name.startswith(stage) and done >= at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_on_images(tmp_path / "model", tmp_path / "a.safetensors", files, settings=SETTINGS, progress=progress)

    monkeypatch.setattr(image_policy, "CHUNK", 20)
    stop_after("the dense pass", 30)
    stop_after("fitting")
    whole = [done for name, done in passes if name == "the dense pass"]
    assert whole[:8] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert whole[8] == 24  # the first 20 are not run again
    passes.clear()
    stop_after("fitting")
    assert [name for name, _ in passes] == ["fitting exits"]
    train_on_images(tmp_path / "model", tmp_path / "a.safetensors", files, settings=SETTINGS)
    train_on_images(tmp_path / "model", tmp_path / "b.safetensors", files, settings=SETTINGS)
    spec = open_model(tmp_path / "model").spec
    resumed, whole = (load_policy(tmp_path / f"{name}.safetensors", spec) for name in "ab")
    assert (resumed.units, resumed.answers) == (whole.units, whole.answers)
    for name, array in whole.weights().items():
        np.testing.assert_array_equal(resumed.weights()[name], array)
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(tmp_path / "model", "vit-classes")
    save_pictures(tmp_path / "pictures", 60)
    monkeypatch.setattr(image_policy, "ImageSettings", lambda: SETTINGS)
    given = ("train", tmp_path / "model", "--images", tmp_path / "pictures", "-o", tmp_path / "line.safetensors")
    assert "--units only" in dash(*given, "--steps", "3").output
    assert "follow each other up to layer 4" in dash(*given, "--units", "1-2,3").output
    output = done(*given, "--units", "1-2,3-4").stdout
    assert "all leave before layer" in output
    assert "Next: dash-export build" in output
    built = done(
        "build", tmp_path / "model", "--policy", tmp_path / "line.safetensors", "-o", tmp_path / "a.dash"
    ).output
    assert "ms/picture" in built
    assert "Dial of the picture policy" in built
    picture = tmp_path / "pictures" / "000.png"
    assert "LABEL_" in done("run", tmp_path / "a.dash", picture).stdout
    done("run", tmp_path / "a.dash", tmp_path / "pictures", "-o", tmp_path / "f.npz", "--trade-off", "1000")
    with np.load(tmp_path / "f.npz") as found:
        assert found["pooled"].shape == (60, 32)
        assert found["actions"].any()
    near = done("run", tmp_path / "a.dash", picture, "--gallery", tmp_path / "pictures", "--json").stdout
    assert '"000.png", 1.0' in near
    assert "token" in done("frontier", tmp_path / "a.dash", "--images", tmp_path / "pictures", "--limit", "8",
                           "--skipped", "0.2,1", "-o", tmp_path / "front").stdout  # fmt: skip
    assert (tmp_path / "front.png").is_file()
    done("inspect", tmp_path / "a.dash")
    given = ("export", tmp_path / "model", "-o", tmp_path / "b.dash")
    refused = dash(*given, "--policy", tmp_path / "line.safetensors", "--units", "3-4").output
    assert "exits of an encoder's policy build on one another: train it again with these --units" in refused
    done(*given, "--policy", "untrained")
    assert Bundle.open(tmp_path / "b.dash").manifest.policy.units == ()
    assert "lacks bypass.03-04" in dash(*given, "--policy", "untrained", "--units", "3-4").output


def test_refusals(tmp_path: Path) -> None:
    save_model(tmp_path / "text")
    files = save_pictures(tmp_path / "pictures", 60)
    with pytest.raises(PolicyError, match="is a causal LM"):
        train_on_images(tmp_path / "text", tmp_path / "a.safetensors", files)
    save_encoder(tmp_path / "model")
    with pytest.raises(RequestError, match="59 pictures; a policy needs at least 60"):
        train_on_images(tmp_path / "model", tmp_path / "a.safetensors", files[:59])
    with pytest.raises(PolicyError, match="Layer 0 can be in no unit"):
        train_on_images(tmp_path / "model", tmp_path / "a.safetensors", files, units=[Unit(0, 4)])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(12, "3,4,5,6,7,8,9,10-11"), (5, "1,2,3-4"), (24, "6-8,9-11,12-14,15-17,18-20,21-23"), (2, "1"), (3, "1-2")],
)
def test_where_exits_lie(layers: int, expected: str) -> None:
    assert units_text(exit_units(layers, 0.25, 8)) == expected


def test_an_exit_finds_a_linear_map_and_says_how_well_it_answers() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((400, 12)).astype(np.float32), rng.standard_normal((12, 5)).astype(np.float32)
    noise = 0.3 * rng.standard_normal((400, 5)).astype(np.float32)
    found, unseen = fitted_exit(x, x @ weight + 2 + noise, 4)
    np.testing.assert_allclose(found["weight"], weight, atol=0.15)
    np.testing.assert_allclose(found["bias"], 2, atol=0.15)
    seen = divergence(x @ weight[:, :4] + 2 + noise[:, :4], applied(found, x)[:, :4]).mean()
    own = divergence(x @ weight[:, :4] + 2 + noise[:, :4], unseen).mean()
    assert seen < own < 2 * seen


def test_pictures_whose_answers_still_move_have_more_damage() -> None:
    """Half of the pictures settle at the first exit, the others at the last."""
    rng, hidden, count = np.random.default_rng(0), 16, 400
    dense = rng.standard_normal((count, hidden)).astype(np.float32)
    late = np.arange(count) % 2 == 1
    spread = [np.where(late, 1.0, 0.3), np.where(late, 0.9, 0.01), np.where(late, 0.5, 0.01), np.full(count, 0.01)]
    answers = [(dense + own[:, None] * rng.standard_normal(dense.shape)).astype(np.float32) for own in spread]
    centre = dense.mean(axis=0)
    weight, bias = fitted_scores(answers, dense, centre)
    for place in range(2):
        logs = moves(answers[place + 1], answers[place::-1], centre) @ weight[place] + bias[place]
        units = (Unit(1, 1), Unit(2, 2), Unit(3, 3))
        damage = leaving_damage(logs[:, place:], place, units, 4)
        assert np.median(damage[late]) > 20 * np.median(damage[~late])
    assert not weight[0, 3].any()  # before the first exit there is one answer, so the second and third move not


def test_damage_is_what_leaving_here_adds_per_layer() -> None:
    units = (Unit(1, 2), Unit(3, 3), Unit(4, 5))
    logs = np.log([[0.5, 0.4, 0.1], [0.1, 0.2, 0.3]])
    # Leaving at 1 instead of at 3 adds 0.1 for 2 layers, at 4 0.4 for 3, at the end 0.5 for 5.
    np.testing.assert_allclose(leaving_damage(logs, 0, units, 6), [2 * 0.4 / 3, 2 * 0.1 / 5], rtol=1e-5)
    np.testing.assert_allclose(leaving_damage(logs[:, 1:], 1, units, 6), [0.3, 0.2 / 3], rtol=1e-5)
    np.testing.assert_allclose(leaving_damage(logs[:, 2:], 2, units, 6), [0.1, 0.3], rtol=1e-5)


def test_the_guard_knows_what_is_far() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 12)).astype(np.float32)
    guard = fitted_guard(features, 6)
    near, far = distances(guard, features), distances(guard, features + 30)
    assert (far.min(axis=0) > 4 * near.max(axis=0)).all()
    np.testing.assert_allclose(near[:, 0].mean(), 1, atol=0.01)
