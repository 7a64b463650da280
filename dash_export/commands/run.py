"""`dash-export run`: an answer, streamed; `--chat`, `--prompts` for many answers, `--json` for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from dash_export.bundle.recipe import MAX_THREADS, Dispatch
from dash_export.cli import printable
from dash_export.commands.options import TARGET, TRUSTED, load_runtime, setting_options
from dash_export.commands.progress import progress_bar
from dash_export.core.advice import policy_command
from dash_export.core.kinds import Setting
from dash_export.core.units import layers_text
from dash_export.errors import DashError, RequestError
from dash_export.text.text_files import read_stream, read_text

if TYPE_CHECKING:
    from dash_export.runtime import Batch, DashRuntime, Response, Sampling, Session

BATCH = 8
CHAT_HINT = "/help lists the commands, /quit or Ctrl-D leaves, Ctrl-C stops an answer."
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class RunOptions:
    """Options for every prompt of this call. `max_tokens` None: the library's default; `templated`: prompts are put
    into the model's chat template.
    """

    runtime: DashRuntime
    session: Session
    setting: Setting
    sampling: Sampling
    max_tokens: int | None
    system: str | None
    templated: bool

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """Return a new conversation: the system message, if any, and the prompt."""
        return with_system(self.system, [{"role": "user", "content": prompt}])

    def encode(self, prompt: str) -> list[int]:
        text, limit = self.session.text, self.session.context_left
        return text.chat(self.messages(prompt), limit) if self.templated else text.encode(prompt, limit=limit)


def with_system(system: str | None, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return messages that begin with the system message, if there is one."""
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@click.command("run")
@click.argument("bundle", type=_PATH)
@click.argument("prompt", required=False)
@click.option("--prompts", type=_PATH, metavar="FILE", help="Many prompts, one per line (-: stdin).")
@click.option("--batch", type=click.IntRange(1, 1024), help=f"How many of --prompts to decode together ({BATCH}).")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the model's chat template.")
@click.option("--chat", is_flag=True, help=f"A conversation: {CHAT_HINT}")
@click.option("--system", help="System message of the chat template.")
@TARGET
@TRUSTED
@setting_options
@click.option(
    "--dispatch", type=click.Choice(get_args(Dispatch)),
    help="Of a GPU target: how the policy is evaluated; the recipe's choice by default.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(0, MAX_THREADS), help="Of a CPU target; 0: one per core it may use.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="By default 256, or what the context has left.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, help="1 is off.")
@click.option("--min-p", type=float, default=0.0, help="0 is off.")
@click.option("--repetition-penalty", type=float, default=1.0, help="1 is off.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given again.")
@click.option("--json-schema", type=_PATH, metavar="FILE", help="Answer in JSON of this schema.")
@click.option("--grammar", type=_PATH, metavar="FILE", help="Answer in this grammar, in Lark.")
@click.option("--gallery", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
              help="Of an image encoder: name the pictures in DIR that are nearest.")  # fmt: skip
@click.option("-o", "--output", type=_PATH, metavar="NAME.npz", help="Of an encoder: write the pooled vectors of a "
              "folder's pictures, or of each line of --prompts.")  # fmt: skip
@click.option("--show-skips", is_flag=True, help="Colour each token by the share of layers it ran.")
@click.option("--json", "as_json", is_flag=True,
              help="One JSON object: text, tokens, finish_reason, statistics, actions.")  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, /, bundle: Path, prompt: str | None, prompts: Path | None, batch: int | None, raw: bool,
    chat: bool, system: str | None, target: str | None, trusted_key: Path | None, threads: int | None,
    dispatch: str | None, max_tokens: int | None, json_schema: Path | None, grammar: Path | None, show_skips: bool,
    as_json: bool, setting: Setting, gallery: Path | None, output: Path | None, **sampling: Any
) -> None:  # fmt: skip
    """Answer PROMPT (or standard input, or every line of --prompts) with a built bundle; figures go to stderr.

    The prompt is put into the model's chat template when it has one; --raw gives plain text. For the bundle of an
    encoder PROMPT is a picture or a folder of pictures, or the text to encode.
    """
    _check_usage(ctx)
    many = read_prompts(prompts) if prompts is not None else []
    if prompt in (None, "-") and not many and not chat:
        prompt = read_stream(sys.stdin).removesuffix("\n")
    if prompt is not None and not prompt.strip():
        raise RequestError("The prompt is empty: give at least one word.")
    if setting.given:  # `--policy token` alone: the bundle is asked first, which may have no such policy
        setting.check()
    form = _form(json_schema, grammar)

    from dash_export.commands.chat import converse
    from dash_export.commands.encode import encode_inputs
    from dash_export.commands.printing import AnswerPrinter
    from dash_export.runtime import Sampling

    runtime = load_runtime(bundle, target, dispatch=dispatch, threads=threads, trusted_key=trusted_key)
    if runtime.bundle.manifest.model.decides == "input":
        encode_inputs(runtime, prompt or "", many, setting, gallery, output, as_json)
        return
    if gallery is not None or output is not None:
        raise click.UsageError("--gallery and --output are of encoders.")
    templated = runtime.text.template is not None and not raw
    if not templated and (chat or system is not None):
        raise RequestError("This model has no chat template, so there is no --chat and no --system: give plain text.")
    if not templated and not raw:
        click.echo("[this model has no chat template: it continues the prompt as plain text]", err=True)
    session = runtime.session_with(setting)
    if setting.skip and runtime.bundle.manifest.policy.bypass == "none":
        _warn_of_skips(runtime, setting.skip)
    options = RunOptions(runtime, session, setting, Sampling(**sampling, grammar=form), max_tokens, system, templated)
    if chat:
        converse(options, show_skips, prompt)
    elif many:
        size = batch or min(BATCH, runtime.engines.sequences)
        answer_all(runtime.batch_with(setting, min(size, len(many))), many, options, as_json)
    else:
        asked = prompt or ""
        if templated:
            stream = session.chat(options.messages(asked), max_tokens, options.sampling)
        else:
            stream = session.stream(options.encode(asked), max_tokens, options.sampling)
        if as_json:
            click.echo(json.dumps(_as_dict(list(stream))))
        else:
            printer = AnswerPrinter(options.session, show_skips)
            printer.print(stream)
            printer.print_legend()


