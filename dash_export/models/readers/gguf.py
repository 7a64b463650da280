"""A GGUF file as a Checkpoint: Hugging Face names, [out, in] matrices, half-split rotary layout, float32 rows.

The file's metadata become the Hugging Face config that the model would have had: both kinds of checkpoint share the
family code, which checks the values.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dash_export.core.facts import LARGEST_CONTEXT
from dash_export.errors import CheckpointError
from dash_export.files.artifacts import identity
from dash_export.files.typed_json import shown
from dash_export.models.config import base_frequencies, decoder_spec, llama3_frequencies, positive
from dash_export.models.readers.gguf_families import ARCHITECTURES, LONG, SHORT
from dash_export.models.readers.gguf_file import GgufTensor, read_gguf
from dash_export.models.readers.tokenizer_gguf import token_id, tokenizer_assets
from dash_export.models.readers.weights import build_checkpoint, fused_names, require, unfused
from dash_export.models.spec import Checkpoint

_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1's numbers, the same in every release; GGUF keeps only the divisors that follow from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
_HEAD_DIMS = ("attention.value_length", "rope.dimension_count")
_ATTENTION_FACTOR = "rope.scaling.attn_factor"
_YARN = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_CONTEXT, _EPSILON, _CAUSAL = "context_length", "attention.layer_norm_rms_epsilon", "attention.causal"
_KNOWN = {
    *(*_SIZES.values(), *_HEAD_DIMS, _CONTEXT, _EPSILON, _CAUSAL, "vocab_size", "tensor_data_layout"),
    *("rope.freq_base", "rope.scale_linear", *_YARN.values()),
    *(f"rope.scaling.{name}" for name in ("type", "factor", "finetuned")),
}
"""Keys of an architecture, without its prefix, that are read or that change nothing."""


def open_gguf(path: Path) -> Checkpoint:
    """Return the Checkpoint of a GGUF file: model, tokenizer and chat template.

    Raises CheckpointError for a damaged file, an architecture, option or tokenizer that is not supported, and for
    tensors that this architecture does not use (silently dropping a bias would give another model).
    """
    seen = {path: identity(path)}
    metadata, tensors = read_gguf(path)
    name, own = _architecture(metadata)
    family = ARCHITECTURES[name]
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path} lacks the tensor token_embd.weight (a vocabulary-only or adapter file?)")
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        **{wanted: own.get(key) for wanted, key in {**_SIZES, **family.keys}.items()},
        "hidden_act": "silu",
        "max_position_embeddings": positive(own, _CONTEXT, LARGEST_CONTEXT),
        "rms_norm_eps": positive(own, _EPSILON, 1.0),
        "rope_parameters": {},
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": name != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "dtype": "float32",
    }
    heads, width = (positive(own, _SIZES[size], 1 << 20) for size in ("num_attention_heads", "hidden_size"))
    head_dim = config["head_dim"] = positive(own, _SIZES["head_dim"], 1 << 20, width // heads)  # llama.cpp's default
    if own.get("rope.scaling.type") == "longrope" and {LONG, SHORT} <= {*family.extra} & tensors.keys():
        own["rope.scaling.type"] = "none"  # the factors say it
    config["rope_parameters"] = _rope(own, tensors.get(_ROPE_FACTORS), head_dim)
    config |= family.more(own, tensors, config)
    spec = decoder_spec(config, path.absolute().stem)
    config["num_key_value_heads"] = spec.num_kv_heads
    given = positive(own, _ATTENTION_FACTOR, 1e3, spec.rope_scale)
    if abs(given - spec.rope_scale) > 1e-3:
        raise CheckpointError(f"{_ATTENTION_FACTOR} {given} is not supported; expected {spec.rope_scale:.6g}")
    fixed = _HEAD_DIMS if family.model_type != "phi3" else _HEAD_DIMS[:1]  # Phi-3 may rotate a part of a head
    if other := next((key for key in fixed if own.get(key, head_dim) != head_dim), None):
        raise CheckpointError(
            f"{other} {shown(own[other])} is not supported; supported: that of a head's key, {head_dim}"
        )
    for key, short in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if (token := token_id(metadata, key)) is not None:
            config[f"{short}_token_id"] = token
    turned = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads} if family.interleaved else {}
    gguf = require("gguf")
    architecture = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(architecture, spec.num_layers)
    wanted = [*spec.weight_shapes(), *fused_names(spec)]
    stored = {weight: names.get_name(weight, try_suffixes=(".weight", ".bias")) for weight in wanted}
    used = {*stored.values(), *family.extra, *([_ROPE_FACTORS] if name == "llama" else [])}
    if unused := sorted(tensors.keys() - used):
        raise CheckpointError(
            f"{path} holds {len(unused)} tensors that {name} does not use, the first is {unused[0][:100]!r}; this "
            "variant is not supported"
        )
    weights = {
        weight: tensors[known].weight(weight, turned.get(weight.split(".")[-2], 0))
        for weight, known in stored.items()
        if known in tensors
    }
    weights = unfused(spec, weights)
    assets = {"config.json": json.dumps(config, indent=2) + "\n"} | tokenizer_assets(metadata, spec.vocab_size)
    return build_checkpoint(str(path), spec, config, weights, assets, [path], seen)


def _architecture(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return (architecture, its keys without their prefix). Raises CheckpointError for an architecture that is not
    supported, for a file that is not one whole model, and for an unknown key: the model could be another one.
    """
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {shown(family)} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"the GGUF file is a {shown(metadata['general.type'])}; expected a model")
    shards = metadata.get("split.count", 0)
    if not isinstance(shards, int) or shards > 1:
        raise CheckpointError(
            f"the GGUF file is one of {shown(shards)} shards; join them first: llama-gguf-split --merge"
        )
    prefix = f"{family}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    # An unknown key can change the model: experts, a window, a scale, soft-capping, a misspelled RoPE base.
    known = {*_KNOWN, *ARCHITECTURES[family].keys.values(), *ARCHITECTURES[family].known}
    seeing = ("vision.", "mm.") if family == "gemma3" else ()  # of the half of the model that is not in such a file
    wrong = [
        key for key, value in own.items() if key not in known and value not in (0, "") and not key.startswith(seeing)
    ]
    if wrong or own.get(_CAUSAL, True) is not True:
        raise CheckpointError(
            f"the GGUF file sets {prefix}{[*wrong, _CAUSAL][0]:.100}, which is not supported here: the model "
            "would be another one"
        )
    return family, own


