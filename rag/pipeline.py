"""The whole of it: a question in, an answer with its evidence out."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator as PyGenerator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.answer import Answer, Citation, Disagreement, GenerationStats, Hit
from rag.citations import (
    MarkerStream,
    StrictStream,
    check_citations,
    is_refusal,
    strip_markers,
    unlinked,
)
from rag.confidence import Calibration
from rag.disagreement import find_contradictions
from rag.embedder import Embedder, load_embedder
from rag.errors import InputError
from rag.evidence import (
    Evidence,
    is_doubtful,
    quotations,
    rank_sentences,
    support_features,
    support_probability,
)
from rag.filter import EVERYTHING, Filter
from rag.followup import search_question
from rag.language import REFUSAL, detect_language
from rag.prompt import Prompt, build_prompt
from rag.question_file import half_character
from rag.refusal_threshold import kb_threshold
from rag.retriever import Retrieval, Retriever
from rag.sentences import one_line
from rag.settings import Settings
from rag.stopping import Stop
from rag.store import Store, open_store

if TYPE_CHECKING:
    from rag.generator import GenerationResult, Generator

History = Sequence[tuple[str, str]]
_BATCH = 32  # questions whose prompts are given to the engine together


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that is known before the model writes."""

    question: str
    retrieval: Retrieval
    sentences: tuple[Evidence, ...]
    support: float
    refuse: bool
    seconds_retrieval: float
    began: float


