"""Which sentence of the retrieved passages answers the question, and is there one at all?

Sentences are scored by features that need no language model: how much of the question's term
weight they hold, how near they are in the embedding, whether they hold the kind of thing that is
asked for (a number, a date, a name, a place, a reason), and what a small trained network makes of
them (`rag.extractor`). Weights are fitted on reading-comprehension questions, as they are and in
other words (`python -m rag.bundled.fit_ranking`).
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
from rag.extractor import bundled_extractor
from rag.language import detect_language
from rag.ranking import FEATURES as MATCH_FEATURES
from rag.sentences import sentence_spans
from rag.simplified import simplify
from rag.soft_match import SoftMatch
from rag.terms import passage_terms

_FITTED = Path(__file__).parent / "bundled" / "evidence.json"

FEATURES = (
    "coverage",  # share of the question's term weight that the sentence holds
    "context",  # the same with the sentences beside it
    "soft",  # share of the question that the sentence says in the same or other words
    "soft_context",  # the same with the sentences beside it
    "dense",  # cosine of question and sentence
    "hit",  # score of its passage, less that of the best one
    "pairs",  # share of neighbouring question terms that are neighbours in it
    "number", "no_number", "time", "no_time", "name", "no_name", "reason", "no_reason",
    "digits_kept",  # share of the question's numbers that it repeats
    "length",  # log of its number of terms
    "question",  # whether it is a question itself
    "first",  # whether its passage begins with it
    "place",  # share of the question's term weight in title and headings
    "key",  # share of the weight of the question's KEY_TERMS heaviest terms that its passage holds
    "read",  # log of the sentence's share among all places where the extractor sees an answer begin
)
KEY_TERMS = 2
_LEAST_READ = -10.0

# "When was it built?" asks; "what happens when it is built" does not.
_VERB = r"(?:am|is|are|was|were|do|does|did|has|have|had|can|could|will|would|shall|should|may|might|must)\b"
_ASKS = {
    "number": re.compile(
        r"\bhow (?:many|much|long|old|far|large|big|high|tall|fast|often|deep)\b|\bwhat (?:percent|number|"
        r"size|length|age|population|amount|fraction|proportion)|多少|几[个种年次人天位层条岁届名]|多[大长高久快重远]|"
        r"比例|第几|几分之"
    ),
    "time": re.compile(
        rf"\bwhen {_VERB}|\bsince when\b|\b(?:what|which) (?:year|date|month|day|century|decade|time)\b|哪[一]?[年天月]|什么时候|"
        r"何时|几[年月日]|哪个(?:世纪|年代|时期|朝代)|什么时间"
    ),
    "name": re.compile(
        rf"(?:^|[,.;:?] ?|\b(?:and|by|to|with|for|from|of) )who(?:m|se)?\b|\bwhere {_VERB}|\b(?:what|which) (?:person|man|woman|king|city|country|state|place|"
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


# A short line between blank lines that is no list item, no table row and ends like no sentence.
_SHORT_LINE = re.compile(
    r"(?![-*|•·>])(?=.*[^\W\d_])(?:[^\n。！？；.!?;:：|]|\.(?=\S|\s)){1,28}(?<![。！？；.!?;:：，,])"
    r"|(?![-*|•·>])(?:[A-Za-z0-9][\w'’.-]*(?: |$)){1,8}(?<![.!?;:,])"
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One sentence of a hit. [start, end) are offsets into the file's text."""

    hit_number: int  # 1-based, as in `[n]`
    start: int
    end: int
    text: str
    score: float


_TABLE_RULE = re.compile(r"\s*\|?\s*:?-{2,}[-:|\s]*(?:\n|$)")
_LIST_MARK = re.compile(r"[-*•·]\s+")
_BARE_NUMBER = re.compile(r"[(（]?(?:\d{1,3}|[一二三四五六七八九十]{1,3}|[a-zA-Z])[.)）、:：]?")  # of a list, alone on its line


def _is_heading(text: str, start: int, end: int, hit: Hit) -> bool:
    """Whether [start, end) of a passage is a heading, the number of a list's item, or the head of a table
    or the rule under it: it says what is spoken of, not what is said."""
    sentence = text[start:end]
    if _BARE_NUMBER.fullmatch(sentence):
        return True
    if _TABLE_RULE.fullmatch(sentence) or sentence.startswith("|") and _TABLE_RULE.match(text[end:].lstrip("\n")):
        return True
    bare = sentence.lstrip("#").strip()
    if sentence.startswith("#") or bare in hit.chunk.headings or bare == hit.chunk.title:
        return True
    alone = text[:start].endswith(("", "\n\n")[start > 0]) and text[end:].startswith("\n\n")
    return alone and _SHORT_LINE.fullmatch(sentence) is not None and _has_text_below(text[end:].lstrip("\n"), hit)


