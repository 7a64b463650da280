"""One training run: its batches, its progress, and what it keeps in its work folder so that it can be killed.

Every batch is drawn from (seed, stage, step), so a resumed training is the one that was killed.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dash_export.artifacts import Progress, no_progress, write_atomic
from dash_export.train.corpus import Batch, Corpus
from dash_export.train.gated_model import GatedModel
from dash_export.train.settings import TrainingSettings

SAVE_EVERY = 20
"""Steps. A kill costs as many at most."""
_DIGEST = hashlib.sha256().digest_size
"""Bytes of the SHA-256 that a file begins with."""


@dataclass
class Run:
    """`key` changes with anything the training depends on: what another one left in `folder` is not taken. `total`: the
    work there is, in forward passes of a batch.
    """

    model: GatedModel
    corpus: Corpus
    settings: TrainingSettings
    folder: Path
    key: str
    progress: Progress = no_progress
    total: int = 0
    done: int = 0

    def batch(self, stage: str, step: int) -> tuple[Batch, np.random.Generator]:
        """A step's windows, and the generator that what else is random in it comes from."""
        rng = np.random.default_rng([self.settings.seed, zlib.crc32(stage.encode()), step])
        return self.corpus.batch(rng, self.settings.windows, self.settings.window), rng

    def advance(self, name: str, work: int) -> None:
        """Tell of work that is done."""
        self.done += work
        self.progress(name, min(self.done, self.total), self.total)

    def due(self, step: int, steps: int) -> bool:
        """Whether what was done up to this step is to be saved."""
        return (step + 1) % SAVE_EVERY == 0 or step + 1 == steps

    def save(self, stage: str, step: int, **state: Any) -> None:
        """Keep what so many steps of a stage made: tensors and plain values."""
        packed = io.BytesIO()  # torch's own error for a full disk is none of Python's
        torch.save({"key": self.key, "step": step, **state}, packed)
        payload = packed.getvalue()
        write_atomic(self._path(stage), hashlib.sha256(payload).digest() + payload)

    def restore(self, stage: str, load: Callable[[dict[str, Any]], object]) -> int:
        """How many steps of a stage are done; `load` gets what they made, and fails for what does not fit."""
        if not self._path(stage).is_file():
            return 0
        try:
            stored = self._path(stage).read_bytes()
            payload = stored[_DIGEST:]  # in which torch would not notice damage
            if hashlib.sha256(payload).digest() != stored[:_DIGEST]:
                return 0
            # Tensors and plain values only: nothing is unpickled.
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            if state["key"] != self.key:
                return 0
            load(state)
            return int(state["step"])
        except Exception:  # torch raises many kinds
            return 0  # not ours, or of another version: this stage begins anew

    def forget(self, stage: str) -> None:
        """Remove what a stage kept."""
        self._path(stage).unlink(missing_ok=True)

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}-state.pt"
