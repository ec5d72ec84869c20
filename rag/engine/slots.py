"""The engine for any causal LM: transformers' own forward, one row at a time, over our KV cache.

Each slot keeps one token sequence with its keys and values on the model's device. A new prompt
takes over, or copies, the slot that shares most of its beginning, and computes only the rest.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from rag.engine.interface import Event, FinishEvent, Request, TokenEvent, check_request
from rag.engine.sampling import Sampler, top_logprobs
from rag.errors import GeneratorError

PREFILL_CHUNK = 512  # tokens a forward: bounds the attention's workspace and other callers' wait
_MIN_SHARED = 16  # a shorter common beginning is not worth a copy


class BufferLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in buffers that grow by doubling, so a new token is written in
    place (transformers' DynamicLayer copies all of them each time). One row; no window is cut off,
    which keeps every layer croppable: the mask does the sliding."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (1, heads, n, dim) and return everything so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            capacity = max(end, 2 * self.keys.shape[2], 64)
            self.keys = _grown(self.keys, self.length, capacity)
            self.values = _grown(self.values, self.length, capacity)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # The first versions of transformers 5 give the positions themselves.
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + count, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """What `get_max_length` was called in the first versions of transformers 5."""
        return -1

    def copy_prefix(self, length: int) -> BufferLayer:
        """A new layer that holds the first `length` tokens of this one."""
        copy = BufferLayer()
        if self.keys is not None and self.values is not None:
            copy.lazy_initialization(self.keys, self.values)
            copy.keys = _grown(self.keys, length, length)
            copy.values = _grown(self.values, length, length)
            copy.length = length
        return copy


def _grown(buffer: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    new = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
    new[:, :, :length] = buffer[:, :, :length]
    return new


class Slot:
    """A token sequence and the cache that holds its keys and values."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.tokens: list[int] = []
        self.reserved = 0  # most tokens that the request in hand can bring it to
        self.busy = False
        self.last_used = 0

    @property
    def size(self) -> int:
        return max(len(self.tokens), self.reserved)

    def keep(self, length: int) -> None:
        """Forget every token behind the first `length`."""
        for layer in self.cache.layers:
            if isinstance(layer, BufferLayer):
                layer.length = length
        del self.tokens[length:]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens the two begin with in common."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


