"""Which sentence of the retrieved passages answers the question, and is there one at all?

Sentences are scored by features that need no language model: how much of the question's term
weight they hold, how near they are in the embedding, whether they hold the kind of thing that is
asked for (a number, a date, a name, a place, a reason). Weights are fitted on reading-comprehension
questions (`python -m rag.bundled.fit_ranking`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rag.answer import Hit
from rag.embedder import Embedder
from rag.language import Language
from rag.terms import passage_terms

_FITTED = Path(__file__).parent / "bundled" / "evidence.json"

# A full stop ends a sentence where blank space and no lower-case letter follows, so that "3.5",
# "e.g. this" and "v2.1" stay whole. Chinese marks and line breaks always end one.
_END = re.compile(
    r"[。！？；](?:[”’」』）)\"']*)|[!?](?:[\"')\]]*)(?=\s|$)|(?<![A-Z])(?<!\b[Nn]o)(?<!\b(?:Mr|Dr|St|vs|cf))"
    r"(?<!\bMrs)(?<!\b[Ff]ig)\.(?:[\"')\]]*)(?=\s+[^a-z\s]|\s*$)|\n+"
)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """[start, end) of each sentence, without surrounding blanks. Every letter is in one of them."""
    spans = []
    begin = 0
    for match in [*_END.finditer(text), None]:
        end = match.end() if match else len(text)
        piece = text[begin:end]
        stripped = piece.strip()
        if stripped:
            start = begin + len(piece) - len(piece.lstrip())
            spans.append((start, start + len(stripped)))
        begin = end
    return spans


def best_sentence_start(text: str, weights: Mapping[str, float]) -> int:
    """Offset of the sentence that holds most of the question's term weight; 0 where none does."""
    best, best_start = 0.0, 0
    for start, end in sentence_spans(text):
        held = sum(weights.get(term, 0.0) for term in set(passage_terms(text[start:end])))
        if held > best:
            best, best_start = held, start
    return best_start


FEATURES = (
    "coverage", "context", "dense", "hit", "pairs", "number", "no_number", "time", "no_time",
    "name", "no_name", "reason", "length", "question", "first", "place", "digits_kept",
)

