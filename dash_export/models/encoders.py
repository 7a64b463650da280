"""A Hugging Face config of an encoder, read without trust, as an `EncoderSpec`; positions for another size."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from dash_export.core.facts import LARGEST, MOST_TOKENS
from dash_export.errors import CheckpointError
from dash_export.files.typed_json import shown
from dash_export.models.config import MAX_INTERMEDIATE, Config, positive
from dash_export.models.spec import EncoderSpec, Float32Array, TextSpec

LARGEST_SIDE = 1 << 13
"""Most pixels of a side: a picture of that size has more tokens than any encoder takes."""
_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
Size = tuple[int, int]
"""[height, width], in pixels."""


class EncoderFamily(NamedTuple):
    """Result of a family module's `encoder`: the spec, and the name in its files of each weight's name here. A name
    may have the place of a part behind it: `name#1/3` is the second third of the rows. `prefixes`: what may stand
    before all names of a file.
    """

    spec: EncoderSpec
    names: Callable[[str], str]
    prefixes: tuple[str, ...] = ("",)


def encoder_spec(config: Config, size: Size | None, **fields: Any) -> EncoderSpec:
    """Return the spec of a config. `size`: that of the pictures, by default the config's. The family gives the other
    `fields` of `EncoderSpec`. Raises CheckpointError naming the key that is missing, out of range or unsupported.
    """
    if positive(config, "num_channels", 1 << 10, 3) != 3:
        raise CheckpointError(f"num_channels {shown(config['num_channels'])} is not supported; supported: 3 (RGB)")
    patch, own = side(config, "patch_size"), image_size(config)
    size = size or own
    if any(each % patch for each in size):
        raise CheckpointError(f"pictures of {size[0]} x {size[1]} pixels are not whole patches of {patch}")
    given: dict[str, Any] = {
        "image_size": size,
        "patch_size": patch,
        "special": fields.get("registers", 0) + fields.get("class_token", True),
        "table_size": (own[0] // patch, own[1] // patch),
    }
    return _checked(EncoderSpec(**(_layers(config, fields) | given | fields)))


def text_spec(config: Config, **fields: Any) -> TextSpec:
    """Return the spec of a text encoder's config, as `encoder_spec` does."""
    given: dict[str, Any] = {
        "image_size": (),
        "patch_size": 0,
        "special": 1,
        "vocab_size": positive(config, "vocab_size", LARGEST["vocab_size"]),
        "max_positions": positive(config, "max_position_embeddings", MOST_TOKENS),
    }
    return _checked(TextSpec(**(_layers(config, fields) | given | fields)))


def _layers(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    hidden = positive(config, "hidden_size", LARGEST["hidden_size"])
    heads = positive(config, "num_attention_heads", LARGEST["num_heads"])
    if hidden % heads:
        raise CheckpointError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"hidden_act {shown(activation)} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    given: dict[str, Any] = {
        "model_type": config["model_type"],
        "num_layers": positive(config, "num_hidden_layers", LARGEST["num_layers"]),
        "hidden_size": hidden,
        "num_heads": heads,
        "head_dim": hidden // heads,
        "activation": _ACTIVATIONS[activation],
    }
    if "intermediate_size" not in fields:
        given["intermediate_size"] = positive(config, "intermediate_size", MAX_INTERMEDIATE)
    return given


_Spec = TypeVar("_Spec", bound=EncoderSpec)


def _checked(spec: _Spec) -> _Spec:
    for fault in spec.faults():
        raise CheckpointError(f"the config describes no encoder that is supported: {fault}")
    return spec


def image_size(config: Config) -> Size:
    """Return the size of the pictures that the config describes."""
    given = config.get("image_size", 224)
    if isinstance(given, list) and len(given) == 2:
        height, width = (positive({"image_size": each}, "image_size", LARGEST_SIDE) for each in given)
        return height, width
    return (side(config, "image_size", 224),) * 2


def side(config: Config, key: str, default: int | None = None) -> int:
    """Return the side of a square, given as one number or as two equal ones."""
    given = config.get(key)
    if isinstance(given, list) and len(given) == 2 and given[0] == given[1]:
        config = {key: given[0]}
    return positive(config, key, LARGEST_SIDE, default)


def labels(config: Config) -> int:
    """Return the number of classes of a `...ForImageClassification`, 0 for another model."""
    if not any("ForImageClassification" in str(each) for each in config.get("architectures") or ()):
        return 0
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) and names else positive(config, "num_labels", 1 << 20, 2)


def renamed(layers: str, table: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function from names here to names in a file. `layers`: what a file writes for `model.layers`; `table`:
    the file's name for each name here, without the layer and without `.weight` or `.bias`.
    """

    def name(own: str) -> str:
        layer, rest = "", own
        if own.startswith("model.layers."):
            number, _, rest = own.removeprefix("model.layers.").partition(".")
            layer = f"{layers}.{number}."
        stem, dot, part = rest.rpartition(".")
        if rest in table:
            return layer + table[rest]
        there, hash_, place = table[stem].partition("#")
        return f"{layer}{there}{dot if not there.endswith('_') else ''}{part}{hash_}{place}"

    return name


def resized(table: Float32Array, old: Size, new: Size, antialias: bool) -> Float32Array:
    """Return learned positions [1, special + patches, hidden] for `new` [height, width] in patches, by bicubic
    interpolation as transformers does it (`torch.nn.functional.interpolate`, align_corners=False).
    """
    if tuple(old) == tuple(new):
        return table
    special = table.shape[1] - old[0] * old[1]
    grid = table[0, special:].reshape(*old, -1).astype(np.float64)
    rows, columns = (_bicubic(old[axis], new[axis], antialias) for axis in (0, 1))
    grid = np.einsum("ij,jkh->ikh", rows, grid)
    grid = np.einsum("ij,kjh->kih", columns, grid)
    found = np.concatenate([table[0, :special], grid.reshape(new[0] * new[1], -1)])
    return found.astype(np.float32)[None]


def _bicubic(old: int, new: int, antialias: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return Keys' cubic weights [new, old], as torch has them, with or without `antialias`."""
    scale, a = old / new, -0.5 if antialias else -0.75
    wide = max(scale, 1.0) if antialias else 1.0
    found = np.zeros((new, old))
    for place in range(new):
        centre = (place + 0.5) * scale - 0.5
        reach = range(int(np.floor(centre - 2 * wide)) + 1, int(np.ceil(centre + 2 * wide)))
        for at in reach:
            distance = abs(at - centre) / wide
            if distance < 1:
                weight = ((a + 2) * distance - (a + 3)) * distance * distance + 1
            elif distance < 2:
                weight = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
            else:
                continue
            if antialias and not 0 <= at < old:
                continue
            found[place, min(max(at, 0), old - 1)] += weight
    found /= found.sum(1, keepdims=True)
    return found
