"""What the generator writes when it is always asked: the figures before and after training.

The pipeline quotes the source where a small model's confidence is low, and refuses where nothing
supports an answer; here neither is done, as the model's own words are to be judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rag.answer import Answer, GenerationStats
from rag.citations import is_refusal
from rag.engine.interface import Sampling
from rag.pipeline import Rag
from rag.quality.evaluation import EvalQuestion, EvalResult, hit_is_right, token_f1

_BATCH = 32
RIGHT_F1 = 0.5  # from which an answer counts as right when the confidence is fitted
_FEWEST_FITTED = 20


@dataclass(frozen=True, slots=True)
class Written:
    """One question's answer, and the mean log-probability of its tokens (nats; 0.0 without any)."""

    result: EvalResult
    mean_logprob: float


def write_answers(
    rag: Rag, questions: Sequence[EvalQuestion], progress: Callable[[int], None]
) -> list[Written]:
    """The model's own words for each question, greedily chosen."""
    written: list[Written] = []
    for begin in range(0, len(questions), _BATCH):
        part = questions[begin : begin + _BATCH]
        prompts = [rag.prompt(question.question) for question in part]
        began = time.perf_counter()
        found = rag.generator.generate_batch(
            prompts, max_new_tokens=rag.settings.max_new_tokens, sampling=Sampling()
        )
        seconds = (time.perf_counter() - began) / len(part)
        for question, prompt, one in zip(part, prompts, found, strict=True):
            answer = Answer(
                question=question.question, text=one.text, hits=prompt.hits,
                kind="refused" if is_refusal(one.text) else "generated",
                stats=GenerationStats(
                    prompt_tokens=one.prompt_tokens, reused_tokens=one.reused_tokens,
                    new_tokens=one.new_tokens, seconds_total=seconds, finish_reason=one.finish_reason,
                ),
            )
            mean = sum(one.token_logprobs) / len(one.token_logprobs) if one.token_logprobs else 0.0
            rank = next((at for at, hit in enumerate(prompt.hits) if hit_is_right(hit, question)), None)
            written.append(Written(EvalResult(question, answer, rank, seconds), mean))
        progress(len(part))
    return written


def fit_confidence(written: Sequence[Written]) -> dict[str, float]:
    """How far the adapted model's own answers can be trusted, as `rag.confidence` reads it.

    Fitted (Platt, 1999) on answers to questions that were not trained on; right is an F1 of at least
    RIGHT_F1. With fewer than 20 answers nothing can be said, and the threshold of 1 is never
    reached: the sources are quoted.
    """
    from rag.bundled.reader_eval import fit_confidence as fit

    given = [one for one in written if not one.result.answer.refused and one.mean_logprob < 0.0]
    right = np.array([
        float(not one.result.question.unanswerable
              and token_f1(one.result.answer.text, one.result.question.answers) >= RIGHT_F1)
        for one in given
    ])  # fmt: skip
    facts = {"support": 0.0, "answers": float(len(given)), "right": float(right.mean()) if len(given) else 0.0}
    if len(given) < _FEWEST_FITTED:
        return {"bias": 0.0, "logprob": 0.0, "threshold": 1.0, **facts}
    means = np.array([one.mean_logprob for one in given])
    slope, offset = fit(means, right)
    shown = 1 / (1 + np.exp(-(slope * means + offset))) >= 0.5
    return {"bias": offset, "logprob": slope, "threshold": 0.5, "shown": float(shown.mean()), **facts}
