"""`train`: a model and text -> a policy file with its card."""

from __future__ import annotations

import io
import math
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export import __version__
from dash_export.artifacts import Progress, no_progress, sha256_file, write_atomic
from dash_export.errors import PolicyError, RequestError
from dash_export.models import Checkpoint, open_checkpoint
from dash_export.models.spec import FINAL_NORM, DecoderSpec
from dash_export.outputs import locked, named, refuse_inputs, remove_own, work_folder, work_of
from dash_export.policy.continuations import continue_prompts
from dash_export.policy.corpus import Corpus, Passage, TokenIds, read_corpus, read_prompts
from dash_export.policy.figures import JUDGED_SEED, held_out_batches, token_figures
from dash_export.policy.gated_model import GatedModel
from dash_export.policy.precision import PRECISIONS, training_precision
from dash_export.policy.settings import RANK, TrainingSettings
from dash_export.policy.skip_modules import SkipModules
from dash_export.policy.training import Training, training_key
from dash_export.policy_file import check_replaceable, load_policy, policy_path, save_policy
from dash_export.runtime.text import Text
from dash_export.skip_policy import SkipPolicy, check_gated, default_gated, narrowed

KINDS = ("token", "static")
DECIDE = ("", "each", "once")
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
    start: Path | None = None,
    settings: TrainingSettings | None = None,
    device: str = "",
    progress: Progress = no_progress,
) -> SkipPolicy:
    """Train a policy of `kind` (`token` or `static`) for `model` and write it to `output` (`.safetensors`, and a JSON
    card beside it).

    With `start`, a trained policy of this model, training goes on from there, to tune it further, for other text, or
    for another model of the same shape: network and compensation are as they are in it (of the `gated` layers only,
    where given), and only the tuning steps are done. Where the settings say how to `decide`, its network is learnt
    anew; a higher `rank` widens its low-rank compensation.

    `texts` are plain text files, `prompts` .jsonl files of chat prompts that the model continues itself. Until it is
    done the work lies in `<output>.unfinished`; a killed training goes on there. Raises CheckpointError, PolicyError
    and RequestError.
    """
    output, settings = named(output), settings or TrainingSettings()
    if kind not in KINDS:
        raise PolicyError(f"There is no trainable policy kind {kind!r}. Known: {', '.join(KINDS)}.")
    if settings.decide not in DECIDE:
        raise PolicyError(f"There is no way to decide {settings.decide!r}. Known: each, once.")
    if settings.decide == "once" and (settings.width or settings.history):
        raise PolicyError("Only a linear network that reads no actions decides about all layers at once.")
    if settings.precision and settings.precision not in PRECISIONS:
        raise PolicyError(f"There is no precision {settings.precision!r}. Known: {', '.join(PRECISIONS)}.")
    if not 0 < settings.trade_offs[0] < settings.trade_offs[1] < math.inf:
        raise PolicyError(f"Trade-offs go from a low to a higher, finite one, above 0; got {settings.trade_offs}.")
    if output.suffix != ".safetensors":
        raise PolicyError(f"A policy file is called NAME.safetensors, not {output.name}.")
    check_replaceable(output)
    if not texts and not prompts:
        raise RequestError("There is nothing to learn from: give text files (--text) or chat prompts (--prompts).")
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    spec = checkpoint.spec
    if settings.rank > spec.hidden_size:
        raise PolicyError(f"The hidden size of this model is {spec.hidden_size}: a higher rank than that adds nothing.")
    if settings.window > spec.max_positions:
        raise PolicyError(f"The context of this model is {spec.max_positions} tokens: give a --window of at most that.")
    start = start and policy_path(start)
    policy = None if start is None else _trained(start, spec, kind)
    if policy is not None:
        _check_rank(settings.rank, policy, start)
        policy = policy if gated is None else narrowed(policy, gated)
        if kind == "static" or settings.decide:
            policy = replace(policy, network=None, reads=())
        gated, settings = policy.gated, _further(settings, policy)
    settings = replace(settings, decide=settings.decide or "each", rank=settings.rank or min(RANK, spec.hidden_size))
    layers = check_gated(default_gated(spec.num_layers) if gated is None else gated, spec.num_layers)
    if not layers:
        raise PolicyError("There is no layer to learn about: no layer may be skipped.")
    place = _device(device)
    began = time.perf_counter()
    told_apart(texts, prompts)
    data = {path.name: sha256_file(_existing(path)) for path in (*texts, *prompts)}
    origin = None if start is None else {"file": start.name, "sha256": sha256_file(start)}
    refuse_inputs([*checkpoint.seen, *texts, *prompts, *filter(None, [start])], [work_of(output)])
    key = training_key(settings, checkpoint.fingerprint, kind, layers, data, origin)
    with locked(output, "train"):
        progress("reading the text", 0, 0)
        text = _text(checkpoint)
        training_corpus, held = read_corpus(texts, text.tokenizer, settings.window, settings.held_out)
        chats = [messages for file in prompts for messages in read_prompts(file)]
        folder = work_folder(output)
        precision = settings.precision or training_precision(place, folder / f"{key}-precision")
        gated_model = GatedModel(checkpoint, place, PRECISIONS[precision])
        checkpoint.check_same()
        if chats:
            _add_own_words(gated_model, text, chats, settings, folder, key, (training_corpus, held), progress)
        training = Training(
            gated_model, training_corpus, settings, layers, folder, checkpoint.name, key, policy, progress
        )
        policy = training.token_policy() if kind == "token" else training.static_policy(LARGEST_STATIC_SET)
        norm = checkpoint.weights[FINAL_NORM].read_rows(0, spec.hidden_size)
        policy = replace(policy, compensation=policy.compensation.in_half(), final_norm=norm)
        batches = held_out_batches(held, settings.windows, settings.window)
        modules = SkipModules(policy).to(place)
        judged, figures = token_figures(
            gated_model, modules, batches, policy.static_order, settings.trade_offs, progress
        )
        card: dict[str, Any] = {
            "model": Path(checkpoint.source).name,
            "model_fingerprint": checkpoint.fingerprint,
            "kind": kind,
            "from": origin,
            "gated": list(layers),
            "static_order": list(policy.static_order),
            "cosine_order": list(policy.cosine_order),
            "settings": asdict(settings),
            "data": {name: {"sha256": digest} for name, digest in data.items()},
            "tokens": training_corpus.tokens(),
            "held_out": {"tokens": held.tokens(), "judged": judged, "figures": figures},
            "versions": {
                "dash-export": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
            },
            "precision": precision,
            "device": f"{place.type}, {platform.machine()}, {torch.get_num_threads()} threads",
            "seconds": round(time.perf_counter() - began, 1),
        }
        check_replaceable(output)  # what has appeared there meanwhile stays, and so does the work of hours
        save_policy(output, policy, spec, card)
        remove_own(folder)
        return policy


