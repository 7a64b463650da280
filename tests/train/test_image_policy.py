"""A policy for an image encoder from unlabelled pictures: stages against the runtime, guard, resuming, refusals."""

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.layout import ANSWERS, PREPROCESSOR
from dash_export.bundle.policy_file import load_policy
from dash_export.core.input_table import Picture, held_out, held_out_text, narrowed_table
from dash_export.core.rule import ForcedRule
from dash_export.core.units import Unit
from dash_export.errors import PolicyError, RequestError
from dash_export.files.artifacts import no_progress
from dash_export.images.processor import ImageProcessor
from dash_export.models import EncoderCheckpoint, open_model
from dash_export.train import image_policy
from dash_export.train.image_network import fitted_network, predicted, unit_damages
from dash_export.train.image_passes import ImageModel, Regression, divergence, unit_candidates
from dash_export.train.image_policy import ImageSettings, best_units, train_on_images
from tests.commands.helpers import dash, done
from tests.tiny import save_model
from tests.tiny_encoder import save_encoder

SETTINGS = ImageSettings(first=1, longest=2, searched=8, components=6)


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
    held = [
        files[place]
        for place in np.random.default_rng(SETTINGS.seed).permutation(64)[64 - len(table.divergence) - 48 :]
    ]
    order = np.random.default_rng(SETTINGS.seed).permutation(64)
    held = [files[place] for place in order[: round(SETTINGS.held_out * 64)]]
    encoder, asked = runtime.encoder(), runtime.encoder("token", trade_off=0.0)
    pixels = encoder.processor.batch(held)
    dense, damage = encoder.encode(pixels), asked.encode(pixels).damage
    np.testing.assert_allclose(
        table.damage.T[~asked.encode(pixels).guarded], damage[~asked.encode(pixels).guarded], rtol=2e-3
    )
    for skips in product([False, True], repeat=len(units)):
        skipped = np.repeat(np.array(skips)[:, None], len(held), axis=1)
        encoder.rule = ForcedRule(skipped)
        found = encoder.encode(pixels)
        choice = int(table.of(skipped[:, :1])[0])
        np.testing.assert_allclose(table.divergence[:, choice], divergence(dense.pooled, found.pooled), atol=2e-4)
        assert dense.probabilities is not None
        assert found.probabilities is not None
        assert table.changed is not None
        classes = found.probabilities.argmax(1) != dense.probabilities.argmax(1)
        assert (table.changed[:, choice] == classes).mean() > 0.9


def test_skipping_with_bypasses_beats_leaving_layers_out(trained: Path) -> None:
    runtime = DashRuntime.load(trained / "line.dash", "portable")
    pixels = runtime.encoder().processor.batch(sorted((trained / "pictures").iterdir())[:16])
    dense = runtime.encoder().encode(pixels).pooled
    encoder = runtime.encoder()
    encoder.rule = ForcedRule(np.ones((len(runtime.bundle.manifest.policy.units), 16), bool))
    assert divergence(dense, encoder.encode(pixels).pooled).mean() < 0.1
    assert len(runtime.build.dial) > 2


def test_foreign_pictures_are_guarded_and_dense(trained: Path) -> None:
    runtime = DashRuntime.load(trained / "line.dash", "portable")
    own = save_pictures(trained / "more", 24, seed=5)
    foreign = [np.random.default_rng(at).integers(0, 256, (42, 42, 3)).astype(np.uint8) for at in range(8)]
    encoder, dense = runtime.encoder("token", trade_off=1e6), runtime.encoder()
    found = encoder(foreign)
    assert found.guarded.all()
    np.testing.assert_array_equal(found.pooled, dense(foreign).pooled)
    assert encoder(own).guarded.mean() < 0.2


def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    files = save_pictures(tmp_path / "pictures", 60)
    passes: list[str] = []

    def stop_after(stage: str) -> None:
        def progress(name: str, *_: int) -> None:
            passes.append(name)
            if name.startswith(stage):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_on_images(tmp_path / "model", tmp_path / "a.safetensors", files, settings=SETTINGS, progress=progress)

    stop_after("the bypass")
    assert "the dense pass" in passes
    passes.clear()
    stop_after("every choice")
    assert not {"the dense pass", "choosing units"} & set(passes)
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
    output = done(*given, "--units", "1-2,3").stdout
    assert "1-2,3" in output
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


def test_refusals(tmp_path: Path) -> None:
    save_model(tmp_path / "text")
    files = save_pictures(tmp_path / "pictures", 60)
    with pytest.raises(PolicyError, match="is a causal LM"):
        train_on_images(tmp_path / "text", tmp_path / "a.safetensors", files)
    save_encoder(tmp_path / "model")
    with pytest.raises(RequestError, match="59 pictures; a policy needs at least 60"):
        train_on_images(tmp_path / "model", tmp_path / "a.safetensors", files[:59])
    with pytest.raises(PolicyError, match="from 1 to 8"):
        train_on_images(
            tmp_path / "model", tmp_path / "a.safetensors", files, units=[Unit(at, at) for at in range(1, 10)]
        )


