"""A checkpoint's weights in the transformers model of its family (torch)."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from dash_export.core.facts import Traits
from dash_export.files.artifacts import Progress, no_progress
from dash_export.models.spec import Checkpoint, DecoderSpec, layer_weight

_CONFIG = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "original_max_position_embeddings"),
    *("rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "layer_types"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "use_sliding_window", "sliding_window"),
    *("hidden_activation", "max_window_layers", "sliding_window_pattern", "rope_local_base_freq", "no_rope_layers"),
    *("no_rope_layer_interval", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
}
"""Config keys that define the decoder, checked where they are read: transformers would obey others, too."""
_NONE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
"""Keys in which null has a meaning; in any other key it stands for the default."""
_FUSED = (("self_attn", "qkv_proj", ("q", "k", "v")), ("mlp", "gate_up_proj", ("gate", "up")))
_UPDATE = "update_"


def torch_model(
    checkpoint: Checkpoint, dtype: torch.dtype, attention: str = "sdpa", progress: Progress = no_progress
) -> Any:
    """Return the causal LM of a checkpoint, frozen, on the CPU."""
    spec = checkpoint.spec
    given = {name: value for name, value in checkpoint.config.items() if name in _CONFIG}
    known = {name: value for name, value in given.items() if value is not None or name in _NONE}
    known |= {"rms_norm_eps": spec.rms_norm_eps, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(**known)
    config._attn_implementation = "eager" if spec.model_type == "gemma2" else attention  # Gemma 2 has no other
    with no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if spec.fused:
        for layer in model.model.layers:
            _unfuse(layer, spec)
    for place, layer in enumerate(spec.updates):
        _add_update(model.model.layers[layer], f"{_UPDATE}{spec.updates[:place].count(layer)}", spec)

    def weight(name: str) -> torch.Tensor:  # one at a time in float32
        offset = spec.norm_offset if name.endswith("norm.weight") else 0
        read = torch.from_numpy(checkpoint.read(name))
        return (read - offset if offset else read).to(dtype, copy=True)

    state = {}
    for done, name in enumerate(checkpoint.weights, 1):
        state[name] = weight(name)
        progress("reading the model", done, len(checkpoint.weights))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)  # no second copy
    assert not unexpected, f"{unexpected} are not of such a model"
    assert not missing or (missing == ["lm_head.weight"] and spec.tie_embeddings), f"{missing} are missing"
    model.tie_weights()
    for parameter in model.parameters():  # not `model.to`, which rounds the frequencies of RoPE, too
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def embedded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the input of a causal LM's first layer [batch, tokens, hidden] for ids [batch, tokens]."""
    hidden: torch.Tensor = model.model.embed_tokens(ids) * getattr(model.model, "embedding_multiplier", 1.0)
    return hidden


def logits_of(model: Any, final: torch.Tensor, traits: Traits) -> torch.Tensor:
    """Return the logits for the last hidden states after the final norm."""
    logits: torch.Tensor = model.lm_head(final) * traits.logits_scale
    return traits.logits_cap * torch.tanh(logits / traits.logits_cap) if traits.logits_cap else logits


class LayerInputs:
    """Inputs of every layer beside the hidden state, mask and rotary embedding, of passes from position 0 on."""

    def __init__(self, model: Any, spec: DecoderSpec, hidden: torch.Tensor) -> None:
        """Prepare the inputs for `hidden` [batch, tokens, hidden], which enters the first layer."""
        count = hidden.shape[1]
        places = torch.arange(count, device=hidden.device)
        self._traits, self._eager = spec.traits, model.config._attn_implementation == "eager"
        self._behind = places[:, None] - places
        kinds = {False: "full_attention", True: "sliding_attention"}
        self._rotary = {
            local: model.rotary_emb(hidden, places[None], *([kinds[local]] if spec.traits.window_rope else []))
            for local in {bool(spec.traits.window(layer)) for layer in range(spec.num_layers)}
        }
        self._dtype = hidden.dtype

    def of(self, layer: int) -> dict[str, Any]:
        """Return the keyword arguments of a layer. Attention without a mask is causal, except eager attention."""
        window = self._traits.window(layer)
        mask = None
        if self._eager or 0 < window < len(self._behind):
            hidden = (self._behind < 0) | (self._behind >= (window or len(self._behind)))
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
            mask = mask[None, None]
        return {"attention_mask": mask, "position_embeddings": self._rotary[bool(window)]}


def _unfuse(layer: Any, spec: DecoderSpec) -> None:
    """Replace the fused projections of a layer by one module each, named as in other families."""
    shapes = spec.weight_shapes()
    for owner, whole, names in _FUSED:
        module = getattr(layer, owner)
        for name in names:
            rows, columns = shapes[layer_weight(0, f"{owner}.{name}_proj.weight")]
            setattr(module, f"{name}_proj", torch.nn.Linear(columns, rows, bias=False))
        delattr(module, whole)
    _join(layer)


def _join(layer: Any) -> None:
    """Let functions stand for the fused projections of an unfused layer: they have no weights of their own."""
    for owner, whole, names in _FUSED:
        module = getattr(layer, owner)
        parts = [getattr(module, f"{name}_proj") for name in names]
        setattr(module, whole, lambda hidden, parts=parts: torch.cat([part(hidden) for part in parts], -1))


def copied_layer(model: Any, spec: DecoderSpec, attention: str) -> Any:
    """Return a copy of the last layer of a causal LM, in float32, trainable and without updates of pruned units.
    `attention` is the name of its attention function, as registered with transformers.
    """
    layer = deepcopy(model.model.layers[-1]).float().requires_grad_(True)
    for name in [name for name, _ in layer.named_children() if name.startswith(_UPDATE)]:
        delattr(layer, name)
        layer._forward_hooks.clear()
    if spec.fused:
        _join(layer)
    layer.self_attn.config._attn_implementation = attention  # of the copy's own config
    return layer


def unit_normed(hidden: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    """Return RMSNorm of unit gain, computed in float32, in the dtype of `hidden`."""
    return torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=spec.rms_norm_eps).to(hidden.dtype)


def bypass_input(hidden: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    """Return what the bypass of a unit reads of the unit's input."""
    return hidden if spec.traits.norms_after else unit_normed(hidden, spec)


def _add_update(layer: torch.nn.Module, name: str, spec: DecoderSpec) -> None:
    """Make the layer end with the update of a pruned unit that followed it (bypasses.py)."""
    layer.add_module(name, torch.nn.Linear(spec.hidden_size, spec.hidden_size))

    def updated(module: torch.nn.Module, _inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = module.get_submodule(name)(bypass_input(hidden, spec))
        return hidden + update

    layer.register_forward_hook(updated)


@contextmanager
def instead(module: torch.nn.Module, skip: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """Within the context, `module` returns `rows` [batch, tokens, size] where `skip` [batch, tokens] bool is true."""
    hook = module.register_forward_hook(
        lambda _module, _inputs, found: torch.where(skip[..., None], rows.to(found.dtype), found)
    )
    try:
        yield
    finally:
        hook.remove()