def _trained(path: Path, spec: DecoderSpec, kind: str) -> SkipPolicy:
    """The policy that training goes on from."""
    policy = load_policy(path, spec)
    if kind == "static" and policy.compensation.kind == "none":
        raise PolicyError(f"{path} has no compensation, so there is nothing to tune further: train one anew.")
    if kind == "token" and policy.network is None:
        raise PolicyError(f"{path} has no network: it is a static policy, and goes on with --kind static only.")
    return policy


def _check_rank(rank: int, policy: SkipPolicy, path: Path | None) -> None:
    known = policy.compensation.rank
    if rank and not known:
        raise PolicyError(f"{path} has a compensation that is not low-rank: it takes no --rank.")
    if rank and rank < known:
        raise PolicyError(f"{path} has a compensation of rank {known}, which can become wider, not narrower.")


def _further(settings: TrainingSettings, policy: SkipPolicy) -> TrainingSettings:
    """What is left to do for a trained policy, and what it says of itself."""
    rank = policy.compensation.rank
    settings = replace(
        settings,
        compensation=policy.compensation.kind,
        rank=settings.rank or rank,
        fit_steps=settings.fit_steps if settings.rank > rank else 0,
        compensation_rate=settings.compensation_rate * settings.again,
    )
    if policy.network is None:
        return settings
    return replace(
        settings,
        width=policy.width,
        history=policy.reads_actions,
        decide="once" if policy.reads else "each",
        warm_up_steps=0,
        regression_steps=0,
        refinement_rate=settings.refinement_rate * settings.again,
    )