class Rag:
    """A knowledge base with its models. `Rag.open(".kb")`, then `ask`.

    The embedder is loaded at once, the generator with the first answer (`retrieve` never needs it).
    Safe to share between threads.
    """

    def __init__(self, base: Store, embedder: Embedder, settings: Settings) -> None:
        self.base = base
        self.embedder = embedder
        self.settings = settings
        self.retriever = Retriever(base, embedder, without=settings.retrieval_without)
        self._generator: Generator | None = None
        self._calibration: Calibration | None = None
        self._loading = threading.Lock()
        folder = Path(settings.kb)  # of `rag calibrate`; a store elsewhere has none
        self._own_threshold = kb_threshold(folder, embedder.fingerprint) if settings.store == "embedded" else None

    @classmethod
    def open(
        cls, kb: str | Path | None = None, settings: Settings | None = None, **overrides: Any
    ) -> Rag:
        """Open a knowledge base. `overrides` are settings by name, as in `Rag.open(top_k=6)`.

        Raises KnowledgeBaseError where there is none or another embedder built it.
        """
        if settings is not None and overrides:
            raise InputError("give either `settings` or single settings by name, not both.")
        chosen = settings or Settings.load(**overrides)
        if kb is not None:
            chosen = replace(chosen, kb=str(kb))
        base = open_store(chosen)
        return cls(base, load_embedder(chosen.embedder, device=chosen.device), chosen)

    @property
    def generator(self) -> Generator:
        """The language model, loaded at first use."""
        with self._loading:
            if self._generator is None:
                from rag.generator import load_generator  # imports torch, which takes seconds

                self._generator = load_generator(self.settings)
                self._calibration = Calibration.read(self.settings.generator, self.settings.adapter)
            return self._generator

    def use_generator(self, generator: Generator, calibration: Calibration | None = None) -> None:
        """Answer with a model that is loaded already."""
        with self._loading:
            self._generator = generator
            self._calibration = calibration

    def over(self, base: Store) -> Rag:
        """Another one over this base, with the same models."""
        other = Rag(base, self.embedder, self.settings)
        other.use_generator(self.generator, self._calibration)
        return other

    def retrieve(self, question: str, k: int | None = None, *, where: Filter = EVERYTHING) -> list[Hit]:
        """Up to k passages, best first (settings' top_k without k), of the files in `where`.

        Raises InputError where there are none.
        """
        return self.retriever.retrieve(question, k or self.settings.top_k, where=where)

    def support(self, question: str, retrieval: Retrieval | None = None) -> float:
        """Probability that the passages found answer the question; nothing is generated."""
        return self._plan(question, (), retrieval).support

    def prompt(self, question: str) -> Prompt:
        """What the model reads for a question, also where the pipeline would refuse it first."""
        return self._prompt(self._plan(question, (), None), ())

    def ask(self, question: str, *, history: History = (), where: Filter = EVERYTHING) -> Answer:
        """Answer one question from the files in `where`.

        `history` holds earlier (question, answer) pairs, oldest first. Raises InputError where no file
        is in `where`.
        """
        stream = self.stream(question, history=history, where=where)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                answer: Answer = end.value
                return answer

    def stream(
        self, question: str, *, history: History = (), where: Filter = EVERYTHING,
        retrieval: Retrieval | None = None, stop: Stop | None = None,
    ) -> PyGenerator[str | Answer, None, Answer]:
        """Yield pieces of text as they are written, and last the Answer (also the return value).

        The Answer's text is the one that counts: markers that don't hold have been set right in it.
        Where citations are strict, a sentence comes once it has been checked, and the pieces together
        are that text. Where a model's confidence decides whether its words are shown at all, they come
        in one piece. `retrieval` is what was searched already, in place of a search in `where`.
        `stop`, set in another thread, ends the model's work at once; the Answer is then made of
        what it had written.
        """
        plan = self._plan(question, history, retrieval, where)
        if plan.refuse:
            answer = self._refusal(plan)
            yield answer.text
            yield answer
            return answer
        prompt = self._prompt(plan, history)
        writing = self.generator.stream(
            prompt, max_new_tokens=self.settings.max_new_tokens, sampling=self._sampling(),
            stop=stop,
        )
        held_back = self._calibration is not None
        is_strict = self.settings.citations == "strict"
        strict = StrictStream(prompt.hits, page_at=self._page_at) if is_strict else None
        markers = MarkerStream(len(prompt.hits), [hit.chunk.text for hit in prompt.hits])
        while True:
            try:
                piece = next(writing)
            except StopIteration as end:
                result: GenerationResult = end.value
                break
            if not held_back and (shown := (strict or markers).push(piece)):
                yield shown
        if not held_back and strict is None and (shown := markers.finish()):
            yield shown
        answer = replace(
            self._compose(plan, prompt, result), prompt=self.generator.prompt_text(prompt)
        )
        if held_back:
            yield answer.text
        elif strict is not None and (shown := answer.text.removeprefix(strict.shown)):
            yield shown
        yield answer
        return answer

    def batch(self, questions: Sequence[str], *, where: Filter = EVERYTHING) -> list[Answer]:
        """Answers in the order of the questions, searched and generated together, from the files in `where`."""
        answers: list[Answer] = []
        for begin in range(0, len(questions), _BATCH):
            answers += self._batch(questions[begin : begin + _BATCH], where)
        return answers

    def _batch(self, questions: Sequence[str], where: Filter) -> list[Answer]:
        began = time.perf_counter()
        found = self.retriever.search_batch(questions, self.settings.top_k, where=where)
        share = (time.perf_counter() - began) / max(1, len(questions))
        plans = [
            replace(self._assess(question, retrieval, began), seconds_retrieval=share)
            for question, retrieval in zip(questions, found, strict=True)
        ]
        answers = {at: self._refusal(plan) for at, plan in enumerate(plans) if plan.refuse}
        asked = [(at, plan, self._prompt(plan, ())) for at, plan in enumerate(plans) if not plan.refuse]
        if asked:
            results = self.generator.generate_batch(
                [prompt for _, _, prompt in asked], max_new_tokens=self.settings.max_new_tokens,
                sampling=self._sampling(),
            )
            for (at, plan, prompt), result in zip(asked, results, strict=True):
                answers[at] = replace(
                    self._compose(plan, prompt, result), prompt=self.generator.prompt_text(prompt)
                )
        return [answers[at] for at in range(len(plans))]

    # before the model writes

    def _plan(
        self, question: str, history: History, retrieval: Retrieval | None, where: Filter = EVERYTHING
    ) -> _Plan:
        if not question.strip():
            raise InputError("the question is empty.")
        if wrong := next(filter(None, map(half_character, chain([question], *history))), None):
            raise InputError(f"the question or what was said before it holds {wrong}.")
        began = time.perf_counter()
        if retrieval is None:
            searched = search_question(question, history)
            retrieval = self.retriever.search_batch([searched], self.settings.top_k, where=where)[0]
        return self._assess(question, retrieval, began)

    def _assess(self, question: str, retrieval: Retrieval, began: float) -> _Plan:
        """Find the sentences that answer, and whether anything does."""
        weighed = retrieval.weighed
        sentences: tuple[Evidence, ...] = ()
        support, threshold = 0.0, 1.0
        for evidence in rank_sentences(weighed.text, weighed.terms, weighed.weights, retrieval.hits):
            features = support_features(
                weighed.terms, evidence=evidence, hit=retrieval.best_match, pool=retrieval.pool_match
            )
            found, fitted = support_probability(features, evidence.across)
            # What is said in the other language comes in where the question's own says nothing, and then
            # only beyond doubt.
            if not sentences or support < threshold and not is_doubtful(found):
                sentences, support = evidence.sentences, found
            threshold = fitted if self._own_threshold is None else self._own_threshold
        return _Plan(
            question=question, retrieval=retrieval, sentences=sentences, support=support,
            refuse=support < threshold, seconds_retrieval=time.perf_counter() - began, began=began,
        )

    def _prompt(self, plan: _Plan, history: History) -> Prompt:
        generator = self.generator
        room = generator.context_length - self.settings.max_new_tokens
        if room < 1:
            raise InputError(
                f"max_new_tokens is {self.settings.max_new_tokens}, but {self.settings.generator!r} has a "
                f"context of {generator.context_length} tokens. Lower max_new_tokens."
            )
        layout = "reader" if generator.layout == "reader" else "chat"
        question = plan.retrieval.weighed.text if layout == "reader" else plan.question
        return build_prompt(
            question, plan.retrieval.hits, history=history, layout=layout,
            budget=min(self.settings.max_prompt_tokens, room), count_tokens=generator.count_tokens,
        )

    def _sampling(self) -> Any:
        from rag.engine import Sampling

        chosen = self.settings
        return Sampling(
            temperature=chosen.temperature, top_k=chosen.sampling_top_k, top_p=chosen.top_p,
            repetition_penalty=chosen.repetition_penalty, seed=chosen.seed,
        )

    # after it

    def _refusal(self, plan: _Plan, stats: GenerationStats | None = None) -> Answer:
        return Answer(
            question=plan.question, text=REFUSAL[detect_language(plan.question)], kind="refused",
            hits=plan.retrieval.hits, confidence=plan.support,
            stats=stats or GenerationStats(
                seconds_retrieval=plan.seconds_retrieval,
                seconds_total=time.perf_counter() - plan.began,
            ),
        )

    def _compose(self, plan: _Plan, prompt: Prompt, result: GenerationResult) -> Answer:
        """The answer that is shown: the model's, a quotation in its place, or a refusal."""
        stats = self._stats(plan, result)
        calibration = self._calibration
        if calibration is None:
            if is_refusal(result.text):
                return self._refusal(plan, stats)
            confidence = plan.support
        else:
            confidence = calibration.confidence(result.token_logprobs, plan.support)
            if is_refusal(result.text) or not strip_markers(result.text):
                confidence = 0.0
            if confidence < calibration.threshold:
                return self._quotation(plan, stats)
        strict = self.settings.citations == "strict"
        checked = check_citations(result.text, prompt.hits, page_at=self._page_at, strict=strict)
        if strict and not checked.citations:
            return self._refusal(plan, stats) if calibration is None else self._quotation(plan, stats)
        if calibration is not None and not checked.citations:
            return self._quotation(plan, stats)
        return Answer(
            question=plan.question, text=checked.text, kind="generated",
            citations=checked.citations, hits=prompt.hits, unsupported=checked.unsupported,
            confidence=confidence, stats=stats, doubtful=is_doubtful(plan.support),
            disagreements=self._disagreements(plan, prompt.hits),
        )

    def _quotation(self, plan: _Plan, stats: GenerationStats) -> Answer:
        """The best-supported sentence; where others are nearly as likely to answer, those too."""
        hits = plan.retrieval.hits
        quotes = quotations(plan.sentences)
        citations = []
        lines = []
        for number, start, end in quotes:
            citation = self._citation(hits, number, start, end)
            citations.append(citation)
            lines.append(f"{unlinked(one_line(citation.quote))} [{number}]")
        return Answer(
            question=plan.question, text="\n".join(lines), kind="quoted", citations=tuple(citations),
            hits=hits, confidence=plan.support, stats=stats, doubtful=is_doubtful(plan.support),
            disagreements=self._disagreements(plan, hits),
        )

    def _citation(self, hits: Sequence[Hit], number: int, start: int, end: int) -> Citation:
        """The words [start, end) of a file, which stand in the hit of this number."""
        chunk = hits[number - 1].chunk
        quote = chunk.text[start - chunk.start : end - chunk.start]
        return Citation(number, chunk.path, self._page_at(chunk.path, start), start, end, quote)

    def _disagreements(self, plan: _Plan, hits: Sequence[Hit]) -> tuple[Disagreement, ...]:
        """Where the passages shown say different things about what is asked."""
        weighed = plan.retrieval.weighed
        shown = [item for item in plan.sentences if item.hit_number <= len(hits)]

        def cite(item: Evidence) -> Citation:
            return self._citation(hits, item.hit_number, item.start, item.end)

        return tuple(
            Disagreement(found.kind, cite(found.first), cite(found.second), found.first_words, found.second_words)
            for found in find_contradictions(weighed.text, weighed.weights, shown, hits)
        )

    def _stats(self, plan: _Plan, result: GenerationResult) -> GenerationStats:
        generator = self.generator
        return GenerationStats(
            prompt_tokens=result.prompt_tokens, reused_tokens=result.reused_tokens,
            new_tokens=result.new_tokens, seconds_to_first_token=result.seconds_to_first_token,
            tokens_per_second=result.tokens_per_second, seconds_retrieval=plan.seconds_retrieval,
            seconds_total=time.perf_counter() - plan.began, device=generator.device,
            dtype=generator.dtype, generator=generator.name, finish_reason=result.finish_reason,
            model_bytes=generator.model_bytes, cache_bytes=generator.cache_bytes,
            cached_bytes=generator.cached_bytes, counts_estimated=result.counts_estimated,
        )

    def _page_at(self, path: str, offset: int) -> int | None:
        return self.base.page_at(path, offset)
