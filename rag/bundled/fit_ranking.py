"""Fit what ranks passages and sentences and what refuses: `python -m rag.bundled.fit_ranking`.

Uses only questions that neither embedder nor extractor was trained on: of reading comprehension, whose
writers had the passage before them, and as people ask (`asked_questions`). Writes ranking.json
(passage weights), evidence.json (sentence weights; support weights with the refusal threshold).
Passage and sentence weights minimise the listwise softmax loss (ListNet, Cao et al., 2007);
support is a logistic regression on questions whose gold passage is there or has been taken away.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from rag import evidence, ranking
from rag.answer import Hit
from rag.bundled.fit_questions import FitQuestion, Parts, Searched, search_all
from rag.bundled.fit_weights import first_right, fit_listwise, fit_support
from rag.embedder import load_embedder

HERE = Path(__file__).parent
PASSAGES_GIVEN = 4


_READING: list[Searched] = []  # what forked readers find in their memory


def read_all(items: Sequence[Searched], *, with_and_without: bool) -> None:
    """Have the sentences of ranked questions read on all processors, and kept for `Searched.read`."""
    _READING[:] = items
    read = partial(_read, with_and_without=with_and_without)
    with get_context("fork").Pool() as readers:
        for item, known in zip(items, readers.imap(read, range(len(items)), chunksize=8), strict=True):
            item.known.update(known)


def _read(at: int, *, with_and_without: bool) -> dict[tuple[int, ...], evidence.SentenceFeatures]:
    item = _READING[at]
    for without_gold in (False, True) if with_and_without else (False,):
        hits, order = _hits(item, without_gold=without_gold)
        if hits:
            item.read(tuple(order), hits)
    return item.known


def _close_lists(
    items: Sequence[Searched], weights: dict[str, float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features of the second stage, where the first left the gold passage among the best."""
    lists = []
    for item in items:
        front, features = _close(item, weights)
        if item.gold in front:
            lists.append((features, np.array([at == item.gold for at in front])))
    return lists


def _close(item: Searched, weights: dict[str, float]) -> tuple[list[int], np.ndarray]:
    first = item.features @ np.array(list(weights.values()))
    best = [int(at) for at in np.argsort(-first)]
    front = best[: ranking.count_close([item.stored[at].chunk.text for at in best])]
    texts = [item.stored[at].chunk.text for at in front]
    return front, ranking.close_features(item.question.question, first[front], texts)


def _rank_all(items: Sequence[Searched], weights: dict[str, float], close: dict[str, float]) -> None:
    """Set `scores` as the retriever would."""
    vector = np.array(list(close.values()))
    for item in items:
        front, features = _close(item, weights)
        scored = sorted(zip((features @ vector).tolist(), front, strict=True), reverse=True)
        item.scores = {at: score for score, at in scored}


def _hits(item: Searched, *, without_gold: bool) -> tuple[list[Hit], list[int]]:
    order = [at for at in item.scores if not (without_gold and at == item.gold)][:PASSAGES_GIVEN]
    return [Hit(item.stored[at].chunk, item.scores[at]) for at in order], order


def _sentence_lists(
    items: Sequence[Searched]
) -> list[tuple[np.ndarray, np.ndarray]]:
    lists = []
    for item in items:
        if item.gold is None or not (item.question.answer or item.question.sentences):
            continue
        hits, order = _hits(item, without_gold=False)
        if item.gold not in order:
            continue
        found = item.read(tuple(order), hits)
        right = _answering(item.question, found.sentences, hits, order.index(item.gold))
        if right.any():
            lists.append((found.rows, right))
    return lists


def _quoted(items: Sequence[Searched], weights: dict[str, float]) -> tuple[float, float]:
    """Of questions whose passage is among those given: the share for which what is quoted answers, and
    how many sentences are quoted, the mean."""
    vector = np.array(list(weights.values()))
    answered, counts = [], []
    for item in items:
        hits, order = _hits(item, without_gold=False)
        if item.gold not in order:
            continue
        found = item.read(tuple(order), hits)
        right = _answering(item.question, found.sentences, hits, order.index(item.gold))
        scored = [replace(s, score=score) for s, score in zip(found.sentences, (found.rows @ vector).tolist(), strict=True)]
        places = evidence.quotations(sorted(scored, key=lambda s: -s.score))
        quoted = [any(n == s.hit_number and a <= s.start < b for n, a, b in places) for s in scored]
        answered.append(right[quoted].any())
        counts.append(sum(quoted))
    return float(np.mean(answered)), float(np.mean(counts))


