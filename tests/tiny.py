"""Tiny random models whose logits depend visibly on everything, and the bundles made of them. `tests/gpu` imports this
where there is no onnx.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dash_export.core.drafter import Drafter
from dash_export.core.policy import SkipPolicy, half, no_policy, untrained_policy
from dash_export.core.units import Unit, layer_actions

if TYPE_CHECKING:
    from dash_export.models import Checkpoint, DecoderSpec

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.1 * pair for pair in range(8)],
    "long_factor": [2.0 + pair for pair in range(8)],
}
TEXT = "The layers of a decoder are not equally needed, and some of them hardly at all. " * 20


def save_model(folder: Path, family: str = "llama", **options: Any) -> Any:
    """A random model of `family` with a tokenizer and a chat template; 6 layers unless said otherwise. Returns the
    transformers model.
    """
    from tests.models.helpers import save_tiny

    model = save_tiny(folder, family, **({"scaled": True, "num_hidden_layers": 6} | options))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model


def tiny_checkpoint(folder: Path, family: str = "llama", **options: Any) -> Checkpoint:
    from dash_export.models import open_checkpoint

    save_model(folder, family, **options)
    return open_checkpoint(folder)


TINY_UNITS = (Unit(2, 3), Unit(4, 4))
"""Of six layers: one unit of two, one of one."""


def with_bypasses(policy: SkipPolicy, spec: DecoderSpec, seed: int = 1) -> SkipPolicy:
    """The policy with random bypasses, large enough that leaving out any part of them shows."""
    rng, bypasses = np.random.default_rng(seed), []
    for unit in policy.units:
        shapes, scale = spec.bypass_shapes(unit).items(), {2: 0.1, 1: 0.2}
        bypasses.append(
            {name: (scale[len(shape)] * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes}
        )
    return replace(policy, bypasses=tuple(bypasses))


def tiny_policy(
    checkpoint: Checkpoint, form: str = "none", seed: int = 0, units: tuple[Unit, ...] = TINY_UNITS
) -> SkipPolicy:
    """Untrained, with an order as training would rank the units. `form`: none or linear."""
    policy = untrained_policy(checkpoint.spec, units, seed)
    policy = replace(policy, static_order=tuple(reversed(range(len(units)))))
    return policy if form == "none" else with_bypasses(policy, checkpoint.spec)


def random_drafter(spec: DecoderSpec, seed: int = 0, tokens: int = 40) -> Drafter:
    """A drafter whose drafts depend visibly on everything, of a vocabulary with gaps. Its numbers fit in 16 bits."""
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in spec.drafter_shapes().items():
        noise = rng.standard_normal(shape)
        weights[name] = half((1 + 0.2 * noise if "norm" in name else 0.17 * noise).astype(np.float32))
    kept = np.sort(rng.choice(spec.vocab_size, tokens, replace=False))
    return Drafter(weights, kept, slope=0.8, offset=-0.3, origin=f"random (seed {seed})")


def drafter_only(checkpoint: Checkpoint) -> SkipPolicy:
    """A policy without units."""
    return replace(no_policy(checkpoint.spec.num_layers, ()), drafter=random_drafter(checkpoint.spec))


def tiny_bundle(root: Path, *targets: str, form: str = "none", weights: str = "fp32", **options: Any) -> Path:
    """Export a tiny model under `root` and build it for `targets` (`cpu` at `weights`, `portable`). Returns the
    bundle.
    """
    from dash_export.building import build
    from dash_export.building.exporting import export

    checkpoint = tiny_checkpoint(root / "model", **options)
    bundle = export(checkpoint, root / "tiny.dash", tiny_policy(checkpoint, form))
    for target in targets:
        build(bundle, target, weights=weights if target == "cpu" else None)
    return bundle.root


def random_ids(count: int, vocab: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def random_actions(tokens: int, layers: int, units: tuple[Unit, ...], seed: int = 0, share: float = 0.4) -> np.ndarray:
    """Random per-token skips of whole units as decode could take them, as a skip map [tokens, layers]: the first two
    positions are dense.
    """
    skipped = np.random.default_rng(seed).random((len(units), tokens)) < share
    skipped[:, :2] = False
    return layer_actions(skipped, units, layers)
