"""Policies of your own: a class with two methods that says which units each token skips (docs/own-policy.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib import import_module
from runpy import run_path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dash_export.core.dial import CostTable
from dash_export.core.facts import ModelFacts
from dash_export.core.rule import State
from dash_export.core.units import Damages, Skips, Unit
from dash_export.errors import PolicyError

NO_POLICY = "is no policy: it needs the methods begin(model, units, cost) and skips(state)."
WRITTEN = "Write --policy module:Class or --policy file.py:Class."
CPU_ONLY = "A policy of your own runs on CPU builds only: it needs the state on the host."


@runtime_checkable
class Policy(Protocol):
    """Policy of one session. A decode step asks about one token; a score asks about many, in the order of the text."""

    def begin(self, model: ModelFacts, units: Sequence[Unit], cost: CostTable) -> None:
        """Begin a conversation. `cost` says what a skip of each unit saves, as a fraction of a dense token's time."""

    def skips(self, state: State) -> Skips:
        """Return bool [units, tokens], true where a unit is skipped."""
        ...


@contextmanager
def _own_errors(what: str) -> Iterator[None]:
    """Turn whatever the user's code raises inside the block into a PolicyError that begins with `what`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise PolicyError(f"{what}: {type(error).__name__}: {error!s:.300}") from error


class OwnRule:
    """Rule that asks a policy of the user's, and checks the answer."""

    asks = True

    def __init__(self, policy: Policy, model: ModelFacts, units: Sequence[Unit], cost: CostTable) -> None:
        self.policy, self._facts, self._units = policy, (model, tuple(units), cost), len(units)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnRule:
        """Copy the policy, for a fork or a row of a batch. Raises PolicyError where it cannot be copied."""
        with _own_errors(f"{type(self.policy).__name__} cannot be copied, as forks and batches need it"):
            return OwnRule(deepcopy(self.policy, memo), *self._facts)

    def restart(self) -> None:
        """Begin a conversation. Raises PolicyError for whatever the policy raises."""
        with _own_errors(f"{type(self.policy).__name__}.begin"):
            self.policy.begin(*self._facts)

    def skips(self, damage: Damages) -> Skips:  # noqa: ARG002
        """Raise PolicyError: a policy of the user's needs the whole state, and a device shows the host only damage."""
        raise PolicyError(CPU_ONLY)

    def decide(self, state: State) -> Skips:
        """Return the policy's decision [units, tokens]. Raises PolicyError where it raises or gives something else."""
        shape, name = (self._units, len(state.tokens)), type(self.policy).__name__
        with _own_errors(f"{name}.skips"):
            found = np.asarray(self.policy.skips(state))
        if found.shape != shape or found.dtype != np.bool_:
            raise PolicyError(
                f"{name}.skips must return bool {list(shape)}, units and tokens; got {found.dtype} {list(found.shape)}."
            )
        return found


def load_policy(text: str) -> Policy:
    """Load `package.module:Class` or `path/to/file.py:Class` and make it without arguments. Modules are the installed
    ones: the current folder is not searched. Raises PolicyError.
    """
    module, _, name = text.rpartition(":")
    if not module or not name:
        raise PolicyError(f"{text!r:.60} is no policy of your own. {WRITTEN}")
    with _own_errors(f"{module} cannot be imported"):
        if module.endswith(".py"):
            found = run_path(module, run_name="dash_export_own_policy").get(name)
        else:
            found = getattr(import_module(module), name, None)
    if not isinstance(found, type):
        raise PolicyError(f"{module} has no class {name!r:.60}. {WRITTEN}")
    with _own_errors(f"{text} cannot be made without arguments"):
        policy = found()
    if not isinstance(policy, Policy):
        raise PolicyError(f"{text} {NO_POLICY}")
    return policy
