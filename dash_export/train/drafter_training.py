"""`train`: a model -> a policy file with a drafter, from text that the model writes itself."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export import __version__
from dash_export.bundle.policy_file import card_path, check_replaceable, load_policy, save_policy
from dash_export.core.advice import policy_command
from dash_export.core.drafter import Drafter
from dash_export.core.policy import SkipPolicy
from dash_export.core.units import Unit, units_text
from dash_export.errors import PolicyError, RequestError
from dash_export.files.artifacts import Progress, content_key, identity, no_progress, sha256_file
from dash_export.files.outputs import locked, output_path, remove_own, work_folder, work_of
from dash_export.files.replacing import refuse_inputs
from dash_export.models import AnyCheckpoint, Checkpoint, DecoderSpec, open_model
from dash_export.models.bypasses import check_model
from dash_export.models.spec import FINAL_NORM
from dash_export.text.chats import Chat, read_prompts
from dash_export.text.text_files import read_text
from dash_export.text.tokenizer import Text
from dash_export.train import DrafterSettings
from dash_export.train.draft_figures import DraftFigures, judged
from dash_export.train.drafter import fitted, head_rows, round_weights, short_vocabularies
from dash_export.train.model import GatedModel, layer_size
from dash_export.train.own_text import Written, own_text, read_windows
from dash_export.train.plan import Plan, memory, pass_seconds, whole_training_progress
from dash_export.train.training import LONGEST_NAME, check_sources, model_text, torch_device, torch_precision
from dash_export.train.work import Work

_OWN, _DRAFTER = "own text", "drafter"
_PASS = 1024
"""Tokens of a pass, in which a plan counts."""
_WRITING, _LEARNING = 2.0, 1.3
"""Time of a written token, with the prompt that is made for it, and of the products of a step, over those of a pass."""
LEAST_TEXTS = 4
_NOTHING: tuple[Sequence[np.ndarray], Sequence[Chat]] = ((), ())


def train_drafter(
    model: str | Path | Checkpoint,
    output: str | Path,
    texts: Sequence[Path] = (),
    prompts: Sequence[Path] = (),
    *,
    start: Path | None = None,
    settings: DrafterSettings | None = None,
    device: str = "",
    planned: Callable[[Plan], None] = lambda _: None,
    progress: Progress = no_progress,
) -> SkipPolicy:
    """Train a drafter for `model` and write it to `output` (`.safetensors`, and a JSON card beside it).

    The model writes the text itself. `prompts` are .jsonl files of chats that it answers beside its own, and `texts`
    plain text files that it reads. `start` is a policy whose skips the drafter joins. The unfinished work lies in
    `<output>.unfinished`, where a killed training goes on. `planned` is told the plan before the model is read;
    `progress(name, done, total)` counts forward passes over all stages. Raises CheckpointError, PolicyError and
    RequestError.
    """
    output, settings, began = output_path(output), settings or DrafterSettings(), time.perf_counter()
    check_replaceable(output)
    checkpoint = model if isinstance(model, AnyCheckpoint) else open_model(model)
    if not isinstance(checkpoint, Checkpoint):
        raise PolicyError(f"{checkpoint.source} is an encoder. {policy_command(checkpoint.spec, checkpoint.source)}")
    spec, place = checkpoint.spec, torch_device(device)
    check_sources(texts, prompts)
    longest = settings.prompt_tokens + 2 * settings.answer_tokens
    if longest > spec.max_positions:
        raise PolicyError(f"The context of this model is {spec.max_positions} tokens; its texts would have {longest}.")
    settings = replace(
        settings,
        vocabulary=min(settings.vocabulary, spec.vocab_size),
        precision=settings.precision or torch_precision(place),
    )
    checkpoint = replace(checkpoint, seen={**checkpoint.seen, **{path: identity(path) for path in (*texts, *prompts)}})
    refuse_inputs(checkpoint.seen, [work_of(output), output, card_path(output)])
    origin = f"drafter for {spec.name[:LONGEST_NAME]}, trained by dash-export"
    joined = SkipPolicy((), 0, None, (), origin, final_norm=checkpoint.read(FINAL_NORM))
    if start is not None:
        joined = load_policy(start, spec)
        check_model(joined, checkpoint)
    data = {path.name: sha256_file(path) for path in (*texts, *prompts)}
    read = (checkpoint.fingerprint, sorted(checkpoint.assets.items()), data, __version__, torch.__version__)
    key = content_key("drafter", asdict(settings), *read)
    with locked(output, "train"):
        plan = drafter_plan(spec, settings, place)
        planned(plan)
        text = model_text(checkpoint)
        work = Work(work_folder(output, "train"), key)
        resumed = any(work.folder.glob("*-state.pt"))
        gated = GatedModel(checkpoint, place, getattr(torch, settings.precision or ""), progress)
        checkpoint.check_same()
        told = whole_training_progress(progress, plan.passes)
        written = _texts(gated, text, settings, work, texts, prompts, told)
        held = written[:: ceil(1 / settings.held_out)]
        learnt = [each for at, each in enumerate(written) if at % ceil(1 / settings.held_out)]
        if len(held) < LEAST_TEXTS:
            raise RequestError(f"The model has written {len(written)} texts: too few to learn from. Give --prompts.")
        tokens, compared = short_vocabularies(gated, learnt, (settings.vocabulary, settings.compared))
        layer = fitted(gated, head_rows(gated.head, compared), learnt, settings, work, told)
        round_weights(layer)
        head = head_rows(gated.head, tokens)
        figures = judged(layer, head, tokens, held, settings.depth, settings.batch_tokens)
        who = f"{origin} (seed {settings.seed}, key {key[:8]})"
        drafter = Drafter(layer.weights(), tokens.numpy(), figures.slope, figures.offset, who)
        policy = replace(joined, drafter=drafter)
        seconds = None if resumed else round(time.perf_counter() - began, 1)
        counts = (len(written), sum(len(each.ids) for each in written))
        save_policy(
            output, policy, spec, _card(checkpoint, policy.units, settings, gated, figures, data, counts, seconds)
        )
        remove_own(work.folder)
        return policy


def _texts(
    gated: GatedModel,
    text: Text,
    settings: DrafterSettings,
    work: Work,
    texts: Sequence[Path],
    prompts: Sequence[Path],
    progress: Progress,
) -> list[Written]:
    """Return what the model writes, after what it reads of `texts` and answers of `prompts`; each batch is saved."""
    window = settings.prompt_tokens + settings.answer_tokens
    chats = [chat for path in prompts for chat in read_prompts(path)]
    windows = [each for path in texts for each in text.windows(read_text(path), settings.tokens // window, window)]
    if texts and not windows:
        raise RequestError(f"{texts[0]} is too short to learn from: give text of {window} tokens or more.")
    given: list[tuple[Sequence[np.ndarray], Sequence[Chat]]] = []
    given += [(windows[at : at + settings.rows], ()) for at in range(0, len(windows), settings.rows)]
    given += [((), chats[at : at + settings.rows]) for at in range(0, len(chats), settings.rows)]
    found, number, count, fruitless = list[Written](), 0, 0, 0
    while number < len(given) or count < settings.tokens:
        seen, asked = given[number] if number < len(given) else _NOTHING

        def make(seen: Any = seen, asked: Any = asked, number: int = number) -> list[tuple[Any, ...]]:
            made = read_windows(gated, seen) if seen else own_text(gated, text, settings, number, asked)
            return [tuple(each) for each in made]

        batch = [Written(*each) for each in work.once(f"text-{number}", make)]
        fruitless = 0 if batch else fruitless + 1
        if fruitless == LEAST_TEXTS:
            raise RequestError("The model writes nothing to its own chat template: give --prompts or --text.")
        found += batch
        number += 1
        if number > len(given):
            count += sum(len(each.ids) for each in batch)
        progress(_OWN, min(count, settings.tokens), settings.tokens)
    return found


def drafter_plan(spec: DecoderSpec, settings: DrafterSettings, device: torch.device) -> Plan:
    """Return the plan of a drafter's training, without the text that it is given."""
    layer, head = layer_size(spec), spec.hidden_size * settings.vocabulary
    whole = spec.num_layers * layer
    deep = settings.first_alone + settings.depth * (1 - settings.first_alone)
    step = _LEARNING * 3 * deep * (layer + 2 * spec.hidden_size**2 + head) / whole
    writing = _WRITING * (1 + spec.hidden_size * spec.vocab_size / whole)
    passes = {_OWN: writing * settings.tokens / _PASS, _DRAFTER: step * settings.epochs * settings.tokens / _PASS}
    dtype = getattr(torch, settings.precision or "float32")
    kept = settings.tokens * (spec.hidden_size + 2 * spec.key_value_size) * torch.finfo(dtype).bits / 8
    seconds = pass_seconds(spec, _PASS, dtype, device)
    return Plan(dict.fromkeys(passes, settings.tokens), passes, seconds, memory(spec, 1, _PASS, dtype, device) + kept)


def _card(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    settings: DrafterSettings,
    gated: GatedModel,
    figures: DraftFigures,
    data: dict[str, str],
    counts: tuple[int, int],
    seconds: float | None,
) -> dict[str, Any]:
    return {
        "kind": "drafter",
        "units": units_text(units),
        "model": Path(checkpoint.source).name,
        "model_fingerprint": checkpoint.fingerprint,
        "model_bits": round(checkpoint.bits, 2),
        "data": data,
        "settings": asdict(settings),
        "texts": counts[0],
        "tokens": counts[1],
        "held_out": asdict(figures),
        "seconds": seconds,
        "versions": {"dash-export": __version__} | {name: version(name) for name in ("torch", "transformers")},
        "precision": settings.precision,
        "device": f"{gated.device.type}, {platform.machine()}, {torch.get_num_threads()} threads",
    }
