"""The sampler against distributions worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from rag.engine.interface import Sampling
from rag.engine.sampling import Sampler, filtered_distribution
from rag.errors import GeneratorError

# softmax gives 0.5, 0.25, 0.125, 0.125 for tokens 2, 0, 1, 3
LOGITS = torch.tensor([math.log(2.0), 0.0, math.log(4.0), 0.0])


def kept(sampling: Sampling) -> dict[int, float]:
    probabilities, tokens = filtered_distribution(LOGITS, sampling)
    return {int(t): round(float(p), 4) for p, t in zip(probabilities, tokens, strict=True)}


def test_filters_keep_what_their_definitions_say() -> None:
    assert kept(Sampling(1.0)) == {0: 0.25, 1: 0.125, 2: 0.5, 3: 0.125}
    assert kept(Sampling(1.0, top_k=2)) == {2: 0.6667, 0: 0.3333}
    assert kept(Sampling(1.0, top_p=0.6)) == {2: 0.6667, 0: 0.3333}
    assert kept(Sampling(1.0, top_p=0.5)) == {2: 1.0}
    assert kept(Sampling(1.0, top_p=0.01)) == {2: 1.0}
    assert kept(Sampling(1.0, min_p=0.5)) == {0: 0.3333, 2: 0.6667}
    # Temperature 0.5 squares the odds: 16 : 4 : 1 : 1.
    assert kept(Sampling(0.5)) == {0: 0.1818, 1: 0.0455, 2: 0.7273, 3: 0.0455}
    # top-p counts after top-k has renormalised: 2/3 already reaches 0.6.
    assert kept(Sampling(1.0, top_k=2, top_p=0.6)) == {2: 1.0}


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(1.0, seed=5), ())
    n = 8000
    counts = Counter(sampler.choose(LOGITS)[0] for _ in range(n))
    # Four standard deviations: wrong by chance once in some 4,000 seeds, and the seed is fixed.
    for token, probability in ((0, 0.25), (1, 0.125), (2, 0.5), (3, 0.125)):
        assert abs(counts[token] / n - probability) < 4 * math.sqrt(
            probability * (1 - probability) / n
        )


def test_the_same_seed_gives_the_same_draws_and_no_seed_fresh_ones() -> None:
    wide = torch.zeros(1000)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed), ())
        return [sampler.choose(wide)[0] for _ in range(8)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    # Token 2 (logit 1.386) was seen: 1.386 / 2.1 = 0.66 < 0.693, so token 0 wins, and is seen.
    sampler = Sampler(Sampling(0.0, repetition_penalty=2.1), (2,))
    token, logprob = sampler.choose(LOGITS)
    assert token == 0
    assert logprob == pytest.approx(math.log(0.25), abs=1e-6)  # of the model, not of the penalised
    assert sampler.choose(LOGITS)[0] == 2  # 0.66 against 0.693 / 2.1
    below_zero = torch.tensor([-1.0, -1.5])
    assert Sampler(Sampling(0.0, repetition_penalty=2.0), (0,)).choose(below_zero)[0] == 1


def test_top_p_beyond_the_candidates_is_exact() -> None:
    flat = torch.zeros(2000)
    probabilities, tokens = filtered_distribution(flat, Sampling(1.0, top_p=0.5))
    assert abs(len(tokens) - 1000) <= 1
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-4)


def test_logits_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(GeneratorError, match="not numbers"):
        Sampler(Sampling(), ()).choose(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
     {"top_p": 1.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}],
)  # fmt: skip
def test_meaningless_values_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(GeneratorError, match=next(iter(bad))):
        Sampler(Sampling(**bad), ())  # type: ignore[arg-type]
