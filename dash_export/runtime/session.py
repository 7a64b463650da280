"""One conversation: a KV cache, a policy, a budget, and the loop from prompt to tokens; it belongs to one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from dash_export.backends.host.cache import KVCache, pass_length, whole_tiles
from dash_export.core.drafts import Drafts, no_drafts
from dash_export.core.kinds import SessionRules
from dash_export.core.rule import DENSE, Rule
from dash_export.core.sampling import Logits, Prompt, Sampling, TokenIds
from dash_export.core.units import DENSE_POSITIONS, Actions, layer_actions
from dash_export.errors import RequestError
from dash_export.runtime.results import (
    MAX_TOKENS,
    NO_TOKEN,
    Generation,
    Response,
    Score,
    Turn,
    answer_length,
    check_room,
    checked_embeddings,
    checked_tokens,
)
from dash_export.runtime.scoring import score
from dash_export.runtime.steps import Row, Steps
from dash_export.text.tokenizer import Text

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.backends.cuda.step import DeviceStep
    from dash_export.backends.host.decode import BoundStep, EngineSet

Floats = npt.NDArray[np.float32]
_CPU_ONLY = "A CPU build of this version does: `dash-export build` makes it."


@dataclass
class Session:
    """Conversation, made by `DashRuntime.session()`. Tokens stay in the cache, so a further prompt continues it."""

    engines: EngineSet | DeviceEngines
    text: Text
    rules: SessionRules
    kv_step: int
    prefill_chunk: int
    new_drafts: Callable[[], Drafts | None] = no_drafts
    """Makes what guesses tokens of a text; none where every token is to be decoded by itself."""

    def __post_init__(self) -> None:
        self.steps = Steps(self.engines, self.kv_step)
        self.cache = self.steps.cache
        self.bound = self.steps.bound
        self._drafts = self.new_drafts()
        self._cancelled = False
        self._pending: list[int] = []
        """The last token of an answer: already given out, not yet in the cache. It goes before the next tokens."""
        self._streams = 0
        self.state: Floats | None = None
        """The final, normed state [hidden] of the newest token, in the memory of its step; None where there is none."""
        self.tokens: list[int] = []
        """The tokens in the cache; NO_TOKEN for an embedding."""
        self.prefilled = 0
        """Tokens that went through prefill so far."""
        self._first_decoded: int | None = None  # place of the conversation's first decoded token

    @property
    def context_left(self) -> int:
        """Positions of the model's context that are still free."""
        return self.engines.model.max_positions - int(self.cache.length)

    def cancel(self) -> None:
        """End the running stream with its next token; a prompt is computed to its end. Safe to call from another
        thread or a signal handler.
        """
        self._cancelled = True

    def reset(self) -> None:
        """Forget the conversation; keep memory and bindings."""
        self._rewind(0)

    def fork(self) -> Session:
        """Return a session that continues from here, with memory of its own. Fork between answers, not within one."""
        twin = replace(self, rules=deepcopy(self.rules))
        self.cache.length = len(self.tokens)  # as in `reserve`
        twin.cache.take(0, self.cache)
        twin.tokens, twin._pending, twin._first_decoded = [*self.tokens], [*self._pending], self._first_decoded
        twin.state = None if self.state is None else self.state.copy()  # the next step overwrites it
        return twin

    # --- answers

    def generate(
        self, prompt: Prompt, max_tokens: int | None = MAX_TOKENS, sampling: Sampling | None = None
    ) -> Generation:
        """Return the whole answer of `stream`. `prompt` is text or token ids."""
        return Generation.gathered(list(self.stream(prompt, max_tokens, sampling)))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int | None = MAX_TOKENS,
        sampling: Sampling | None = None,
    ) -> Iterator[Response]:
        """Answer messages {role, content}; yield one Response per token. Cached tokens are not computed again."""
        self._cancelled = False
        ids = self.text.chat(messages, self.engines.model.max_positions)
        answer_length(len(ids), max_tokens, self.engines.model.max_positions)  # refuse before the cache is rewound
        self.rewind_to(ids)
        return self._begin(ids[len(self.tokens) :], max_tokens, sampling, continues=False)

    def stream(
        self, prompt: Prompt, max_tokens: int | None = MAX_TOKENS, sampling: Sampling | None = None
    ) -> Iterator[Response]:
        """Prefill `prompt` densely after the cached tokens, then decode under the policy; yield one Response per token.
        `max_tokens` None: as many as there is room for, 256 at most. Raises RequestError and ContextLengthError.
        """
        self._cancelled = False
        return self._begin(prompt, max_tokens, sampling)

    def _begin(
        self, prompt: Prompt, max_tokens: int | None, sampling: Sampling | None, continues: bool = True
    ) -> Iterator[Response]:
        ids = np.concatenate([np.array(self._pending, np.int64), self.checked_ids(prompt)])
        max_tokens = answer_length(len(ids), max_tokens, self.context_left)
        self._streams += 1
        after = int(ids[-1]) if continues else None
        return self._stream(self._streams, ids, max_tokens, sampling or Sampling(), after)

    def _stream(
        self, number: int, ids: TokenIds, max_tokens: int, sampling: Sampling, after: int | None
    ) -> Iterator[Response]:
        self._check_newest(number)
        turn = Turn(self.text, sampling, max_tokens, len(ids), after=after)
        logits = self._prefill(ids, min(max_tokens, self.kv_step))
        response = turn.respond(logits, self.tokens, np.zeros(self.engines.model.num_layers, np.int8), self._cancelled)
        if self._drafts is not None:
            self._drafts.read([*self.tokens, response.token])
        self._pending = [response.token]
        answer = self._decoded(Row(None, turn, self.rules, self.tokens, self._pending, self._drafts, self.state))
        while True:
            yield response
            if response.finish_reason is not None:
                return
            self._check_newest(number)
            response = next(answer)

    def _decoded(self, row: Row) -> Iterator[Response]:
        """Decode a row without end; yield its responses. What is left when nobody asks for more was not decoded."""

        def choose(row: Row, logits: Logits, actions: Actions, draft: int | None) -> Response:
            self.state = row.state
            return row.turn.respond(logits, row.tokens, actions, self._cancelled, draft)

        while True:
            row.turn.begin()
            row.tokens = self.tokens
            self._note_decoded()
            self.steps.make_room(len(self.tokens), row.drafts is not None)
            yield from self.steps.advance([row], choose)

    def _check_newest(self, number: int) -> None:
        """Raise RequestError where another stream, or a reset, has used this session since."""
        if number != self._streams:
            raise RequestError(
                "This answer was left for another one, or for a reset, of the same session: take it to its end first, "
                "or give each conversation a session of its own."
            )

    # --- known tokens

    def prefill(self, ids: Prompt | None = None, embeddings: Floats | None = None) -> Logits:
        """Run tokens, or `embeddings` float32 [n, hidden] as `embed` gives them, densely after the cached tokens.
        Return the logits [vocab] after the last one.
        """
        if (ids is None) == (embeddings is None):
            raise RequestError("Give ids or embeddings, one of them.")
        pending = np.array(self._pending, np.int64)
        given: TokenIds | Floats = self.checked_ids(ids) if ids is not None else self._embeddings(embeddings)
        check_room(len(pending) + len(given), 0, self.context_left)
        self._streams += 1
        if len(pending):
            self._prefill(pending, len(given))
        return np.asarray(self._prefill(given, 0).copy())

    def embed(self, ids: Prompt) -> Floats:
        """Return the embeddings [n, hidden] of tokens, as they enter the first layer; the conversation is unchanged."""
        tokens = self.checked_ids(ids)
        self._embeddings()
        parts = [tokens[start : start + self.chunk] for start in range(0, len(tokens), self.chunk)]
        return np.concatenate([cast("BoundStep", self.bound(len(part))).embed(part) for part in parts])

    @property
    def hidden(self) -> Floats:
        """The final, normed state [hidden] of the newest token. Raises RequestError where there is none."""
        if not self.engines.gives_state:
            raise RequestError(f"This build gives no states. {_CPU_ONLY}")
        if self.state is None:
            raise RequestError("There is no state yet: prefill first.")
        return np.array(self.state)

    def restart(self, ids: Prompt) -> Logits:
        """Return the logits [vocab] after `ids` as a conversation of its own. Cached tokens that `ids` begins with stay
        as they are: those of an answer keep the K and V of their skips.
        """
        known = self.checked_ids(ids, fresh=True)
        check_room(len(known), 0, self.engines.model.max_positions)
        self.rewind_to(known)
        return self.prefill(known[len(self.tokens) :])

    def decode_one(self, token: int, rule: Rule | None = None) -> tuple[Logits, Actions]:
        """Decode one known token under the policy (or `rule`); return logits [vocab] and actions [layers]."""
        if type(token) is not int or not 0 <= token < self.engines.model.vocab_size:  # fast: answers are timed by this
            (token,) = self.checked_ids([token]).tolist()
        check_room(1 + len(self._pending), 0, self.context_left)
        self._streams += 1
        for pending in self._pending:
            self._advance(pending)
        logits, actions = self._advance(token, rule)
        return logits.copy(), actions

    def score(self, ids: Prompt, prefix: int = 2, actions: Actions | None = None, keep_logits: bool = False) -> Score:
        """Score a text as decode under the policy would see it: in one pass where rows of the build's engines may
        differ (CPU), else token by token. This ends the conversation of the session.

        The first `prefix` tokens, two at least, are dense, like a prompt. `actions` int8 [tokens, layers] forces every
        action instead. A budget means its calibrated trade-off here: only decode adjusts the trade-off. Raises
        PolicyError for actions of another shape.
        """
        return score(self, self.checked_ids(ids, fresh=True), prefix, actions, keep_logits)

    def logits(self, ids: Prompt, prefix: int = 2, actions: Actions | None = None) -> npt.NDArray[np.float32]:
        """Return the logits [tokens, vocab] of `score`."""
        return cast("npt.NDArray[np.float32]", self.score(ids, prefix, actions, keep_logits=True).logits)

    # --- what is known of a conversation

    @property
    def chunk(self) -> int:
        """Most tokens of one pass."""
        return min(self.prefill_chunk, self.engines.rows_at_once(self.cache.capacity))

    def next_pass_length(self, left: int) -> int:
        """Return how many tokens of a prompt the next pass takes, of `left` (see `pass_length`)."""
        return pass_length(left, self.chunk)

    def rewind_to(self, ids: Sequence[int] | TokenIds) -> None:
        """Keep cached tokens that `ids` begins with, in whole TILEs. The last two of `ids` are not kept: the last one's
        logits are wanted, and no pass may take it alone (`next_pass_length`).
        """
        pairs = enumerate(zip(ids, self.tokens, strict=False))
        known = next((place for place, (one, other) in pairs if one != other), min(len(ids), len(self.tokens)))
        self._rewind(whole_tiles(min(known, len(ids) - 2)), known)

    def load_prefix(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Replace the cached tokens by `tokens`, whose K and V are the first rows of sequence 0 of `cache`."""
        self._rewind(0)
        self.reserve(cache.length)
        self.cache.take(0, cache)
        self.cache.length = len(tokens)
        self.tokens[:] = tokens

    # --- steps

    def _prefill(self, given: TokenIds | Floats, headroom: int) -> Logits:
        """Prefill in chunks; return the last logits. `tokens` are what the cache holds, whatever is raised."""
        self.reserve(len(given) + headroom)
        start = 0
        while True:
            part = given[start : start + self.next_pass_length(len(given) - start)]
            step = self.bound(len(part))
            if part.ndim == 2:
                cast("BoundStep", step).prefill_embeddings(cast("Floats", part))
            else:
                step.prefill(cast("TokenIds", part))
            self._pending = []  # the pending token is the first of `part`
            self.tokens.extend([NO_TOKEN] * len(part) if part.ndim == 2 else part.tolist())
            start += len(part)
            if start == len(given):
                break
        self.prefilled += len(given)
        return self._last(step)

    def _last(self, step: BoundStep | DeviceStep) -> Logits:
        """Return the logits [vocab] after a step's last token; they are valid until the next step."""
        self.state = None if step.final_state is None else step.final_state[0, 0]
        last: Logits = step.logits[0, 0]
        return last

    def _advance(self, token: int, rule: Rule | None = None) -> tuple[Logits, Actions]:
        """Decode one known token. Return its logits [vocab], valid until the next step, and actions [layers]."""
        self.reserve(1)
        step = self.bound(1)
        self._note_decoded()
        if rule is None:
            rule = DENSE if self.cache.length < DENSE_POSITIONS else self.rules.rule
        step.decode(token, rule)
        self.rules.decoded(step.skipped)
        self._pending = []  # before append: an interrupt may come after that call, and then both must be done
        self.tokens.append(token)
        return self._last(step), self.actions_of(step)[0]

    def _note_decoded(self) -> None:
        self.cache.length = len(self.tokens)  # as in `reserve`
        if self._first_decoded is None:
            self._first_decoded = len(self.tokens)

    def actions_of(self, step: BoundStep | DeviceStep) -> Actions:
        return layer_actions(step.skipped, self.engines.units, self.engines.model.num_layers)

    def _rewind(self, length: int, known: int = 0) -> None:
        del self.tokens[length:]  # first: the cache follows `tokens`, and a user's policy may raise in `restart`
        self._pending = []
        self.cache.length = length
        self.state = None
        self._streams += 1
        if self._drafts is not None:
            self._drafts.clear()  # a longer text follows, maybe another
        if max(length, known) <= (self._first_decoded or 0):  # the text has no answer left: another conversation begins
            self._first_decoded = None
            self.rules.restart()

    def reserve(self, more: int) -> None:
        self.cache.length = len(self.tokens)  # an interrupt may have come after a step, before its tokens were noted
        self.steps.reserve(self.cache.length + more)

    # --- checks

    def checked_ids(self, prompt: Prompt, fresh: bool = False) -> TokenIds:
        """Return the token ids [n] of a prompt, or of a text that begins a `fresh` context whatever is cached."""
        special = fresh or not self.tokens
        limit = self.engines.model.max_positions if fresh else self.context_left
        ids = self.text.encode(prompt, special=special, limit=limit) if isinstance(prompt, str) else prompt
        return checked_tokens(ids, self.engines.model.vocab_size)

    def _embeddings(self, given: Floats | None = None) -> Floats:
        """Return given embeddings, checked, or none [0, hidden]. Raises RequestError, also where none are taken."""
        if not self.engines.takes_embeddings:
            raise RequestError(f"This build takes no embeddings. {_CPU_ONLY}")
        hidden = self.engines.model.hidden_size
        return np.zeros((0, hidden), np.float32) if given is None else checked_embeddings(given, hidden)
