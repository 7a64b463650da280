"""Continuous batching. Requests wait in a bounded queue. Between two decode steps of the running rows, one chunk of one
prompt is prefilled; where none runs, short prompts enter together. A row that ends makes room for the next request. One
thread owns the engines; the public methods may be called from any thread.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy

from dash_export.backends.host.cpus import available_memory
from dash_export.core.kinds import Setting
from dash_export.core.sampling import Logits, Prompt, TokenIds
from dash_export.errors import BackendError, ContextLengthError, DashError, RequestError
from dash_export.runtime import DashRuntime
from dash_export.runtime.results import MAX_TOKENS, Response, Turn, answer_length, checked_tokens
from dash_export.runtime.rows import Rows
from dash_export.serve.reading import Prefixes, begin, next_part, prefill
from dash_export.serve.tickets import GUIDED, MISTAKE, BusyServerError, DeadlineError, Request, Ticket
from dash_export.text.guidance import Guide

logger = logging.getLogger(__name__)
ROWS, WAITING, PREFIX_BYTES = 8, 64, 256 << 20


class Scheduler:
    """Scheduler of the requests to one bundle. `start` begins its thread; `close` ends it."""

    def __init__(
        self,
        runtime: DashRuntime,
        *,
        rows: int | None = None,
        waiting: int = WAITING,
        prefix_bytes: int = PREFIX_BYTES,
        alone: Setting | None = None,
        memory: int | None = None,
        context: int | None = None,
    ) -> None:
        """`rows`: how many requests decode together, by default ROWS, or as many as the engines take.

        `waiting`: most requests in the queue. `alone`: the setting of requests that have none, for steps with one row,
        by default dense with drafts. With several rows they are dense, because a token policy saves nothing where rows
        skip different units. `prefix_bytes`: bytes for the K and V of
        prompts. `memory`: bytes for all K and V on a CPU, by default half of the free memory. `context`: a row's most
        positions.
        Raises PolicyError, RequestError, and BackendError where engines or the device take fewer rows.
        """
        engines = runtime.engines
        rows = min(ROWS, engines.sequences) if rows is None else rows
        runtime.batch(rows)  # raises where the engines take fewer
        self.runtime, self.most_waiting = runtime, waiting
        self.size, self._rows = rows, Rows(engines, rows, runtime.recipe.runtime.kv_step)
        self._prompt = runtime.session()
        self.context = most = min(context or engines.model.max_positions, engines.model.max_positions)
        """Positions that each row may have; `short`: fewer than asked for, because memory has no room."""
        if engines.grows:
            _ = rows > 1 and engines.mixed  # loaded now: not while answers wait
            room = (available_memory() // 2 if memory is None else memory) - prefix_bytes
            # Room for all rows, which are copied as one of them grows, and for the prompt that is being prefilled.
            self.context = min(most, max(MAX_TOKENS, room // self._prompt.cache.position_nbytes // (rows + 1)))
        else:
            for cache in (self._rows.cache, self._prompt.cache):
                cache.reserve(1)  # caches that do not grow: take all memory now
        self.short = self.context < most
        self._prefixes = Prefixes(prefix_bytes)
        self._alone, self._together = map(runtime.rules, (alone or Setting(), Setting()))
        self._waiting: deque[Ticket] = deque()
        self._job: Ticket | None = None
        self._live: dict[Ticket, None] = {}
        """Tickets that have left the queue and not ended: the job and the rows, whom `_fail_all` tells."""
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.figures = Counter[str]()
        """Counts since the start, by the names that metrics.py tells."""

    # --- from any thread

    def start(self) -> None:
        """Start the thread, which answers the requests."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ids(self, prompt: Prompt) -> TokenIds:
        """Return the token ids of a prompt, slowly for a long text. Raises RequestError and ContextLengthError."""
        ids = self.runtime.text.encode(prompt, limit=self.context) if isinstance(prompt, str) else prompt
        return checked_tokens(ids, self.runtime.engines.model.vocab_size)

    def check_queue(self, guided: int = 0) -> None:
        """Raise BusyServerError, and count the request as refused, if the queue is full, the scheduler is closing, or
        with `guided` more there would be over GUIDED answers with a grammar.
        """
        if self._closing:
            why = "is closing"
        elif len(self._waiting) >= self.most_waiting:
            why = f"has {self.most_waiting} requests waiting"
        elif guided and self.guided + guided > GUIDED:
            why = f"takes {GUIDED} answers with a grammar at a time"
        else:
            return
        self.figures["refused"] += 1
        raise BusyServerError(f"The server {why}: ask again later.")

    def submit(self, request: Request, tell: Callable[[Response], None], guide: Guide | None = None) -> Ticket:
        """Queue a request. `guide`: a guide of its grammar; to make one here may take a second. Raises RequestError,
        ContextLengthError and PolicyError for a request that cannot be answered, and BusyServerError.
        """
        runtime = self.runtime
        ids = self.ids(request.prompt)
        try:
            max_tokens = answer_length(len(ids), request.max_tokens, self.context, self.context)
        except ContextLengthError as error:
            why = f" (So many for each of {self.size} rows: fewer leave more.)" if self.short else ""
            raise ContextLengthError(f"{error}{why}") from None
        rules = None if request.setting is None else self.runtime.rules(request.setting)
        until = float("inf") if request.deadline is None else time.monotonic() + request.deadline
        if guide is None and request.sampling.grammar is not None:
            guide = runtime.text.guides.guide(request.sampling.grammar)
        ticket = Ticket(request, ids, max_tokens, rules, tell, until, guide)
        with self._changed:
            self.check_queue()
            self.figures["requests"] += 1
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End an answer before its next token. Nothing happens to an answer that has ended."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    @property
    def waiting(self) -> int:
        return len(self._waiting) + (self._job is not None)

    @property
    def guided(self) -> int:
        """Count the answers with a grammar, waiting or under way."""
        with self._changed:
            return sum(ticket.guide is not None for ticket in (*self._waiting, *self._live.copy()))

    @property
    def running(self) -> int:
        return len(self._rows)

    def close(self, seconds: float = 0.0) -> bool:
        """Take no more requests, wait `seconds` for answers, then fail the rest. Return whether none had to fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is None:  # never started
            waiting, self._waiting = self._waiting, deque()
            for ticket in waiting:
                self._end(ticket)
            return not waiting
        self._thread.join(seconds)
        drained = not self._thread.is_alive()
        with self._changed:
            for ticket in [*self._waiting, *self._live]:
                ticket.until = 0.0
            self._changed.notify()
        self._thread.join()
        return drained

    # --- on the scheduler's own thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._job or self._rows or self._closing):
                    self._changed.wait()
                if self._closing and not (self._waiting or self._job or self._rows):
                    return
            try:
                self._prefill(waited_for=bool(self._rows))
                if self._rows.rows:
                    self._decode()
            except BaseException:  # a bug or a panic of native code ends these answers, not the server
                logger.exception("a step failed")
                self._fail_all(BackendError(MISTAKE))

    def _fail_all(self, error: DashError) -> None:
        """Fail the prompt and all rows under way: the contents of their caches are not known."""
        self._job = None
        self._rows.clear()
        self._prompt.reset()
        for ticket in [*self._live]:
            self._tell(ticket, self._rows.failed(error, None if ticket.turn is None else ticket.turn.statistics))

    def _prefill(self, waited_for: bool) -> None:
        """Prefill one pass; where no row waits for it, further prompts too, up to a chunk of tokens in all."""
        self._drop_waiting()
        left = self._prompt.prefill_chunk
        while left > 0 and (ticket := self._job or self._next_job()) is not None:
            if ticket.cancelled or ticket.late:
                self._job = None
                self._end(ticket)
            else:
                left -= self._prefill_pass(ticket, left)
                if waited_for:
                    return

    def _next_job(self) -> Ticket | None:
        with self._changed:
            if self._waiting and len(self._rows) < self.size:
                self._job = self._waiting.popleft()
                self._live[self._job] = None
        return self._job

    def _prefill_pass(self, ticket: Ticket, left: int) -> int:
        """Prefill one pass of the job, unless it has more than `left` tokens. Return what is taken of `left`."""
        try:
            turn, session, reading = ticket.turn, self._prompt, ticket.request.reading
            if turn is None:
                turn = begin(ticket, session, self._prefixes)
                self.figures["known_tokens"] += ticket.known
            part = next_part(ticket, session)
            if len(part) > left:
                return left
            logits = prefill(ticket, session, part)
            if len(session.tokens) == len(ticket.ids):
                if reading is not None and reading.only:
                    self._tell(ticket, turn.without_tokens(self._rows.dense()))
                else:
                    self._begin(ticket, turn, logits)
                self._job = None
            return len(part)
        except (DashError, MemoryError) as error:  # fails this request only: the rows are unchanged
            self._job = None
            self._prompt.reset()
            self._tell(ticket, self._rows.failed(error))
            return 0

    def _begin(self, ticket: Ticket, turn: Turn, logits: Logits) -> None:
        ticket.alone = rules = ticket.rules or deepcopy(self._alone)
        self._tell(ticket, self._rows.begin(self._prompt, logits, turn, rules, ticket, ticket.max_tokens))
        with suppress(MemoryError, BackendError):  # no room to keep it: it will be prefilled anew
            self._prefixes.keep(self._prompt.tokens, self._prompt.cache, 0)

    def _decode(self) -> None:
        """Decode one step of all rows."""
        rows = self._rows.rows
        for row in rows:
            if row.tag.rules is None:
                row.rules = row.tag.alone if len(rows) == 1 else self._together
        stopped = {row.tag for row in rows if row.tag.cancelled or row.tag.late}
        try:
            told = self._rows.advance(stopped)
        except BackendError as error:
            self._fail_all(error)
            return
        for ticket, response in told:
            if response.finish_reason == "cancelled" and ticket.late and not ticket.cancelled:
                response = self._rows.failed(self._late(), response.statistics)
            self._tell(ticket, response)

    def _drop_waiting(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled or ticket.late]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        """Fail a cancelled or late ticket that has no row yet."""
        error = RequestError("The request was cancelled.") if ticket.cancelled else self._late()
        self._tell(ticket, self._rows.failed(error))

    def _tell(self, ticket: Ticket, response: Response) -> None:
        if response.finish_reason is not None:
            self._live.pop(ticket, None)
            said, ended = response.statistics, "finished" if response.error is None else "failed"
            ended = "cancelled" if ticket.cancelled else ended
            self.figures.update({"prompt_tokens": said.prompt_tokens, "tokens": said.tokens, ended: 1})
        try:
            ticket.tell(response)
        except Exception:  # an error of the client must not end other answers
            logger.exception("a response could not be told")
            ticket.cancelled = True
        if response.finish_reason is not None:
            ticket.turn = ticket.guide = None  # free megabytes: the client may hold the ticket for long

    def _late(self) -> DeadlineError:
        return DeadlineError("The server is closing." if self._closing else "The time that this request had is over.")
