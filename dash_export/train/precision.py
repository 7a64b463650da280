"""In which precision the frozen model is run while a policy is trained: bfloat16, but where float32 is faster."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch

from dash_export.artifacts import write_atomic

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FASTER = 1.2
"""float32 takes twice the memory, so it has to be so many times as fast."""
_SHAPES, _TRIALS = ((1024, 576), (1536, 576)), 9


def training_precision(device: torch.device, kept: Path) -> str:
    """Key of PRECISIONS. On a CPU it is tried out: with instructions for bfloat16 it is faster than float32 by half on
    one and slower by half on another, whatever their flags say. What `kept` holds of a training that goes on stays.
    """
    if kept.is_file():
        name = kept.read_text(encoding="ascii", errors="replace")
        if name in PRECISIONS:
            return name
    tried = device.type == "cpu" and _seconds(torch.bfloat16) > FASTER * _seconds(torch.float32)
    name = "float32" if tried else "bfloat16"
    write_atomic(kept, name)
    return name


def _seconds(dtype: torch.dtype) -> float:
    """Of one product of a small model's size."""
    left, right = (torch.ones(shape, dtype=dtype) for shape in _SHAPES)
    taken = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        taken.append(time.perf_counter() - began)
    return median(taken)