def _has_text_below(below: str, hit: Hit) -> bool:
    """Whether a text begins with a longer paragraph, or with a heading known as such.

    Where one short line follows another, as in notes, each says something.
    """
    paragraph = below.split("\n\n", 1)[0].strip()
    return _SHORT_LINE.fullmatch(paragraph) is None or paragraph in hit.chunk.headings


def asked_for(question: str) -> set[str]:
    """Which kinds of thing the question asks for: "number", "time", "name", "reason"."""
    lowered = simplify(question).lower()
    return {kind for kind, pattern in _ASKS.items() if pattern.search(lowered)}


@dataclass(frozen=True, slots=True)
class SentenceFeatures:
    """Every sentence of the hits, scores still 0, with its features, float64 (n, FEATURES).

    `absent` is the logarithm of the extractor's share for "none of them answers".
    """

    sentences: list[Evidence]
    rows: npt.NDArray[np.float64]
    absent: float


def sentence_features(
    question: str, terms: Sequence[str], weights: Mapping[str, float], hits: Sequence[Hit]
) -> SentenceFeatures:
    """What is known of every sentence of the hits, headings left out."""
    sentences: list[Evidence] = []
    neighbours: list[range] = []  # for each sentence, itself and those beside it in its passage
    for number, hit in enumerate(hits, 1):
        text, first = hit.chunk.text, len(sentences)
        for start, end in sentence_spans(text):
            if not _is_heading(text, start, end, hit):
                if mark := _LIST_MARK.match(text[start:end]):
                    start += mark.end()
                sentences.append(
                    Evidence(number, hit.chunk.start + start, hit.chunk.start + end, text[start:end], 0.0)
                )
        last = len(sentences)
        neighbours += [range(max(first, at - 1), min(last, at + 2)) for at in range(first, last)]
    if not sentences:
        return SentenceFeatures([], np.zeros((0, len(FEATURES))), 0.0)
    read = bundled_extractor().extract(question, [hit.chunk.text for hit in hits])
    soft = SoftMatch(question, [item.text for item in sentences])
    held = [passage_terms(item.text) for item in sentences]
    sets = [set(terms_).intersection(weights) for terms_ in held]
    total = sum(weights[term] for term in terms) or 1.0
    pairs = list(zip(terms, terms[1:], strict=False))
    pair_total = sum(weights[a] + weights[b] for a, b in pairs) or 1.0
    in_place = [set(passage_terms(hit.chunk.place)) for hit in hits]
    places = [sum(weights.get(term, 0.0) for term in held_there) / total for held_there in in_place]
    heaviest = sorted(weights, key=lambda term: (-weights[term], term))[:KEY_TERMS]
    key_total = sum(weights[term] for term in heaviest) or 1.0
    in_hits = [there.union(passage_terms(hit.chunk.text)) for there, hit in zip(in_place, hits, strict=True)]
    keys = [sum(weights[term] for term in heaviest if term in there) / key_total for there in in_hits]
    best_score = max(hit.score for hit in hits)
    kinds = _KindsAsked(question)
    own = soft.coverages()
    rows = []
    for at, item in enumerate(sentences):
        around = set().union(*(sets[other] for other in neighbours[at]))
        near = set(zip(held[at], held[at][1:], strict=False))
        near |= set(zip(held[at], held[at][2:], strict=False))
        rows.append([
            sum(weights[term] for term in sets[at]) / total,
            sum(weights[term] for term in around) / total,
            float(own[at]),
            soft.coverage(neighbours[at]),
            float(soft.dense[at]),
            hits[item.hit_number - 1].score - best_score,
            sum(weights[a] + weights[b] for a, b in pairs if (a, b) in near) / pair_total,
            *kinds.features(item.text),
            math.log1p(len(held[at])),
            float(item.text.endswith(("?", "？"))),
            float(neighbours[at][0] == at),
            places[item.hit_number - 1],
            keys[item.hit_number - 1],
            max(_LEAST_READ, read.mass(
                item.hit_number - 1, item.start - hits[item.hit_number - 1].chunk.start,
                item.end - hits[item.hit_number - 1].chunk.start,
            )),
        ])
    return SentenceFeatures(sentences, np.array(rows), read.null)