def _answering(
    question: FitQuestion, sentences: Sequence[evidence.Evidence], hits: Sequence[Hit], gold: int
) -> np.ndarray:
    """Which sentences are of the gold passage, `hits[gold]`, and hold the answer: bool (sentences,)."""
    begin = hits[gold].chunk.start
    return np.array([s.hit_number == gold + 1 and _answers(question, s, begin) for s in sentences])


def _answers(question: FitQuestion, sentence: evidence.Evidence, begin: int) -> bool:
    """Whether a sentence of the gold passage, which begins at `begin`, holds the answer."""
    if question.answer:
        return question.answer in sentence.text or sentence.text in question.answer
    return any(start < sentence.end - begin and sentence.start - begin < end for start, end in question.sentences)


def _support_rows(
    items: Sequence[Searched], sentence_weights: np.ndarray, *, swapped: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Support features and whether there is an answer. `swapped`: there is none, whatever is found."""
    rows, labels = [], []
    for item in items:
        if item.gold is None and not swapped:
            continue
        for without_gold in (False,) if swapped else (False, True):
            hits, order = _hits(item, without_gold=without_gold)
            if not hits or not (without_gold or swapped or item.gold in order):
                continue
            found = item.read(tuple(order), hits)
            if not found.sentences:
                continue
            best = found.rows[int(np.argmax(found.rows @ sentence_weights))]
            rows.append(evidence.support_features(
                item.weighed.terms, evidence=evidence.RankedEvidence((), best, found.absent), hit=item.features[order].max(axis=0),
                pool=np.median(item.features, axis=0),
            ))
            labels.append(not without_gold and not swapped)
    return np.array(rows), np.array(labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .jsonl.xz files")
    parser.add_argument("--embedder", default="bundled")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--questions", type=int, default=1300, help="most questions of a language")
    parser.add_argument("--passages", type=int, default=4000, help="most passages of a language")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = search_all(
        options.data, load_embedder(options.embedder), most_questions=options.questions,
        most_passages=options.passages, seed=options.seed,
    )
    _fit_and_write(parts, options.out)


def _fit_and_write(parts: Parts, out: Path) -> None:
    """Fit on 70% of the questions, measure on the rest.

    Passage weights are fitted for each language, on reading comprehension (questions as people ask were
    tried and changed nothing); sentence and support weights on both together, on the same questions in
    other words too, and on questions as people ask. Support also sees questions that nothing answers:
    of which one word has become another's, about what the collection does not speak of, and about the
    subject of a passage that does not tell it.
    """
    passage = {
        language: fit_listwise(_passage_lists(items), ranking.FEATURES, signs=_PASSAGE_SIGNS)
        for language, items in parts.fit.items()
    }
    # No Chinese collection here has titles to fit on.
    share = passage["en"]["place"] / passage["en"]["coverage"]
    passage["zh"]["place"] = round(share * passage["zh"]["coverage"], 5)
    close = {
        language: fit_listwise(
            _close_lists(items, passage[language]), ranking.CLOSE_FEATURES,
            signs=dict.fromkeys(ranking.CLOSE_FEATURES, 1),
        )
        for language, items in parts.fit.items()
    }
    for language in passage:
        answered, unanswered = parts.answered(language), parts.unanswered(language)
        _rank_all([*answered, *unanswered], passage[language], close[language])
        read_all([item for item in answered if item.gold is not None], with_and_without=True)
        read_all(unanswered, with_and_without=False)
    print("passages fitted, sentences read", flush=True)
    asked = list(parts.asked.values())
    own, threshold, doubt = fit_evidence(
        [*parts.fit.values(), *parts.reworded.values(), *(part.fit for part in asked)],
        [*parts.swapped.values(), *(part.missing for part in asked)],
    )
    halves = [_parted(items) for items in parts.across.values()]
    asked_halves = [_parted(part.across) for part in asked]
    across, across_threshold, _ = fit_evidence([items for items, _ in (*halves, *asked_halves)], ())
    # One threshold serves both: the probabilities across languages are moved to where it is right for them.
    across.support["bias"] = round(across.support["bias"] + _logit(threshold) - _logit(across_threshold), 5)
    figures = {
        language: _measure(items, passage[language], own, threshold, parts.far_test[language])
        for language, items in parts.test.items()
    }
    across_figures = {
        language: _measure(items, passage[language], across, threshold)
        for language, (_, items) in zip(parts.across, halves, strict=True)
    }
    asked_figures = {
        language: _measure(part.test, passage[language], own, threshold, part.missing_test, "not told there")
        for language, part in parts.asked.items()
    }
    asked_across_figures = {
        language: _measure(items, passage[language], across, threshold)
        for language, (_, items) in zip(parts.asked, asked_halves, strict=True)
    }
    all_figures = {"figures": figures, "figures_across": across_figures, "figures_asked": asked_figures,
                   "figures_asked_across": asked_across_figures}
    _write(out / "ranking.json", {"weights": passage, "close_weights": close, **all_figures})
    _write(out / "evidence.json", {**asdict(own), "across": asdict(across), "threshold": round(threshold, 3),
                                   "doubt": round(doubt, 3)})
    print(json.dumps(all_figures, indent=1))


@dataclass(frozen=True, slots=True)
class EvidenceWeights:
    sentence: dict[str, float]
    support: dict[str, float]


def fit_evidence(
    groups: Sequence[Sequence[Searched]], swapped: Iterable[Sequence[Searched]]
) -> tuple[EvidenceWeights, float, float]:
    """Sentence and support weights on ranked questions, and the thresholds of `fit_support`."""
    sentence = fit_listwise(
        [row for items in groups for row in _sentence_lists(items)], evidence.FEATURES, signs=_SENTENCE_SIGNS
    )
    vector = np.array(list(sentence.values()))
    parts = [_support_rows(items, vector) for items in groups]
    parts += [_support_rows(items, vector, swapped=True) for items in swapped]
    support, threshold, doubt = fit_support(
        np.concatenate([rows for rows, _ in parts]), np.concatenate([labels for _, labels in parts])
    )
    return EvidenceWeights(sentence, support), threshold, doubt


def _parted(items: Sequence[Searched]) -> tuple[list[Searched], list[Searched]]:
    """Seven tenths to fit on, and the rest to measure on; a passage's questions stay together."""
    passages = list(dict.fromkeys(item.question.passage for item in items))
    fitted = set(passages[: int(len(passages) * 0.7)])
    return [item for item in items if item.question.passage in fitted], [item for item in items if item.question.passage not in fitted]


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _passage_lists(items: Sequence[Searched]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (item.features, np.arange(len(item.stored)) == item.gold)
        for item in items if item.gold is not None
    ]


def _measure(
    items: Sequence[Searched], passage: dict[str, float], weights: EvidenceWeights, threshold: float,
    far: Sequence[Searched] = (), far_name: str = "of another subject",
) -> dict[str, float]:
    """Figures on questions that nothing was fitted on; `far` are about what is not there, and called so."""
    lists = _passage_lists(items)
    found = len(lists) / max(1, len(items))
    first = [next(iter(item.scores)) == item.gold for item in items]
    only = {name: dict.fromkeys(ranking.FEATURES, 0.0) | {name: 1.0} for name in ("bm25", "dense")}
    rows, labels = _support_rows(items, np.array(list(weights.sentence.values())))
    vectors = np.array(list(weights.sentence.values())), np.array(list(weights.support.values()))
    probability = 1 / (1 + np.exp(-(rows @ vectors[1])))
    far_rows, _ = _support_rows(far, vectors[0], swapped=True)
    far_said = 1 / (1 + np.exp(-(far_rows @ vectors[1]))) >= threshold if len(far_rows) else np.zeros(0)
    said = probability >= threshold
    above = probability[labels][:, None] > probability[~labels][None, :]
    quoted, sentences = _quoted(items, weights.sentence)
    return {
        "questions": len(items),
        "gold among candidates": round(found, 4),
        "hit@1": round(float(np.mean(first)), 4),
        "hit@1 first stage": round(first_right(lists, passage) * found, 4),
        "hit@1 bm25": round(first_right(lists, only["bm25"]) * found, 4),
        "hit@1 dense": round(first_right(lists, only["dense"]) * found, 4),
        "sentence@1": round(first_right(_sentence_lists(items), weights.sentence), 4),
        "quotation answers": round(quoted, 4),
        "sentences quoted": round(sentences, 2),
        "support AUC": round(float(above.mean()), 4),
        "answerable kept": round(float(said[labels].mean()), 4),
        "unanswerable refused": round(float((~said[~labels]).mean()), 4),
        **({f"{far_name} refused": round(1 - float(far_said.mean()), 4)} if len(far_said) else {}),
    }


# The cosine itself stays out: its range is another one with every embedder.
_PASSAGE_SIGNS = dict.fromkeys(ranking.FEATURES, 1) | {"dense": 0}
_SENTENCE_SIGNS = {
    "coverage": 1, "context": 1, "soft": 1, "soft_context": 1, "dense": 1, "hit": 1, "pairs": 1,
    "number": 1, "no_number": -1, "time": 1, "no_time": -1, "name": 1, "no_name": -1, "reason": 1,
    "no_reason": -1, "question": -1, "place": 1, "digits_kept": 1, "read": 1, "key": 1,
}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