class SlotEngine:
    """Engine over `model.forward`. Requests of one call run one after the other."""

    def __init__(
        self, model: PreTrainedModel, *, context_length: int, kv_tokens: int, reason: str = ""
    ) -> None:
        """`reason` goes into the description: why not the pooled engine."""
        self._reason = reason
        self._model = model
        self._device = model.device
        self.device = str(model.device)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.context_length = context_length
        self.kv_tokens = max(kv_tokens, context_length)
        self.reuses_prefixes = self._new_cache() is not None
        self._slots: list[Slot] = []
        self._slots_lock = threading.Lock()
        self._forward_lock = threading.Lock()
        self._clock = 0
        self._live: set[str] = set()
        self._cancelled: set[str] = set()
        parameters = inspect.signature(model.forward).parameters
        if "past_key_values" not in parameters:
            raise GeneratorError(
                f"{type(model).__name__} keeps its state in a way of its own instead of a KV cache; "
                "this program can't run it. Choose a transformer model."
            )
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @property
    def description(self) -> str:
        reuse = "prefix reuse" if self.reuses_prefixes else "no prefix reuse (recurrent layers)"
        return f"transformers forward of {type(self._model).__name__}{self._reason}, {reuse}"

    @property
    def cached_tokens(self) -> int:
        with self._slots_lock:
            return sum(len(slot.tokens) for slot in self._slots)

    def generate(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run the requests and yield their events as they come. Closing the iterator cancels.

        Raises GeneratorError at once where a request can't be run as it stands.
        """
        samplers = []
        for request in requests:
            check_request(request, self.context_length)
            if request.block_starts:
                raise GeneratorError(
                    "block-diagonal prompts need the engine's own forward, and this model runs on "
                    f"{self.description}. Use the plain layout."
                )
            samplers.append(Sampler(request.sampling, request.prompt_ids))
        return self._run(list(requests), samplers)

    def cancel(self, request_id: str) -> None:
        """End a running request before its next token; its FinishEvent says "cancelled"."""
        with self._slots_lock:
            if request_id in self._live:
                self._cancelled.add(request_id)

    def _run(self, requests: list[Request], samplers: list[Sampler]) -> Iterator[Event]:
        started = time.perf_counter()
        for request, sampler in zip(requests, samplers, strict=True):
            yield from self._run_one(request, sampler, started)

    def _run_one(self, request: Request, sampler: Sampler, started: float) -> Iterator[Event]:
        slot = self._acquire(request)
        self._live.add(request.id)
        reused = len(slot.tokens)
        intact = False
        try:
            first: float | None = None
            new_tokens = 0
            reason = "length"
            pending = list(request.prompt_ids[reused:])
            while new_tokens < request.max_new_tokens:
                logits = self._forward(slot, pending)
                token, logprob = sampler.choose(logits)
                if first is None:
                    first = time.perf_counter() - started
                if token in request.stop_ids:
                    reason = "stop"
                    break
                new_tokens += 1
                intact = True
                top = top_logprobs(logits, request.top_logprobs)
                yield TokenEvent(request.id, token, logprob, top)
                if request.id in self._cancelled:
                    reason = "cancelled"
                    break
                intact = False
                pending = [token]
            intact = True
        finally:
            self._live.discard(request.id)
            self._cancelled.discard(request.id)
            self._release(slot, intact=intact)
        seconds = time.perf_counter() - started
        yield FinishEvent(
            request_id=request.id,
            reason=reason,  # type: ignore[arg-type]
            prompt_tokens=len(request.prompt_ids),
            reused_tokens=reused,
            new_tokens=new_tokens,
            seconds_to_first_token=seconds if first is None else first,
            seconds=seconds,
        )

    @torch.inference_mode()
    def _forward(self, slot: Slot, tokens: list[int]) -> torch.Tensor:
        """Logits (vocabulary,) behind the last of `tokens`, which the slot then holds too."""
        logits: torch.Tensor | None = None
        # Recurrent layers take up their state for single tokens only: the prompt goes in one piece.
        step = PREFILL_CHUNK if self.reuses_prefixes else len(tokens)
        for begin in range(0, len(tokens), step):
            chunk = tokens[begin : begin + step]
            with self._forward_lock:
                output = self._model(
                    input_ids=torch.tensor([chunk], device=self._device),
                    past_key_values=slot.cache,
                    use_cache=True,
                    **self._last_logits,
                )
            slot.tokens.extend(chunk)
            logits = output.logits[0, -1]
        assert logits is not None, "a forward needs at least one token"
        return logits

    def _acquire(self, request: Request) -> Slot:
        """A slot for this request alone, holding the longest cached beginning of its prompt."""
        prompt = request.prompt_ids
        needed = len(prompt) + request.max_new_tokens
        with self._slots_lock:
            self._clock += 1
            idle = [slot for slot in self._slots if not slot.busy]
            best = max(idle, key=lambda slot: common_prefix(slot.tokens, prompt), default=None)
            # At least one prompt token is always computed: its logits choose the first new token.
            shared = min(common_prefix(best.tokens, prompt), len(prompt) - 1) if best else 0
            if best is None or shared < _MIN_SHARED:
                best, shared = None, 0
            self._make_room(needed, spare=best)
            if best is not None and not self._has_room(needed):
                # No room for a copy beside it: take it over, or refuse where that is too much.
                slot = best
                self._slots.remove(best)
                if not self._has_room(needed):
                    raise self._no_room(needed)
                self._slots.append(best)
            elif best is not None and shared < len(best.tokens) // 2:
                # Much of it would be lost to this prompt: take a copy and leave it for the next.
                cache = self._new_cache()
                assert cache is not None
                cache.layers = [
                    layer.copy_prefix(shared) if isinstance(layer, BufferLayer) else layer
                    for layer in best.cache.layers
                ]
                slot = Slot(cache)
                slot.tokens = best.tokens[:shared]
                self._slots.append(slot)
            elif best is not None:
                slot = best
            elif self._has_room(needed):
                slot = Slot(self._new_cache() or DynamicCache(config=self._model.config))
                self._slots.append(slot)
            else:
                raise self._no_room(needed)
            slot.keep(shared)
            slot.busy = True
            slot.reserved = needed
            slot.last_used = self._clock
            return slot

    def _has_room(self, needed: int) -> bool:
        return sum(slot.size for slot in self._slots) + needed <= self.kv_tokens

    def _no_room(self, needed: int) -> GeneratorError:
        used = sum(slot.size for slot in self._slots)
        return GeneratorError(
            f"the KV cache is in use by other requests: {used} of {self.kv_tokens} tokens "
            f"taken, {needed} needed. Wait for a running answer, or ask for fewer tokens."
        )

    def _make_room(self, needed: int, *, spare: Slot | None) -> None:
        """Drop idle slots, least recently used first, until `needed` tokens fit beside the rest."""
        idle = [slot for slot in self._slots if not slot.busy and slot is not spare]
        for slot in sorted(idle, key=lambda slot: slot.last_used):
            if self._has_room(needed):
                return
            self._slots.remove(slot)

    def _release(self, slot: Slot, *, intact: bool) -> None:
        with self._slots_lock:
            slot.busy = False
            slot.reserved = 0
            # An error in mid-forward leaves layers of different length: drop it.
            if not intact or not self.reuses_prefixes:
                self._slots.remove(slot)

    def _new_cache(self) -> Cache | None:
        """A cache of BufferLayers; None where the model keeps a state that can't be cut back."""
        layers = DynamicCache(config=self._model.config).layers
        replaced: list[Any] = []
        for layer in layers:
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                replaced.append(BufferLayer())
            elif type(layer).__name__ == "DummyLayer":  # not in every transformers 5
                replaced.append(layer)
            else:
                return None
        return Cache(layers=replaced) if replaced else None
