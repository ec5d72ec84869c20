"""Which tokens the next forward computes: continuous batching over one pool of slots.

Every step takes the decoding rows first and fills what is left of its token budget with pieces of
prompts, the longest cached beginning first (Orca, Yu et al., 2022; chunked prefill as in
Sarathi-Serve, Agrawal et al., 2024). Where slots run out, the youngest request is set back and
computed again later. One background thread runs the steps; callers only wait for their events.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

import torch

from rag.engine.attention import Chunk
from rag.engine.drafting import Drafter
from rag.engine.interface import Event, FinishEvent, Request, TokenEvent, check_request
from rag.engine.kvcache import (
    CacheStats,
    Extent,
    KVPool,
    Node,
    PrefixCache,
    common_prefix,
    cut_extents,
    extents_length,
    join_extents,
)
from rag.engine.passage_store import SHORTEST, PassageStore, Splice, StoredPassage
from rag.engine.sampling import Logits, Sampler
from rag.errors import GeneratorError

_RESERVE = 256  # slots asked ahead for new tokens, so that a row's own tokens stay neighbours
_WINDOW = 64  # waiting requests of one call that are looked at when a row is free
_IDLE_SECONDS = 5.0  # the thread ends after this long without work; the next request starts one
# While idle, memory is got for so many slots beyond those used, and at most so many bytes.
_AHEAD_SLOTS, _AHEAD_BYTES = 2048, 512 << 20
_TOUCHED_AT_ONCE = 64  # slots

# A thread that the ending interpreter stops inside a forward would abort the whole process.
_ENGINES: weakref.WeakSet[PooledEngine] = weakref.WeakSet()


@atexit.register
def _close_engines() -> None:
    for engine in list(_ENGINES):
        engine.close()


Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one step takes on."""

    step_tokens: int  # tokens of a step
    busy_step_tokens: int  # where one call decodes beside another's prompts: bounds its wait
    rows_per_call: int  # rows that one call of `generate` may hold
    rows: int  # rows in all
    draft_tokens: int  # drafts fill a decoding step up to this many tokens; 0: no drafting


CPU_LIMITS = Limits(512, 160, rows_per_call=32, rows=48, draft_tokens=32)
GPU_LIMITS = Limits(4096, 1024, rows_per_call=192, rows=256, draft_tokens=64)


class PooledModel(Protocol):
    """A forward that keeps keys and values in a pool: DecoderModel, TransformersModel."""

    device: torch.device
    dtype_name: str
    vocab_size: int

    @property
    def description(self) -> str: ...

    @property
    def has_windows(self) -> bool: ...

    def new_pool(self, capacity: int, *, int8: bool = False) -> KVPool: ...

    def forward(self, chunks: Sequence[Chunk], pool: KVPool) -> torch.Tensor: ...


class TurningModel(PooledModel, Protocol):
    """One whose keys can be moved to other positions: DecoderModel."""

    def turn_keys(self, keys: torch.Tensor, by: int) -> torch.Tensor: ...


class GraphModel(PooledModel, Protocol):
    """One that can decode at fixed sizes: DecoderModel."""

    def decoding_graphs(self, pool: KVPool, *, capture: bool) -> None: ...