class _KindsAsked:
    """Which kinds of thing a question asks for, and whether a sentence has them to offer."""

    def __init__(self, question: str) -> None:
        self.wants = asked_for(question)
        self.lowered = simplify(question).lower()
        self.digits = set(_DIGITS.findall(self.lowered))

    def features(self, sentence: str) -> list[float]:
        """"number" to "digits_kept" of FEATURES. What stands in the question itself is no answer."""
        sentence = simplify(sentence)
        lowered = sentence.lower()
        digits = set(_DIGITS.findall(lowered))
        new_digits = digits - self.digits
        has = {
            "number": bool(new_digits),
            "time": bool(_YEAR.search(sentence)) and bool(new_digits or "世纪" in sentence),
            "name": any(name.lower() not in self.lowered for name in _NAME.findall(sentence)),
            "reason": bool(_REASON.search(lowered)),
        }
        found: list[float] = []
        for kind in ("number", "time", "name", "reason"):
            found += [float(kind in self.wants and has[kind]), float(kind in self.wants and not has[kind])]
        return [*found, len(self.digits & digits) / len(self.digits) if self.digits else 0.0]


@dataclass(frozen=True, slots=True)
class _Weights:
    sentence: npt.NDArray[np.float64]  # (FEATURES,)
    support: npt.NDArray[np.float64]  # (SUPPORT_FEATURES,)


@dataclass(frozen=True, slots=True)
class _Fitted:
    own: _Weights
    across: _Weights  # where question and sentence are of different languages: no word is shared
    threshold: float
    doubt: float


@lru_cache(maxsize=1)
def _fitted() -> _Fitted:
    values = json.loads(_FITTED.read_text(encoding="utf-8"))
    own, across = (
        _Weights(
            np.array([part["sentence"][name] for name in FEATURES]),
            np.array([part["support"][name] for name in SUPPORT_FEATURES]),
        )
        for part in (values, values["across"])
    )
    return _Fitted(own, across, float(values["threshold"]), float(values["doubt"]))


@dataclass(frozen=True, slots=True)
class RankedEvidence:
    """Sentences, the one that answers best first, and that one's features beside the usual ones.

    `across`: the best one is not in the question's language.
    """

    sentences: tuple[Evidence, ...]
    best_features: npt.NDArray[np.float64]  # float64 (FEATURES,)
    absent: float  # as in SentenceFeatures
    across: bool = False


def rank_sentences(
    question: str, terms: Sequence[str], weights: Mapping[str, float], hits: Sequence[Hit]
) -> list[RankedEvidence]:
    """The sentences of the hits by how well they answer the question.

    Twice where there are hits in both languages: first with those in the question's language
    preferred, then with the others; which to believe is for `support_probability` to say. Empty without hits.
    """
    found = sentence_features(question, terms, weights, hits)
    sentences, features = found.sentences, found.rows
    language = detect_language(question)
    same = [detect_language(hit.chunk.text) == language for hit in hits]
    own = np.array([same[item.hit_number - 1] for item in sentences], dtype=bool)
    ranked = []
    for across, preferred in ((False, own), (True, ~own)):
        if not preferred.any():
            continue
        fitted = _fitted().across if across else _fitted().own
        scores = features @ fitted.sentence + _SAME_LANGUAGE * preferred
        order = [int(at) for at in np.argsort(-scores, kind="stable")]
        best = next(at for at in order if preferred[at])
        order.remove(best)
        ranked.append(RankedEvidence(
            tuple(replace(sentences[at], score=float(scores[at])) for at in (best, *order)),
            features[best], found.absent, across,
        ))
    return ranked


_SAME_LANGUAGE = 1.0  # not fitted, as SAME_LANGUAGE of the ranking
# Openings that say nothing without the sentence before.
_LEANS = re.compile(
    r"(?:It|They|He|She|Its|Their|His|Her|Both|The (?:former|latter)|(?:This|That|These|Those)(?= (?:is|are|was|were|"
    r"means?|makes?|happens?|lets?|keeps?|can|could|will|would|may|might|has|have|does|do|did|allows?|leads?|helps?|gives?|"
    r"saves?|costs?|takes?|needs?|works?|holds?|applies|apply|includes?|requires?|explains?|also|only)\b))\b"
    r"|(?:它们?|他们?|她们?|前者|后者|两者|二者|其(?!他|它|余|实|中)|这(?=[是就也会能使让可要叫称]|意味|表示|说明|适用|需要)|"
    r"此(?!外|时|后|前|处|种|类))"
)
# A line that ends otherwise is a heading that looks like none, or a caption: run on, it reads as part of what follows.
_ENDS_AS_SENTENCE = re.compile(r"[。！？；：.!?:;…][\"'”’」』)）\]]*$")
_QUOTED_MASS = 0.95
_MOST_QUOTED = 5
_MOST_SOURCES = 2