def _warn_of_skips(runtime: DashRuntime, skip: tuple[int, ...]) -> None:
    """Tell what skipping layers costs that have no trained bypass."""
    from dash_export.measure.fixed_skips import perplexity_factor

    with progress_bar("run") as progress:
        factor = perplexity_factor(runtime, skip, progress)
    click.echo(
        f"[no trained bypass stands in for the layers {layers_text(skip)}: skipping them makes perplexity {factor:.3g} "
        f"times as high on the calibration text. A policy has bypasses. {policy_command(runtime.engines.model)}]",
        err=True,
    )


def _check_usage(ctx: click.Context) -> None:
    names = {"PROMPT" if name == "prompt" else f"--{name.removeprefix('as_').replace('_', '-')}": value
             for name, value in ctx.params.items()}  # fmt: skip
    given = {name for name, value in names.items() if value is not None and value is not False}
    for first, others in (
        ("--prompts", ("PROMPT", "--chat", "--show-skips")),
        ("--chat", ("--json", "--raw")),
        ("--json", ("--show-skips",)),
        ("--raw", ("--system",)),
        ("--json-schema", ("--grammar",)),
    ):
        for second in others:
            if {first, second} <= given:
                raise click.UsageError(f"{first} and {second} exclude each other.")
    if "--batch" in given and "--prompts" not in given:
        raise click.UsageError("--batch is for --prompts.")
    if not {"PROMPT", "--prompts", "--chat"} & given and sys.stdin.isatty():
        raise click.UsageError("Give a prompt, pipe one in, or start a conversation with --chat.")


def _form(schema: Path | None, grammar: Path | None) -> str | None:
    """Return the grammar that answers are held to. Raises RequestError for a file that cannot be used."""
    if schema is None:
        return None if grammar is None else read_text(grammar, pipe=True)
    from dash_export.text.guidance import json_grammar

    try:
        given = json.loads(read_text(schema, pipe=True))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{schema} is not JSON ({error}).") from error
    if not isinstance(given, dict):
        raise RequestError(f"{schema} is no JSON schema, which is an object.")
    return json_grammar(given)


def _as_dict(responses: Sequence[Response]) -> dict[str, object]:
    statistics = responses[-1].statistics
    figures = asdict(statistics) | {
        "tokens_per_second": round(statistics.tokens_per_second, 3),
        "layers_per_token": round(statistics.layers_per_token, 3),
        "tokens_per_pass": round(statistics.tokens_per_pass, 3),
    }
    if not statistics.decode_steps:  # the only token comes from the prompt
        del figures["tokens_per_second"], figures["layers_per_token"], figures["tokens_per_pass"]
    return {
        "text": "".join(response.text for response in responses),
        "tokens": [response.token for response in responses],
        "finish_reason": responses[-1].finish_reason,
        "statistics": figures,
        "actions": [response.actions.nonzero()[0].tolist() for response in responses],
    }


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; blank lines are left out. Raises RequestError where there is no prompt."""
    text = read_stream(sys.stdin) if path == Path("-") else read_text(path, pipe=True)
    prompts = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise RequestError(f"{path} has no prompt: give one per line.")
    return prompts


def answer_all(batch: Batch, prompts: list[str], options: RunOptions, as_json: bool) -> None:
    """Print each answer when it is complete, as text or as one JSON line. Print on stderr why a prompt has no answer,
    and the figures of all answers. Raises RequestError at the end where a prompt has no answer.
    """
    answers: dict[int, list[Response]] = {}
    encoded: dict[int, list[int]] = {}

    def refuse(index: int, error: DashError) -> None:
        click.echo(printable(f"{index}: the prompt {prompts[index][:40]!r} has no answer. {error}"), err=True)

    for index, prompt in enumerate(prompts):
        try:
            encoded[index] = options.encode(prompt)
        except DashError as error:
            refuse(index, error)
    indices, began, count, answered = list(encoded), time.perf_counter(), 0, 0
    told = batch.stream(encoded.values(), options.max_tokens, options.sampling, continues=not options.templated)
    for position, response in told:
        index = indices[position]
        if response.error is not None:
            refuse(index, response.error)
            continue
        count += 1
        answers.setdefault(index, []).append(response)
        if response.finish_reason is not None:
            answered += 1
            _print_one(index, prompts[index], answers.pop(index), as_json)
    seconds, steps = time.perf_counter() - began, max(1, batch.rows.decode_steps)
    click.echo(
        f"[{answered} answers, {count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s in all, up to "
        f"{batch.size} at a time, {batch.rows.layers_run / steps:.1f} layers/step]",
        err=True,
    )
    if answered < len(prompts):
        raise RequestError(f"{len(prompts) - answered} of {len(prompts)} prompts have no answer: why stands above.")


def _print_one(index: int, prompt: str, responses: list[Response], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"index": index, **_as_dict(responses)}))
        return
    answer = "".join(piece.text for piece in responses)
    asked, said = map(printable, (prompt, answer)) if sys.stdout.isatty() else (prompt, answer)
    click.secho(f"{index}: {asked}", bold=True)
    click.echo(f"{said}\n")
