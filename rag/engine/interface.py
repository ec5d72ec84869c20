"""The small interface between the engine and everything above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from rag.errors import GeneratorError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy and ignores the rest but the penalty.

    top_k 0 and top_p 1.0 switch those filters off. repetition_penalty follows CTRL (Keskar et al.,
    2019), as transformers applies it: logits of tokens already in prompt or output are divided by
    it where positive and multiplied where negative. `seed` None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. Raises nothing itself; the engine checks it against its limits.

    With `block_starts` the prompt is block-diagonal, for a model that was trained on it: passages
    begin there, each sees what stands before the first of them and itself, and takes its positions
    from the end of that opening on. What begins at `question_start` sees everything, at positions
    behind the longest passage. A passage's keys are then the same in every prompt that holds it
    behind the same opening, in whatever order, and are computed once.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()  # the stop token ends the output and is not part of it
    top_logprobs: int = 0  # most probable tokens to report beside each chosen one
    block_starts: tuple[int, ...] = ()
    question_start: int = 0
    # [start, end) of passages whose keys may come from another prompt, as an approximation. Only
    # for an engine that was made with a passage store.
    reusable: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token with its log-probability (natural log, before temperature and filters).

    `top` are the `top_logprobs` most probable tokens of its place with their log-probabilities,
    highest first; the chosen one is among them only where it is that probable.
    """

    request_id: str
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of one request. Times are seconds from when `generate` was called."""

    request_id: str
    reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    seconds: float


Event = TokenEvent | FinishEvent


class Engine(Protocol):
    """A causal LM with its KV cache on `device`."""

    device: str
    dtype: str
    context_length: int  # most prompt + new tokens of one request

    def generate(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run the requests and yield their events as they come. Closing the iterator cancels.

        Raises GeneratorError where a prompt and its new tokens exceed `context_length`.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End one running request before its next token; the others of its call go on.

        Does nothing where no such request runs.
        """
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held now, of running requests and earlier ones."""
        ...

    @property
    def description(self) -> str:
        """Which forward runs and what is reused, in a few words."""
        ...


MAX_TOP_LOGPROBS = 100  # each place of each output keeps that many


def check_request(request: Request, context_length: int) -> None:
    """Raise GeneratorError where the request is empty, too long for the context, or senseless."""
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    if prompt == 0:
        raise GeneratorError("the prompt is empty: there is nothing to continue.")
    if new < 1:
        raise GeneratorError(f"max_new_tokens is {new}; it must be at least 1.")
    if prompt + new > context_length:
        raise GeneratorError(
            f"{prompt} prompt tokens + {new} new tokens = {prompt + new} exceed the context of "
            f"{context_length}. Shorten the prompt or lower max_new_tokens."
        )
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise GeneratorError(
            f"top_logprobs is {request.top_logprobs}; it must be from 0 to {MAX_TOP_LOGPROBS}."
        )
    borders = [border for span in request.reusable for border in span]
    if borders and (
        borders != sorted(borders)
        or borders[0] < 0
        or borders[-1] >= prompt
        or request.block_starts
    ):
        raise GeneratorError(
            f"reusable passages {request.reusable} do not lie one behind the other within the first "
            f"{prompt - 1} tokens, or the prompt is block-diagonal, which reuses them exactly."
        )
    starts, asked = request.block_starts, request.question_start
    if starts and not (
        all(low < high for low, high in pairwise((*starts, asked)))
        and 0 < starts[0]
        and asked < prompt
    ):
        raise GeneratorError(
            f"block starts {starts} with the question at {asked} do not divide a prompt of {prompt} "
            "tokens into an opening, passages and a question."
        )
