"""A decoder, for everything downstream: a frozen description and named weights, free of any framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import identity
from dash_export.errors import CheckpointError
from dash_export.manifest import ModelFacts

Float32Array = npt.NDArray[np.float32]

FINAL_NORM = "model.norm.weight"
LAYERS = "model.layers."
"""The beginning of the names of all layers' weights."""


def layer_weight(layer: int, name: str = "") -> str:
    """Return the name of a layer's weight; without `name`, what the names of all its weights begin with."""
    return f"{LAYERS}{layer}.{name}"


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(ModelFacts):
    """A pre-norm decoder with RMSNorm, rotary grouped-query attention and a gated SiLU MLP: what a runtime knows of it,
    and what its graphs are made by.

    `rope_frequencies`: rotary position embedding in the half-split ("neox") layout, float32 [rotary_dim / 2] with every
    scaling already applied: position p turns pair i by p * rope_frequencies[i] radians; `rope_scale` multiplies sines
    and cosines, `window_frequencies` are those of layers with a window, where they have others. `post_norms`: what a
    branch adds is normed. `norm_offset`: what a folder's gains lack; `fused`: its Q, K and V are one matrix, and so are
    gate and up. `updates`: the layers that end
    with the update of a unit that was pruned behind them, each as often as there are such (bypasses.py). `parameters`
    are counted. What a family adds is a field with a default here, its weights below, and its nodes in
    graphs/portable.py.
    """

    name: str = "model"
    parameters: int = field(init=False)
    intermediate_size: int
    rope_frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    window_frequencies: tuple[float, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    fused: bool = False
    updates: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", sum(map(prod, self.weight_shapes().values())))

    @property
    def mlp_norm(self) -> str:
        """The norm before the MLP: where branches are normed, the older name is that of attention's."""
        return "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight this decoder needs, under its Hugging Face name; matrices are [out, in]."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_layers):
            shapes |= {layer_weight(index, name): shape for name, shape in self._layer_shapes(index).items()}
        shapes[FINAL_NORM] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        biased = [f"self_attn.{name}_proj" for name in "qkv"] if self.qkv_bias else []
        biased += ["self_attn.o_proj"] if self.output_bias else []
        biased += [f"mlp.{name}_proj" for name in ("gate", "up", "down")] if self.mlp_bias else []
        if self.post_norms:
            shapes |= {f"{which}_feedforward_layernorm.weight": (hidden,) for which in ("pre", "post")}
        shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased}
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        for number in range(self.updates.count(index)):
            shapes |= {f"update_{number}.weight": (hidden, hidden), f"update_{number}.bias": (hidden,)}
        return shapes


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, still on disk: `rows(start, stop)` reads rows of its first axis, in any float type.
    `dtype`: how it is stored (F32, BF16, Q4_K). `packed`: the same rows in a GGUF file's bytes, where they have a type
    with blocks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], npt.NDArray[Any]]
    packed: Callable[[int, int], npt.NDArray[np.uint8]] | None = None

    def read_rows(self, start: int, stop: int) -> Float32Array:
        """Rows [start, stop) as float32. Raises CheckpointError naming the tensor where they cannot be read, or are not
        finite.
        """
        try:
            with np.errstate(all="ignore"):
                found = np.asarray(self.rows(start, stop), np.float32)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.name}: {error}") from error
        self.check_finite(found, start, stop)
        return found

    def check_finite(self, found: npt.NDArray[Any], start: int, stop: int) -> None:
        """Raises CheckpointError where there is NaN or infinity in what was read of rows [start, stop)."""
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"tensor {self.name} holds NaN or infinity in rows {start} to {stop - 1}; the weights are damaged"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A trained causal LM on disk: its description, its weights (read on demand) and the files that travel with it.

    `config` is the Hugging Face config dictionary (synthesised for a GGUF file), `assets` holds the text of
    `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (those
    that exist), and `fingerprint` changes when the weights or the configuration do. `seen`: its weight files, and what
    tells whether they are still the same.
    """

    source: str
    spec: DecoderSpec
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    assets: Mapping[str, str]
    fingerprint: str
    seen: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    def read(self, name: str) -> Float32Array:
        """A whole weight. Raises CheckpointError where it holds what is not finite."""
        return np.concatenate([*row_blocks(self.weights[name])])

    def check_same(self) -> None:
        """Raises CheckpointError where a file that was read is another one than when it was opened: what has been read
        of it would be of two models (or texts).
        """
        for path, known in self.seen.items():
            if not path.exists() or identity(path) != known:
                raise CheckpointError(f"{path} changed while it was read. Wait until it is whole, and run this again.")


def row_blocks(weight: Weight, block_bytes: int = 16 << 20) -> Iterator[Float32Array]:
    """The tensor as consecutive blocks of rows of about `block_bytes`, so that a caller never holds more than one."""
    rows = weight.shape[0] if weight.shape else 0
    step = max(1, block_bytes // max(1, 4 * prod(weight.shape[1:])))
    for start in range(0, rows, step):
        yield weight.read_rows(start, min(rows, start + step))
