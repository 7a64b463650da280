"""Command group of the command line. A command's module is imported when it is called, so that --help is fast."""

import errno
import io
import logging
import os
import sys
import unicodedata
from difflib import get_close_matches
from importlib import import_module

import click

from dash_export import __version__
from dash_export.backends.base import MAIN
from dash_export.errors import DashError

# command -> what it does, in the order of first use. The module is dash_export.commands.<command>.
COMMANDS = {
    "export": "A model (folder, hub id, GGUF file) to a bundle of ONNX graphs.",
    "build": "Compile a bundle's engines for a target and measure them.",
    "run": "Answer a prompt, or chat, skipping layers as told.",
    "serve": "Bundles behind OpenAI's API, and a page to try them.",
    "push": "A bundle to the Hugging Face hub, with a card of its figures.",
    "sign": "Sign a bundle, for machines that run only what you signed.",
    "inspect": "What is in a bundle: graphs, engines, sizes, costs, policy.",
    "train": "Learn a drafter for a model, or with --skips a policy that skips layers.",
    "bench": "Tokens per second here, of prompts and of answers, under every policy kind.",
    "eval": "What skipping costs in quality, under every policy kind.",
    "frontier": "What policy kinds and other builds pay for the time they save.",
    "profile": "Where the time of a token goes: segments, actions, policy, host; table, report, trace.",
    "list": "Targets and policies that come with the package, and bundles of the hub in the cache.",
    "doctor": "What this machine has, and the install line for what is missing.",
}
# Package that may be missing -> the extra that brings it.
EXTRAS = {
    **{package: backend.extra for package, backend in MAIN.items()},
    **dict.fromkeys(("onnx", "onnx_ir", "gguf", "safetensors", "huggingface_hub", "ml_dtypes"), "export"),
    **dict.fromkeys(("torch", "transformers"), "train"),
    **dict.fromkeys(("matplotlib", "scipy"), "profile"),
    "lm_eval": "eval",
    "PIL": "vision",
    **dict.fromkeys(("starlette", "uvicorn", "httptools", "pydantic", "llguidance"), "serve"),
}
INTERRUPTED = 130
OUTPUT = "dash_export.output"
"""Key in `click.Context.meta` of the paths that the running command writes, for disk errors that name no file."""


class LazyGroup(click.Group):
    """Group that imports a command when it is called; prints errors a user can act on as one paragraph on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"dash_export.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and args[0] not in COMMANDS and (near := get_close_matches(args[0], COMMANDS)):
            ctx.fail(f"There is no command {args[0]!r}. Did you mean {' or '.join(near)}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if (said := error_message(error, ctx.meta.get(OUTPUT))) is None:
                raise
            raise click.ClickException(printable(said)) from error


_FULL = ("requested and", "Not enough free space", "No space left")
"""Parts of the messages by which numpy, onnx_ir and shutil report a full disk."""


def error_message(error: Exception, output: object = None) -> str | None:
    """Return one paragraph that says what went wrong and what to do; None for a bug in this program, which keeps its
    traceback. `output` is named where a disk error names no file.
    """
    if isinstance(error, DashError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        install = f"Run: pip install 'dash-export[{EXTRAS.get(package)}]'"
        return f"This command needs the package {package!r}. {install}" if package in EXTRAS else None
    if isinstance(error, MemoryError):
        what = f" ({error})" if str(error) else ""
        return f"The memory of this machine is not enough{what}: free some, or ask for less at a time."
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):  # click ends quietly: the reader has gone
        return None
    where = error.filename or output or "the output"
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or any(said in reason for said in _FULL):
        return (
            f"The disk is full: {where} could not be written ({reason}). "
            "Free some space, or choose an output on another disk, and run the command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{where} may not be read or written ({reason}). Check its permissions, or choose another output folder."
    return f"{where} could not be read or written ({reason}). Check the path and the disk, and run the command again."


def printable(text: str) -> str:
    """Return the text without control characters, which steer a terminal, and lone surrogates, which no report can
    encode: models and strangers' files may hold anything.
    """
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs"))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done; 1 an error, told on stderr; 2 wrong usage; 130 interrupted with Ctrl-C. Completion: "
    'eval "$(_DASH_EXPORT_COMPLETE=bash_source dash-export)", with zsh_source or fish_source for these shells.',
)
@click.version_option(__version__, prog_name="dash-export")
@click.option("-v", "--verbose", count=True, help="Tell more on stderr: -v what is done, -vv everything.")
def cli(verbose: int) -> None:
    """Dynamic layer skipping for language models that is faster on a clock.

    \b
    dash-export build MODEL -o my.dash --target cpu
    dash-export run my.dash "What is a decoder layer?"
    """
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("dash_export").setLevel(level)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # huggingface_hub reads it on import; offline it would warn


def main() -> None:
    """Run the command line: the console script."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next opened file would take its number
            while os.open(os.devnull, os.O_RDWR) < descriptor:
                pass
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode
    try:
        cli(prog_name="dash-export")
    except (OSError, SystemExit) as ended:  # --help and --version write before `invoke`
        failed = ended
        try:
            sys.stdout.flush()
        except OSError as error:  # the interpreter would try again, and end with code 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            failed = error if isinstance(ended, SystemExit) and not ended.code else ended
        if isinstance(failed, OSError):
            raise SystemExit(f"Error: {error_message(failed)}") from failed
        raise
