"""How the prompts of one `dash-export run` are answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dash_export.runtime import Sampling, Session

MAX_TOKENS = 256


@dataclass(frozen=True)
class Asking:
    """How every prompt of this call is answered. `max_tokens` None: 256, or what the context has left."""

    session: Session
    sampling: Sampling
    max_tokens: int | None
    system: str | None = None

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """A conversation's beginning."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": prompt}]

    def room(self, prompt_tokens: int) -> int:
        """How many tokens to ask for. What does not fit at all is left to the library to refuse."""
        if self.max_tokens is not None:
            return self.max_tokens
        free = self.session.engines.model.max_positions - prompt_tokens
        return max(1, min(MAX_TOKENS, free))