def told_apart(texts: Sequence[Path], prompts: Sequence[Path] = ()) -> None:
    """Raises RequestError where a name on the card, or that of a source, would stand for two files."""
    own = [OWN_WORDS] if prompts else []
    sources, files = [*own, *(path.stem for path in texts)], [path.name for path in (*texts, *prompts)]
    twice = next((name for names in (sources, files) for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"Two sources would be called {twice}: texts are told apart by their names, so rename one.")


def _device(name: str) -> torch.device:
    """Raises RequestError for one that this torch does not know or cannot use."""
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"There is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return place


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise RequestError(f"There is no file {path}.")
    return path


def _text(checkpoint: Checkpoint) -> Text:
    """The model's tokenizer and chat template, as the runtime reads them from a bundle."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in checkpoint.assets.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        return Text(Path(folder))


def _add_own_words(
    model: GatedModel,
    text: Text,
    chats: Sequence[Sequence[Mapping[str, str]]],
    settings: TrainingSettings,
    folder: Path,
    key: str,
    corpora: tuple[Corpus, Corpus],
    progress: Progress,
) -> None:
    """Continuations of `own_prompts` of the chats: kept in `folder`, so that a resumed training reads the same ones.

    A `held_out` share of the prompts is held out, and what is judged does not follow the seed.
    """
    path = folder / f"{key}-{CONTINUATIONS}"
    kept = _kept(path)
    if kept is None:
        order = np.random.default_rng(JUDGED_SEED).permutation(len(chats))
        split = max(1, int(len(chats) * (1 - settings.held_out)))
        count = round(settings.own_prompts * (1 - settings.held_out))
        drawn = np.random.default_rng(settings.seed).permutation(order[:split])[:count]
        held = order[split:][: settings.own_prompts - count]

        def continued(chosen: TokenIds, seed: int) -> list[Passage]:
            ids = [np.array(text.chat(chats[index])[-settings.window :], np.int64) for index in chosen]
            return continue_prompts(model, ids, settings.own_tokens, text.eos_ids, seed, progress)

        shares = {"training": continued(drawn, settings.seed), "held": continued(held, JUDGED_SEED)}
        if not shares["held"] and len(shares["training"]) > 1:
            shares["held"].append(shares["training"].pop())
        kept = {
            f"{share}-{index}-{passage.prefix}": passage.ids
            for share, passages in shares.items()
            for index, passage in enumerate(passages)
        }
        packed = io.BytesIO()
        np.savez(packed, **kept)  # type: ignore[arg-type]
        write_atomic(path, packed.getvalue())
    for corpus, share in zip(corpora, ("training", "held"), strict=True):
        names = [name for name in kept if name.startswith(share)]
        if names:
            corpus.sources[OWN_WORDS] = [Passage(kept[name], int(name.rpartition("-")[2])) for name in names]
    if not all(corpus.sources for corpus in corpora):
        raise RequestError(
            "The model's continuations of these prompts are too few to learn from and to be judged on: give more "
            "prompts, or text (--text)."
        )


def _kept(path: Path) -> dict[str, TokenIds] | None:
    """The continuations that a killed training wrote; None where there are none, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception:  # numpy and zipfile raise many kinds
        return None
