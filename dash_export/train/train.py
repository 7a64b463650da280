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
from dash_export.decision import Unit, check_units, units_text
from dash_export.errors import PolicyError, RequestError
from dash_export.models import Checkpoint, open_checkpoint
from dash_export.models.spec import FINAL_NORM, DecoderSpec
from dash_export.outputs import locked, named, refuse_inputs, remove_own, work_folder, work_of
from dash_export.policy import SkipPolicy, card_path, check_replaceable, load_policy, policy_path, save_policy
from dash_export.runtime.text import Text
from dash_export.train.continuations import continue_prompts
from dash_export.train.corpus import Corpus, Passage, TokenIds, read_corpus, read_prompts
from dash_export.train.cost import saved
from dash_export.train.figures import JUDGED_SEED, held_out_batches, held_out_figures
from dash_export.train.gated_model import GatedModel
from dash_export.train.precision import PRECISIONS, training_precision
from dash_export.train.run import Run
from dash_export.train.settings import TrainingSettings
from dash_export.train.skip_modules import SkipModules
from dash_export.train.training import Training, training_key

KINDS = ("token", "static")
SELF_GENERATED = "self-generated"
LONGEST_NAME = 100


def train(
    model: str | Path | Checkpoint,
    output: str | Path,
    texts: Sequence[Path],
    prompts: Sequence[Path] = (),
    *,
    kind: str = "token",
    units: Sequence[Unit] | None = None,
    start: Path | None = None,
    settings: TrainingSettings | None = None,
    device: str = "",
    progress: Progress = no_progress,
) -> SkipPolicy:
    """Train a policy of `kind` (`token` or `static`) for `model` and write it to `output` (`.safetensors`, and a JSON
    card beside it).

    Without `units` those are found that gain most. With `start`, a trained policy of this model, training goes on from
    there, to tune it further, for other text, or for another model of the same shape: its units, network and bypasses
    are as they are in it, and only the tuning steps are done.

    `texts` are plain text files, `prompts` .jsonl files of chat prompts that the model continues itself. Until it is
    done the work lies in `<output>.unfinished`; a killed training goes on there. Raises CheckpointError, PolicyError
    and RequestError.
    """
    output, settings = named(output), settings or TrainingSettings()
    _check(output, texts, prompts, kind, settings)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    spec = checkpoint.spec
    if settings.window > spec.max_positions:
        raise PolicyError(f"The context of this model is {spec.max_positions} tokens: give a --window of at most that.")
    start = start and policy_path(start)
    policy = None if start is None else _trained(start, spec, kind)
    if policy is not None:
        if units is not None:
            raise PolicyError(f"{start} has its units, {units_text(policy.units)}: others are trained from nothing.")
        units, settings = policy.units, _further(settings)
    chosen = None if units is None else _checked(units, spec)
    settings = _limited(settings)
    place = _device(device)
    began = time.perf_counter()
    told_apart(texts, prompts)
    data = {
        path.name: {"read_as": form, "sha256": sha256_file(_existing(path))}
        for form, paths in (("text", texts), ("prompts", prompts))
        for path in paths
    }
    origin = None if start is None else {"file": start.name, "sha256": sha256_file(start)}
    replaced = [work_of(output), output, card_path(output)]
    refuse_inputs([*checkpoint.seen, *texts, *prompts, *filter(None, [start])], replaced)
    asked = None if chosen is None else units_text(chosen)
    key = training_key(settings, checkpoint.fingerprint, kind, asked, data, origin)
    with locked(output, "train"):
        progress("reading the text", 0, 0)
        text = _text(checkpoint)
        training_corpus, held = read_corpus(texts, text.tokenizer, settings.window, settings.held_out)
        chats = [messages for file in prompts for messages in read_prompts(file)]
        folder = work_folder(output, "train")
        precision = settings.precision or training_precision(place, folder / f"{key}-precision")
        gated_model = GatedModel(checkpoint, place, PRECISIONS[precision])
        checkpoint.check_same()
        if chats:
            _add_generated(gated_model, text, chats, settings, folder, key, (training_corpus, held), progress)
        training = Training(Run(gated_model, training_corpus, settings, folder, key, progress), chosen, policy)
        policy = training.token_policy() if kind == "token" else training.static_policy()
        policy = replace(
            policy,
            bypasses=tuple(bypass.in_half() for bypass in policy.bypasses),
            origin=_origin(kind, checkpoint.name, settings.seed, key),
            final_norm=checkpoint.weights[FINAL_NORM].read_rows(0, spec.hidden_size),
        )
        batches = held_out_batches(held, settings.windows, settings.window)
        modules = SkipModules(policy).to(place)
        judged, figures = held_out_figures(
            gated_model, modules, batches, policy.static_order, settings.trade_offs, progress
        )
        card: dict[str, Any] = {
            "model": Path(checkpoint.source).name,
            "model_fingerprint": checkpoint.fingerprint,
            "kind": kind,
            "from": origin,
            "units": units_text(policy.units),
            "read": policy.read,
            "static_order": units_text(policy.units[place] for place in policy.static_order),
            "chosen": [asdict(candidate) | {"unit": str(candidate.unit)} for candidate in training.chosen],
            "settings": asdict(settings),
            "data": data,
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


def _check(output: Path, texts: Sequence[Path], prompts: Sequence[Path], kind: str, settings: TrainingSettings) -> None:
    """What can be said before anything is read."""
    if kind not in KINDS:
        raise PolicyError(f"There is no trainable policy kind {kind!r}. Known: {', '.join(KINDS)}.")
    if settings.precision and settings.precision not in PRECISIONS:
        raise PolicyError(f"There is no precision {settings.precision!r}. Known: {', '.join(PRECISIONS)}.")
    if not 0 < settings.trade_offs[0] < settings.trade_offs[1] < math.inf:
        raise PolicyError(f"Trade-offs go from a low to a higher, finite one, above 0; got {settings.trade_offs}.")
    if output.suffix != ".safetensors":
        raise PolicyError(f"A policy file is called NAME.safetensors, not {output.name}.")
    check_replaceable(output)
    if not texts and not prompts:
        raise RequestError("There is nothing to learn from: give text files (--text) or chat prompts (--prompts).")


def _checked(units: Sequence[Unit], spec: DecoderSpec) -> tuple[Unit, ...]:
    """The units, where they are ones of this model and pay."""
    units = tuple(units)
    if not units:
        raise PolicyError("There is no unit to learn about: no layer may be skipped.")
    check_units(units, units[0].first - 1, spec.num_layers)
    idle = next((unit for unit in units if saved(spec, len(unit.layers)) <= 0), None)
    if idle is not None:
        raise PolicyError(f"Skipping {idle} saves nothing: its bypass is larger. Give larger units.")
    return units


def _trained(path: Path, spec: DecoderSpec, kind: str) -> SkipPolicy:
    """The policy that training goes on from."""
    policy = load_policy(path, spec)
    if not policy.units or not all(bypass.weights for bypass in policy.bypasses):
        raise PolicyError(f"{path} has a bypass without weights, so there is nothing to tune further: train one anew.")
    if kind == "token" and policy.network is None:
        raise PolicyError(f"{path} has no network: it is a static policy, and goes on with --kind static only.")
    return policy


def _further(settings: TrainingSettings) -> TrainingSettings:
    """What is left to do for a trained policy."""
    return replace(
        settings,
        search_steps=0,
        fit_steps=0,
        warm_up_steps=0,
        regression_steps=0,
        bypass_rate=settings.bypass_rate * settings.again,
        refinement_rate=settings.refinement_rate * settings.again,
    )


def _limited(settings: TrainingSettings) -> TrainingSettings:
    """No stage takes more steps than the tuning: a trial run is one in all its parts."""
    stages = ("search_steps", "fit_steps", "warm_up_steps", "regression_steps")
    return replace(settings, **{name: min(getattr(settings, name), settings.tuning_steps) for name in stages})


def _origin(kind: str, name: str, seed: int, key: str) -> str:
    """One line for the manifest."""
    return f"{kind} policy for {name[:LONGEST_NAME]}, trained by dash-export (seed {seed}, key {key[:8]})"


def told_apart(texts: Sequence[Path], prompts: Sequence[Path] = ()) -> None:
    """Raises RequestError where a name on the card, or that of a source, would stand for two files."""
    own = [SELF_GENERATED] if prompts else []
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


def _add_generated(
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
    path = folder / f"{key}-{SELF_GENERATED}.npz"
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
            corpus.sources[SELF_GENERATED] = [Passage(kept[name], int(name.rpartition("-")[2])) for name in names]
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
