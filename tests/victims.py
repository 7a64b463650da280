"""What the kill tests run in a process of its own, to be killed before its n-th file operation."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def arm(folder: str, moment: int) -> list[int]:
    """Kill this process before file operation number `moment` under `folder`. Returns a counter of the operations
    seen.
    """
    count = [0]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in OPERATIONS and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(folder):
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def export_victim(model: str, output: str, form: str, moment: int, counted: str) -> None:
    from dash_export.exporting import export
    from dash_export.models import open_checkpoint
    from tests.tiny import tiny_policy

    checkpoint = open_checkpoint(model)
    policy = tiny_policy(checkpoint, form)
    count = arm(str(Path(output).parent), moment)
    export(checkpoint, output, policy)
    total = count[0]
    Path(counted).write_text(str(total))


def build_victim(bundle: str, moment: int, counted: str) -> None:
    from dash_export.building import build, dial, pipeline

    dial.WINDOWS, dial.SHARES, pipeline.TRIALS = 1, (0.5,), 1  # whatever else runs
    count = arm(bundle, moment)
    build(bundle, "cpu", weights="fp32")
    total = count[0]
    Path(counted).write_text(str(total))
