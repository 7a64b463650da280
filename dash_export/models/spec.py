"""Description of a model for all other packages: a frozen spec and named weights, free of any framework."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dash_export.core.drafter import EMBEDDING, NORM, STATE
from dash_export.core.drafter import LAYER as DRAFTER_LAYER
from dash_export.core.facts import DecoderFacts, EncoderFacts, TextFacts
from dash_export.errors import CheckpointError
from dash_export.files.artifacts import identity

Float32Array = npt.NDArray[np.float32]

FINAL_NORM, EMBED_WEIGHT, HEAD_WEIGHT = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
LAYERS = "model.layers."
"""Prefix of the names of all layers' weights."""


def layer_weight(layer: int, name: str = "") -> str:
    """Return the name of a layer's weight; without `name`, the prefix of the names of all its weights."""
    return f"{LAYERS}{layer}.{name}"


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(DecoderFacts):
    """A decoder with RMSNorm, rotary grouped-query attention and a gated MLP (SiLU by default): the facts that
    a runtime needs, and those that the graphs are built from.

    `post_norms`: the outputs of attention and MLP are normed before they are added. `norm_offset`: added to the gains
    in a Hugging Face folder. `fused`: the folder stores Q, K and V as one matrix, and gate and up as another.
    `updates`: the layers that end with the update of a pruned unit that followed them, each listed once per such unit
    (bypasses.py). `parameters` are counted from the weights. An option that a new family needs is a field with a
    default here, its weights below, and its nodes in graphs/portable/portable.py.
    """

    name: str = "model"
    parameters: int = field(init=False)
    intermediate_size: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    fused: bool = False
    updates: tuple[int, ...] = ()
    final_norm: ClassVar[str] = FINAL_NORM

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", sum(map(prod, self.weight_shapes().values())))

    def facts(self) -> DecoderFacts:
        return DecoderFacts(**{item.name: getattr(self, item.name) for item in fields(DecoderFacts)})

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight this decoder needs, by its Hugging Face name; matrices are [out, in]."""
        shapes: dict[str, tuple[int, ...]] = {EMBED_WEIGHT: (self.vocab_size, self.hidden_size)}
        for index in range(self.num_layers):
            shapes |= {layer_weight(index, name): shape for name, shape in self._layer_shapes(index).items()}
        shapes[FINAL_NORM] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes[HEAD_WEIGHT] = (self.vocab_size, self.hidden_size)
        return shapes

    def drafter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a drafter's weights: its layer has the form of the last one, without updates."""
        hidden, layer = self.hidden_size, replace(self, updates=())._layer_shapes(self.num_layers - 1)
        shapes: dict[str, tuple[int, ...]] = {STATE: (hidden, hidden), EMBEDDING: (hidden, hidden), NORM: (hidden,)}
        return shapes | {DRAFTER_LAYER + name: shape for name, shape in layer.items()}

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
            sizes = (queries, keys) if self.traits.norms_after else (self.head_dim, self.head_dim)
            shapes |= {f"self_attn.{which}_norm.weight": (size,) for which, size in zip("qk", sizes, strict=True)}
        if self.traits.norms_after:
            del shapes["input_layernorm.weight"], shapes["pre_feedforward_layernorm.weight"]
        for number in range(self.updates.count(index)):
            shapes |= {f"update_{number}.weight": (hidden, hidden), f"update_{number}.bias": (hidden,)}
        return shapes


PATCH, CLASS_TOKEN, REGISTERS, POSITIONS = (
    f"model.{name}" for name in ("patch", "class_token", "registers", "positions")
)
"""Names of an encoder's weights, the same in all families: the patches' matrix, the tokens before them, positions."""
WORDS, PLACES, TYPES = (f"model.{name}.weight" for name in ("words", "places", "types"))
"""Those of a text encoder: a row for each token, for each position and for each type of token."""
CLASSIFIER = "classifier"


class Dense(NamedTuple):
    """A layer behind the pooling, `pool.dense_N`: the numbers that it gives."""

    size: int
    activation: Literal["tanh", ""] = ""
    biased: bool = True


