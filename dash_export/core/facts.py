"""Facts of a model: what runtime, oracle, training and graphs must know of it besides its weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the model that the runtime needs.

    `rope_frequencies`: rotary position embedding in the half-split ("neox") layout, float32 [rotary_dim / 2] with every
    scaling already applied: position p rotates pair i by p * rope_frequencies[i] radians. `rope_scale` multiplies sines
    and cosines. `window_frequencies`: those of the layers with a window, if these have others. `tie_embeddings`: the
    head's matrix is the embedding's.
    """

    name: str
    model_type: str
    num_layers: Annotated[int, Within(1, LARGEST["num_layers"])]
    hidden_size: Annotated[int, Within(1, LARGEST["hidden_size"])]
    vocab_size: Annotated[int, Within(1, LARGEST["vocab_size"])]
    num_heads: Annotated[int, Within(1, LARGEST["num_heads"])]
    num_kv_heads: Annotated[int, Within(1, LARGEST["num_kv_heads"])]
    head_dim: Annotated[int, Within(1, LARGEST["head_dim"])]
    max_positions: Annotated[int, Within(2, LARGEST["max_positions"])]
    parameters: Annotated[int, Within(1, LARGEST["parameters"])]
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    window_frequencies: tuple[float, ...] = ()
    tie_embeddings: bool = False
    traits: Traits = Traits()

    @property
    def attention_scale(self) -> float:
        """Factor of the product of query and key."""
        return self.traits.attention_scale or self.head_dim**-0.5


def rope_tables(model: ModelFacts, rows: int) -> dict[str, npt.NDArray[np.float32]]:
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
