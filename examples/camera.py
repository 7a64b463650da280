"""Encode what a camera sees: the next frame is read and prepared while this one is computed.

    python examples/camera.py line.dash /dev/video0 --budget 0.6      # needs opencv-python-headless; a video file, too
    python examples/camera.py line.dash DIR --budget 0.6              # the pictures in a folder

Prints for each frame the layers that ran, whether it was guarded (foreign: all ran), and the milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dash_export import DashRuntime
from dash_export.images.sources import image_files


def frames(source: Path) -> Iterator[Any]:
    """Yield the pictures in a folder, or a camera's frames, RGB. `stream` asks for each while the last is computed."""
    if source.is_dir():
        yield from image_files(source)
        return
    try:
        import cv2
    except ImportError:
        needed = "a camera or a video needs: pip install opencv-python-headless"
        raise SystemExit(f"{source} is no folder; {needed}") from None
    camera = cv2.VideoCapture(str(source))
    camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, where the driver can
    if not camera.isOpened():
        raise SystemExit(f"{source} cannot be opened: is it a camera (/dev/video0) or a video, and may you read it?")
    while (read := camera.read())[0]:
        yield np.ascontiguousarray(read[1][..., ::-1])  # it gives BGR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("source", type=Path)
    parser.add_argument("--target", help="default: cpu, or the only one that is built")
    parser.add_argument("--budget", type=float, help="fraction of the dense time; default: the recommended one")
    parser.add_argument("--frames", type=int, help="stop after so many")
    given = parser.parse_args()
    runtime = DashRuntime.load(given.bundle, given.target)
    encoder = runtime.encoder(budget=given.budget) if given.budget else runtime.encoder_with(runtime.recommended)
    began, seconds, number = time.perf_counter(), 0.0, 0
    for number, found in enumerate(encoder.stream(islice(frames(given.source), given.frames)), 1):
        guarded = ", guarded" if found.guarded[0] else ""
        print(f"{number}: {int((found.actions == 0).sum())} layers{guarded}, {1000 * found.seconds:.1f} ms")
        seconds += found.seconds
    whole = time.perf_counter() - began
    print(f"{number} frames in {whole:.2f} s, of which computing took {seconds:.2f} s: {number / whole:.1f} a second")


if __name__ == "__main__":
    main()
