"""Drafts beside decoding a token a step: tokens per second and per pass, each prompt in all modes in turns.

    python tools/bench/drafts.py BUNDLE [--target cpu-gguf]

Prompts that nothing was trained on; answers that repeat 12 tokens are a row of their own. The text with drafts is that
of drafts which are refused, bit for bit; a pass of one row rounds otherwise, so `other` says how many answers differ
from those of no drafts at all. `predicted` is the ratio by the build's costs of passes.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import print_json

from dash_export import DashRuntime, Sampling
from dash_export.commands.tables import print_table
from dash_export.measure.timing import in_turns
from dash_export.runtime import Response, Session

CODE = (
    "Write a Python function that returns the n-th row of Pascal's triangle.",
    "Write a function in JavaScript that debounces another function.",
    "Write a Python class for a queue made of two stacks.",
    "Write a SQL query that lists the three customers with the most orders in 2023.",
    "Write a C function that reverses a singly linked list.",
    "Write a bash script that renames all .jpeg files of a folder to .jpg.",
    "Write a Python function that parses an ISO 8601 date without libraries.",
    "Write a Go function that counts the words of a file with goroutines.",
    "Write a Python decorator that retries a function three times with a pause.",
    "Write a regular expression for IPv4 addresses and explain its parts.",
)
CHAT = (
    "How do bees find their way back to the hive?",
    "Give me a plan for a quiet weekend in the mountains.",
    "What are the causes of inflation?",
    "Write a short letter to a landlord about a broken heater.",
    "Explain the difference between weather and climate to a child.",
    "Why do some people wake up before their alarm?",
    "Suggest names for a small bakery and say why.",
    "What should I look at when buying a used bicycle?",
    "Describe how a sailing boat can go against the wind.",
    "Summarize the story of Robinson Crusoe in five sentences.",
)
PAGE = """def load(path):
    with open(path) as file:
        lines = file.read().splitlines()
    rows = []
    for line in lines:
        name, price, count = line.split(",")
        rows.append({"name": name, "price": float(price), "count": int(count)})
    return rows


def total(rows):
    result = 0.0
    for row in rows:
        result += row["price"] * row["count"]
    return result
"""
COPY = (
    f"Rename the variable `rows` to `items` in this code and give the whole code again.\n\n{PAGE}",
    f"Add a docstring to each function and give the whole code again.\n\n{PAGE}",
    f"Repeat this code exactly, in a code block.\n\n{PAGE}",
)
KINDS = {"code": CODE, "chat": CHAT, "copying": COPY}
MODES = ("off", "lookup", "layer", "auto")


def repeats(tokens: list[int], length: int = 12) -> bool:
    seen = [tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)]
    return len(set(seen)) < len(seen)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu-gguf", show_default=True)
@click.option("--kinds", default="code,chat,copying", show_default=True)
@click.option("--modes", default=",".join(MODES), show_default=True, help="The first one is what others are of.")
@click.option("--tokens", default=160, show_default=True, help="New tokens of an answer.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--rounds", default=1, show_default=True, help="Answers of each mode to a prompt.")
def main(bundle: Path, target: str, kinds: str, modes: str, tokens: int, temperature: float, rounds: int) -> None:
    """Time answers with and without drafts."""
    runtime = DashRuntime.load(bundle, target, verify=False)
    names = [name for name in modes.split(",") if name != "layer" or runtime.engines.drafter is not None]
    sessions = {name: runtime.session(draft=name) for name in names}
    sampling = Sampling(temperature=temperature, seed=1)
    rows = defaultdict[str, list[dict[str, Any]]](list)
    for session in sessions.values():
        _answer(session, "Hello.", 24, sampling)  # binds its steps
    for kind in kinds.split(","):
        for prompt in KINDS[kind]:
            found: dict[str, list[list[Response]]] = {name: [] for name in names}
            for _, index in in_turns(len(names), rounds):
                found[names[index]].append(_answer(sessions[names[index]], prompt, tokens, sampling))
            row = {name: _figures(runtime, each, found[names[0]]) for name, each in found.items()}
            again = repeats([response.token for response in found[names[-1]][0]])
            rows[f"{kind}, repeating" if again and kind != "copying" else kind].append(row)
            told = ", ".join(f"{name} {own['rate']:.1f}" for name, own in row.items())
            click.echo(f"{kind}: {prompt[:40]!r} {told} tokens/s", err=True)
    result, shown = dict[str, Any](), []
    for kind, of_prompts in rows.items():
        for name in names:
            of = {key: [row[name][key] for row in of_prompts] for key in of_prompts[0][name]}
            figures = {key: round(float(np.median(values)), 3) for key, values in of.items()} | {
                "other": sum(of["other"])
            }
            result[f"{kind}: {name}"] = figures
            shown.append((f"{kind} ({len(of_prompts)})", name, *figures.values()))
    title = f"{bundle.name}, {target}, {tokens} tokens, temperature {temperature:g}: medians over prompts"
    heads = ("ratio", "tokens/s", "tokens/pass", "first right", "accepted", "predicted", "other")
    print_table(title, ("prompts", "drafts"), heads, shown)
    print_json("drafts", {"target": target, "temperature": temperature, "tokens": tokens, "modes": result})


def _answer(session: Session, prompt: str, tokens: int, sampling: Sampling) -> list[Response]:
    session.reset()
    return [*session.chat([{"role": "user", "content": prompt}], tokens, sampling)]


def _figures(runtime: DashRuntime, answers: list[list[Response]], plain: list[list[Response]]) -> dict[str, float]:
    """Median rate and its ratio to the plain answers'; of the first answer what was drafted."""
    rate, base = (float(np.median([each[-1].statistics.tokens_per_second for each in of])) for of in (answers, plain))
    said, first, passes = answers[0][-1].statistics, 0, 0
    costs = runtime.cost.passes
    seconds = said.decode_seconds * 1e6 / runtime.cost.dense_us if costs is not None else 0.0
    drafted = [response.drafted for response in answers[0][1:]]
    place = 0
    while place < len(drafted):  # a pass ends with the first token that was no draft
        passes, first = passes + 1, first + drafted[place]
        place = next((at for at in range(place, len(drafted)) if not drafted[at]), len(drafted)) + 1
    return {
        "ratio": rate / base,
        "rate": rate,
        "per_pass": said.tokens_per_pass,
        "first": first / max(1, passes),
        "accepted": said.accepted / max(1, said.drafts),
        "predicted": said.decode_steps / seconds if seconds else 0.0,
        "other": [response.token for response in answers[0]] != [response.token for response in plain[0]],
    }


if __name__ == "__main__":
    main()
