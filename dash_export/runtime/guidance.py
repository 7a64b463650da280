"""Answers held to a grammar: which tokens may come next, by llguidance (extra `serve`)."""

from __future__ import annotations

import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from dash_export.errors import BackendError, RequestError
from dash_export.runtime.child import Child
from dash_export.runtime.sampling import Logits
from dash_export.text_files import MAX_TOKENS

_T = TypeVar("_T")
READS = "cannot be read for a grammar"
MOST_LETTERS = 1 << 16
SECONDS, MEGABYTES, STATES = 1, 24, 120_000
"""To read a grammar for all answers to a request (2,000 properties: 0.3 s, 19 MB), and the states that
each may learn while it is used: half a kilobyte each, 12,000 to 24,000 letters of strings with a maxLength.
"""
CHILD = Path(__file__).with_name("grammar_child.py")
_KEPT = 1024
"""Grammars that are known to be good."""
_TRIES = Lock()
os.register_at_fork(before=_TRIES.acquire, after_in_parent=_TRIES.release, after_in_child=_TRIES.release)
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


GRACE, PER_TOKEN = 0.5, 0.01
"""Processor seconds that an answer's grammar may take, all in all and for each token: other answers wait for them."""


class Guide:
    """How far one answer is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._seconds, self._tokens = matcher, 0.0, 0

    def allowed(self, logits: Logits) -> Logits:
        """logits [vocab], those of tokens that may not come next at -inf. Raises RequestError where the grammar cannot
        go on, or takes longer than an answer beside others may.
        """
        began = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._seconds, self._tokens = self._seconds + time.thread_time() - began, self._tokens + 1
        if self._seconds > GRACE + PER_TOKEN * self._tokens:
            raise RequestError(f"The answer's grammar takes over {1e3 * PER_TOKEN:.0f} ms for each token.")
        self._check()
        return np.where(np.unpackbits(bits, count=len(logits), bitorder="little"), logits, np.float32(-np.inf))

    def take(self, token: int) -> bool:
        """The next token; returns whether the grammar ends with it."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"The answer's grammar cannot go on ({said:.200}).")


def _without_gaps(tokenizer: Tokenizer) -> str:
    """Its tokenizer.json, with tokens that no text has in the place of ids that none has: llguidance counts tokens, and
    takes an id beyond their number for none (Phi-4 mini's end is such a one).
    """
    text, known = tokenizer.to_str(), set(tokenizer.get_vocab().values())
    gaps = {*range(max(known, default=0))} - known if max(known, default=0) < MAX_TOKENS else set()
    if not gaps:
        return text
    data = json.loads(text)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    made = {f"<|no token {token}|>": token for token in sorted(gaps)}
    data["model"]["vocab"] |= made  # where an added token takes its id from
    data["added_tokens"] += [{"id": token, "content": content, **plain} for content, token in made.items()]
    return json.dumps(data)


class Guides:
    """Grammars over a model's tokens. For any thread.

    A grammar of a few hundred letters can take minutes and gigabytes to read, so each is tried in a process of its own
    first; and all copies of a matcher share what it has learnt, mistakes included, so each answer has one of its own.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        known = [
            token for token in sorted(eos_ids) if 0 <= token < 1 << 32 and tokenizer.id_to_token(token) is not None
        ]
        self._tokenizer, self._eos = tokenizer, known or None
        self._tokens: Any = None
        self._child: Child | None = None
        self._tried = OrderedDict[str, float]()
        """Share of SECONDS or MEGABYTES that a grammar takes."""

    def _share(self, grammar: str) -> float:
        """Try a grammar. Raises RequestError for one that cannot be read within SECONDS and MEGABYTES."""
        if len(grammar) > MOST_LETTERS:
            raise RequestError(f"The grammar or schema has over {MOST_LETTERS} letters.")
        with _TRIES:
            if grammar not in self._tried:
                self._start()
                assert self._child is not None
                try:
                    good, text = self._child.ask(json.dumps({"grammar": grammar}), 5.0 * SECONDS, "no grammar is tried")
                except RequestError as error:  # which is no fault of who asks
                    raise BackendError(str(error)) from error
                if not good:
                    raise RequestError(f"The grammar or schema cannot be read ({text:.300}).")
                self._tried[grammar] = float(text)
                if len(self._tried) > _KEPT:
                    self._tried.popitem(last=False)
            self._tried.move_to_end(grammar)
            return self._tried[grammar]

    def guides(self, grammar: str, count: int = 1) -> list[Guide]:
        """At the beginning of so many answers. `grammar`: Lark, as llguidance has it. Raises RequestError for one that
        cannot be read, or not so often within SECONDS and MEGABYTES.
        """
        if count * self._share(grammar) > 1 and count > 1:
            raise RequestError(f"The grammar or schema takes too long to be read for {count} answers: ask for fewer.")
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=STATES, verbose_errors=False)
        read = "does not do for this grammar"
        return [
            Guide(native(read, lambda: LLMatcher(self._tokens, grammar, log_level=0, limits=limits)))
            for _ in range(count)
        ]

    def guide(self, grammar: str) -> Guide:
        """The same for one."""
        return self.guides(grammar)[0]

    def _start(self) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise RequestError("Answers in a grammar need llguidance: pip install 'dash-export[serve]'.") from error
        if self._eos is None:  # llguidance would take the first token
            raise RequestError("Answers in a grammar need the model's own end of a text, and its tokenizer has none.")
        if self._tokens is None:  # a second for 150,000 tokens
            self._tokens = native(READS, lambda: LLTokenizer(_without_gaps(self._tokenizer), eos_token=self._eos))
        if self._child is None or not self._child.alive:
            setup = {"tokenizer": _without_gaps(self._tokenizer), "eos": self._eos}
            self._child = Child(CHILD, setup | {"memory": MEGABYTES << 20, "seconds": SECONDS, "states": STATES})
