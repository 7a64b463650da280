"""Answers held to a grammar: which tokens may come next, by llguidance (extra `serve`)."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from dash_export.errors import RequestError
from dash_export.runtime.sampling import Logits

_T = TypeVar("_T")
READS = "cannot be read for a grammar"
MOST_LETTERS = 1 << 16
_KEPT = 128
"""Grammars that are kept as they were read: more than wait and decode at a time."""
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models write it: small ones never end where they may write as much white space as they like."""


def native(what: str, call: Callable[[], _T]) -> _T:
    """`call` of native code on a tokenizer, whose panics are no Exception. Raises RequestError."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RequestError(f"The model's tokenizer {what} ({error!s:.200}).") from error


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON that fits a JSON schema: `{"type": "object"}` for any object."""
    return f"start: {json_rule(schema)}\n"


def json_rule(schema: Mapping[str, Any]) -> str:
    """Such JSON as a part of a grammar. Raises RequestError."""
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"The schema is not JSON ({error}).") from error


class Guide:
    """How far one answer is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, logits: Logits) -> Logits:
        """logits [vocab], those of tokens that may not come next at -inf."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.where(np.unpackbits(bits, count=len(logits), bitorder="little"), logits, np.float32(-np.inf))

    def take(self, token: int) -> bool:
        """The next token; returns whether the grammar ends with it."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"The answer's grammar cannot go on ({self._matcher.get_error():.200}).")


class Guides:
    """Grammars over a model's tokens. For any thread."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        self._tokenizer, self._eos = tokenizer, sorted(eos_ids)
        self._tokens: Any = None
        self._read, self._lock, self._making = OrderedDict[str, Any](), Lock(), Lock()

    def guide(self, grammar: str) -> Guide:
        """At the beginning of an answer. `grammar`: Lark, as llguidance has it. Raises RequestError for one that cannot
        be read.
        """
        if len(grammar) > MOST_LETTERS:
            raise RequestError(f"The grammar or schema has over {MOST_LETTERS} letters.")
        with self._lock:
            known = self._read.get(grammar)
        if known is None:  # outside the lock: a costly one holds up its own answer only
            known = self._matcher(grammar)
        with self._lock:
            self._read[grammar] = known
            self._read.move_to_end(grammar)
            if len(self._read) > _KEPT:
                self._read.popitem(last=False)
        return Guide(known.deep_copy())

    def _matcher(self, grammar: str) -> Any:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError as error:
            raise RequestError("Answers in a grammar need llguidance: pip install 'dash-export[serve]'.") from error
        with self._making:
            if self._tokens is None:  # a second for 150,000 tokens
                size = self._tokenizer.get_vocab_size()
                eos = [token for token in self._eos if 0 <= token < size] or None
                self._tokens = native(READS, lambda: LLTokenizer(self._tokenizer.to_str(), eos_token=eos))
        matcher = native("does not do for this grammar", lambda: LLMatcher(self._tokens, grammar, log_level=0))
        if matcher.is_error():
            raise RequestError(f"The grammar or schema cannot be read ({matcher.get_error():.300}).")
        return matcher