class Call:
    """One call of `generate`: where its events go."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self.started = time.perf_counter()
        self.running = 0


class Passages:
    """How far a block-diagonal prompt is: its passages are computed, or found, one by one as runs
    of their own behind the opening; the question then reads them side by side."""

    def __init__(self, request: Request) -> None:
        starts = (*request.block_starts, request.question_start)
        self.borders = list(pairwise(starts))
        self.opening = starts[0]
        self.question_start = request.question_start
        longest = max(end - start for start, end in self.borders)
        self.turn = self.opening + longest - self.question_start
        self.done = 0
        self.held: list[Node] = []
        self.extents: list[Extent] = []  # of the opening and the passages done

    def take(self, node: Node, extents: Sequence[Extent]) -> None:
        """Keep a passage that is cached whole, `extents` with the opening."""
        self.extents += extents if not self.done else cut_extents(extents, self.opening)[1]
        self.held.append(node)
        self.done += 1

    def run(self, tokens: list[int]) -> list[int]:
        """The opening and the passage in hand, out of the whole prompt."""
        start, end = self.borders[self.done]
        return tokens[: self.opening] + tokens[start:end]


@dataclass(slots=True, eq=False)  # a row is itself, whatever another holds
class Row:
    """A request on its way. `text` is prompt and output, `tokens` the run in work: the same, but
    for a passage of a block-diagonal prompt. The first `computed` of `tokens` have their keys and
    values in the slots `shared` (the tree's) and `own`, in that order."""

    request: Request
    call: Call
    sampler: Sampler
    text: list[int]
    tokens: list[int]
    number: int
    passages: Passages | None = None
    computed: int = 0
    node: Node | None = None
    shared: list[Extent] = field(default_factory=list)
    num_shared: int = 0
    own: list[Extent] = field(default_factory=list)
    reused: int | None = None
    counted: int = 0  # passages whose cached tokens are in `reused`
    first_token_at: float | None = None
    drafter: Drafter | None = None
    draft: list[int] = field(default_factory=list)
    cancelled: bool = False
    splices: list[Splice] = field(default_factory=list)  # still to be laid in, in order
    exact: int | None = None  # tokens before the first splice; None: all are exact

    @property
    def num_shareable(self) -> int:
        """Computed tokens that are right for every prompt that begins with them."""
        return self.computed if self.exact is None else min(self.computed, self.exact)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def new_tokens(self) -> int:
        return len(self.text) - self.prompt_length

    @property
    def decodes(self) -> bool:
        """Whether only its last token is left to compute."""
        return self.whole and self.computed == len(self.tokens) - 1 and self.new_tokens > 0

    @property
    def whole(self) -> bool:
        """Whether the run in work is the prompt itself, not one of its passages."""
        return self.tokens is self.text

    @property
    def room(self) -> int:
        """Tokens that its slots hold."""
        return self.num_shared + extents_length(self.own)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine was made."""

    steps: int
    computed_tokens: int
    new_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    spliced_tokens: int  # approximate: passages laid in from other prompts
    waiting: int
    running: int
    cache: CacheStats


class PooledEngine:
    """Engine over our own forward: every request shares one pool, one tree and one loop."""

    def __init__(
        self,
        model: PooledModel,
        *,
        context_length: int,
        kv_tokens: int,
        limits: Limits | None = None,
        int8_kv: bool = False,
        splicing: TurningModel | None = None,
        graphs_of: GraphModel | None = None,
    ) -> None:
        """`int8_kv` stores keys and values in 8 bits. With `splicing`, which is the model itself,
        passages may be reused approximately, and as many tokens of them are kept again. With
        `graphs_of`, the model itself too, decoding goes at fixed sizes where the device is CUDA.
        """
        self._model = model
        self.device = str(model.device)
        self.dtype = model.dtype_name
        self.context_length = context_length
        self.kv_tokens = max(kv_tokens, context_length)
        self.limits = limits or (CPU_LIMITS if model.device.type == "cpu" else GPU_LIMITS)
        graphs = graphs_of if model.device.type == "cuda" else None
        # The slot behind all others is nobody's: what pads a step goes there.
        self._pool = model.new_pool(self.kv_tokens + (graphs is not None), int8=int8_kv)
        if graphs is not None:
            graphs.decoding_graphs(self._pool, capture=True)
        self._int8_kv = int8_kv
        self._cache = PrefixCache(self.kv_tokens)
        self._splicing = splicing
        self._store = PassageStore(self.kv_tokens if splicing is not None else 0)
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        self._numbers = 0
        self._steps = self._computed = self._new = 0
        self._drafted = self._accepted = self._preemptions = self._spliced = 0
        # Guards the two lists and the thread; held only for moments, never through a forward.
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        _ENGINES.add(self)
        # Slots before this one have memory; a GPU's have it from the start.
        self._touched = 0 if model.device.type == "cpu" else self.kv_tokens
        with self._wake:
            self._start_loop()

    @property
    def description(self) -> str:
        storage = " in 8 bits" * self._int8_kv
        storage += ", passages reused approximately" * (self._splicing is not None)
        return f"{self._model.description}, {self.kv_tokens} tokens of shared KV cache{storage}"

    @property
    def cached_tokens(self) -> int:
        return self._cache.capacity - self._cache.free.total

    def generate(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run the requests and yield their events as they come. Closing the iterator cancels.

        Raises GeneratorError at once where a request can't be run as it stands, and later where
        the computation failed.
        """
        call = Call()
        rows = []
        for request in requests:
            check_request(request, self.context_length)
            low, high = min(request.prompt_ids), max(request.prompt_ids)
            if low < 0 or high >= self._model.vocab_size:
                raise GeneratorError(
                    f"token ids from {low} to {high} do not fit a vocabulary of "
                    f"{self._model.vocab_size}. Tokenizer and model do not belong together."
                )
            sampler = Sampler(request.sampling, request.prompt_ids)
            drafter = Drafter() if self.limits.draft_tokens else None
            text = list(request.prompt_ids)
            row = Row(request, call, sampler, text, text, 0, drafter=drafter)
            if request.reusable and self._splicing is None:
                raise GeneratorError(
                    "this engine reuses passages exactly only; load the generator with "
                    "passage_reuse approximate, or leave `reusable` empty."
                )
            if request.block_starts:
                if self._model.has_windows:
                    raise GeneratorError(
                        "block-diagonal prompts are not defined for a model with sliding windows. "
                        "Use the plain layout."
                    )
                row.passages = Passages(request)
            rows.append(row)
        return self._events(call, rows)

    def cancel(self, request_id: str) -> None:
        """End a request before its next token; its FinishEvent says "cancelled"."""
        with self._wake:
            for row in (*self._running, *self._waiting):
                if row.request.id == request_id:
                    row.cancelled = True

    def stats(self) -> EngineStats:
        """What has been done so far, and what is cached now."""
        cache = self._cache
        return EngineStats(
            steps=self._steps,
            computed_tokens=self._computed,
            new_tokens=self._new,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            preemptions=self._preemptions,
            spliced_tokens=self._spliced,
            waiting=len(self._waiting),
            running=len(self._running),
            cache=CacheStats(
                capacity=cache.capacity,
                free=cache.free.total,
                cached=cache.cached,
                in_use=cache.in_use,
                hit_tokens=cache.hit_tokens,
                asked_tokens=cache.asked_tokens,
                evicted_tokens=cache.evicted_tokens,
                bytes=self._pool.bytes,
            ),
        )

    def close(self) -> None:
        """Stop behind the step in hand; requests that still run get an error. Idempotent."""
        with self._wake:
            self._stopping = True
            thread = self._thread
            self._wake.notify()
        if thread is not None:
            thread.join()

    # callers' side

    def _events(self, call: Call, rows: list[Row]) -> Iterator[Event]:
        unfinished = len(rows)
        self._submit(rows)
        try:
            while unfinished:
                event = call.events.get()
                if isinstance(event, GeneratorError):
                    raise event
                if isinstance(event, BaseException):
                    raise GeneratorError(
                        f"the computation failed: {type(event).__name__}: {event}. The request "
                        "was dropped; the engine starts afresh with the next one."
                    ) from event
                unfinished -= isinstance(event, FinishEvent)
                yield event
        finally:
            with self._wake:
                for row in rows:
                    row.cancelled = True

    def _submit(self, rows: list[Row]) -> None:
        with self._wake:
            if self._stopping:
                raise GeneratorError("the engine was closed; load the generator again.")
            for row in rows:
                self._numbers += 1
                row.number = self._numbers
            self._waiting.extend(rows)
            self._start_loop()
            self._wake.notify()

    def _start_loop(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="rag-engine", daemon=True)
            self._thread.start()

    # the loop's side

    def _loop(self) -> None:
        while True:
            while not (self._waiting or self._running or self._stopping) and self._touch_ahead():
                pass
            with self._wake:
                if not (self._waiting or self._running or self._stopping):
                    self._wake.wait(_IDLE_SECONDS)
                if self._stopping or not (self._waiting or self._running):
                    self._thread = None
                    break
            try:
                self._step()
            except BaseException as error:
                self._fail(error)
        if self._stopping:
            self._fail(GeneratorError("the engine was closed while this request ran."))

    def _touch_ahead(self) -> bool:
        """Get memory for some of the slots that come next, while there is nothing else to do; False
        where enough of them have it. The first write to a page waits until the system has found and
        cleared one, which on a virtual machine made a fresh prompt a fifth slower."""
        start, end = self._cache.free.last
        begin = max(self._touched, start)
        ahead = min(_AHEAD_SLOTS, _AHEAD_BYTES * self._pool.capacity // self._pool.bytes)
        end = min(end, start + ahead, begin + _TOUCHED_AT_ONCE)
        if begin >= end:
            return False
        self._pool.touch(begin, end)
        self._touched = end
        return True

    def _fail(self, error: BaseException) -> None:
        """Hand an error of the loop to every caller, and start afresh."""
        with self._wake:
            calls = {id(row.call): row.call for row in (*self._running, *self._waiting)}
            self._running.clear()
            self._waiting.clear()
            # A forward that broke off leaves keys of some layers only.
            self._cache.clear()
        for call in calls.values():
            call.events.put(error)

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        work = self._choose_work()
        if not work:
            return
        chunks = [self._chunk(row, length) for row, length in work]
        logits = Logits(self._model.forward(chunks, self._pool))
        self._steps += 1
        first = 0
        for (row, _), chunk in zip(work, chunks, strict=True):
            self._computed += len(chunk.tokens)
            try:
                self._advance(row, chunk, logits, first)
            except GeneratorError as error:  # this row's logits are no numbers
                self._end(row)
                row.call.events.put(error)
            first += chunk.num_logits

    def _drop_cancelled(self) -> None:
        with self._wake:
            waiting = [row for row in self._waiting if row.cancelled]
            running = [row for row in self._running if row.cancelled]
        for row in (*waiting, *running):
            self._finish(row, "cancelled")
        # Only now: a row that is in neither list would hear nothing of a crash.
        with self._wake:
            self._waiting = [row for row in self._waiting if row not in waiting]

    # admission

    def _admit(self) -> None:
        """Give free rows to waiting requests: the call with the fewest rows first, and within a
        call the longest cached beginning, unless a running row is just computing more of it."""
        while self._waiting:
            row = self._next_waiting()
            if row is None:
                return
            while len(self._running) >= self.limits.rows or not self._start(row):
                if not self._make_way(row):
                    return
            with self._wake:
                self._waiting.remove(row)
                self._running.append(row)
            row.call.running += 1

    def _make_way(self, row: Row) -> bool:
        """Where a call has no row running at all, set back the youngest of the call that has most:
        a question need not wait until a row of a batch is done. False: nobody has two."""
        several = [other for other in self._running if other.call.running > 1]
        if row.call.running or not several:
            return False
        self._set_back(max(several, key=lambda other: (other.call.running, other.number)))
        return True

    def _next_waiting(self) -> Row | None:
        with self._wake:
            waiting = list(self._waiting)
        by_call: dict[int, list[Row]] = {}
        for row in waiting:
            of_call = by_call.setdefault(id(row.call), [])
            if len(of_call) < _WINDOW and row.call.running < self.limits.rows_per_call:
                of_call.append(row)
        prefilling = [row for row in self._running if not row.decodes]
        candidates = sorted(filter(None, by_call.values()), key=lambda rows: rows[0].call.running)
        for rows in candidates:
            best: tuple[int, int, Row] | None = None
            for row in rows:
                cached = self._cache.match_length(row.tokens)
                soon = max(
                    (common_prefix(other.tokens, row.tokens) for other in prefilling), default=0
                )
                if soon > cached + 16:
                    continue  # wait for what another row is about to share
                if best is None or (cached, -row.number) > best[:2]:
                    best = (cached, -row.number, row)
            if best is not None:
                return best[2]
        return None

    def _start(self, row: Row) -> bool:
        """Find the row's cached beginning and slots for the rest. False: no slots now."""
        if row.passages is not None:
            if self._next_run(row):
                return True
            self._free(row, keep=True)
            assert self._running, "an empty pool is too small for one request"
            return False
        # At least one token is always computed: its logits choose the next.
        node, shared = self._cache.match(row.tokens[:-1])
        row.num_shared = extents_length(shared)
        remaining = len(row.tokens) - row.num_shared
        ahead = min(_RESERVE, row.request.max_new_tokens - row.new_tokens)
        after = shared[-1][1] if shared else None
        own = self._cache.allocate(remaining + ahead, after=after)
        if own is None and not self._running:
            own = self._cache.allocate(remaining, after=after)
        if own is None:
            self._cache.release(node)
            row.num_shared = 0
            # Nobody runs who could free slots, and one request always fits into an empty pool.
            assert self._running, "an empty pool is too small for one request"
            return False
        row.node, row.shared, row.own = node, shared, own
        row.computed = row.num_shared
        row.splices = self._store.splices(row.text, row.request.reusable, row.num_shared)
        row.exact = row.splices[0].start if row.splices else None
        if row.reused is None:
            row.reused = row.num_shared + sum(one.end - one.start for one in row.splices)
        self._lay_in(row)
        return True

    def _next_run(self, row: Row) -> bool:
        """Go on with the next passage that is not cached, or else with the question.

        False: no slots now; what is done stays done.
        """
        passages = row.passages
        assert passages is not None and row.node is None
        while passages.done < len(passages.borders):
            run = passages.run(row.text)
            node, shared = self._cache.match(run)
            found = extents_length(shared)
            own: list[Extent] | None = []
            if found < len(run):
                after = shared[-1][1] if shared else None
                own = self._cache.allocate(len(run) - found, after=after)
            if own is None:
                self._cache.release(node)
                return False
            if row.new_tokens == 0 and passages.done >= row.counted:
                row.counted = passages.done + 1
                row.reused = (row.reused or 0) + found - (passages.opening if passages.done else 0)
            if found == len(run):
                passages.take(node, shared)
                continue
            row.tokens, row.node, row.shared, row.own = run, node, shared, own
            row.num_shared = row.computed = found
            return True
        remaining = len(row.text) - passages.question_start
        own = self._cache.allocate(remaining, after=None)
        if own is None:
            return False
        row.tokens, row.own = row.text, own
        row.shared = join_extents(passages.extents)
        row.num_shared = row.computed = passages.question_start
        return True

    # work

    def _choose_work(self) -> list[tuple[Row, int]]:
        """(row, tokens to compute) of this step: every decoding row, then prompts."""
        work: list[tuple[Row, int]] = []
        for row in list(self._running):
            if row in self._running and not row.whole and row.computed == len(row.tokens):
                self._end_passage(row)
        decoding = [row for row in self._running if row.decodes]
        # One row more or less costs little only while the weights are what takes the time.
        drafts = max(0, self.limits.draft_tokens - len(decoding))
        for index, row in enumerate(decoding):
            if row not in self._running:
                continue  # set back to make room for one before it
            row.draft = []
            if row.drafter is not None and drafts:
                # The token after the draft is chosen too: leave it room within the maximum.
                fair = -(-drafts // (len(decoding) - index))
                limit = min(fair, row.request.max_new_tokens - row.new_tokens - 1)
                row.draft = row.drafter.propose(row.tokens, limit)
            if not self._ensure_room(row, len(row.tokens) + len(row.draft)):
                continue
            drafts -= len(row.draft)
            work.append((row, 1 + len(row.draft)))
        work = [(row, length) for row, length in work if row in self._running]
        # A batch alone has nobody to keep waiting but itself.
        shared = len({id(row.call) for row in self._running}) > 1
        budget = self.limits.busy_step_tokens if work and shared else self.limits.step_tokens
        budget -= sum(length for _, length in work)
        prefilling = [row for row in self._running if not row.decodes]
        # Small calls before large ones, then the fewest left: a question overtakes a batch.
        for row in sorted(
            prefilling, key=lambda row: (row.call.running, len(row.tokens) - row.computed)
        ):
            if budget <= 0:
                break
            end = row.splices[0].start if row.splices else len(row.tokens)
            length = min(budget, end - row.computed)
            row.draft = []
            work.append((row, length))
            budget -= length
        return work

    def _end_passage(self, row: Row) -> None:
        """Lay a computed passage beside those before it, and go on."""
        assert row.passages is not None and row.node is not None
        row.passages.take(row.node, row.shared)
        row.node, row.shared, row.num_shared = None, [], 0
        while not self._next_run(row):
            youngest = max(self._running, key=lambda other: other.number)
            self._set_back(youngest)
            if youngest is row:
                return

    def _ensure_room(self, row: Row, length: int) -> bool:
        """Slots for the row's first `length` tokens, setting younger rows back if need be.

        False: the row itself was set back.
        """
        while row.room < length:
            after = row.own[-1][1] if row.own else None
            missing = length - row.room
            ahead = min(_RESERVE, row.request.max_new_tokens + row.prompt_length - length)
            more = self._cache.allocate(missing + max(0, ahead), after=after)
            if more is None:
                more = self._cache.allocate(missing, after=after)
            if more is not None:
                row.own = join_extents([*row.own, *more])
                return True
            youngest = max(self._running, key=lambda other: other.number)
            self._set_back(youngest)
            if youngest is row:
                return False
        return True

    def _set_back(self, row: Row) -> None:
        """Preempt: give up the row's slots; it waits and is computed again, output kept."""
        self._preemptions += 1
        self._free(row, keep=False)
        row.call.running -= 1
        with self._wake:
            self._running.remove(row)
            self._waiting.insert(0, row)

    def _chunk(self, row: Row, length: int) -> Chunk:
        end = row.computed + length
        tokens = [*row.tokens, *row.draft][row.computed : end]
        extents, _ = cut_extents([*row.shared, *row.own], end)
        complete = end >= len(row.tokens) and row.whole
        num_logits = 0 if not complete else 1 + len(row.draft)
        turn = row.passages.turn if row.passages is not None and row.whole else 0
        return Chunk(tokens, row.computed, join_extents(extents), num_logits, turn)

    # results

    def _advance(self, row: Row, chunk: Chunk, logits: Logits, first: int) -> None:
        """Take in a computed chunk, whose logits begin at row `first`: share prompt tokens, choose
        new ones, tell the caller."""
        before = row.computed
        row.computed += len(chunk.tokens) - len(row.draft)
        if not row.whole:
            self._share(row, row.computed)
        elif before < row.prompt_length and row.passages is None:
            if before <= row.num_shared:  # nothing that was laid in stands before
                self._share(row, min(row.num_shareable, row.prompt_length))
            self._lay_in(row)
            if row.computed >= row.prompt_length:
                self._keep_passages(row)
        if not chunk.num_logits:
            return
        draft, row.draft = row.draft, []
        accepted = 0
        for index in range(chunk.num_logits):
            token, logprob = row.sampler.choose_from(logits, first + index)
            if row.first_token_at is None:
                row.first_token_at = time.perf_counter()
            if token in row.request.stop_ids:
                self._finish(row, "stop")
                break
            row.text.append(token)
            self._new += 1
            top = logits.top(first + index, row.request.top_logprobs)
            row.call.events.put(TokenEvent(row.request.id, token, logprob, top))
            if row.new_tokens >= row.request.max_new_tokens:
                self._finish(row, "length")
                break
            # The draft was computed as if it were right; it goes on counting while it is.
            if index >= len(draft) or draft[index] != token:
                break
            row.computed += 1
            accepted += 1
        self._drafted += len(draft)
        self._accepted += accepted
        if row.drafter is not None:
            row.drafter.learn(len(draft), accepted, len(row.tokens))

    def _share(self, row: Row, length: int) -> None:
        """Hand the slots of the row's first `length` tokens to the tree, for everybody."""
        own, rest = cut_extents(row.own, length - row.num_shared)
        node, row.shared = self._cache.insert(row.tokens[:length], own)
        if row.node is not None:
            self._cache.release(row.node)
        row.node, row.num_shared, row.own = node, length, rest

    @torch.inference_mode()
    def _lay_in(self, row: Row) -> None:
        """Write the keys of a passage that the row has come to, turned for its place."""
        while row.splices and row.splices[0].start == row.computed:
            splice = row.splices.pop(0)
            assert self._splicing is not None
            upto, _ = cut_extents([*row.shared, *row.own], splice.end)
            _, extents = cut_extents(upto, splice.start)
            slots = [slot for start, end in extents for slot in range(start, end)]
            at = torch.tensor(slots, device=self._model.device)
            stored, skipped = splice.stored, splice.start - splice.passage
            keys = self._splicing.turn_keys(
                stored.keys[:, :, skipped:], splice.passage - stored.position
            )
            values = stored.values[:, :, skipped:]
            for layer in range(len(keys)):
                self._pool.write(
                    layer, at, keys[layer].transpose(0, 1), values[layer].transpose(0, 1)
                )
            row.computed = splice.end
            self._spliced += splice.end - splice.start

    def _keep_passages(self, row: Row) -> None:
        """Keep what a prompt computed for passages that no earlier one held."""
        for start, end in row.request.reusable:
            tokens = row.request.prompt_ids[start:end]
            if end - start < SHORTEST or tokens in self._store:
                continue
            upto, _ = cut_extents([*row.shared, *row.own], end)
            _, extents = cut_extents(upto, start)
            layers = range(self._pool.num_layers)
            keys, values = (
                torch.stack([
                    torch.cat([read(layer, *extent) for extent in extents], 1) for layer in layers
                ])
                for read in (self._pool.keys, self._pool.values)
            )  # fmt: skip
            self._store.keep(tokens, StoredPassage(start, keys, values))

    def _free(self, row: Row, *, keep: bool) -> None:
        """Give up the row's slots; with `keep`, what is computed stays cached in the tree."""
        # What was computed beside passages is right there only: it never enters the tree.
        # The same goes for what was laid in from other prompts, and all behind it.
        if keep and row.node is not None and row.num_shareable > row.num_shared:
            self._share(row, row.num_shareable)
        self._cache.give_back(row.own)
        held = [] if row.node is None else [row.node]
        if row.passages is not None:
            held += row.passages.held
            row.passages = Passages(row.request)
        for node in held:
            self._cache.release(node)
        row.node, row.own, row.shared, row.num_shared, row.computed = None, [], [], 0, 0
        row.tokens = row.text
        row.splices, row.exact = [], None

    def _end(self, row: Row) -> None:
        self._free(row, keep=True)
        if row in self._running:
            with self._wake:
                self._running.remove(row)
            row.call.running -= 1

    def _finish(self, row: Row, reason: Reason) -> None:
        self._end(row)
        now = time.perf_counter()
        first = row.first_token_at if row.first_token_at is not None else now
        row.call.events.put(
            FinishEvent(
                request_id=row.request.id,
                reason=reason,
                prompt_tokens=row.prompt_length,
                reused_tokens=row.reused or 0,
                new_tokens=row.new_tokens,
                seconds_to_first_token=first - row.call.started,
                seconds=now - row.call.started,
            )
        )