_ASKS = {
    "number": re.compile(
        r"\bhow (?:many|much|long|old|far|large|big|high|tall|fast|often|deep)\b|\bwhat (?:percent|number|"
        r"size|length|age|population|amount|fraction|proportion)|多少|几[个种年次人天位层条岁届名]|多[大长高久快重远]|"
        r"比例|第几|几分之"
    ),
    "time": re.compile(
        r"\bwhen\b|\b(?:what|which) (?:year|date|month|day|century|decade|time)\b|哪[一]?[年天月]|什么时候|"
        r"何时|几[年月日]|哪个(?:世纪|年代|时期|朝代)|什么时间"
    ),
    "name": re.compile(
        r"\bwho(?:m|se)?\b|\bwhere\b|\b(?:what|which) (?:person|man|woman|king|city|country|state|place|"
        r"company|team|name)|谁|哪位|何人|叫什么|哪里|哪儿|何地|哪个(?:国家|城市|地方|省)|什么名字|什么地方"
    ),
    "reason": re.compile(r"\bwhy\b|\b(?:what|for what) (?:reason|cause|purpose)|为什么|为何|原因|目的是"),
}
_YEAR = re.compile(
    r"\b1\d{3}\b|\b20\d{2}\b|\b(?:January|February|March|April|May|June|July|August|September|October|"
    r"November|December)\b|\bcentury\b|\b\d{1,2}:\d{2}\b|[0-9〇一二三四五六七八九十]+[年月日]|世纪|朝|年间"
)
_DIGITS = re.compile(
    r"\d+(?:[.,]\d+)*|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|"
    r"fifty|hundred|thousand|million|billion|half|twice|third|quarter|dozen)\b|[一二两三四五六七八九十百千万亿半]+"
    r"(?=[个种年次人天位层条岁届名倍章节部本段步%分之点元])"
)
_NAME = re.compile(r"(?<=[\w,;:'\"(] )[A-Z][\w'’-]+|《[^》]+》|[\u4e00-\u9fff]{1,4}(?:省|市|县|国|州|区|大学|公司)|·")
_REASON = re.compile(
    r"\bbecause\b|\bdue to\b|\bsince\b|\bso that\b|\bin order to\b|\btherefore\b|\bas a result\b|\bto (?:avoid|"
    r"prevent|keep|make)\b|因为|由于|因此|所以|以便|为了|从而|使得|避免|原因"
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One sentence of a hit. [start, end) are offsets into the file's text."""

    hit_number: int  # 1-based, as in `[n]`
    start: int
    end: int
    text: str
    score: float


def asked_for(question: str) -> set[str]:
    """Which kinds of thing the question asks for: "number", "time", "name", "reason"."""
    lowered = question.lower()
    return {kind for kind, pattern in _ASKS.items() if pattern.search(lowered)}


def sentence_features(
    question: str, terms: Sequence[str], weights: Mapping[str, float], hits: Sequence[Hit],
    embedder: Embedder,
) -> tuple[list[Evidence], npt.NDArray[np.float64]]:
    """Every sentence of the hits (scores still 0) and its features, float64 (n, FEATURES)."""
    sentences: list[Evidence] = []
    rows: list[list[float]] = []
    total = sum(weights[term] for term in terms) or 1.0
    pairs = list(zip(terms, terms[1:], strict=False))
    pair_total = sum(weights[a] + weights[b] for a, b in pairs) or 1.0
    wants = asked_for(question)
    question_digits = set(_DIGITS.findall(question.lower()))
    question_lower = question.lower()
    best_score = max((hit.score for hit in hits), default=0.0)
    for number, hit in enumerate(hits, 1):
        text = hit.chunk.text
        spans = sentence_spans(text)
        held = [passage_terms(text[start:end]) for start, end in spans]
        sets = [set(terms_).intersection(weights) for terms_ in held]
        place = sum(weights.get(term, 0.0) for term in set(passage_terms(hit.chunk.place))) / total
        for at, (start, end) in enumerate(spans):
            sentence = text[start:end]
            around: set[str] = set(sets[at])
            around.update(*sets[max(0, at - 1) : at + 2])
            new_digits = set(_DIGITS.findall(sentence.lower())) - question_digits
            new_names = [name for name in _NAME.findall(sentence) if name.lower() not in question_lower]
            has = {
                "number": bool(new_digits),
                "time": bool(_YEAR.search(sentence)) and bool(new_digits or "世纪" in sentence),
                "name": bool(new_names),
                "reason": bool(_REASON.search(sentence.lower())),
            }
            following = list(zip(held[at], held[at][1:], strict=False))
            near = set(following) | set(zip(held[at], held[at][2:], strict=False))
            digits_kept = len(question_digits & set(_DIGITS.findall(sentence.lower())))
            rows.append([
                sum(weights[term] for term in sets[at]) / total,
                sum(weights[term] for term in around) / total,
                0.0,
                hit.score - best_score,
                sum(weights[a] + weights[b] for a, b in pairs if (a, b) in near) / pair_total,
                float("number" in wants and has["number"]),
                float("number" in wants and not has["number"]),
                float("time" in wants and has["time"]),
                float("time" in wants and not has["time"]),
                float("name" in wants and has["name"]),
                float("name" in wants and not has["name"]),
                float("reason" in wants and has["reason"]),
                math.log1p(len(held[at])),
                float(sentence.endswith(("?", "？"))),
                float(at == 0),
                place,
                digits_kept / len(question_digits) if question_digits else 0.0,
            ])
            sentences.append(
                Evidence(number, hit.chunk.start + start, hit.chunk.start + end, sentence, 0.0)
            )
    features = np.array(rows).reshape(len(rows), len(FEATURES))
    if sentences:
        vectors = embedder.embed_passages([item.text for item in sentences])
        features[:, 2] = vectors @ embedder.embed_questions([question])[0]
    return sentences, features


@lru_cache(maxsize=1)
def fitted() -> dict[str, dict[str, dict[str, float]]]:
    """"sentence" and "support": language -> feature -> weight ("bias" for the latter)."""
    result: dict[str, dict[str, dict[str, float]]] = json.loads(_FITTED.read_text(encoding="utf-8"))
    return result


@dataclass(frozen=True, slots=True)
class RankedEvidence:
    """Sentences, the one that answers best first, and that one's features."""

    sentences: tuple[Evidence, ...]
    best_features: npt.NDArray[np.float64]  # float64 (FEATURES,)


def rank_sentences(
    question: str, terms: Sequence[str], weights: Mapping[str, float], hits: Sequence[Hit],
    embedder: Embedder, *, language: Language,
) -> RankedEvidence:
    """The sentences of the hits by how well they answer the question."""
    sentences, features = sentence_features(question, terms, weights, hits, embedder)
    if not sentences:
        return RankedEvidence((), np.zeros(len(FEATURES)))
    fit = fitted()["sentence"][language]
    scores = features @ np.array([fit[name] for name in FEATURES])
    order = [int(at) for at in np.argsort(-scores, kind="stable")]
    ranked = tuple(replace(sentences[at], score=float(scores[at])) for at in order)
    return RankedEvidence(ranked, features[order[0]])


SUPPORT_FEATURES = (
    "bias", "coverage", "context", "dense", "pairs", "wrong_kind", "hit_bm25", "hit_dense",
    "hit_coverage", "hit_window", "unknown", "terms",
)


def support_features(
    question: str, terms: Sequence[str], weights: Mapping[str, float], *,
    sentence: npt.NDArray[np.float64], hit: npt.NDArray[np.float64], unknown_terms: frozenset[str],
) -> npt.NDArray[np.float64]:
    """float64 (SUPPORT_FEATURES,): what speaks for an answer being there.

    `sentence`: the best sentence's features; `hit`: the best of each match feature among the hits;
    `unknown_terms`: question terms that stand nowhere in the base.
    """
    total = sum(weights[term] for term in terms) or 1.0
    wrong_kind = sentence[6] + sentence[8] + sentence[10]
    return np.array([
        1.0, sentence[0], sentence[1], sentence[2], sentence[4], wrong_kind, hit[0], hit[1], hit[2],
        hit[3], sum(weights[term] for term in unknown_terms) / total, math.log1p(len(terms)),
    ])


def support_probability(features: npt.NDArray[np.float64], language: Language) -> tuple[float, float]:
    """Probability that the passages answer the question, and the fitted threshold to refuse below."""
    fit = fitted()["support"][language]
    score = float(features @ np.array([fit[name] for name in SUPPORT_FEATURES]))
    return 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, score)))), fit["threshold"]
