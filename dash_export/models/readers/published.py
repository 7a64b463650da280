"""Published folders whose model is one of our families under other names: the text half of a Gemma 3 that sees, and the
dense models of Granite 4, which are written as hybrid ones without Mamba layers and experts.
"""

from typing import Any

from dash_export.errors import CheckpointError
from dash_export.models.config import Config, section

_GEMMA3 = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Values that the published 4B leaves out, as in transformers."""
_NAMES = (
    ("model.language_model.", "model."),
    ("language_model.", ""),
    (".shared_mlp.input_linear.", ".mlp.gate_up_proj."),
    (".shared_mlp.output_linear.", ".mlp.down_proj."),
)


def family_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the family's own model, the same object where it is one. Raises CheckpointError for a
    Granite 4 that is not dense.
    """
    if config.get("model_type") == "gemma3":
        whole = {name: one for name, one in config.items() if name not in ("text_config", "vision_config")}
        return whole | _GEMMA3 | section(config, "text_config") | {"model_type": "gemma3_text"}
    if config.get("model_type") == "granitemoehybrid":
        _check_dense(config)
        size = config.get("shared_intermediate_size", 1024)
        return config | {"model_type": "granite", "intermediate_size": size, "layer_types": None}
    return config


def family_name(name: str) -> str:
    """Return what the family calls a tensor of such a folder."""
    for there, ours in _NAMES:
        name = name.replace(there, ours, 1)
    return name


def _check_dense(config: Config) -> None:
    kinds = config.get("layer_types")
    attends = isinstance(kinds, list) and all(one in ("attention", "full_attention") for one in kinds)
    if not attends or config.get("num_local_experts") != 0 or config.get("position_embedding_type") != "rope":
        raise CheckpointError(
            "granitemoehybrid with Mamba layers, experts or without RoPE is not supported; supported: its dense models"
        )
