"""The group: lazy, helpful, and every error one paragraph with the right exit code."""

import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dash_export import __version__
from dash_export.cli import COMMANDS, EXTRAS, LazyGroup, cli
from dash_export.errors import BundleError
from tests.commands.helpers import dash, done, environment, python, refused

HELP_IMPORTS = """
import sys
from dash_export.cli import cli
try:
    cli(["--help"], prog_name="dash-export")
except SystemExit:
    pass
heavy = {"numpy", "onnxruntime", "onnx", "onnx_ir", "torch", "transformers", "tokenizers", "rich"} & set(sys.modules)
print("HEAVY", sorted(heavy))
"""
RUNTIME_IMPORTS = """
import sys
from dash_export import DashRuntime
from dash_export.cli import cli
try:
    cli(["run", sys.argv[1], "hello", "--target", "cpu-fp32", "--max-tokens", "3"], prog_name="dash-export")
except SystemExit as end:
    print("CODE", end.code)
DashRuntime.load(sys.argv[1], "cpu-fp32").score([1, 2, 3, 4], trade_off=1.0)
heavy = {"onnx", "onnx_ir", "onnxscript", "torch", "transformers", "gguf", "safetensors", "huggingface_hub"}
heavy |= {"polygraphy", "jinja2"}  # chat templates are rendered in a process of their own
print("HEAVY", sorted(heavy & set(sys.modules)))
"""


def raising(error: BaseException) -> click.Command:
    """A group with one command that fails."""

    @click.group(cls=LazyGroup)
    def group() -> None: ...

    @click.command("build")
    def failing() -> None:
        raise error

    group.get_command = lambda _ctx, _name: failing  # type: ignore[method-assign]
    return group


def test_help_is_lazy() -> None:
    ran = python(HELP_IMPORTS)
    assert "HEAVY []" in ran.stdout, ran.stdout + ran.stderr
    assert all(name in ran.stdout for name in (*COMMANDS, "Exit codes"))


def test_running_needs_no_exporter(tiny_root: object) -> None:
    ran = python(RUNTIME_IMPORTS, tiny_root)
    assert "CODE 0" in ran.stdout, ran.stderr
    assert "HEAVY []" in ran.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = done(name, "--help")
    assert result.output.startswith(f"Usage: dash-export {name}")


def test_version_and_completion() -> None:
    """Click's own, by the variable that `--help` names."""
    assert dash("--version").output == f"dash-export, version {__version__}\n"
    ran = python("from dash_export.cli import main; main()", _DASH_EXPORT_COMPLETE="bash_source")
    assert "complete -o nosort -F" in ran.stdout, ran.stderr
    assert cli.get_command(click.Context(cli), "os") is None


@pytest.mark.parametrize(
    "arguments",
    [("nothing",), ("export",), ("run",), ("build", "x", "--weights", "int3"), ("inspect", "a", "b"), ("--unknown",)],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    refused(*arguments, code=2)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("biuld", "Did you mean build?"), ("servce", "Did you mean serve?"), ("zzz", "zzz"), ("--verbos", "--verbose")],
)
def test_a_mistyped_command(typed: str, meant: str) -> None:
    said = refused(typed, "x", code=2)
    assert meant in said
    assert ("Did you mean" in said) == (typed != "zzz")


def disk(code: int) -> OSError:
    return OSError(code, "reason", "/x/y.data")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BundleError("There is no bundle."), 1, "Error: There is no bundle.\n"),
        (BundleError("\x1b[2Jgone\x07 \ud800"), 1, "Error: [2Jgone \n"),
        (KeyboardInterrupt(), 130, "Interrupted\n"),
        (MemoryError("24 GB for a cache"), 1, "Error: The memory of this machine is not enough (24 GB for a cache): "),
        (disk(errno.ENOSPC), 1, "Error: The disk is full: /x/y.data "),
        (disk(errno.EDQUOT), 1, "Error: The disk is full: /x/y.data "),
        (disk(errno.EROFS), 1, "Error: /x/y.data may not be read or written "),
        (disk(errno.EACCES), 1, "Error: /x/y.data may not be read or written "),
        (disk(errno.EIO), 1, "Error: /x/y.data could not be read or written "),
        (OSError(errno.EIO, "reason"), 1, "Error: the output could not be read or written "),
        (OSError("100 requested and 20 written"), 1, "Error: The disk is full: the output "),
    ],
)
def test_errors_are_one_line(error: BaseException, code: int, said: str) -> None:
    result = CliRunner().invoke(raising(error), ["build"])
    assert result.exit_code == code
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize(("asked", "unbuffered"), [("--version", ""), ("--help", "1"), ("list", "")])
def test_a_full_output(asked: str, unbuffered: str) -> None:
    command, settings = [sys.executable, "-m", "dash_export", asked], environment(PYTHONUNBUFFERED=unbuffered)
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=settings)
    assert result.returncode == 1
    assert result.stderr.startswith(b"Error: The disk is full: the output ")
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("package", ["onnx_ir", "onnxruntime"])
def test_missing_package_names_the_extra(package: str) -> None:
    error = ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.core")
    result = CliRunner().invoke(raising(error), ["build"])
    assert result.exit_code == 1
    assert f"pip install 'dash-export[{EXTRAS[package]}]'" in result.stderr


@pytest.mark.parametrize("bug", [ModuleNotFoundError("No module named 'zzz'", name="zzz"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    assert CliRunner().invoke(raising(bug), ["build"]).exception is bug


def test_closed_pipe_is_quiet() -> None:
    closed = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    assert "Traceback" not in python(f"{closed}\nfrom dash_export.cli import cli\ncli(['--help'])").stderr
