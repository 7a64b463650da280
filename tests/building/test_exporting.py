"""Checkpoint -> bundle: what is reused, what is refused, what is left behind, and how much memory it takes."""

import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from dash_export.building import build, exporting
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import SCHEMA
from dash_export.core.policy import no_policy
from dash_export.errors import BundleError, CheckpointError, NewerBundleError, OutputError, PolicyError
from dash_export.files.outputs import MARK
from dash_export.graphs.portable import all_graphs
from dash_export.models import Checkpoint
from dash_export.models.spec import FINAL_NORM
from tests.commands.helpers import python
from tests.conftest import DATA
from tests.forged import tree
from tests.models.helpers import write_gguf
from tests.tiny import TINY_UNITS, save_model, tiny_checkpoint, tiny_policy

MEGABYTES = 1 << 20
# Peak resident set in MB over that after the imports, of exporting argv[1] to argv[2].
PEAK = """
import sys
import numpy, gguf, safetensors, onnx_ir, tokenizers
import dash_export.building.exporting, dash_export.models.readers.gguf, dash_export.models.readers.huggingface
from dash_export.models import open_checkpoint
from dash_export.core.policy import untrained_policy
from dash_export.backends.host.cpus import peak_memory

before = peak_memory()
checkpoint = open_checkpoint(sys.argv[1])
dash_export.building.exporting.export(checkpoint, sys.argv[2], untrained_policy(checkpoint.spec))
assert "torch" not in sys.modules and "transformers" not in sys.modules
print((peak_memory() - before) / (1 << 20))
"""


def hashes(bundle: Bundle) -> dict[str, str]:
    return {record.name: record.sha256 for record in bundle.manifest.files}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_manifest_lists_every_file(tiny_model: Checkpoint, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    bundle = export(tiny_model, tmp_path / "a.dash", tiny_policy(tiny_model), lambda *step: told.append(step))
    assert [done for _, done, _ in told] == list(range(1, told[0][2] + 1))
    on_disk = {str(path.relative_to(bundle.root)) for path in bundle.root.rglob("*") if path.is_file()}
    assert on_disk == hashes(bundle).keys() | {"manifest.json"}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= on_disk
    bundle.verify(bundle.manifest.files)
    assert (bundle.manifest.model.num_layers, bundle.manifest.model.name) == (6, "model")
    assert bundle.manifest.policy.units == TINY_UNITS
    again = export(tiny_model, tmp_path / "b.dash", tiny_policy(tiny_model))
    assert (hashes(again), again.manifest.key) == (hashes(bundle), bundle.manifest.key)


def test_a_policy_knows_its_model(tiny_model: Checkpoint, tmp_path: Path) -> None:
    norm = tiny_model.weights[FINAL_NORM].read_rows(0, tiny_model.spec.hidden_size)
    policy = replace(tiny_policy(tiny_model), origin="token policy for A", final_norm=norm * np.float32(1.02))
    with pytest.raises(PolicyError, match=r"policy of another model .*\(token policy for A\).* 2% apart.*--from"):
        export(tiny_model, tmp_path / "a.dash", policy)
    huge = replace(policy, final_norm=np.full_like(norm, 1e30))  # whose square is no float32
    with pytest.raises(PolicyError, match="policy of another model"):
        export(tiny_model, tmp_path / "a.dash", huge)
    assert not names(tmp_path)
    near = np.where(np.arange(len(norm)) % 2, norm * np.float32(1.005), norm)
    export(tiny_model, tmp_path / "a.dash", replace(policy, final_norm=near))


@pytest.mark.parametrize("file", ["onnx/layer_03.data", "manifest.json", "tokenizer_config.json"])
def test_a_damaged_bundle_is_made_anew(file: str, tiny_model: Checkpoint, tmp_path: Path) -> None:
    """The same command repairs it, as the error says. A file that was put there, like the last of these, goes."""
    root = export(tiny_model, tmp_path / "a.dash").root
    before = tree(root)
    (root / file).write_bytes((root / file).read_bytes()[:1000] if file in before else b"{}")
    export(tiny_model, root)
    assert tree(root) == before


def test_a_bundle_in_another_is_refused(tiny_model: Checkpoint, own_bundle: Path) -> None:
    """The outer one's next export would remove it."""
    for name in ("onnx/mine.dash", "mine.dash"):
        with pytest.raises(OutputError, match="would lie inside the bundle"):
            export(tiny_model, own_bundle / name)
    assert not (own_bundle / "mine.dash").exists()


def test_a_newer_bundle_is_not_overwritten(tiny_model: Checkpoint, tmp_path: Path) -> None:
    manifest = export(tiny_model, tmp_path / "a.dash").root / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"schema": {SCHEMA}', '"schema": 99', 1))
    with pytest.raises(NewerBundleError, match="Upgrade"):
        export(tiny_model, tmp_path / "a.dash")


def test_a_changed_policy_keeps_the_layers(tiny_model: Checkpoint, tmp_path: Path) -> None:
    """And a backup beside it is nobody's leftover."""
    first = export(tiny_model, tmp_path / "a.dash", tiny_policy(tiny_model))
    backup = Path(shutil.copytree(first.root, tmp_path / "a.dash.previous"))
    one = hashes(first)
    second = export(tiny_model, tmp_path / "a.dash", tiny_policy(tiny_model, "linear"))
    two = hashes(second)
    assert first.manifest.key != second.manifest.key
    changed = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
    assert changed
    assert all(name.startswith(("onnx/bypass_", "onnx/policy.")) for name in changed)
    assert Bundle.open(backup).manifest == first.manifest
    assert names(tmp_path) == {"a.dash", "a.dash.previous"}


def test_fewer_units_leave_no_orphans(tiny_model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that died under one policy is resumed under another."""
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "put_in_place", Mock(side_effect=KeyboardInterrupt))
        patch.setattr(exporting.outputs, "removed_on_error", lambda *_: nullcontext())
        with pytest.raises(KeyboardInterrupt):
            export(tiny_model, tmp_path / "a.dash", no_policy(6, TINY_UNITS))
    bundle = export(tiny_model, tmp_path / "a.dash", no_policy(6, TINY_UNITS[1:]))
    assert [path.name for path in bundle.root.rglob("bypass_*.onnx")] == ["bypass_04-04.onnx"]


@pytest.mark.parametrize("where", ["photos", "extension", "file", "."])
def test_what_is_no_bundle_is_not_overwritten(
    where: str, tiny_model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("photos/cat.jpg", "meow"), ("extension/manifest.json", "{}"), ("file", "text")):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match="is not a bundle: it will not be overwritten"):
        export(tiny_model, where)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(tiny_model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `mktemp -d` makes it, whose permissions stay; also after a kill at its end."""
    (output := tmp_path / "mine").mkdir(mode=0o700)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dash_export.files.replacing._finish", kill)  # the old one is set aside
        with pytest.raises(KeyboardInterrupt):
            export(tiny_model, output)
    made = export(tiny_model, output)
    made.verify(made.manifest.files)
    assert output.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not (output / MARK).exists()


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "model.layers.4.input_layernorm.weight"])
def test_nan_weights_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    """The small ones too, which lie inside the graph, and a factor of a block."""
    model = save_model(tmp_path / "model")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-3] = float("nan")  # not where opening looks
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "blocks.gguf", model, quantize="Q8_0")
    for form in ("model", "blocks.gguf"):
        with pytest.raises(CheckpointError, match=f"^tensor {re.escape(name)} holds NaN"):
            export(tmp_path / form, tmp_path / "deep" / "a.dash")
    assert names(tmp_path) == {"model", "blocks.gguf"}


