"""A training in several processes, which torchrun starts, on one machine or more.

All draw the same batches, and each takes its share of the windows; sums and gradients are added up. They see one
folder, where the first process alone writes.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from dash_export.errors import DashError, RequestError


@dataclass(frozen=True)
class Processes:
    """How many processes share the training, and which of them this is."""

    count: int = 1
    rank: int = 0

    def share(self, items: Any) -> Any:
        """Return this process's share of a sequence or, by rows, of a tensor."""
        return items[self.rank :: self.count]

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors, in place, by their sums over all processes. Raises DashError where one of them has ended."""
        if self.count > 1:
            with _said():
                for tensor in tensors:
                    distributed.all_reduce(tensor)

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace gradients by their means over all processes: a bypass may be used in the windows of one alone, or of
        none. Then its gradient is 0, for one process as for several: optimisers pass over what has none.
        """
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad / self.count for each in parameters]
        self.add_up(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def wait(self) -> None:
        if self.count > 1:
            with _said():
                distributed.barrier()


ALONE = Processes()


def rank() -> int:
    """Return this process's number among all that torchrun started; 0 without torchrun."""
    return _told("RANK", 0)


def local_rank() -> int:
    """Return this process's number among those that torchrun started on this machine; 0 without torchrun."""
    return _told("LOCAL_RANK", 0)


@contextmanager
def joined(most: int) -> Iterator[Processes]:
    """Join the processes that torchrun started; without it, be the only one. Raises RequestError for more than `most`,
    and DashError where they do not find one another.
    """
    count = _told("WORLD_SIZE", 1)
    if count == 1:
        yield ALONE
        return
    if count > most:
        raise RequestError(
            f"Steps have {most} windows here, so {most} processes at most can share them, not {count}: start fewer, or "
            "give more --steps where these are less than 7."
        )
    with _said():
        distributed.init_process_group("gloo")  # of tensors on GPUs, too
    try:
        yield Processes(count, rank())
    finally:
        distributed.destroy_process_group()


def _told(name: str, alone: int) -> int:
    return int(os.environ[name]) if distributed.is_torchelastic_launched() else alone


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DashError(f"Another process of this training has ended, and says why itself ({error}).") from error