def _rope(own: Mapping[str, Any], divisors: GgufTensor | None, head_dim: int) -> dict[str, Any]:
    """Return the config's `rope_parameters`. As in llama.cpp, a factor without a type is linear, a factor of 0 none."""
    rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10_000.0)}
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear")) or None
    kind = own.get("rope.scaling.type", "none" if factor is None else "linear")
    if kind not in ("none", "linear", "llama3", "yarn"):  # "none" is config.json's "default": a factor is ignored
        raise CheckpointError(
            f"rope.scaling.type {shown(kind)} is not supported; supported: none, linear, llama3, yarn"
        )
    if kind == "yarn":
        if "rope.scaling.yarn_ext_factor" in own:  # 0 would turn it off
            raise CheckpointError("rope.scaling.yarn_ext_factor is not supported; expected none")
        rope |= {name: own[key] for name, key in _YARN.items() if key in own}
        factor = factor or 1.0
    if divisors is None:
        return rope if kind == "none" else rope | {"rope_type": kind, "factor": factor}
    if kind not in ("none", "llama3"):
        raise CheckpointError(f"rope scaling {shown(kind)} together with {_ROPE_FACTORS} is not supported")
    return rope | _llama3(divisors, positive(rope, "rope_theta", 1e12), head_dim)


def _llama3(tensor: GgufTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Return Llama 3's scaling, known by its divisors [head_dim / 2]; {} where all are 1. Raises CheckpointError."""
    if tensor.shape == (head_dim // 2,):
        factors, plain = tensor.rows(0, head_dim // 2), base_frequencies(theta, head_dim)
        if (factors == 1).all():
            return {}
        factor = float(factors.max())
        with np.errstate(all="ignore"):
            named = llama3_frequencies(plain, factor, *_LLAMA3.values())
            if factor > 1 and np.allclose(plain / factors, named, rtol=1e-5, atol=0):
                return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise CheckpointError(
        f"{tensor.name} in {tensor.path}, {list(tensor.shape)}, are not the divisors of Llama 3's rope scaling; "
        "no other scaling of this kind is supported. Export from the model's Hugging Face folder instead"
    )