@pytest.mark.parametrize("how", ["a full disk", "a bundle that could not be opened"])
def test_a_failed_export_leaves_nothing_behind(
    how: str, tiny_model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = hashes(export(tiny_model, tmp_path / "a.dash"))
    sound, calls = all_graphs.save_graph, []

    def full(*args: object, **options: object) -> list[Path]:
        calls.append(args)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return sound(*args, **options)  # type: ignore[arg-type]

    if how == "a full disk":
        monkeypatch.setattr(all_graphs, "save_graph", full)
    else:
        monkeypatch.setattr(exporting, "version", lambda _name: "\x1b[2J")
    for name in ("a.dash", "b.dash"):
        calls.clear()
        with pytest.raises((OSError, BundleError), match=r"No space left|is not printable text"):
            export(tiny_model, tmp_path / name, tiny_policy(tiny_model))
    bundle = Bundle.open(tmp_path / "a.dash")
    assert hashes(bundle) == old
    bundle.verify(bundle.manifest.files)
    assert names(tmp_path) == {"a.dash"}


@pytest.mark.model
def test_peak_memory(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Twice the largest tensor (the embedding, 113 MB in fp32) and 100 MB, whatever the number of layers."""
    largest = 49152 * 576 * 4 / MEGABYTES
    result = python(PEAK, smollm2_gguf, tmp_path / "a.dash")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2 * largest + 100


def test_heldout_text_is_not_calibration_text() -> None:
    from dash_export.files.resources import resource_folder

    folder = resource_folder("calibration")
    seen = "\n".join((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("prose", "quantise"))
    held_out = [DATA / "heldout.txt", folder / "heldout.txt"]
    paragraphs = [part.strip() for path in held_out for part in path.read_text(encoding="utf-8").split("\n\n")]
    assert len(paragraphs) > 60
    assert not [text for text in paragraphs if len(text) > 40 and text in seen]


def test_a_model_that_changes_while_it_is_exported(tmp_path: Path) -> None:
    tiny_model = tiny_checkpoint(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"

    def change(name: str, *_: object) -> None:
        if name == "layer_02":
            other = bytearray(weights.read_bytes())
            other[-1] ^= 1
            weights.write_bytes(other)

    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read"):
        export(tiny_model, tmp_path / "a.dash", progress=change)
    assert names(tmp_path) == {"model"}


def test_graphs_that_change_while_they_are_built(tiny_model: Checkpoint, tmp_path: Path) -> None:
    """Nothing that was made of them is taken for an engine of the sound ones later."""
    bundle = export(tiny_model, tmp_path / "a.dash")
    path, sound = bundle.path("onnx/layer_04.data"), bundle.path("onnx/layer_04.data").read_bytes()
    expected = {record.name: record.sha256 for record in build(bundle, "cpu", weights="fp32").files}
    shutil.rmtree(bundle.root / "engines")

    def change(name: str, *_: object) -> None:
        if name == "layers_00-01":
            path.write_bytes(bytes(reversed(sound)))

    with pytest.raises(BundleError, match=r"layer_04\.data was replaced while it was read"):
        build(bundle, "cpu", weights="fp32", progress=change)
    path.write_bytes(sound)
    assert {record.name: record.sha256 for record in build(bundle, "cpu", weights="fp32").files} == expected
