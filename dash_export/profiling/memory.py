"""Peak resident memory of one setting: in a process of its own, as an application that only decodes would have it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from dash_export.decision import Setting
from dash_export.errors import BackendError

_SECONDS = 300


def setting_memory(root: Path, target: str, dispatch: str, setting: Setting, context: int, tokens: int) -> int | None:
    """Bytes. The child loads the build, prefills `context` tokens and decodes `tokens`; None where that takes longer
    than minutes or where it is killed. Raises BackendError.
    """
    order = {
        "root": str(root), "target": target, "dispatch": dispatch, "setting": asdict(setting), "context": context,
        "tokens": tokens,
    }  # fmt: skip
    command = [sys.executable, "-m", "dash_export.profiling.memory"]
    try:
        done = subprocess.run(
            command, input=json.dumps(order), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == -signal.SIGKILL:  # its engines are one copy more, and memory may have ended
        return None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise BackendError(f"The process that measures memory failed: {said[-1] if said else done.returncode}.")
    return int(done.stdout)


def main() -> None:
    """The child: an order on stdin, bytes on stdout."""
    from dash_export.runtime import DashRuntime

    order = json.load(sys.stdin)
    setting = Setting(**order["setting"])
    runtime = DashRuntime.load(order["root"], order["target"], dispatch=order["dispatch"], verify=False)
    session = runtime.session_with(setting)
    session.prefill([1] * order["context"])
    for _ in range(order["tokens"]):
        session.decode_one(1)

    from dash_export.profiling.machine import peak_memory

    print(peak_memory())


if __name__ == "__main__":
    main()
