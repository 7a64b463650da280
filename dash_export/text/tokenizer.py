"""Text in and out: tokenizer, incremental decoding with stop strings."""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from dash_export.bundle.layout import safe_path
from dash_export.errors import BundleError, ContextLengthError, RequestError
from dash_export.text.chat_template import ChatTemplate
from dash_export.text.guidance import Guides, call_tokenizer
from dash_export.text.text_files import MAX_TEXT_BYTES, bounded_text, load_tokenizer

_T = TypeVar("_T")
_PIECE = 1 << 18
"""Letters that `encode_in_pieces` encodes at a time."""
_APART, _LONG = 1 << 12, 1 << 16
"""A text of _APART letters or more is encoded as a batch of one, which lets other Python threads run. Of texts of _LONG
letters or more only one is encoded at a time, because it takes a hundred times its memory.
"""
_one_long = Lock()
_READS = "does not read this text"
LETTERS = 16
"""Letters per free token over which a text is refused unread: one token may be 64 spaces, but no text is all spaces."""


class Text:
    """Tokenizer and chat template of a bundle."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer, special tokens and template. Raises BundleError without tokenizer.json, or for a bad file."""
        tokenizer = _read(folder, "tokenizer.json", load_tokenizer)
        if tokenizer is None:
            raise BundleError(f"{folder} has no tokenizer.json. The bundle is damaged: export it again.")
        self.tokenizer = tokenizer
        # Special tokens are read from where transformers reads them.
        config, generation, model = (
            _read(folder, f"{name}.json", _mapping) or {}
            for name in ("tokenizer_config", "generation_config", "config")
        )
        named = dict(config)
        for group in ("extra_special_tokens", "model_specific_special_tokens"):
            named |= config[group] if isinstance(config.get(group), dict) else {}
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
        special |= {name: _token_text(token) for name, token in named.items() if name.endswith("_token")}
        self.bos_id = self.tokenizer.token_to_id(special["bos_token"])
        self.eos_ids = _eos_ids((generation, model), self.tokenizer, special["eos_token"])
        self.special = special
        self.guides = Guides(self.tokenizer, self.eos_ids)
        template = _read(folder, "chat_template.jinja", str)
        self.template = ChatTemplate(template, special) if template else None

    def encode(self, text: str, *, special: bool = True, limit: int = sys.maxsize) -> list[int]:
        """Return the token ids of a text; `special` adds what begins a fresh text (a BOS, for some models). Raises
        RequestError for text that is no valid Unicode. Raises ContextLengthError, without encoding, for a text far over
        `limit` tokens.
        """
        _check_letters(len(text), limit)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            said = f"The text is not valid Unicode (character {error.start} is half of one): give UTF-8."
            raise RequestError(said) from error
        if len(text) < _APART:
            return call_tokenizer(_READS, lambda: self.tokenizer.encode(text, add_special_tokens=special).ids)
        with _one_long if len(text) >= _LONG else nullcontext():
            batch = self.tokenizer.encode_batch
            return call_tokenizer(_READS, lambda: batch([text], add_special_tokens=special)[0].ids)

    def encode_in_pieces(self, text: str) -> npt.NDArray[np.int64]:
        """Encode a text of any length in memory for one piece at a time; pieces are cut at lines, or else at words."""
        pieces: list[npt.NDArray[np.int64]] = []
        start = 0
        while start < len(text) or not pieces:
            end = start + _PIECE
            if end < len(text):
                end = next((at for cut in "\n " if (at := text.rfind(cut, start + 1, end)) > 0), end)
            pieces.append(np.array(self.encode(text[start:end], special=start == 0), np.int64))
            start = end
        return np.concatenate(pieces)

    def windows(self, text: str, count: int, window: int) -> list[npt.NDArray[np.int64]]:
        """Return at most `count` windows of `window` tokens without overlap, spread evenly over a text. Each begins as
        a fresh text does (with a BOS, for some models). There is none where the text is shorter than a window.
        """
        ids, first = self.encode_in_pieces(text), self.beginning
        ids, own = ids[len(first) :], window - len(first)
        if own < 1:
            return []
        starts = np.linspace(0, len(ids) - own, min(count, len(ids) // own)).astype(int)
        return [np.concatenate([first, ids[start : start + own]]) for start in starts]

    @property
    def beginning(self) -> npt.NDArray[np.int64]:
        """Token ids that a fresh text begins with (a BOS, for some models)."""
        return np.array(self.encode(""), np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids. Raises RequestError where the tokenizer's decoder gives up."""
        decode = self.tokenizer.decode
        return call_tokenizer("cannot write these tokens", lambda: decode(list(ids), skip_special_tokens=True))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        limit: int = sys.maxsize,
        tools: Sequence[Mapping[str, Any]] = (),
        begins: bool = True,
        continues: bool = False,
    ) -> list[int]:
        """Return the token ids of chat messages, up to where the assistant's turn begins (without this, unless it
        `begins`), or where the last message is to be continued. `limit` is that of `encode`. `tools` are functions in
        OpenAI's form, for a template that takes tools.
        """
        if self.template is None:
            raise RequestError("This model has no chat template: give it plain text, or export a chat model.")
        if isinstance(cast(object, messages), str):
            raise RequestError("messages must be a list of messages {role, content}, not one text.")
        said = [value for message in messages for value in message.values()]
        letters = sum(len(value if isinstance(value, str) else repr(value)) for value in (*said, *tools))
        _check_letters(letters, limit)
        if tools and not self.template.takes_tools():
            raise RequestError("This model's chat template takes no tools (none that are called by <tool_call>).")
        return self.encode(self.template.render(messages, begins, tools, continues), special=False, limit=limit)


def _far_over(letters: int, limit: int) -> bool:
    """Return whether a text has so many letters that it is not worth encoding for `limit` tokens."""
    return letters > LETTERS * max(limit, 256)


def _check_letters(letters: int, limit: int) -> None:
    if _far_over(letters, limit):
        raise ContextLengthError(
            f"The context does not hold this: {letters} letters are far over the {limit} tokens that are free. "
            "Shorten the prompt or start a new session."
        )


class TextStream:
    """Stream of token ids -> text that is certain: whole characters, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: int | None = None) -> None:
        """`after`: the token that the text goes on from. SentencePiece's decoders drop the space of a first token."""
        self._tokenizer = tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        if after is not None:
            call_tokenizer("cannot write this token", lambda: self._go_on_from(after))
        self._stop = tuple(stop)
        self._held = ""
        self._last: int | None = None
        self.stopped = False

    def _go_on_from(self, token: int) -> None:
        if "\N{REPLACEMENT CHARACTER}" not in self._tokenizer.decode([token]):  # part of a character
            self._decode.step(self._tokenizer, token)

    def push(self, token: int) -> str:
        """Return the text that this token makes certain. At a stop string set `stopped`, and leave the string out."""
        if piece := call_tokenizer("cannot write this token", lambda: self._step(token)):
            self._last = token
            self._held += piece
        found = [position for position in map(self._held.find, self._stop) if position >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
            return piece
        certain = len(self._held) - max((overlap(self._held, stop) for stop in self._stop), default=0)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    def _step(self, token: int) -> str | None:
        try:
            return self._decode.step(self._tokenizer, token)
        except Exception:  # tokenizers raises plain Exception where the bytes before this token are no text
            self._decode = DecodeStream(skip_special_tokens=True)
            if self._last is not None:  # without the last token, this one would lose its space as a first token does
                self._decode.step(self._tokenizer, self._last)
            self._held += "\N{REPLACEMENT CHARACTER}"
            return self._decode.step(self._tokenizer, token)

    def finish(self) -> str:
        """Return the text that was held back, when no stop string came after all."""
        piece, self._held = self._held, ""
        return piece


class TextIds:
    """Texts -> token ids of an encoder, in batches of one length each: nothing is padded, so no graph needs a mask."""

    def __init__(self, root: Path, most: int) -> None:
        """Read the tokenizer of a bundle. `most`: tokens of the longest text."""
        self._text, self._most = Text(root), most

    def groups(self, texts: Sequence[Any]) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[Any]]]:
        """Return (places, ids int64 [n, length]) of the texts of each length. Raises RequestError."""
        return of_each_length([self.ids(text, f"The text {text!r:.40}") for text in texts])

    def ids(self, text: Any, name: str) -> list[int]:
        """Return the token ids of a text, which errors call `name`. Raises RequestError, and ContextLengthError for a
        text too long; one far too long is not encoded.
        """
        if not isinstance(text, str):
            raise RequestError(f"{name} must be a str, not {type(text).__name__}.")
        if _far_over(len(text), self._most):
            said = f"{name} has {len(text)} letters, far over the {self._most} tokens that are the most"
            raise ContextLengthError(f"{said}: shorten or split it.")
        ids = self._text.encode(text)
        self.check_length(len(ids), name)
        if not text.strip() or not ids:
            raise RequestError(f"{name} is empty: give at least one word.")
        return ids

    def check_length(self, count: int, name: str) -> None:
        """Raise ContextLengthError for a text of more tokens than the model has positions."""
        if count > self._most:
            raise ContextLengthError(f"{name} has {count} tokens, and {self._most} are the most: shorten or split it.")


def of_each_length(texts: Sequence[Sequence[int]]) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]]:
    """Return (places, token ids [n, length]) of the texts of each length."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, ids in enumerate(texts):
        found[len(ids)].append(place)
    return [(np.array(some, np.intp), np.array([texts[at] for at in some], np.int64)) for some in found.values()]


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((length for length in range(most, 0, -1) if stop.startswith(text[-length:])), 0)


def _read(folder: Path, name: str, parse: Callable[[str], _T]) -> _T | None:
    """Parse a file of the bundle; return None where there is none."""
    path = safe_path(folder, name)
    try:
        return parse(bounded_text(path, MAX_TEXT_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}). The bundle is damaged: export it again.") from error


def _mapping(text: str) -> dict[str, Any]:
    data = json.loads(text)
    return data if isinstance(data, dict) else {}


def _token_text(token: object) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token.encode(errors="ignore").decode() if isinstance(token, str) else ""  # drops half a character


def _eos_ids(configs: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, eos_token: str) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's own, and those of the first config that names some."""
    given = next((config["eos_token_id"] for config in configs if config.get("eos_token_id") is not None), None)
    found = {token for token in (given if isinstance(given, list) else [given]) if type(token) is int}
    named = tokenizer.token_to_id(eos_token) if eos_token else None
    return frozenset(found if named is None else found | {named})
