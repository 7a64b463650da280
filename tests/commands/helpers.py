"""Running the command line in this process and in one of its own."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from dash_export.cli import cli

ROOT = Path(__file__).parents[2]
DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def dash(*arguments: object, input: str | None = None) -> Result:
    """`dash-export ARGUMENTS` in this process. Nothing but exits may come out of it."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], input=input, prog_name="dash-export")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: object, input: str | None = None) -> Result:
    """The same, which must succeed."""
    result = dash(*arguments, input=input)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object, code: int = 1) -> str:
    """The error message of a command that must fail: one paragraph, no traceback."""
    result = dash(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    message = result.stderr
    assert "Error: " in message
    if code == 1:
        assert "\n\n" not in message.strip()
    return message


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1"} | changes


def python(code: str, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter running `code`."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(**changes), check=False)
