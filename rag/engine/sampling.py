"""The next token from logits: penalty, temperature, top-k, top-p, min-p, and one draw per request.

The draw is an inverse-CDF look-up with a uniform number from the request's own generator, so what
a request samples never depends on who else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rag.engine.interface import Sampling
from rag.errors import GeneratorError

# Sorting a whole vocabulary for top-p costs milliseconds; nearly always this many hold the mass.
_TOP_P_CANDIDATES = 256


def check_sampling(sampling: Sampling) -> None:
    """Raise GeneratorError for a value that has no meaning."""
    rules = (
        (
            "temperature",
            sampling.temperature,
            0.0 <= sampling.temperature <= 100.0,
            "from 0 to 100",
        ),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (off) or more"),
        ("top_p", sampling.top_p, 0.0 < sampling.top_p <= 1.0, "above 0, at most 1"),
        ("min_p", sampling.min_p, 0.0 <= sampling.min_p <= 1.0, "from 0 to 1"),
        (
            "repetition_penalty",
            sampling.repetition_penalty,
            0.0 < sampling.repetition_penalty <= 100.0,
            "above 0, at most 100",
        ),
    )
    for name, value, holds, range_ in rules:
        if not holds:  # NaN compares false and is refused too
            raise GeneratorError(f"sampling {name} is {value}; it must be {range_}.")


class Logits:
    """Logits (n, vocabulary) of one step, float32. What greedy rows need is computed for all at
    once, the first time that one asks."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits
        self._greedy: tuple[list[int], list[float]] | None = None

    def row(self, index: int) -> torch.Tensor:
        """(vocabulary,)."""
        return self._logits[index]

    def greedy(self, index: int) -> tuple[int, float]:
        """The most probable token of a row and its log-probability."""
        if self._greedy is None:
            highest, tokens = self._logits.max(-1)
            logprobs = highest - self._logits.logsumexp(-1)
            self._greedy = (tokens.tolist(), logprobs.tolist())
        token, logprob = self._greedy[0][index], self._greedy[1][index]
        if not math.isfinite(logprob):
            raise _not_numbers()
        return token, logprob

    def top(self, index: int, k: int) -> tuple[tuple[int, float], ...]:
        """The k most probable tokens of a row with their log-probabilities, highest first."""
        return top_logprobs(self._logits[index], k)


def top_logprobs(logits: torch.Tensor, k: int) -> tuple[tuple[int, float], ...]:
    """(token, log-probability) of the k highest of logits (vocabulary,); all where k is more."""
    if not k:
        return ()
    logits = logits.float()
    highest, tokens = logits.topk(min(k, logits.shape[-1]))
    logprobs = highest - logits.logsumexp(-1)
    return tuple(zip(tokens.tolist(), logprobs.tolist(), strict=True))


def _not_numbers() -> GeneratorError:
    return GeneratorError(
        "the model returned logits that are not numbers (NaN or infinity). "
        "Try dtype float32; if it stays, the weights are damaged."
    )


class Sampler:
    """Chooses the tokens of one request. Holds its generator and the tokens it has seen."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        check_sampling(sampling)
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
        self._penalised = sampling.repetition_penalty != 1.0
        self._seen: set[int] = set(prompt_ids) if self._penalised else set()

    @property
    def is_greedy(self) -> bool:
        """Whether the choice is the plain argmax of the logits."""
        return self._generator is None and not self._penalised

    def choose(self, logits: torch.Tensor) -> tuple[int, float]:
        """One token from logits (vocabulary,): its id, and its log-probability before any filter.

        Raises GeneratorError where the logits are not finite numbers.
        """
        logits = logits.float()
        normaliser = torch.logsumexp(logits, dim=-1)
        if not bool(torch.isfinite(normaliser)):
            raise _not_numbers()
        scores = self._penalise(logits)
        token = int(scores.argmax()) if self._generator is None else self._draw(scores)
        if self._penalised:
            self._seen.add(token)
        return token, float(logits[token] - normaliser)

    def choose_from(self, logits: Logits, index: int) -> tuple[int, float]:
        """`choose` from one row of a step's logits."""
        return logits.greedy(index) if self.is_greedy else self.choose(logits.row(index))

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._penalised or not self._seen:
            return logits
        index = torch.tensor(sorted(self._seen), device=logits.device)
        chosen = logits[index]
        penalty = self.sampling.repetition_penalty
        return logits.scatter(0, index, torch.where(chosen > 0, chosen / penalty, chosen * penalty))

    def _draw(self, scores: torch.Tensor) -> int:
        probabilities, tokens = filtered_distribution(scores, self.sampling)
        cumulative = probabilities.double().cumsum(0)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        target = uniform.to(cumulative.device) * cumulative[-1]
        # right=True: a token of zero probability can never be hit, not even by a draw of exactly 0.
        position = int(torch.searchsorted(cumulative, target, right=True))
        position = min(position, len(tokens) - 1)
        return int(tokens[position])


def filtered_distribution(
    scores: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and token ids that remain after temperature, top-k, top-p and min-p.

    scores (vocabulary,) -> (n,), (n,). The filters apply in that order, each on the distribution
    the one before left, as in transformers. Probabilities sum to 1. At least one token remains.
    """
    scores = scores / sampling.temperature
    size = scores.shape[-1]
    if 0 < sampling.top_k < size:
        kept, tokens = scores.topk(sampling.top_k)  # sorted, highest first
        probabilities = kept.softmax(-1)
    elif sampling.top_p < 1.0:
        probabilities, tokens = _most_probable(scores, sampling.top_p)
    else:
        probabilities = scores.softmax(-1)
        tokens = torch.arange(size, device=scores.device)
    if sampling.top_p < 1.0:
        # Keep the smallest set that reaches top_p: a token stays while the mass before it is below.
        mass_before = probabilities.cumsum(-1) - probabilities
        keep = mass_before < sampling.top_p
        keep[0] = True
        probabilities, tokens = probabilities[keep], tokens[keep]
        probabilities = probabilities / probabilities.sum()
    if sampling.min_p > 0.0:
        keep = probabilities >= sampling.min_p * probabilities.max()
        probabilities, tokens = probabilities[keep], tokens[keep]
        probabilities = probabilities / probabilities.sum()
    return probabilities, tokens


def _most_probable(scores: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted probabilities, highest first, of enough tokens to hold `mass` of the distribution."""
    size = scores.shape[-1]
    normaliser = torch.logsumexp(scores, dim=-1)
    count = min(_TOP_P_CANDIDATES, size)
    kept, tokens = scores.topk(count)
    probabilities = (kept - normaliser).exp()
    if count < size and float(probabilities.sum()) < mass:
        kept, tokens = scores.sort(descending=True)
        probabilities = (kept - normaliser).exp()
    return probabilities, tokens
