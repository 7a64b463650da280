"""Tiny random text encoders with a WordPiece tokenizer, and the bundles made of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.core.policy import SkipPolicy
from dash_export.models import EncoderCheckpoint, open_model
from tests.tiny_encoder import encoder_policy

TEXTS = ["A red fox.", "the lazy dog sleeps, and sleeps", "Red dogs", "a red fox!", "lazy foxes and dogs sleep"]
"""Of three lengths; two texts of one length stand apart."""
WORDS = ["a", "the", "red", "fox", "dog", "lazy", "sleep", "and", "##s", "##es", ".", ",", "!"]
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}
FIRST = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def save_bert(folder: Path, made: Any = None, **options: Any) -> Any:
    """A random BERT of five layers, or the `made` one. Returns the transformers model."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    sizes = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 48}
    given = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, **sizes, **options}
    torch.manual_seed(0)
    model = made or BertModel(BertConfig(**given))
    model.eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return model


def save_modules(folder: Path, pooling: dict[str, Any], *after: str, sizes: tuple[int, ...] = ()) -> list[Any]:
    """The modules of sentence-transformers: pooling, dense layers of these sizes, and those `after`. Returns the
    weights [out, in] of the dense layers, whose activation is none but for the first one, which has a bias.
    """
    kinds = ["Transformer", "Pooling", *["Dense"] * len(sizes), *after]
    paths = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds[1:], 1))]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / paths[1]).mkdir()
    (folder / paths[1] / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    width, found = 32, []
    for place, size in enumerate(sizes):
        own = folder / paths[2 + place]
        own.mkdir()
        name = "linear.Identity" if place else "activation.Tanh"
        config = {"in_features": width, "out_features": size, "bias": not place}
        (own / "config.json").write_text(json.dumps({**config, "activation_function": f"torch.nn.modules.{name}"}))
        weights = {"linear.weight": 0.3 * torch.randn(size, width)}
        weights |= {} if place else {"linear.bias": torch.randn(size)}
        save_file(weights, own / "model.safetensors")
        found.append(weights)
        width = size
    return found


def text_bundle(root: Path, target: str = "portable", policy: bool = True) -> Path:
    """Export a tiny text encoder with a random policy under `root`, pooled by the mean, and build it."""
    save_bert(root / "model")
    save_modules(root / "model", MEAN, "Normalize")
    checkpoint = open_model(root / "model")
    assert isinstance(checkpoint, EncoderCheckpoint)
    chosen: SkipPolicy | None = encoder_policy(checkpoint) if policy else None
    build(bundle := export(checkpoint, root / "tiny.dash", chosen), target)
    return bundle.root
