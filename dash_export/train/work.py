"""State of a training on disk, so that one that was killed goes on where it was."""

import hashlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from dash_export.errors import PolicyError
from dash_export.files.artifacts import open_regular, write_atomic
from dash_export.train.processes import ALONE, Processes

SAVE_SECONDS = 30.0
"""Time between two saves within a stage: a kill loses little more."""
_DIGEST = hashlib.sha256().digest_size
logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Work:
    """State that the stages save in `folder`: tensors and plain values. `key` changes with anything the training
    depends on. State of another training is not used, nor is damaged state, which torch would not notice.
    """

    folder: Path
    key: str
    processes: Processes = ALONE
    saved_at: list[float] = field(default_factory=lambda: [time.monotonic()])
    """When something was saved last."""

    def save(self, stage: str, state: Any) -> None:
        """Save the result of a stage, or its progress, of the first process."""
        if self.processes.rank:
            return
        packed = io.BytesIO()  # in memory first: on a full disk torch raises no OSError
        torch.save(state, packed)
        write_atomic(self._path(stage), self._digest(packed.getvalue()) + packed.getvalue())
        self.saved_at[0] = time.monotonic()

    def save_if_due(self, stage: str, state: Callable[[], Any]) -> bool:
        """Save the progress of a stage if nothing has been saved for SAVE_SECONDS. Return whether that is so."""
        due = time.monotonic() - self.saved_at[0] >= SAVE_SECONDS
        if due:
            self.save(stage, state())
        return due

    def kept(self, stage: str) -> Any:
        try:
            with open_regular(self._path(stage)) as file:
                stored = file.read()
        except OSError:
            return None
        if stored[:_DIGEST] != self._digest(stored[_DIGEST:]):
            logger.warning("%s is of another training, or damaged: it is made anew", self._path(stage))
            return None
        # Tensors and plain values only: nothing is unpickled.
        return torch.load(io.BytesIO(stored[_DIGEST:]), map_location="cpu", weights_only=True)

    def once(self, stage: str, make: Callable[[], _T]) -> _T:
        """Return the saved result of a stage, or make and save it. Raises PolicyError for a folder not shared."""
        made: _T | None = self.kept(stage)
        self.processes.wait()  # all know whether it was there
        if made is None:
            made = make()
            self.save(stage, made)
            self.processes.wait()
            if self.processes.rank:
                made = self.kept(stage)
        if made is None:
            raise PolicyError(
                f"The first process saves in {self.folder}, where this one finds nothing: share the folder."
            )
        return made

    def _digest(self, payload: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + payload).digest()

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}-state.pt"
