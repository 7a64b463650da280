"""`train`: a model and text -> a policy file with its card."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dash_export import __version__
from dash_export.backends.host.cpus import has_bfloat16
from dash_export.bundle.policy_file import card_path, check_replaceable, load_policy, policy_path, save_policy
from dash_export.core.advice import policy_command
from dash_export.core.policy import SkipPolicy, narrowed
from dash_export.core.units import Unit, check_units, units_text
from dash_export.errors import PolicyError, RequestError
from dash_export.files.artifacts import Progress, content_key, identity, no_progress, sha256_file
from dash_export.files.outputs import locked, output_path, remove_own, work_folder, work_of
from dash_export.files.replacing import refuse_inputs
from dash_export.files.resources import resource_folder
from dash_export.models import AnyCheckpoint, Checkpoint, open_model
from dash_export.models.spec import FINAL_NORM, DecoderSpec
from dash_export.text.chats import Chat, chats_text, read_prompts
from dash_export.text.tokenizer import Text
from dash_export.train import KINDS, PRECISIONS, TrainingSettings
from dash_export.train.card import policy_card
from dash_export.train.corpus import OWN, Corpus, read_corpus
from dash_export.train.model import GatedModel, saved
from dash_export.train.own_answers import own_answers
from dash_export.train.plan import Plan, training_plan, whole_training_progress
from dash_export.train.processes import joined, local_rank
from dash_export.train.stages import Run, trained_policy
from dash_export.train.work import Work

LONGEST_NAME = 100
KEPT_ANSWERS = 48
"""Number of held-out answers that a policy file keeps: 60 kB."""
COMMON = 1 << 15
"""Number of tokens whose logits losses compare."""


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
    planned: Callable[[Plan], None] = lambda _: None,
    progress: Progress = no_progress,
) -> SkipPolicy:
    """Train a policy of `kind` (`token` or `static`) for `model` and write it to `output` (`.safetensors`, and a JSON
    card beside it).

    Without `units`, a search finds those that gain most. `start` is a trained policy that training goes on from, to
    tune it further, for other text, or for another model of the same shape: its units, network and bypasses are the
    beginning, and only the tuning steps are done. `units` are then some of its units, or several side by side made one.
    A network that did not read the layer before the first unit is learnt anew. Without prompts its held-out answers are
    kept: a build sets its dial on what a model decodes.

    `texts` are plain text files, `prompts` .jsonl files of chat prompts that the model answers itself; without any, the
    prompts that come with this package are answered (by a model without a chat template their texts are read). The
    unfinished work lies in `<output>.unfinished`, where a killed training goes on. `planned` is told the plan before
    the model is read; `progress(name, done, total)` counts forward passes over all stages. Raises CheckpointError,
    PolicyError and RequestError.

    In processes that torchrun started this is one training: each takes its share, and the first one writes.
    """
    output, settings = output_path(output), settings or TrainingSettings()
    _check(output, kind, settings)
    checkpoint = model if isinstance(model, AnyCheckpoint) else open_model(model)
    if not isinstance(checkpoint, Checkpoint):
        raise PolicyError(f"{checkpoint.source} is an encoder. {policy_command(checkpoint.spec, checkpoint.source)}")
    if not texts and not prompts:
        shipped = resource_folder("calibration")
        templated = "chat_template.jinja" in checkpoint.assets
        texts, prompts = ((), (shipped / "prompts.jsonl",)) if templated else ((shipped / "quantise.txt",), ())
    spec, began = checkpoint.spec, time.perf_counter()
    if settings.window > spec.max_positions:
        raise PolicyError(f"The context of this model is {spec.max_positions} tokens: give a --window of at most that.")
    start = start and policy_path(start)
    before = None if start is None else _trained(start, spec, kind, units)
    if before is not None:
        units = before.units
        settings = _further(settings, rereads=kind == "token" and before.read != units[0].first - 1)
    given = None if units is None else _checked(units, spec)
    place = torch_device(device)
    check_sources(texts, prompts)
    precision = settings.precision or torch_precision(place)
    settings = replace(settings, precision=precision)
    checkpoint = replace(checkpoint, seen={**checkpoint.seen, **{path: identity(path) for path in (*texts, *prompts)}})
    data = {
        path.name: {"read_as": form, "sha256": sha256_file(path)}
        for form, paths in (("text", texts), ("prompts", prompts))
        for path in paths
    }
    origin = None if start is None else {"file": start.name, "sha256": sha256_file(start)}
    replaced = [work_of(output), output, card_path(output)]
    refuse_inputs([*checkpoint.seen, *filter(None, [start])], replaced)
    # All that the training depends on: another tokenizer or chat template makes other tokens of the same file.
    read = (checkpoint.fingerprint, sorted(checkpoint.assets.items()), data, origin, __version__, torch.__version__)
    key = content_key(asdict(settings), kind, None if given is None else units_text(given), *read)
    with joined(settings.windows) as processes, nullcontext() if processes.rank else locked(output, "train"):
        progress = no_progress if processes.rank else progress
        chats = [chat for file in prompts for chat in read_prompts(file)]
        plan = training_plan(spec, settings, kind, given is None, len(chats), place)
        if not processes.rank:
            planned(plan)
        progress("reading the text", 0, 0)
        text = model_text(checkpoint)
        corpus, held = read_corpus(texts, text, settings.window, settings.held_out)
        work = Work(work_of(output) if processes.rank else work_folder(output, "train"), key, processes)
        resumed = any(work.folder.glob("*-state.pt"))
        gated = GatedModel(checkpoint, place, getattr(torch, precision), progress)
        checkpoint.check_same()
        run = Run(gated, corpus, settings, work, whole_training_progress(progress, plan.passes))
        answers = _add_own(run, held, text, chats) if chats else before.answers if before else ""
        gated.learn_on(corpus.frequent(spec.vocab_size, COMMON))
        policy, chosen = trained_policy(run, kind, given, before)
        policy = replace(
            policy.in_half(),
            origin=f"{kind} policy for {spec.name[:LONGEST_NAME]}, trained by dash-export "
            f"(seed {settings.seed}, key {key[:8]})",
            final_norm=checkpoint.read(FINAL_NORM),
            answers=answers,
            drafter=None if before is None else before.drafter,
        )
        if processes.rank:
            return policy
        card = policy_card(checkpoint, policy, run, held, chosen, {"kind": kind, "from": origin, "data": data})
        card["seconds"] = None if resumed else round(time.perf_counter() - began, 1)
        save_policy(output, policy, spec, card)  # raises if a file has appeared there meanwhile; the work folder stays
        remove_own(work.folder)
        return policy


def _check(output: Path, kind: str, settings: TrainingSettings) -> None:
    for name, value, known in (
        ("policy kind", kind, KINDS),
        ("precision", settings.precision or PRECISIONS[0], PRECISIONS),
    ):
        if value not in known:
            raise PolicyError(f"There is no {name} {value!r} to train with. Known: {', '.join(known)}.")
    if not 0 < settings.trade_offs[0] < settings.trade_offs[1] < math.inf:
        raise PolicyError(f"Trade-offs go from a low to a higher, finite one, above 0; got {settings.trade_offs}.")
    if settings.window < 16:
        raise PolicyError(f"A window has 16 tokens or more, not {settings.window}.")
    check_replaceable(output)


def _checked(units: Sequence[Unit], spec: DecoderSpec) -> tuple[Unit, ...]:
    """Return the units. Raises PolicyError where they are not units of this model, or where one saves nothing."""
    if not units:
        raise PolicyError("There is no unit to learn about: no layer may be skipped.")
    check_units(tuple(units), units[0].first - 1, spec.num_layers)
    idle = next((unit for unit in units if saved(spec, len(unit.layers)) <= 0), None)
    if idle is not None:
        raise PolicyError(f"Skipping {idle} saves nothing: its bypass is larger. Give larger units.")
    return tuple(units)


def _trained(path: Path, spec: DecoderSpec, kind: str, units: Sequence[Unit] | None) -> SkipPolicy:
    """Load the policy that training goes on from, with `units` of its own only. Raises PolicyError."""
    policy = load_policy(path, spec)
    if units is not None:
        if not {*units} <= {*policy.units}:
            own = units_text(policy.units)
            raise PolicyError(f"{path} has the units {own}: others are trained from nothing. Name some of them.")
        policy = narrowed(policy, (layer for unit in units for layer in unit.layers))
    if not policy.units or not all(policy.bypasses):
        raise PolicyError(f"{path} has a bypass without weights, so there is nothing to tune further: train one anew.")
    if kind == "token" and policy.network is None:
        raise PolicyError(f"{path} has no network: it is a static policy, and goes on with --kind static only.")
    return policy


def _further(settings: TrainingSettings, rereads: bool) -> TrainingSettings:
    """Return the settings for a trained policy: tuning at lower rates, and regression where the network `rereads`."""
    rates = ("bypass_rate", "refinement_rate")
    changed: dict[str, Any] = {name: getattr(settings, name) * settings.again for name in rates}
    idle = ["search_steps", "fit_steps", *["warm_up_steps", "regression_steps"] * (not rereads)]
    return replace(settings, **changed | dict.fromkeys(idle, 0))


def torch_device(name: str) -> torch.device:
    """Return the device of that name, or cuda where there is one. Raises RequestError."""
    try:
        place = torch.device(name or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"There is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return place


def torch_precision(place: torch.device) -> str:
    """Return the precision that suits a device."""
    return "float32" if place.type == "cpu" and not has_bfloat16() else "bfloat16"


def check_sources(texts: Sequence[Path], prompts: Sequence[Path]) -> None:
    """Raise RequestError where a file is missing, or where two have names that cannot be told apart."""
    check_unique_names(texts, prompts)
    if missing := [path for path in (*texts, *prompts) if not path.is_file()]:
        raise RequestError(f"There is no file {missing[0]}.")


def check_unique_names(texts: Sequence[Path], prompts: Sequence[Path] = ()) -> None:
    """Raise RequestError where two files would have one name on the card, or two sources one name in the corpus."""
    own = [OWN] if prompts else []
    sources, files = [*own, *(path.stem for path in texts)], [path.name for path in (*texts, *prompts)]
    twice = next((name for names in (sources, files) for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"Two sources would be called {twice}: texts are told apart by their names, so rename one.")


def model_text(checkpoint: Checkpoint) -> Text:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in checkpoint.assets.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        return Text(Path(folder))


def _add_own(run: Run, held: Corpus, text: Text, chats: Sequence[Chat]) -> str:
    """Add the model's answers to both corpora. Return the held-out ones, on which a build's dial is set."""
    training, judged = own_answers(run, text, chats)
    for corpus, share in ((run.corpus, training), (held, judged)):
        if share:
            corpus.sources[OWN] = [answer.passage for answer in share]
    if not (run.corpus.sources and held.sources):
        raise RequestError(
            "The model's answers to these prompts are too few to learn from and to be judged on: give more prompts, "
            "or text (--text)."
        )
    return chats_text((answer.messages, answer.text) for answer in judged[:KEPT_ANSWERS])
