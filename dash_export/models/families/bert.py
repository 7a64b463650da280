"""BERT, and the sentence encoders that are one."""

from dash_export.errors import CheckpointError
from dash_export.files.typed_json import shown
from dash_export.models.config import Config, flag, positive
from dash_export.models.encoders import EncoderFamily, renamed, text_spec

NAMES = {
    "model.words": "embeddings.word_embeddings",
    "model.places": "embeddings.position_embeddings",
    "model.types": "embeddings.token_type_embeddings",
    "model.entry_norm": "embeddings.LayerNorm",
    **{own: f"attention.self.{name}" for own, name in (("q", "query"), ("k", "key"), ("v", "value"))},
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
    "pool.dense_0": "pooler.dense",
}


def encoder(config: Config) -> EncoderFamily:
    """BertModel, also as saved with the head of its training."""
    if (kind := config.get("position_embedding_type", "absolute")) != "absolute":
        raise CheckpointError(f"position_embedding_type {shown(kind)} is not supported; supported: 'absolute'")
    if flag(config, "is_decoder") or flag(config, "add_cross_attention"):
        raise CheckpointError("a bert with is_decoder or add_cross_attention is not supported; supported: encoders")
    if any("Classification" in str(each) for each in config.get("architectures") or ()):
        raise CheckpointError("a bert that classifies is not supported: it gives classes (or scores), and no vectors")
    spec = text_spec(
        config,
        norm_eps=positive(config, "layer_norm_eps", 1.0, 1e-12),
        types=positive(config, "type_vocab_size", 1 << 10, 2),
        entry_norm=True,
        norms_sums=True,
    )
    return EncoderFamily(spec, renamed("encoder.layer", NAMES), ("", "bert."))
