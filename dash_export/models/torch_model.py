"""A checkpoint's weights in the transformers model of its family (torch)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from dash_export.models.spec import Checkpoint, DecoderSpec

_CONFIG = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings"),
    *("rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "layer_types"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "use_sliding_window", "sliding_window"),
}
"""What makes the decoder, and is checked where it is read. All else that a stranger's config has (labels, types of
floats, a task's parameters) transformers would take, too.
"""


def torch_model(checkpoint: Checkpoint, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The causal LM of a checkpoint, frozen, on the CPU."""
    spec = checkpoint.spec
    known = {name: value for name, value in checkpoint.config.items() if name in _CONFIG}
    config = transformers.AutoConfig.for_model(**known, pad_token_id=None)
    config._attn_implementation = attention
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for place, layer in enumerate(spec.updates):
        _add_update(model.model.layers[layer], f"update_{spec.updates[:place].count(layer)}", spec)
    state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.weights}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, f"{unexpected} are not of such a model"
    assert not missing or (missing == ["lm_head.weight"] and spec.tie_embeddings), f"{missing} are missing"
    model.tie_weights()
    return model.to(dtype=dtype).eval().requires_grad_(False)


def _add_update(layer: torch.nn.Module, name: str, spec: DecoderSpec) -> None:
    """Add the update that a pruned unit left to this layer (bypasses.py)."""
    size, eps = spec.hidden_size, spec.rms_norm_eps
    layer.add_module(name, torch.nn.Linear(size, size))

    def updated(module: torch.nn.Module, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(hidden.float(), (size,), eps=eps).to(hidden.dtype)
        update: torch.Tensor = module.get_submodule(name)(normed)
        return hidden + update

    layer.register_forward_hook(updated)


@contextmanager
def instead(module: torch.nn.Module, skip: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """While it lasts, `module` gives `rows` [batch, tokens, size] for the tokens that `skip` [batch, tokens]."""
    hook = module.register_forward_hook(
        lambda _module, _inputs, found: torch.where(skip[..., None], rows.to(found.dtype), found)
    )
    try:
        yield
    finally:
        hook.remove()
