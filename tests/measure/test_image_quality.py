"""What an encoder gives up on pictures of several classes, and the commands that tell it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.errors import RequestError
from dash_export.images.sources import image_files
from dash_export.measure.image_quality import ImageQuality, image_quality
from tests.commands.helpers import done, refused
from tests.tiny_encoder import SIDE, encoder_bundle

STATIC = Setting("static", skip=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, and pictures of three classes, which a linear classifier tells apart, mostly."""
    root = tmp_path_factory.mktemp("line")
    encoder_bundle(root, "vit-classes")
    rng = np.random.default_rng(0)
    for place, name in enumerate(("dark", "grey", "light")):
        (root / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = 60 + 60 * place + 60 * rng.standard_normal((SIDE, SIDE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "pictures" / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def runtime_of_line(line: Path) -> DashRuntime:
    return DashRuntime.load(line / "tiny.dash")


@pytest.fixture(scope="module")
def rows(line: Path, runtime_of_line: DashRuntime) -> list[ImageQuality]:
    settings = [STATIC, Setting("token", trade_off=3.0)]
    return image_quality(runtime_of_line, line / "pictures", settings, labelled=True)


def test_figures_are_those_of_the_runtime(line: Path, runtime_of_line: DashRuntime, rows: list[ImageQuality]) -> None:
    files = image_files(line / "pictures")
    dense = runtime_of_line.encoder()(files)
    for row, setting in zip(rows[1:], (STATIC, Setting("token", trade_off=3.0)), strict=True):
        found = runtime_of_line.encoder_with(setting)(files)
        lengths = np.linalg.norm(found.pooled, axis=1) * np.linalg.norm(dense.pooled, axis=1)
        cosines = (found.pooled * dense.pooled).sum(axis=1) / lengths
        assert (row.cosine, row.worst) == pytest.approx((cosines.mean(), cosines.min()), abs=1e-4)
        likeliest = [each.probabilities.argmax(axis=1) for each in (found, dense) if each.probabilities is not None]
        assert row.same_class == pytest.approx(np.mean(np.equal(*likeliest)))
        assert row.guarded == pytest.approx(found.guarded.mean())
        assert row.layers == pytest.approx((found.actions == 0).sum(axis=1).mean())
    cost = runtime_of_line.cost
    assert rows[1].predicted == pytest.approx(1 - sum(cost.cost) + cost.exits[0])
    assert rows[0].pictures == 60


def test_flips_are_what_the_accuracy_changes_by(rows: list[ImageQuality]) -> None:
    dense, *others = rows
    assert (dense.lost, dense.won, dense.agreement, dense.predicted) == (0, 0, 1, 1)
    assert dense.accuracy is not None
    assert dense.accuracy > 0.6
    for row in others:
        assert row.lost is not None
        assert row.won is not None
        assert row.agreement is not None
        assert row.accuracy == pytest.approx(dense.accuracy + row.won - row.lost)
        low, high = row.intervals["accuracy"]
        assert low <= row.accuracy <= high
        spread = np.sqrt(row.accuracy * (1 - row.accuracy) / (row.pictures // 2))
        assert (high - low) / 2 == pytest.approx(1.96 * spread, abs=0.05)
        assert row.lost + row.won <= 1 - row.agreement + 1e-9, "from one wrong class to another is no flip"
    assert others[0].lost


def test_the_command(line: Path) -> None:
    given = ("eval", line / "tiny.dash", "--images", line / "pictures", "--kinds", "static,token", "--skipped", "1,4")
    report = json.loads(done(*given, "--limit", "40", "--json").stdout)
    assert (report["bundle"], report["pictures"], report["limit"]) == ("tiny", "pictures", 40)
    assert [point["pictures"] for point in report["points"]] == [40] * len(report["points"])
    dense, static, *_ = report["points"]
    assert (dense["policy"], dense["lost"], static["policy"], static["layers"]) == ("dense", 0, "static", 3)
    shown = done(*given).stdout
    for expected in ("pictures: 32 pictures", "predicted", "accuracy", "neighbours", "lost", "won", "guarded"):
        assert expected in shown
    done("eval", line / "tiny.dash", "--images", line / "pictures", "--kinds", "dense")


def test_refusals(line: Path, tiny_root: Path, runtime_of_line: DashRuntime) -> None:
    pictures, own = line / "pictures", ("eval", line / "tiny.dash")
    assert "20 pictures lie in" in refused(*own, "--images", pictures / "dark", "--kinds", "dense")
    one = line / "one"
    one.mkdir()
    (one / "dark").symlink_to(pictures / "dark")
    with pytest.raises(RequestError, match="has no pictures in it"):
        image_quality(runtime_of_line, one, [], labelled=True)
    (one / "dark").unlink()
    (pictures / "dark").rename(one / "dark")
    assert "are all of one class, dark. Give a folder that holds one for each" in refused(
        *own, "--images", one, "--kinds", "dense"
    )
    (one / "dark").rename(pictures / "dark")
    text = ("--text", Path(__file__))
    assert "give it pictures, --images DIR" in refused(*own, *text, "--kinds", "dense")
    assert "give it pictures, --images DIR" in refused(*own, "--kinds", "dense")
    decoder = ("eval", tiny_root, "--target", "cpu-fp32", "--images", pictures)
    assert "is a causal LM: give it text" in refused(*decoder)
    assert "give one" in refused(*own, "--images", pictures, *text, code=2)
