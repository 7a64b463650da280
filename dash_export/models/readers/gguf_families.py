"""The GGUF architectures that are supported, and the config.json name of each of their keys.

Values that converters leave out are those of llama.cpp (llama-model.cpp): which layers have a window, Gemma 2's window
and caps, Gemma 3's second RoPE base, the score scale of the 27B Gemmas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dash_export.errors import CheckpointError
from dash_export.models.config import positive
from dash_export.models.readers.gguf_file import GgufTensor

Own = Mapping[str, Any]
"""Metadata of an architecture; the keys lack the architecture's prefix."""
_WINDOW = {"sliding_window": "attention.sliding_window"}
_LOGITS = {"final_logit_softcapping": "final_logit_softcapping"}
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Architecture:
    """One architecture: how to read its files. `interleaved`: llama.cpp rotates neighbouring pairs, and converters
    permute the rows of Q and K to match. `keys`: config name -> key in the file, beside the keys that every
    architecture has. `more(own, tensors, config)` returns the rest of the config; `known` and `extra` are the keys and
    the tensors that `more` reads.
    """

    model_type: str
    model_class: str
    interleaved: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    more: Callable[[Own, Mapping[str, GgufTensor], Mapping[str, Any]], dict[str, Any]] = lambda *_: {}


def _gemma(layers_of_27b: int, own: Own, config: Mapping[str, Any]) -> dict[str, Any]:
    size = config["head_dim"]
    if own.get("block_count") == layers_of_27b:
        size = config["hidden_size"] // config["num_attention_heads"]  # transformers takes an integer only
    return {"query_pre_attn_scalar": size, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


_GEMMA2 = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}


def _gemma2(own: Own, _tensors: Mapping[str, GgufTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: usual if config[name] is None else config[name] or None for name, usual in _GEMMA2.items()}
    return _gemma(46, own, config) | given


def _gemma3(own: Own, _tensors: Mapping[str, GgufTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10_000.0)}
    ropes = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return _gemma(62, own, config) | {"rope_parameters": ropes, "sliding_window_pattern": 6}


def _phi3(own: Own, tensors: Mapping[str, GgufTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(config["rope_parameters"])
    size = config["head_dim"]
    turned = positive(own, "rope.dimension_count", size, size)
    if turned != size:
        rope["partial_rotary_factor"] = turned / size
    context = own.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if (LONG in tensors) != (SHORT in tensors):
        raise CheckpointError(f"the GGUF file has one of {LONG} and {SHORT}, and not the other; it is damaged")
    if LONG in tensors:
        for name, key in (("long_factor", LONG), ("short_factor", SHORT)):
            if tensors[key].shape != (turned // 2,):
                raise CheckpointError(f"{key} has the shape {list(tensors[key].shape)}; expected [{turned // 2}]")
            rope[name] = tensors[key].rows(0, turned // 2).tolist()
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": context}
    return {"rope_parameters": rope, "original_max_position_embeddings": context,
            "sliding_window": config["sliding_window"] or None}  # fmt: skip


def _granite(own: Own, _tensors: Mapping[str, GgufTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    if own.get("rope.scaling.finetuned", True) is not True:  # llama.cpp then applies no RoPE
        raise CheckpointError("granite.rope.scaling.finetuned is false: a model without RoPE is not supported")
    given = {"attention_multiplier": own.get("attention.scale") or config["head_dim"] ** -0.5}
    # Granite 4's dense models come from the converter of its hybrid ones: a number of K/V heads for each layer.
    heads = own.get("attention.head_count_kv")
    if isinstance(heads, list) and heads and heads == heads[:1] * len(heads):
        given["num_key_value_heads"] = heads[0]
    return given


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        keys=_WINDOW | _LOGITS | {"attn_logit_softcapping": "attn_logit_softcapping"},
        more=_gemma2,
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", keys=_WINDOW | _LOGITS, known=("rope.freq_base_swa",), more=_gemma3
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        keys=_WINDOW,
        known=("rope.scaling.attn_factor",),
        extra=(LONG, SHORT),
        more=_phi3,
    ),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        interleaved=True,
        keys={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        known=(
            "attention.scale",
            "expert_shared_feed_forward_length",
            *(f"ssm.{name}" for name in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")),
        ),
        more=_granite,
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", interleaved=True),
}
