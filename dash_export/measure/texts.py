"""Texts that policies are judged on: the model's own answers, which a runtime decodes, or windows of a text."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dash_export.bundle.layout import ANSWERS
from dash_export.core.sampling import TokenIds
from dash_export.core.units import DENSE_POSITIONS
from dash_export.errors import RequestError
from dash_export.files.artifacts import Progress, no_progress
from dash_export.files.resources import resource_folder
from dash_export.measure import LIMIT, PREFIX, WINDOW
from dash_export.runtime import DashRuntime
from dash_export.text.chats import DIAL_ANSWERS, Chat, Continuation, continuation, read_prompts
from dash_export.text.text_files import read_text


class JudgedText(NamedTuple):
    """A text by name, as items with a dense beginning each, and where it was read."""

    name: str
    path: Path
    items: list[Continuation]

    def stretches(self, count: int, length: int) -> list[TokenIds]:
        """Return `count` times `length` tokens, spread over all items one after the other, which are repeated where
        they are too short: to be decoded for their time.
        """
        ids = np.concatenate([item.ids for item in self.items])
        ids = np.tile(ids, -(-length // len(ids)))
        return [ids[start : start + length] for start in np.linspace(0, len(ids) - length, count).astype(int)]


def judged_text(
    runtime: DashRuntime,
    path: Path | None,
    limit: int = LIMIT,
    window: int = WINDOW,
    prefix: int = PREFIX,
    progress: Progress = no_progress,
) -> JudgedText:
    """Return up to `limit` items of the file: windows of `window` tokens of a plain text, the first `prefix` dense, or
    the chats of a .jsonl file, with answers of up to `window` tokens, which dense writes where there are none. Without
    a path: the bundle's held-out answers, or else the calibration text. Raises RequestError for a file that cannot be
    used.
    """
    own = runtime.bundle.root / ANSWERS
    path = path or (own if own.is_file() else resource_folder("calibration") / "prose.txt")
    if path.suffix != ".jsonl":
        cut = windows(runtime, read_text(path), str(path), limit, window, prefix)
        return JudgedText(path.name, path, [Continuation(ids, prefix) for ids in cut])
    chats, items = read_prompts(path), list[Continuation]()
    if path == own and len(chats) >= 2 * DIAL_ANSWERS:  # what the dial was calibrated on does not judge it
        chats = chats[DIAL_ANSWERS:]
    chats, longest = chats[:limit], runtime.engines.model.max_positions
    for done, chat in enumerate(chats, 1):
        answered = chat.answer is not None
        item = continuation(runtime.text, chat, longest, window) if answered else _written(runtime, chat, window)
        items += [] if item is None else [item]
        progress("own answers", done, len(chats))
    if not items:
        raise RequestError(f"{path} has no answer of two tokens or more that the model's context holds.")
    return JudgedText(path.name, path, items)


def _written(runtime: DashRuntime, chat: Chat, tokens: int) -> Continuation | None:
    session = runtime.session("dense")
    prompt = runtime.text.chat(chat.messages)
    if not 2 <= len(prompt) <= session.engines.model.max_positions - tokens:
        return None
    made = session.generate(np.array(prompt, np.int64), tokens).tokens
    return Continuation(np.array([*prompt, *made], np.int64), len(prompt)) if len(made) > 1 else None


def windows(
    runtime: DashRuntime, text: str, name: str, count: int, window: int, prefix: int = DENSE_POSITIONS
) -> list[TokenIds]:
    """Return up to `count` windows of `window` tokens of a text, by `Text.windows`.

    Raises RequestError for a text of less than one window, and for a window that is longer than the model's context or
    that has fewer than 2 tokens after its dense prefix.
    """
    longest = runtime.engines.model.max_positions
    if window < prefix + 2:
        raise RequestError(f"A window must be longer than its dense prefix of {prefix} tokens by two or more.")
    if window > longest:
        raise RequestError(f"A window of {window} tokens is longer than the model's context of {longest}.")
    found = runtime.text.windows(text, count, window)
    if not found:
        raise RequestError(
            f"{name} has less than one window of {window} tokens: give a longer text, or ask for fewer tokens."
        )
    return found
