"""How the prompts of one `dash-export run` are answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dash_export.runtime import Sampling, Session


@dataclass(frozen=True)
class Asking:
    """How every prompt of this call is answered. `max_tokens` None: what the library makes of it."""

    session: Session
    sampling: Sampling
    max_tokens: int | None
    system: str | None = None

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """A conversation's beginning."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": prompt}]
