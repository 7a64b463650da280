"""`dash-export run`: one answer, streamed; `--chat` for a conversation, `--prompts` for many answers, `--json` for
programs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from dash_export.commands.common import choose_target
from dash_export.commands.run_asking import Asking
from dash_export.commands.run_batch import answer_all, read_prompts
from dash_export.commands.setting import setting_options
from dash_export.decision import Setting
from dash_export.errors import RequestError
from dash_export.targets import MAX_THREADS, Dispatch
from dash_export.text_files import read_stream

if TYPE_CHECKING:
    from dash_export.runtime import DashRuntime, Response, Sampling

BATCH = 8


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Many prompts, one per line (-: stdin)."
)
@click.option("--batch", type=click.IntRange(1, 1024), help=f"How many of --prompts to decode together ({BATCH}).")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the model's chat template.")
@click.option(
    "--chat", is_flag=True, help="A conversation: /reset forgets it, /quit or Ctrl-D leaves, Ctrl-C stops an answer."
)
@click.option("--system", help="System message of the chat template.")
@click.option("--target", help="Which build: cpu, or the only one there is.")
@setting_options
@click.option(
    "--dispatch",
    type=click.Choice(get_args(Dispatch)),
    help="Of a GPU target: how the policy is evaluated; the recipe's choice by default.",
)
@click.option("--threads", type=click.IntRange(0, MAX_THREADS), help="Of a CPU target; 0: one per physical core.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="By default 256, or what the context has left.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, help="1 is off.")
@click.option("--min-p", type=float, default=0.0, help="0 is off.")
@click.option("--repetition-penalty", type=float, default=1.0, help="1 is off.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given again.")
@click.option("--show-skips", is_flag=True, help="Colour each token by the share of layers it ran.")
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object: text, tokens, finish_reason, statistics, actions."
)
def command(
    bundle: Path, prompt: str | None, prompts: Path | None, batch: int | None, raw: bool, chat: bool,
    system: str | None, target: str | None, threads: int | None, dispatch: str | None, max_tokens: int | None,
    show_skips: bool, as_json: bool,
    setting: Setting, **options: Any,
) -> None:  # fmt: skip
    """Answer PROMPT (or standard input, or every line of --prompts) with a built bundle; figures go to stderr.

    The prompt is put into the model's chat template when it has one; --raw gives plain text.
    """
    _check_usage(prompt, prompts, batch, chat, raw, as_json, show_skips, system)
    many = read_prompts(prompts) if prompts is not None else []
    text = "" if chat or many else _prompt_text(prompt)
    setting.check()
    runtime = _load(bundle, target, threads, dispatch)
    templated = runtime.text.template is not None and not raw
    if system is not None and not templated:
        raise RequestError(
            "This model has no chat template, so there is no place for --system: put it into the prompt."
        )
    asking = Asking(runtime.session_with(setting), _sampling(options), max_tokens, system)
    if chat:
        from dash_export.commands.run_chat import converse

        if prompt is not None and not prompt.strip():
            raise RequestError("The prompt is empty: give at least one word.")
        converse(asking, show_skips, prompt)
        return
    if many:
        answer_all(
            runtime.batch_with(setting, min(batch or BATCH, len(many))),
            many,
            lambda each: _encode(asking, each, templated, asking.session.context_left),
            max_tokens,
            asking.sampling,
            _as_dict if as_json else None,
        )
        return
    ids = _encode(asking, text, templated, asking.session.context_left)
    stream = asking.session.stream(ids, asking.max_tokens, asking.sampling)
    if as_json:
        click.echo(json.dumps(_as_dict(list(stream)), ensure_ascii=False))
        return
    from dash_export.commands.run_output import print_stream

    print_stream(stream, runtime, show_skips)


def _check_usage(
    prompt: str | None, prompts: Path | None, batch: int | None, chat: bool, raw: bool, as_json: bool,
    show_skips: bool, system: str | None,
) -> None:  # fmt: skip
    many = ("--prompts", prompts is not None)
    pairs = (
        (*many, "PROMPT", prompt is not None),
        (*many, "--chat", chat),
        (*many, "--show-skips", show_skips),
        ("--chat", chat, "--json", as_json),
        ("--chat", chat, "--raw", raw),
        ("--json", as_json, "--show-skips", show_skips),
        ("--raw", raw, "--system", system is not None),
    )
    for first, has_first, second, has_second in pairs:
        if has_first and has_second:
            raise click.UsageError(f"{first} and {second} exclude each other.")
    if batch is not None and prompts is None:
        raise click.UsageError("--batch is for --prompts.")
    if prompt is None and prompts is None and not chat and sys.stdin.isatty():
        raise click.UsageError("Give a prompt, pipe one in, or start a conversation with --chat.")


def _prompt_text(prompt: str | None) -> str:
    if prompt is None or prompt == "-":
        prompt = read_stream(sys.stdin).removesuffix("\n")
    if not prompt.strip():
        raise RequestError("The prompt is empty: give at least one word.")
    return prompt


def _load(folder: Path, target: str | None, threads: int | None, dispatch: str | None) -> DashRuntime:
    from dash_export.bundle import Bundle
    from dash_export.runtime import DashRuntime

    target = choose_target(Bundle.open(folder), target)
    return DashRuntime.load(folder, target, dispatch=dispatch, threads=threads)


def _sampling(options: Mapping[str, Any]) -> Sampling:
    from dash_export.runtime import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return Sampling(**{name: options[name] for name in names})


def _encode(asking: Asking, prompt: str, templated: bool, limit: int = sys.maxsize) -> list[int]:
    text = asking.session.text
    return text.chat(asking.messages(prompt), limit) if templated else text.encode(prompt, limit=limit)


def _as_dict(responses: Sequence[Response]) -> dict[str, object]:
    statistics = responses[-1].statistics
    figures = asdict(statistics) | {
        "tokens_per_second": round(statistics.tokens_per_second, 3),
        "layers_per_token": round(statistics.layers_per_token, 3),
    }
    return {
        "text": "".join(response.text for response in responses),
        "tokens": [response.token for response in responses],
        "finish_reason": responses[-1].finish_reason,
        "statistics": figures,
        "actions": [response.actions.nonzero()[0].tolist() for response in responses],
    }
