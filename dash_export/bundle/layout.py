"""The layout of a bundle, and the names that graphs, builds and the runtime agree on.

smollm2.dash/
  manifest.json, .sig           what the model is, its graphs, its policy, SHA-256 of every file; the owner's signature
  config.json tokenizer.json .. as a Hugging Face folder has them; answers.jsonl: held-out answers, for the dial
  onnx/*.onnx, *.data           the portable graphs
  engines/<target>/build.json   what `build` made for a target: engines, segments, cost table, SHA-256 of every file
  engines/<target>/*            engines; roundings.npz, timing.cache, calibration/: what `build` makes them from again
  engines/<target>-lowered/*    a build as well: graphs that are lowered, and compiled only on the device, from these
"""

import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

from dash_export.errors import BundleError, OutputError
from dash_export.files.outputs import MARK

DEFAULT_TARGET = "cpu"
"""Target of every command that is given none."""
GGUF_TARGET = "cpu-gguf"
"""Target that `build` takes in its place for a model stored in few bits, which it keeps."""

REPORT = "a dash-export report"
"""Text in the beginning of every file that a measuring command writes. Such a command overwrites no other files."""

FINAL_STATE = "final_state"
"""Output of the head: the normed state of the tokens that get logits."""
POOLED, STATES = "pooled", "states"
"""Outputs of an encoder's head: one vector for a picture, and the state of each of its tokens."""
MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"
"""Files of a bundle: the manifest, and the owner's signature."""
BUILD = "build.json"
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Config, tokenizer and template files that the runtime reads, where the bundle has them."""
PREPROCESSOR = "preprocessor_config.json"
"""How an encoder's pictures are prepared."""
ANSWERS = "answers.jsonl"
"""Held-out answers of the model, on which a policy is judged; not in every bundle."""
EXPORT, EXPORTED = "export", (MANIFEST, SIGNATURE, "onnx", *TEXT_FILES, PREPROCESSOR, ANSWERS)
"""The command that writes a bundle, and the entries that it replaces; all others, engines among them, stay."""
NO_HUB_ID = (".dash", ".gguf")
"""File endings, which no hub id has."""
LOWERED = "-lowered"
"""Ending of the name of a build whose graphs are lowered, not compiled. No recipe's name ends so."""
ROUNDINGS, CALIBRATION = "roundings.npz", "calibration"
TIMING_CACHE = "timing.cache"
"""In a build's folder: files from which `build` makes engines again, and a folder of layers that an unfinished build
has calibrated. The runtime never reads them.
"""
_MOST_PARTS, _LONGEST_NAME = 3, 255
"""Bounds of a file's path in a bundle, in parts (`engines/<target>/<file>`) and in characters."""


def cache_folder() -> Path:
    """Return the folder that keeps, between processes, what can be fetched or made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash-export"


def is_hub_id(name: str | Path) -> bool:
    """Return whether `name` is a hub id, org/name: nothing here is called `org`, and it does not end like a file."""
    path = Path(name)
    if path.is_absolute() or len(path.parts) != 2 or path.suffix in NO_HUB_ID or ".." in path.parts:
        return False
    with suppress(OSError):  # a name of thousands of letters
        return not path.parent.exists()
    return False


def past_names(layer: int) -> tuple[str, str]:
    """Return the cache inputs of a portable layer graph, (key, value), as Optimum names them."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Return the cache outputs of a portable layer graph. Bind each to the same memory as its input."""
    return f"present.{layer}.key", f"present.{layer}.value"


def new_names(layer: int) -> tuple[str, str]:
    """Return the outputs that a lowered graph has in place of `present_names`: the new rows alone. In `trt10` [1,
    kv_heads, sequence, head_dim], in an `ort` bypass [batch, sequence, kv_heads * head_dim].
    """
    return f"new.{layer}.key", f"new.{layer}.value"


def short_name(name: str) -> str:
    """Return the name of a cache in ONNX Runtime's engines: `past_key_values.17.key` -> `past_key_17`,
    `present.17.key` -> `key_17`, `new.17.key` -> `new_key_17`.

    ONNX Runtime copies the names of inputs and outputs at every run; names of up to 15 characters need no allocation.
    """
    prefixes = {"past_key_values": "past_", "present": "", "new": "new_"}
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in prefixes:
        return name
    return f"{prefixes[parts[0]]}{parts[2]}_{parts[1]}"


def is_bundle(folder: Path) -> bool:
    """Return whether a folder looks like a bundle. Others have manifests, too, and folders called onnx."""
    known = [folder / "onnx" / "layer_00.onnx", *(folder / "engines").glob("*/build.json")]
    return (folder / MANIFEST).is_file() and any(map(Path.is_file, known))


def check_outside_bundles(path: Path) -> None:
    """Raise OutputError for an output in a bundle or a work folder, whose writers would remove it."""
    for folder in path.absolute().resolve().parents:
        if is_bundle(folder) or (folder / MARK).is_file():
            raise OutputError(f"{path} would lie inside the bundle {folder}: choose a place outside it.")


def safe_path(root: Path, relative: str) -> Path:
    """Return a path inside the bundle. Raises BundleError where `..`, an absolute name or a link leaves the bundle."""
    pure = PurePosixPath(relative)
    path = root / pure
    try:
        if len(pure.parts) > _MOST_PARTS or len(relative) > _LONGEST_NAME:  # resolving looks up each part
            raise ValueError(relative)
        inside = path != root and path.resolve().is_relative_to(root.resolve())
        path.exists()
    except (OSError, ValueError, RuntimeError):  # a NUL byte, a loop of links, a name of 300 letters
        inside = False
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not inside:
        link = os.path.islink(path)  # noqa: PTH114  Path's own raises for a name of 300 letters
        advice = (
            "It is a link: copy the bundle whole (cp -rL, hf download --local-dir)"
            if link
            else "Export the model again"
        )
        raise BundleError(f"{root.name}: the path {relative!r:.200} leaves the bundle. {advice}.")
    return path
