"""Facts of a model: what runtime, oracle, training and graphs must know of it besides its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from dash_export.core.exits import MOVES
from dash_export.core.units import Unit
from dash_export.files.typed_json import NotNegative, Within

LARGEST_CONTEXT = 1 << 20
"""Bound of positions. Long contexts have a million."""
# Above any published model, so that an absurd manifest or config fails where it is read instead of at an allocation.
LARGEST = {
    "num_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "vocab_size": 1 << 22,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 10,
    "max_positions": LARGEST_CONTEXT,
    "parameters": 1 << 50,
}


@dataclass(frozen=True)
class Traits:
    """Options of a model family beyond a plain decoder. The defaults are those of a plain decoder.

    `windows`: for each layer the number of tokens that a query may attend to, its own included, 0 for all; empty if all
    layers attend to all. `window_rope`: layers with a window have RoPE frequencies of their own; `unrotated`: layers
    without RoPE. `norms_after`: attention, MLP and bypasses read the state itself, and only what they add is normed; Q
    and K are normed over all heads at once. `embedding_scale` multiplies embeddings, `residual_scale` what a branch
    adds, `attention_scale` scores (0: head_dim ** -0.5), `logits_scale` logits. `score_cap` and `logits_cap`: x becomes
    cap * tanh(x / cap); 0: none.
    """

    activation: Literal["silu", "gelu_tanh"] = "silu"
    windows: tuple[Annotated[int, Within(0, LARGEST_CONTEXT)], ...] = ()
    window_rope: bool = False
    unrotated: tuple[int, ...] = ()
    norms_after: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: NotNegative = 0.0
    logits_scale: float = 1.0
    score_cap: NotNegative = 0.0
    logits_cap: NotNegative = 0.0

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def rope(self, layer: int) -> str:
        """Return the name of a layer's RoPE tables; empty where the layer has no RoPE."""
        if layer in self.unrotated:
            return ""
        return "rope.window" if self.window_rope and self.window(layer) else "rope"


Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelFacts(ABC):
    """Facts of any model that is a stack of layers: what units, policies, costs and builds are about. `hidden_size`:
    that of the state which all layers read and add to.
    """

    name: str
    model_type: str
    num_layers: Annotated[int, Within(1, LARGEST["num_layers"])]
    hidden_size: Annotated[int, Within(1, LARGEST["hidden_size"])]
    num_heads: Annotated[int, Within(1, LARGEST["num_heads"])]
    head_dim: Annotated[int, Within(1, LARGEST["head_dim"])]
    parameters: Annotated[int, Within(1, LARGEST["parameters"])]

    decides: ClassVar[Literal["token", "input"]] = "token"
    """Subject of a decision: each token, or a whole input (a picture), all of whose tokens skip the same units."""

    takes: ClassVar[Literal["prompt", "pictures", "texts"]] = "prompt"
    """Kind of input: a prompt that is continued, or pictures or texts of which a vector is made."""

    tables: ClassVar[tuple[str, ...]] = ()
    """Files of weights that several graphs read."""

    @property
    def shares_table(self) -> bool:
        """Whether the last graph reads a table of the first one: a head tied to the embedding."""
        return False

    def faults(self) -> Iterator[str]:
        """Yield what does not go together."""
        return iter(())

    @abstractmethod
    def sizes(self) -> dict[str, str]:
        """Return what only this kind of model has, in words, for a table."""

    @abstractmethod
    def bypass_shapes(self, unit: Unit) -> dict[str, Shape]:
        """Return the shapes of the weights that a policy holds for the bypass of a unit."""

    @abstractmethod
    def network_shapes(self, units: int, given: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of a policy network's weights for so many units. `given`: the shapes that it has, from
        which a free dimension is taken.
        """

    def drafter_shapes(self) -> dict[str, Shape]:
        """Return the shapes of a drafter's weights; none where there can be no drafter, or its shapes are not known."""
        return {}

    @abstractmethod
    def random_network(self, units: int, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        """Return a policy network in these shapes that gives noise, to measure and test with."""


@dataclass(frozen=True)
class DecoderFacts(ModelFacts):
    """Facts of a causal decoder, whose layers keep K and V of every token.

    `rope_frequencies`: rotary position embedding in the half-split ("neox") layout, float32 [rotary_dim / 2] with every
    scaling already applied: position p rotates pair i by p * rope_frequencies[i] radians. `rope_scale` multiplies sines
    and cosines. `window_frequencies`: those of the layers with a window, if these have others. `tie_embeddings`: the
    head's matrix is the embedding's.
    """

    vocab_size: Annotated[int, Within(1, LARGEST["vocab_size"])]
    num_kv_heads: Annotated[int, Within(1, LARGEST["num_kv_heads"])]
    max_positions: Annotated[int, Within(2, LARGEST["max_positions"])]
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    window_frequencies: tuple[float, ...] = ()
    tie_embeddings: bool = False
    traits: Traits = Traits()

    tables: ClassVar[tuple[str, ...]] = ("onnx/embed.data",)

    @property
    def attention_scale(self) -> float:
        """Factor of the product of query and key."""
        return self.traits.attention_scale or self.head_dim**-0.5

    @property
    def key_value_size(self) -> int:
        """Number of columns of one layer's K, or V."""
        return self.num_kv_heads * self.head_dim

    @property
    def shares_table(self) -> bool:
        return self.tie_embeddings

    def faults(self) -> Iterator[str]:
        if len(self.traits.windows) not in (0, self.num_layers):
            yield "its attention windows are not one per layer."
        if 2 * max(len(self.rope_frequencies), len(self.window_frequencies)) > self.head_dim:
            yield "it rotates more dimensions than a head has."

    def sizes(self) -> dict[str, str]:
        return {
            "attention": f"{self.num_heads} heads of {self.head_dim}, {self.num_kv_heads} for K and V",
            "vocabulary": str(self.vocab_size),
            "context": f"{self.max_positions} positions",
        }

    def bypass_shapes(self, unit: Unit) -> dict[str, Shape]:
        """Return the shapes: the columns are the update's, then K and V of each layer but the first."""
        columns = self.hidden_size + 2 * self.key_value_size * (len(unit.layers) - 1)
        return {"weight": (self.hidden_size, columns), "bias": (columns,)}

    def network_shapes(self, units: int, given: Mapping[str, Shape]) -> dict[str, Shape]:  # noqa: ARG002
        return {"weight": (self.hidden_size, units), "bias": (units,)}

    def random_network(self, units: int, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        weight = rng.standard_normal((self.hidden_size, units)) * 1.5 * self.hidden_size**-0.5
        return {"weight": weight.astype(np.float32), "bias": np.full(units, -2.0, np.float32)}


MOST_TOKENS = 1 << 14


@dataclass(frozen=True)
class EncoderFacts(ModelFacts):
    """Facts of an image encoder, which computes all tokens of a picture at once and keeps nothing.

    `image_size`: [height, width] in pixels, RGB, cut into patches of `patch_size` pixels a side. A state has `special`
    tokens (class, registers), then one per patch. `labels`: classes of its classifier, 0 where it has none.
    """

    image_size: tuple[Annotated[int, Within(1, 1 << 13)], ...]
    patch_size: Annotated[int, Within(0, 1 << 9)]
    special: Annotated[int, Within(0, 1 << 6)]
    norm_eps: float
    labels: Annotated[int, Within(0, 1 << 20)] = 0

    decides: ClassVar[Literal["token", "input"]] = "input"
    takes: ClassVar[Literal["prompt", "pictures", "texts"]] = "pictures"
    input_name: ClassVar[str] = "pixel_values"

    @property
    def patches(self) -> int:
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size)

    @property
    def tokens(self) -> int:
        """Tokens of a state; 0: as many as the input has."""
        return self.special + self.patches

    def length(self, array: npt.NDArray[Any]) -> int:  # noqa: ARG002
        """Return the tokens of an input, or of a state."""
        return self.tokens

    def input_fault(self, array: npt.NDArray[Any]) -> str:
        """Return what an input must be, where this is none; else ""."""
        shape = (3, *self.image_size)
        if array.ndim == 4 and len(array) and array.shape[1:] == shape and np.isfinite(array).all():
            return ""
        return f"Pictures must be finite numbers [n, {', '.join(map(str, shape))}], n at least 1."

    def example(self, batch: int) -> npt.NDArray[Any]:
        """Return an input to measure the time of."""
        pixels = np.random.default_rng(0).standard_normal((batch, 3, *self.image_size))
        return pixels.astype(np.float32)

    def faults(self) -> Iterator[str]:
        if len(self.image_size) != 2 or not self.patch_size or any(side % self.patch_size for side in self.image_size):
            yield "its image_size is not [height, width] in whole patches."
        elif self.tokens > MOST_TOKENS:
            yield f"a picture has over {MOST_TOKENS} tokens."

    def sizes(self) -> dict[str, str]:
        height, width = self.image_size
        return {
            "attention": f"{self.num_heads} heads of {self.head_dim}",
            "pictures": f"{width} x {height} pixels, {self.labels or 'no'} classes",
            "tokens": f"{self.patches} patches of {self.patch_size} x {self.patch_size} pixels, {self.special} special",
        }

    def bypass_shapes(self, unit: Unit) -> dict[str, Shape]:  # noqa: ARG002
        """Return the shapes: the columns are the pooled vector's, then the classes'."""
        columns = self.hidden_size + self.labels
        return {"weight": (self.exit_features, columns), "bias": (columns,)}

    @property
    def exit_features(self) -> int:
        """Numbers of a state that an exit reads."""
        return (1 + bool(self.special)) * self.hidden_size

    def network_shapes(self, units: int, given: Mapping[str, Shape]) -> dict[str, Shape]:
        features = (2 + bool(self.special)) * self.hidden_size
        kept = (given.get("components") or (0, 0))[-1]
        return {
            "mean": (features,),
            "components": (features, kept),
            "spread": (kept,),
            "limit": (2,),
            "early.weight": (self.exit_features, self.hidden_size),
            "early.bias": (self.hidden_size,),
            "centre": (self.hidden_size,),
            "weight": (units, MOVES, units),
            "bias": (units, units),
        }

    def random_network(self, units: int, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float32]]:
        kept = min(8, self.hidden_size)
        found = {
            name: (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)
            for name, shape in self.network_shapes(units, {"components": (0, kept)}).items()
        }
        return found | {"bias": found["bias"] - 2, "limit": np.full(2, 1e30, np.float32)}


EXAMPLE_TOKENS = 128
"""Length of the text on which costs are measured."""


@dataclass(frozen=True)
class TextFacts(EncoderFacts):
    """Facts of a text encoder: a state has as many tokens as the text, of which the first is special."""

    vocab_size: Annotated[int, Within(0, LARGEST["vocab_size"])] = 0
    max_positions: Annotated[int, Within(0, MOST_TOKENS)] = 0

    takes: ClassVar[Literal["prompt", "pictures", "texts"]] = "texts"
    input_name: ClassVar[str] = "input_ids"

    @property
    def tokens(self) -> int:
        return 0

    def length(self, array: npt.NDArray[Any]) -> int:
        return int(array.shape[1])

    def faults(self) -> Iterator[str]:
        if self.image_size or self.patch_size or self.special != 1 or not self.vocab_size or self.max_positions < 2:
            yield "it describes no text encoder."

    def sizes(self) -> dict[str, str]:
        return {
            "attention": f"{self.num_heads} heads of {self.head_dim}",
            "vocabulary": str(self.vocab_size),
            "texts": f"up to {self.max_positions} tokens",
        }

    def input_fault(self, array: npt.NDArray[Any]) -> str:
        most = self.max_positions
        good = array.ndim == 2 and array.size and array.shape[1] <= most and array.dtype.kind in "iu"
        if good and array.min() >= 0 and array.max() < self.vocab_size:
            return ""
        return f"Texts must be token ids below {self.vocab_size} [n, length], n at least 1, length from 1 to {most}."

    def example(self, batch: int) -> npt.NDArray[Any]:
        shape = batch, min(EXAMPLE_TOKENS, self.max_positions)
        return np.random.default_rng(0).integers(self.vocab_size, size=shape)


def rope_tables(model: DecoderFacts, rows: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return `rope.cos` and `rope.sin`, float32 [rows, rotary_dim / 2], for the positions from 0 on; and
    `rope.window.cos` and `rope.window.sin` where layers with a window have others. Every layer's graph takes them as
    inputs: on a disk they would be a quarter of a small model with a long context.
    """
    kinds = {"rope": (model.rope_frequencies, model.rope_scale), "rope.window": (model.window_frequencies, 1.0)}
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name, (frequencies, scale) in kinds.items():
        if frequencies:
            angles = np.outer(np.arange(rows), np.array(frequencies))
            found |= {f"{name}.{turn.__name__}": (turn(angles) * scale).astype(np.float32) for turn in (np.cos, np.sin)}
    return found
