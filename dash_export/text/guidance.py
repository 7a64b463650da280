"""Answers held to a grammar: llguidance says which tokens may come next (extra `serve`)."""

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

from dash_export.core.sampling import Logits
from dash_export.errors import BackendError, RequestError
from dash_export.text.child import Child
from dash_export.text.text_files import MAX_TOKENS

_T = TypeVar("_T")
READS = "cannot be read for a grammar"
MOST_LETTERS = 1 << 16
SECONDS, MEGABYTES, STATES = 1, 24, 120_000
"""Limits of time and memory to read a grammar, for all answers to a request together (2,000 properties: 0.3 s, 19 MB),
and of the lexer states that each answer may add while it decodes: half a kilobyte each. They are enough for 12,000 to
24,000 letters of strings with a maxLength.
"""
CHILD = Path(__file__).with_name("grammar_child.py")
_KEPT = 1024
"""How many grammars are remembered as good."""
_TRIES = Lock()
os.register_at_fork(before=_TRIES.acquire, after_in_parent=_TRIES.release, after_in_child=_TRIES.release)
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON formatted as models write it: small models never end where they may write any amount of white space."""


def call_tokenizer(what: str, call: Callable[[], _T]) -> _T:
    """Return `call()`, native code on a tokenizer, whose panics are no Exception. Raises RequestError that begins with
    "The model's tokenizer" and `what`.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RequestError(f"The model's tokenizer {what} ({error!s:.200}).") from error


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError("Answers in a grammar need llguidance: pip install 'dash-export[serve]'.") from error
    return llguidance


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of the JSON that fits a JSON schema: `{"type": "object"}` for any object."""
    return f"start: {json_rule(schema)}\n"


def regex_grammar(regex: str) -> str:
    """Return the grammar of the texts that a regular expression (Rust's) describes as a whole."""
    return f"start: /{_llguidance().regex_to_lark(regex)}/\n"


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the JSON that fits a schema as a part of a grammar. Raises RequestError where the schema is not JSON."""
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"The schema is not JSON ({error}).") from error


GRACE, PER_TOKEN = 0.5, 0.01
"""Processor seconds that an answer's grammar may take: GRACE plus PER_TOKEN for each token. Other answers wait."""


class Guide:
    """Position of one answer in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher, self._seconds, self._tokens = matcher, 0.0, 0

    def allowed(self, logits: Logits) -> Logits:
        """Return logits [vocab] with -inf for the tokens that may not come next. Raises RequestError where the grammar
        cannot go on, or takes longer than other answers may be made to wait.
        """
        began = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._seconds, self._tokens = self._seconds + time.thread_time() - began, self._tokens + 1
        if self._seconds > GRACE + PER_TOKEN * self._tokens:
            raise RequestError(f"The answer's grammar takes over {1e3 * PER_TOKEN:.0f} ms for each token.")
        self._check()
        return np.where(np.unpackbits(bits, count=len(logits), bitorder="little"), logits, np.float32(-np.inf))

    def take(self, token: int) -> bool:
        """Take the next token; return whether the grammar ends with it."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def forced(self) -> list[int]:
        """Return the tokens that must come next."""
        return list(self._matcher.compute_ff_tokens())

    def count_allowed(self, tokens: list[int]) -> int:
        """Return how many of these tokens, one after the other, may come next."""
        return int(self._matcher.validate_tokens(tokens))

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().partition("\n")[0]
            raise RequestError(f"The answer's grammar cannot go on ({_in_words(said):.200}).")


def _in_words(said: str) -> str:
    """Return what llguidance says, for who does not know its codes."""
    return said.replace("NoExtensionBias", "by it no token of this model may come next")


def _without_gaps(tokenizer: Tokenizer) -> str:
    """Return the tokenizer.json with its unused ids filled by special tokens that no text has. llguidance counts tokens
    and knows no id beyond their number; Phi-4 mini's end token has such an id.
    """
    text, known = tokenizer.to_str(), set(tokenizer.get_vocab().values())
    gaps = {*range(max(known, default=0))} - known if max(known, default=0) < MAX_TOKENS else set()
    if not gaps:
        return text
    data = json.loads(text)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    made = {f"<|no token {token}|>": token for token in sorted(gaps)}
    data["model"]["vocab"] |= made  # an added token takes its id from here
    data["added_tokens"] += [{"id": token, "content": content, **plain} for content, token in made.items()]
    return json.dumps(data)


class Guides:
    """Grammars over a model's tokens. Threads may share it.

    A grammar of a few hundred letters can take minutes and gigabytes to read, so a child process tries each one first.
    Copies of a matcher share what they have learnt, mistakes included, so each answer has a matcher of its own.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int]) -> None:
        known = [one for one in sorted(eos_ids) if 0 <= one < 1 << 32 and tokenizer.id_to_token(one) is not None]
        self._tokenizer, self._eos = tokenizer, known or None
        self._tokens: Any = None
        self._child: Child | None = None
        self._tried = OrderedDict[str, float]()
        """Grammar -> the share of SECONDS or MEGABYTES that it takes; the one used last comes last."""

    def _share(self, grammar: str) -> float:
        """Return the share of SECONDS or MEGABYTES that a grammar takes. Raises RequestError beyond them."""
        if len(grammar) > MOST_LETTERS:
            raise RequestError(f"The grammar or schema has over {MOST_LETTERS} letters.")
        with _TRIES:
            if grammar not in self._tried:
                self._start()
                assert self._child is not None
                try:
                    good, text = self._child.ask(json.dumps({"grammar": grammar}), 5.0 * SECONDS, "no grammar is tried")
                except RequestError as error:  # a child that fails is not the client's fault
                    raise BackendError(str(error)) from error
                if not good:
                    lark = " GBNF? `python -m llguidance.gbnf_to_lark FILE` makes Lark of it." * ("::=" in grammar)
                    raise RequestError(f"The grammar or schema cannot be read ({_in_words(text):.300}).{lark}")
                self._tried[grammar] = float(text)
                if len(self._tried) > _KEPT:
                    self._tried.popitem(last=False)
            self._tried.move_to_end(grammar)
            return self._tried[grammar]

    def guides(self, grammar: str, count: int = 1) -> list[Guide]:
        """Return `count` guides, each at the beginning of an answer. `grammar` is Lark, as llguidance has it. Raises
        RequestError where it cannot be read, or not `count` times within SECONDS and MEGABYTES.
        """
        if count * self._share(grammar) > 1 and count > 1:
            raise RequestError(f"The grammar or schema takes too long to be read for {count} answers: ask for fewer.")
        read, llguidance = "does not do for this grammar", _llguidance()
        limits = llguidance.LLParserLimits(max_lexer_states=STATES, verbose_errors=False)
        return [
            Guide(call_tokenizer(read, lambda: llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)))
            for _ in range(count)
        ]

    def guide(self, grammar: str) -> Guide:
        """Return one guide (see `guides`)."""
        return self.guides(grammar)[0]

    def _start(self) -> None:
        tokenizer = _llguidance().LLTokenizer
        if self._eos is None:  # llguidance would take the first token as the end
            raise RequestError("Answers in a grammar need the model's own end of a text, and its tokenizer has none.")
        if self._tokens is None:  # takes a second for 150,000 tokens
            self._tokens = call_tokenizer(READS, lambda: tokenizer(_without_gaps(self._tokenizer), eos_token=self._eos))
        if self._child is None or not self._child.alive:
            setup = {"tokenizer": _without_gaps(self._tokenizer), "eos": self._eos}
            self._child = Child(CHILD, setup | {"memory": MEGABYTES << 20, "seconds": SECONDS, "states": STATES})