@dataclass(frozen=True, kw_only=True)
class EncoderSpec(EncoderFacts):
    """An image encoder with LayerNorm before attention and MLP, and attention from every token to every token; in text
    encoders (`norms_sums`) these read the state itself, and its sum with what they add is normed.

    `positions`: rows of the learned table of positions, the class token's included, 0 for none (`table_size`: its
    height and width in patches); `rope_theta`: base of rotary positions of the patches, 0 for none. `registers`: tokens
    without a place between class token and patches. `entry_norm`: a norm before the first layer. `gated`: the MLP is
    down(act(gate(x)) * up(x)). `biased`: projections that have a bias, of q, k, v, o, mlp, patch. `layer_scale`: what
    attention and MLP add is scaled by a vector each. `pooling`: the pooled vector is the class token, one that a
    learned probe attends for, or the mean of all tokens; then it goes through `dense` layers, and is made 1 long if
    `unit_length`. `normed_states`: the states that are given are normed. `classifies`: what the classifier
    reads, joined. `antialias`: how a table of positions is made smaller.
    """

    name: str = "model"
    parameters: int = field(init=False)
    intermediate_size: int
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"
    gated: bool = False
    biased: frozenset[str] = frozenset({"q", "k", "v", "o", "mlp", "patch"})
    layer_scale: bool = False
    class_token: bool = True
    registers: int = 0
    table_size: tuple[int, ...] = ()
    antialias: bool = False
    rope_theta: float = 0.0
    entry_norm: bool = False
    norms_sums: bool = False
    pooling: Literal["class", "probe", "mean"] = "class"
    dense: tuple[Dense, ...] = ()
    unit_length: bool = False
    normed_states: bool = True
    classifies: tuple[Literal["class", "mean"], ...] = ("class",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", sum(map(prod, self.weight_shapes().values())))

    def facts(self) -> EncoderFacts:
        return EncoderFacts(**{item.name: getattr(self, item.name) for item in fields(EncoderFacts)})

    @property
    def final_norm(self) -> str:
        """The weight by which a policy knows its model."""
        return layer_weight(self.num_layers - 1, "norm2.weight") if self.norms_sums else FINAL_NORM

    @property
    def updates(self) -> tuple[int, ...]:
        """Layers that end with the update of a pruned unit: encoders are not pruned."""
        return ()

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight this encoder needs; matrices are [out, in]."""
        hidden, inner, shapes = self.hidden_size, self.intermediate_size, self._front_shapes()
        norms = ["model.entry_norm"] * self.entry_norm + ["model.norm"] * (not self.norms_sums)
        for layer in range(self.num_layers):
            shapes |= {layer_weight(layer, name): shape for name, shape in self._layer_shapes().items()}
        if self.pooling == "probe":
            shapes |= {"pool.probe": (1, 1, hidden)}
            shapes |= {f"pool.{name}.weight": (hidden, hidden) for name in "qkvo"}
            shapes |= {"pool.up.weight": (inner, hidden), "pool.down.weight": (hidden, inner)}
            shapes |= {f"pool.{name}.bias": (hidden,) for name in (*"qkvo", "down")} | {"pool.up.bias": (inner,)}
            norms.append("pool.norm")
        width = hidden
        for place, dense in enumerate(self.dense):
            shapes[f"pool.dense_{place}.weight"] = (dense.size, width)
            shapes |= {f"pool.dense_{place}.bias": (dense.size,)} if dense.biased else {}
            width = dense.size
        shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
        if self.labels:
            shapes |= {f"{CLASSIFIER}.weight": (self.labels, len(self.classifies) * hidden)}
            shapes |= {f"{CLASSIFIER}.bias": (self.labels,)}
        return shapes

    def _front_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {f"{PATCH}.weight": (hidden, 3, self.patch_size, self.patch_size)}
        if "patch" in self.biased:
            shapes[f"{PATCH}.bias"] = (hidden,)
        if self.class_token:
            shapes[CLASS_TOKEN] = (1, 1, hidden)
        if self.registers:
            shapes[REGISTERS] = (1, self.registers, hidden)
        if self.table_size:
            shapes[POSITIONS] = (1, prod(self.table_size) + self.class_token, hidden)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{name}.weight": (inner, hidden) for name in ("gate", "up")[not self.gated :]}
        shapes["down.weight"] = (hidden, inner)
        owners = {name: name if name in "qkvo" else "mlp" for name in (key.removesuffix(".weight") for key in shapes)}
        shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name, own in owners.items() if own in self.biased}
        shapes |= {f"norm{place}.{part}": (hidden,) for place in "12" for part in ("weight", "bias")}
        return shapes | ({"scale1": (hidden,), "scale2": (hidden,)} if self.layer_scale else {})


@dataclass(frozen=True, kw_only=True)
class TextSpec(EncoderSpec, TextFacts):
    """A text encoder: words, learned positions and the token type 0 (of so many `types`, 0: none) are added."""

    types: int = 0

    def facts(self) -> TextFacts:
        return TextFacts(**{item.name: getattr(self, item.name) for item in fields(TextFacts)})

    def _front_shapes(self) -> dict[str, tuple[int, ...]]:
        rows = {WORDS: self.vocab_size, PLACES: self.max_positions} | ({TYPES: self.types} if self.types else {})
        return {name: (count, self.hidden_size) for name, count in rows.items()}


AnySpec = DecoderSpec | EncoderSpec


_BITS = {
    **{"F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_1": 6.0, "Q5_0": 5.5, "Q5_K": 5.5},
    **{"Q4_1": 5.0, "Q4_0": 4.5, "Q4_K": 4.5},
}
"""Types of matrices that a bundle keeps, and their bits per weight."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, still on disk: `rows(start, stop)` reads rows of its first axis, in any float type.
    `dtype`: how the tensor is stored (F32, BF16, Q4_K). `packed(start, stop)` reads the same rows as a GGUF file's
    bytes, uint8 [rows, bytes]; None for other files.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], npt.NDArray[Any]]
    packed: Callable[[int, int], npt.NDArray[np.uint8]] | None = None

    def read_rows(self, start: int, stop: int) -> Float32Array:
        """Return rows as float32. Raises CheckpointError where they cannot be read or are not finite."""
        try:
            with np.errstate(all="ignore"):
                found = np.asarray(self.rows(start, stop), np.float32)
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.name}: {error}") from error
        self.check_finite(found, start, stop)
        return found

    @property
    def bits(self) -> float:
        """Bits per weight in which a bundle stores the tensor: types that it does not keep become float32."""
        return _BITS.get(self.dtype, 32.0) if len(self.shape) == 2 else 32.0

    def check_finite(self, found: npt.NDArray[Any], start: int, stop: int) -> None:
        """Raise CheckpointError when `found`, read from rows [start, stop), holds NaN or infinity."""
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"tensor {self.name} holds NaN or infinity in rows {start} to {stop - 1}; the weights are damaged"
            )


