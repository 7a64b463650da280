"""Plan of a training before it begins: its stages, the time that they take here, and the memory."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from dash_export.files.artifacts import Progress
from dash_export.models import DecoderSpec
from dash_export.train import TrainingSettings
from dash_export.train.corpus import OWN
from dash_export.train.model import activations, layer_size, rows_at_once
from dash_export.train.partition import candidate_groups
from dash_export.train.stages import CLOSED_FORM

OTHER = 1.5
"""Time of a pass over that of products and activations like its layers': attention, norms, smaller products."""


@dataclass(frozen=True)
class Plan:
    """Stages with their steps and with the forward passes that they take, the time of a pass on this device (s), and
    the memory that the training needs (bytes).
    """

    steps: dict[str, int]
    passes: dict[str, float]
    pass_seconds: float
    memory: float

    @property
    def seconds(self) -> float:
        """Expected time of the whole training."""
        return sum(self.passes.values()) * self.pass_seconds

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {steps}" for name, steps in self.steps.items())
        return (
            f"about {max(1, round(self.seconds / 60))} minutes where nothing else runs, "
            f"{self.memory / 2**30:.1f} GiB of memory; {stages}"
        )


def training_plan(
    spec: DecoderSpec, settings: TrainingSettings, kind: str, search: bool, prompts: int, device: torch.device
) -> Plan:
    """Return the plan of a training: of a `search` for units or without, with answers to `prompts` prompts."""
    groups = candidate_groups(spec.num_layers, settings.search_every) if search and settings.search_steps else []
    trials, tokens = sum(map(len, groups)), settings.window * settings.windows
    # (steps, passes): seconds of all steps over the seconds of a pass, for a 135M and a 0.5B in bfloat16 on an EPYC.
    answered = min(prompts, settings.own_prompts)
    first = {
        OWN: (answered, 3.0 * answered * settings.own_tokens / tokens),  # in batches of 64 rows a product is slower
        "candidates": (trials, 1.4 * settings.search_steps * len(groups) + 1.3 * trials),
        CLOSED_FORM: (settings.fit_steps, 1.4 * settings.fit_steps),
    }
    order = {"static order": (1, 35.0)}
    if kind == "token":
        regression, tuning = settings.regression_steps, settings.tuning_steps
        last = {"regression": (regression, 4.0 * regression), "tuning": (tuning, 3.6 * tuning), **order}
    else:
        last = {**order, "tuning": (settings.tuning_steps, 4.0 * settings.tuning_steps)}
    stages = {**first, **last, "held-out text": (settings.judged_batches, 18.0 * settings.judged_batches)}
    dtype = getattr(torch, settings.precision or "float32")
    return Plan(
        {name: steps for name, (steps, _) in stages.items() if steps},
        {name: passes for name, (_, passes) in stages.items()},
        pass_seconds(spec, tokens, dtype, device),
        memory(spec, settings.windows, settings.window, dtype, device),
    )


def pass_seconds(spec: DecoderSpec, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the time of a forward pass of all layers over `tokens` tokens, from two products like theirs. On a CPU by
    processor time: the plan is that of a quiet machine, whatever runs beside it now.
    """
    on_cpu = device.type == "cpu"
    clock, threads = (time.process_time, torch.get_num_threads()) if on_cpu else (time.perf_counter, 1)
    x = torch.ones(tokens, spec.hidden_size, dtype=dtype, device=device)
    weight = torch.ones(spec.hidden_size, 4 * spec.hidden_size, dtype=dtype, device=device)
    times = []
    for _ in range(3):
        began = clock()
        (silu(x @ weight) @ weight.T)[0, 0].item()
        times.append((clock() - began) / threads)
    return OTHER * min(times) / (2 * weight.numel()) * spec.num_layers * layer_size(spec)


def memory(spec: DecoderSpec, windows: int, window: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return about what a training needs: weights, activations for the backward pass, torch itself."""
    weights = spec.num_layers * layer_size(spec) + spec.vocab_size * spec.hidden_size
    rows = min(windows, rows_at_once(spec, window, dtype, device))
    return weights * torch.finfo(dtype).bits / 8 + activations(spec, rows * window, dtype) + 2**29


def whole_training_progress(progress: Progress, passes: Mapping[str, float]) -> Progress:
    """Return the progress callback of the stages. It tells `progress` the forward passes done of the whole training
    (`passes`: those of each stage), so that the pace says how much time is left.
    """
    total = round(sum(passes.values()))

    def told(name: str, done: int, steps: int) -> None:
        stage = name.partition(",")[0].removeprefix("further ")
        before = sum(list(passes.values())[: list(passes).index(stage)])
        progress(f"{name}, {done} of {steps}", round(before + passes[stage] * done / steps), total)

    return told
