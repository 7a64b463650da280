"""`train`: a model and text -> a policy file with its card."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export import __version__
from dash_export.artifacts import Progress, no_progress, sha256_file
from dash_export.errors import PolicyError, RequestError
from dash_export.models import Checkpoint, open_checkpoint
from dash_export.policy.continuations import continue_prompts
from dash_export.policy.corpus import Corpus, Passage, read_corpus, read_prompts
from dash_export.policy.figures import held_out_batches, token_figures
from dash_export.policy.gated_model import GatedModel
from dash_export.policy.settings import TrainingSettings
from dash_export.policy.skip_modules import SkipModules
from dash_export.policy.training import Training, training_key
from dash_export.policy_file import save_policy
from dash_export.runtime.text import Text
from dash_export.skip_policy import SkipPolicy, check_gated, default_gated

KINDS = ("token", "static")
LARGEST_STATIC_SET = 8
OWN_WORDS = "own words"
CONTINUATIONS = "own-words.npz"


def train(
    model: str | Path | Checkpoint,
    output: str | Path,
    texts: Sequence[Path],
    prompts: Sequence[Path] = (),
    *,
    kind: str = "token",
    gated: Sequence[int] | None = None,
    settings: TrainingSettings | None = None,
    device: str = "",
    progress: Progress = no_progress,
) -> SkipPolicy:
    """Train a policy of `kind` (`token` or `static`) for `model` and write it to `output` (`.safetensors`, and a JSON
    card beside it).

    `texts` are plain text files, `prompts` .jsonl files of chat prompts that the model continues itself. Until it is
    done the work lies in `<output>.unfinished`; a killed training goes on there. Raises CheckpointError, PolicyError
    and RequestError.
    """
    output, settings = Path(output), settings or TrainingSettings()
    if kind not in KINDS:
        raise PolicyError(f"There is no trainable policy kind {kind!r}. Known: {', '.join(KINDS)}.")
    if output.suffix != ".safetensors":
        raise PolicyError(f"A policy file is called NAME.safetensors, not {output.name}.")
    if not texts and not prompts:
        raise RequestError("There is nothing to learn from: give text files (--text) or chat prompts (--prompts).")
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    spec = checkpoint.spec
    layers = check_gated(default_gated(spec.num_layers) if gated is None else gated, spec.num_layers)
    if not layers:
        raise PolicyError("There is no layer to learn about: no layer may be skipped.")
    began = time.perf_counter()
    folder = output.with_name(f"{output.name}.unfinished")
    data = {path.name: sha256_file(_existing(path)) for path in (*texts, *prompts)}
    key = training_key(settings, checkpoint.fingerprint, kind, layers, data)
    folder.mkdir(parents=True, exist_ok=True)
    progress("reading the text", 0, 0)
    text = _text(checkpoint, folder)
    training_corpus, held = read_corpus(texts, text.tokenizer, settings.window, settings.held_out)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gated_model = GatedModel(checkpoint, place, torch.bfloat16)
    if prompts:
        _add_own_words(gated_model, text, prompts, settings, folder, key, (training_corpus, held), progress)
    training = Training(gated_model, training_corpus, settings, layers, folder, key, progress)
    policy = training.token_policy() if kind == "token" else training.static_policy(LARGEST_STATIC_SET)
    batches = held_out_batches(held, settings.windows, settings.window)
    modules = SkipModules(policy).to(place)
    figures = token_figures(gated_model, modules, batches, policy.static_order, settings.trade_offs, progress)
    card: dict[str, Any] = {
        "model": Path(checkpoint.source).name,
        "model_fingerprint": checkpoint.fingerprint,
        "kind": kind,
        "gated": list(layers),
        "static_order": list(policy.static_order),
        "cosine_order": list(policy.cosine_order),
        "settings": asdict(settings),
        "data": {name: {"sha256": digest} for name, digest in data.items()},
        "tokens": training_corpus.tokens(),
        "held_out": {"tokens": held.tokens(), "figures": figures},
        "versions": {"dash-export": __version__, "torch": torch.__version__, "transformers": version("transformers")},
        "device": f"{place.type}, {platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.perf_counter() - began, 1),
    }
    save_policy(output, policy, spec, card)
    shutil.rmtree(folder)
    return policy


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise RequestError(f"There is no file {path}.")
    return path


def _text(checkpoint: Checkpoint, folder: Path) -> Text:
    """The model's tokenizer and chat template, as the runtime reads them from a bundle."""
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    for name, content in checkpoint.assets.items():
        (assets / name).write_text(content, encoding="utf-8")
    return Text(assets)


def _add_own_words(
    model: GatedModel,
    text: Text,
    prompts: Sequence[Path],
    settings: TrainingSettings,
    folder: Path,
    key: str,
    corpora: tuple[Corpus, Corpus],
    progress: Progress,
) -> None:
    """Continuations of `own_prompts` chat prompts: kept in `folder`, so that a resumed training reads the same ones."""
    path = folder / f"{key}-{CONTINUATIONS}"
    if not path.is_file():
        chats = [messages for file in prompts for messages in read_prompts(file)]
        chosen = np.random.default_rng(settings.seed).permutation(len(chats))[: settings.own_prompts]
        ids = [np.array(text.chat(chats[index]), np.int64) for index in chosen]
        ids = [prompt[-settings.window :] for prompt in ids]
        passages = continue_prompts(model, ids, settings.own_tokens, text.eos_ids, settings.seed, progress)
        temporary = path.with_name(f".tmp-{path.name}")
        arrays = {f"{index}-{passage.prefix}": passage.ids for index, passage in enumerate(passages)}
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        passages = [Passage(stored[name], int(name.partition("-")[2])) for name in stored.files]
    split = int(len(passages) * (1 - settings.held_out))
    for corpus, part in zip(corpora, (passages[:split], passages[split:]), strict=True):
        if part:
            corpus.sources[OWN_WORDS] = part
