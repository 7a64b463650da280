"""Texts -> token ids of an encoder, in batches of one length each: nothing is padded, so no graph needs a mask."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.errors import ContextLengthError, RequestError
from dash_export.text.tokenizer import Text


class TextIds:
    """Preparation of texts, with the special tokens of the tokenizer's own template."""

    def __init__(self, root: Path, most: int) -> None:
        """Read the tokenizer of a bundle. `most`: tokens of the longest text."""
        self._text, self._most = Text(root), most

    def groups(self, texts: Sequence[Any]) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[Any]]]:
        """Return (places, token ids int64 [n, length]) of the texts of each length. Raises RequestError for what is no
        text, or one that is empty or too long.
        """
        found: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        for place, text in enumerate(texts):
            ids = self._ids(text)
            found[len(ids)].append((place, ids))
        each = (tuple(zip(*group, strict=True)) for group in found.values())
        return [(np.array(places, np.intp), np.array(ids, np.int64)) for places, ids in each]

    def _ids(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(f"A text must be a str, not {type(text).__name__}.")
        ids = self._text.encode(text, limit=self._most)
        if len(ids) > self._most:
            raise ContextLengthError(
                f"The text {text[:40]!r} has {len(ids)} tokens, and {self._most} are the most: shorten or split it."
            )
        if not text.strip() or not ids:
            raise RequestError("A text is empty: give at least one word.")
        return ids