def quotations(sentences: Sequence[Evidence]) -> list[tuple[int, int, int]]:
    """What to quote of ranked sentences: (hit number, start, end), first the one with the best sentence,
    then the others by passage and in reading order.

    The scores were fitted as a softmax, so they give each sentence its probability of being the one
    that answers. Sentences are taken until _QUOTED_MASS of it is reached, at most _MOST_QUOTED of
    _MOST_SOURCES passages; neighbours become one quotation. One that begins with a pronoun brings the
    sentence before it, which says what is spoken of.
    """
    if not sentences:
        return []
    mass = np.exp(np.array([sentence.score for sentence in sentences]) - sentences[0].score)
    mass /= mass.sum()
    order: dict[int, int] = {}  # hit number -> place
    chosen: list[Evidence] = []
    reached = 0.0
    for item, share in zip(sentences, mass.tolist(), strict=True):
        if reached >= _QUOTED_MASS or len(chosen) == _MOST_QUOTED:
            break
        if item.hit_number in order or len(order) < _MOST_SOURCES:
            order.setdefault(item.hit_number, len(order))
            chosen.append(item)
            reached += share
    ends = {(item.hit_number, item.end): item for item in sentences}
    for item in list(chosen):
        if _LEANS.match(item.text):
            before = next((found for gap in range(3) if (found := ends.get((item.hit_number, item.start - gap)))), None)
            if before is not None and before not in chosen and _ENDS_AS_SENTENCE.search(before.text):
                chosen.append(before)
    quoted: list[tuple[int, int, int]] = []
    for item in sorted(chosen, key=lambda s: (order[s.hit_number], s.start)):
        if quoted and quoted[-1][0] == item.hit_number and 0 <= item.start - quoted[-1][2] <= 2:
            quoted[-1] = (item.hit_number, quoted[-1][1], item.end)
        else:
            quoted.append((item.hit_number, item.start, item.end))
    best = sentences[0]
    first = next(at for at, (number, start, end) in enumerate(quoted)
                 if number == best.hit_number and start <= best.start < end)
    return [quoted[first], *quoted[:first], *quoted[first + 1 :]]


SUPPORT_FEATURES = (
    "bias", "coverage", "context", "soft", "soft_context", "dense", "pairs",
    "hit_coverage", "hit_window", "bm25_gap", "terms", "key",
    "read",  # minus the log of the extractor's share for "none of them answers"
    "read_best",  # log of its share for the best sentence
    "kind", "no_kind",  # whether that sentence has, or lacks, the kind of thing that is asked for
)
_KINDS = ("number", "time", "name")
_MOST_READ = 8.0


def support_features(
    terms: Sequence[str], *, evidence: RankedEvidence,
    hit: npt.NDArray[np.float64], pool: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """float64 (SUPPORT_FEATURES,): what speaks for an answer being there.

    `hit`: the best of each match feature among the hits; `pool`: the median of each among all
    candidates, as a passage that answers stands out from what merely is of the same field.
    """
    best = dict(zip(FEATURES, evidence.best_features, strict=True))
    match = dict(zip(MATCH_FEATURES, hit, strict=True))
    pool_match = dict(zip(MATCH_FEATURES, pool, strict=True))
    return np.array([
        1.0, best["coverage"], best["context"], best["soft"], best["soft_context"], best["dense"],
        best["pairs"], match["coverage"], match["window"], match["bm25"] - pool_match["bm25"],
        math.log1p(len(terms)), best["key"], min(_MOST_READ, -evidence.absent), best["read"],
        max(best[kind] for kind in _KINDS), max(best[f"no_{kind}"] for kind in _KINDS),
    ])


def built_in_threshold() -> float:
    """The support below which to refuse, where none was fitted to one's own base."""
    return _fitted().threshold


def is_doubtful(support: float) -> bool:
    """Whether questions with this support are as likely to have no answer there as to have one."""
    return support < _fitted().doubt


def support_probability(features: npt.NDArray[np.float64], across: bool = False) -> tuple[float, float]:
    """Probability that the passages answer the question, and the fitted threshold to refuse below.

    `across` as in RankedEvidence.
    """
    fitted = _fitted().across if across else _fitted().own
    score = float(features @ fitted.support)
    return 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, score)))), _fitted().threshold