@dataclass(frozen=True)
class AnyCheckpoint:
    """A trained model on disk: its description, its weights (read on demand) and the files that travel with it.

    `config` is the Hugging Face config dictionary (synthesised for a GGUF file), `assets` holds the text of
    `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (those
    that exist), and `fingerprint` changes when the weights or the configuration do. `seen`: every file that was read,
    with its identity (artifacts.py) at opening.
    """

    source: str
    spec: AnySpec
    config: Mapping[str, Any]
    weights: Mapping[str, Weight]
    assets: Mapping[str, str]
    fingerprint: str
    seen: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits per weight in which a bundle stores the model, on average."""
        return sum(prod(weight.shape) * weight.bits for weight in self.weights.values()) / self.spec.parameters

    def read(self, name: str) -> Float32Array:
        """Return a whole weight as float32. Raises CheckpointError when it cannot be read or is not finite."""
        return np.concatenate([*row_blocks(self.weights[name])])

    def check_same(self) -> None:
        """Raise CheckpointError when a file is not the one it was at opening: what was read before and after the change
        would be of two models (or texts).
        """
        for path, known in self.seen.items():
            if not path.exists() or identity(path) != known:
                raise CheckpointError(f"{path} changed while it was read. Wait until it is whole, and run this again.")


@dataclass(frozen=True)
class Checkpoint(AnyCheckpoint):
    """A trained causal LM on disk."""

    spec: DecoderSpec


@dataclass(frozen=True)
class EncoderCheckpoint(AnyCheckpoint):
    """A trained encoder of pictures or of texts on disk."""

    spec: EncoderSpec


def row_blocks(weight: Weight, block_bytes: int = 16 << 20) -> Iterator[Float32Array]:
    """Yield the tensor as float32 blocks of rows of about `block_bytes`, so that one at a time is in memory."""
    rows = weight.shape[0] if weight.shape else 0
    step = max(1, block_bytes // max(1, 4 * prod(weight.shape[1:])))
    for start in range(0, rows, step):
        yield weight.read_rows(start, min(rows, start + step))