def test_regression_finds_a_linear_map() -> None:
    from types import SimpleNamespace

    rng = np.random.default_rng(0)
    maps = {part: rng.standard_normal((5, 4)).astype(np.float32) for part in ("", "special.")}
    fit = Regression(SimpleNamespace(special=2, hidden_size=4))  # type: ignore[arg-type]
    for _ in range(8):
        read = rng.standard_normal((3, 9, 4)).astype(np.float32)
        update = read @ maps[""][:4] + maps[""][4]
        update[:, :2] = read[:, :2] @ maps["special."][:4] + maps["special."][4]
        fit.add(read, update)
    found = fit.solved()
    for part, expected in maps.items():
        np.testing.assert_allclose(found[f"{part}weight"], expected[:4], atol=0.02)
        np.testing.assert_allclose(found[f"{part}bias"], expected[4], atol=0.02)


def test_damage_of_a_unit_is_what_it_adds() -> None:
    alone, both = np.array([0.0, 0.1, 0.3]), 0.5
    lost = np.array([[*alone, both]])
    np.testing.assert_allclose(unit_damages(lost), [[(0.1 + 0.2) / 2, (0.3 + 0.4) / 2]])


def test_the_network_learns_what_features_say() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 12)).astype(np.float32)
    damages = np.exp(-5 + features[:, :2] * [1.0, 0.5] + [[0.0, 1.0]])
    network = fitted_network(features, damages, 12, 1e-3)
    found, distance = predicted(network, features)
    assert np.corrcoef(np.log(found).ravel(), np.log(damages).ravel())[0, 1] > 0.99
    assert predicted(network, features + 30)[1].min(axis=0)[0] > 4 * distance.max(axis=0)[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_units_are_those_of_all_choices(seed: int) -> None:
    candidates = unit_candidates(7, 1, 3)
    lost = np.random.default_rng(seed).random(len(candidates))

    def separate(units: tuple[Unit, ...]) -> bool:
        layers = [layer for unit in units for layer in unit.layers]
        return len(layers) == len(set(layers)) == 4

    choices = [units for count in (1, 2, 3) for units in combinations(candidates, count) if separate(units)]
    expected = min(choices, key=lambda units: sum(lost[candidates.index(unit)] for unit in units))
    assert best_units(candidates, lost, 4, 3) == tuple(sorted(expected))
    assert len(best_units(candidates, lost, 4, 1)) == 1  # of three layers: four would take two units


def test_a_bypass_mends_what_the_units_before_it_did(tmp_path: Path) -> None:
    """Where they are skipped it comes nearer to the dense state than one that was fitted to dense states."""
    save_encoder(tmp_path / "model")
    files, units = save_pictures(tmp_path / "pictures", 60), [Unit(1, 1), Unit(2, 3)]
    checkpoint = open_model(tmp_path / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    model, processor = ImageModel(checkpoint, tmp_path), ImageProcessor.parse(checkpoint.assets[PREPROCESSOR])
    work = image_policy._Work(tmp_path, "key")
    run = image_policy._Run(model, processor, (files[:48], files[48:]), SETTINGS, work, no_progress)
    sums = run._sums(units)
    first, alone = (run._bypass(sums, unit) for unit in units)
    chained = run._fitted(units[1], [(units[0], first)])
    states = [*model.states(processor.batch(files[:48]))]
    state = model.skip(states[1], first)
    errors = [float(((model.skip(state, bypass) - states[4]) ** 2).mean()) for bypass in (chained, alone)]
    assert errors[0] < 0.97 * errors[1]


def test_a_table_of_some_of_the_units() -> None:
    rng = np.random.default_rng(0)
    pictures = [
        Picture(
            tuple(rng.random(3).tolist()), tuple(rng.random(8).tolist()), changed=tuple((rng.random(8) < 0.5).tolist())
        )
        for _ in range(5)
    ]
    whole = held_out(held_out_text(pictures), 3)
    some = held_out(narrowed_table(held_out_text(pictures), (0, 2)), 2)
    np.testing.assert_array_equal(some.damage, whole.damage[[0, 2]])
    for skips in product([False, True], repeat=2):
        own = int(some.of(np.array(skips)[:, None])[0])
        there = int(whole.of(np.array([skips[0], False, skips[1]])[:, None])[0])
        np.testing.assert_array_equal(some.divergence[:, own], whole.divergence[:, there])
        assert some.changed is not None
        assert whole.changed is not None
        np.testing.assert_array_equal(some.changed[:, own], whole.changed[:, there])
