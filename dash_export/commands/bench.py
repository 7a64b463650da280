"""`dash-export bench`: how fast a build takes prompts and decodes here, as a table and one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.commands.options import Load, comparison_options, count_option, print_refused, with_bounds
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import print_table
from dash_export.files.resources import resource_folder
from dash_export.measure import BENCH_PROMPT, BENCH_ROUNDS, TOKENS
from dash_export.text.chats import read_prompts

if TYPE_CHECKING:
    from dash_export.files.artifacts import Progress
    from dash_export.measure.candidates import Candidate
    from dash_export.measure.timing import Timing
    from dash_export.runtime import DashRuntime

PROMPTS, LONGEST = 8, 200
"""Shipped prompts that are answered with drafts and without, and letters that each has at most."""


@click.command("bench")
@comparison_options(budgets=(0.85,))
@click.option(
    "--text", type=click.Path(path_type=Path, dir_okay=False),
    help="Text to read and decode; by default the model's held-out answers that came with the policy, or else the "
    "calibration text.",
)  # fmt: skip
@count_option("--prompt", BENCH_PROMPT, "Tokens of the prompt.", least=2)
@count_option("--tokens", TOKENS, "Tokens decoded after it, without those that settle.", least=8)
@count_option("--rounds", BENCH_ROUNDS, "Processes that time each setting, in turns.")
def command(load: Load, text: Path | None, prompt: int, tokens: int, rounds: int) -> None:
    """Measure how many tokens of a prompt, and of an answer, a built BUNDLE computes per second here.

    Dense and the policy kinds (all, at a budget of 0.85, unless told otherwise) take turns on the same known tokens,
    each in processes of its own. Then the model answers prompts with drafts and without. The last line is JSON.
    `profile` says where the time goes, `frontier` what saving it costs. Let nothing else run meanwhile.
    """
    from dash_export.measure.breakdown import conditions, this_machine
    from dash_export.measure.texts import judged_text
    from dash_export.measure.timing import SETTLE, decode_times, fitting_context

    with progress_bar("bench") as progress:
        progress("loading", 0, 0)
        candidates, refused = load()
        machine = this_machine()
        fitting_context(candidates, prompt, SETTLE + tokens)
        judged = judged_text(candidates[0].runtime, text, progress=progress)
        parts = judged.stretches(rounds, prompt + SETTLE + tokens)
        timings = decode_times(candidates, parts, prompt, progress)
        drafts = _drafts(candidates[0].runtime, tokens, progress)
    found: dict[str, Any] = {
        "model": candidates[0].runtime.bundle.manifest.model.name,
        "machine": machine,
        "course": {"text": judged.name, "context": prompt, "tokens": tokens, "windows": rounds, "rounds": rounds},
        "lanes": [_lane(*each, prompt) for each in zip(candidates, timings, strict=True)],
    }
    click.echo("\n".join([*conditions(found), ""]))
    _print(found["lanes"])
    if drafts:
        found["drafts"] = drafts
        click.echo(
            f"With drafts {drafts['tokens_per_second']:.1f} tokens/s, {drafts['ratio']:.2f} times those without, "
            f"{drafts['tokens_per_pass']:.2f} tokens/pass, greedy answers to {drafts['prompts']} prompts of "
            f"{tokens} tokens.\n"
        )
    print_refused(refused)
    click.echo(json.dumps(found | {"refused": refused}))


def _drafts(runtime: DashRuntime, tokens: int, progress: Progress) -> dict[str, Any]:
    """Return figures of answers with drafts beside the same without; none where this build has no drafts."""
    from dash_export.measure.drafts import drafted_beside_plain

    if runtime.cost.passes is None:
        return {}
    chats = read_prompts(resource_folder("calibration") / "prompts.jsonl")
    prompts = [text for chat in chats if len(text := chat.messages[-1]["content"]) < LONGEST][:PROMPTS]
    found = drafted_beside_plain(runtime, prompts, tokens, progress=progress)
    said = [answer[-1].statistics for answer in found.drafted]
    per_pass = sum(each.decode_steps for each in said) / max(1, sum(each.passes for each in said))
    rates = {"tokens_per_second": found.drafted_rate, "plain_tokens_per_second": found.plain_rate}
    return {"prompts": len(prompts), **rates, "ratio": found.ratio, "tokens_per_pass": per_pass}


def _lane(candidate: Candidate, timing: Timing, prompt: int) -> dict[str, Any]:
    from dash_export.measure.candidates import setting_record

    return {
        "label": candidate.label,
        "build": candidate.build,
        "target": candidate.runtime.build.target,
        "setting": setting_record(candidate.setting),
        "prompt_tokens_per_second": 1e3 * prompt / timing.prompt_ms,
        "tokens_per_second": 1e3 / timing.milliseconds,
        **asdict(timing),
    }


def _print(lanes: Sequence[dict[str, Any]]) -> None:
    from dash_export.measure.intervals import Interval

    print_table(
        "Tokens per second", ("setting",), ("prompt", "decode", "ms/token", "time of dense", "predicted"),
        (
            (
                lane["label"], f"{lane['prompt_tokens_per_second']:.0f}", f"{lane['tokens_per_second']:.1f}",
                f"{lane['milliseconds']:.2f}",
                with_bounds(Interval(lane["ratio"], lane["low"], lane["high"]), 3), f"{lane['predicted']:.3f}",
            )
            for lane in lanes
        ),
    )  # fmt: skip
