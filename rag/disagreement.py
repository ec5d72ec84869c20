"""Do two places of the documents say different things about what is asked?

Two sentences disagree where they say the same but for one number, date or time of day, or where one
denies what the other says, and the question asks for just that. Wrong alarms are worse than missed
ones: whatever may make them statements about different things (another year, version, name, another
word that qualifies one of them) speaks against it. Amounts are compared as `rag.values` reads them.
Sentences in different languages aren't compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

from rag.answer import Hit
from rag.evidence import Evidence, asked_for
from rag.knowledge import path_words
from rag.language import detect_language
from rag.term_weights import term_weights
from rag.terms import passage_terms, question_terms
from rag.values import Value, agree, dimension_of, find_values, plain

_COMPARED = 12  # sentences that answer best
_MOST = 3  # disagreements that are told
_BEFORE = 2  # sentences before one, in which its subject may be named
_ABOUT_QUESTION = 0.45  # least share of the question's weight in each sentence and what stands around it
_SAME = 0.6  # least share of the shorter statement's weight that both say
_HEAVY = 1.2  # weight from which a term makes a difference


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two sentences of different hits, the better answer first, and the words in which they differ."""

    kind: Literal["number", "date", "negation"]
    first: Evidence
    second: Evidence
    first_words: str
    second_words: str


def find_contradictions(
    question: str, weights: Mapping[str, float], ranked: Sequence[Evidence], hits: Sequence[Hit]
) -> list[Contradiction]:
    """At most three, the best answers first. `ranked`: sentences of the hits, the best answer first;
    `weights`: of the question's terms."""
    asked = _Asked.of(question, weights)
    if asked.wants == "nothing" or len({item.hit_number for item in ranked}) < 2:
        return []
    language = detect_language(question)
    statements = [
        _Statement(item, hits[item.hit_number - 1], asked) for item in ranked[:_COMPARED]
        if detect_language(item.text) == language and not item.text.rstrip().endswith(("?", "？"))
    ]
    told = [each for each in statements if each.share_of_question >= _ABOUT_QUESTION]
    found: list[Contradiction] = []
    for first, second in combinations(told, 2):
        if first.item.hit_number == second.item.hit_number or len(found) == _MOST:
            continue
        if (contradiction := _compare(asked, first, second)) is not None:
            known = {(each.first_words, each.second_words) for each in found}
            if (contradiction.first_words, contradiction.second_words) not in known:
                found.append(contradiction)
    return found


# the question

_YES_OR_NO = re.compile(
    r"^(?:[^?]*, )?(?:is|are|was|were|do|does|did|can|could|may|might|must|should|shall|will|would|has|have|had)\b|"
    r"吗[?？。]?$|是否|能不能|可不可以|是不是|有没有|会不会|可否|能否|要不要|需不需要|算不算|可以不可以"
)
_NO_VALUE = re.compile(
    r"^(?:who|whom|whose|why|how (?:do|does|did|can|is|are|was|to|should|would)|where)\b|为什么|为何|怎么|怎样|如何|谁|哪里|哪儿|哪位|"
    r"\b(?:difference|compare|explain|describe)\b|区别|不同|比较|介绍"
)
_WHEN = re.compile(
    r"\bwhen\b|\b(?:what|which) (?:year|date|month|day|century|decade)\b|\bdeadline\b|哪[一]?[年天月日]|什么时候|何时|几[年月日]|"
    r"截止日期|什么日期|日期是"
)
_CLOCK = re.compile(r"\bwhen\b|\bwhat time\b|几点|什么时候|何时|什么时间")
_HOW_MUCH = (
    (re.compile(r"\bhow long\b|\bhow many (?:seconds|minutes|hours|days|weeks|months|years)\b|多长时间|多久|几[天周年]|几个月|多少[天年周]|多少个(?:月|小时)|[期间]是?(?:有)?多长"), ("duration",)),
    (re.compile(r"\bhow (?:far|high|tall|wide|deep)\b|多[高远宽深]"), ("length",)),
    (re.compile(r"\bhow (?:heavy)\b|多重"), ("mass",)),
    (re.compile(r"\b(?:percent|percentage|share|proportion)\b|百分之|比例|占多少"), ("percent",)),
    (re.compile(r"\bhow (?:much|expensive)\b|\b(?:price|fee|rent|cost|costs)\b|多少钱|价格|费用|租金|罚款|收费"),
     ("euro", "dollar", "pound", "yuan", "franc", "yen", "percent", "mass", "volume", "data", "energy", "power")),
)
_COUNTED = re.compile(r"\bhow many ([a-z]+)|(?:多少|几)(?:个|名|位|种|门|条|项|件|台|张|本|款|家|间|辆|层|次|章|块)?([\u4e00-\u9fff]{1,2})")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a question asks for: "negation" (yes or no), "value", or "nothing" that could differ so."""

    text: str
    wants: Literal["negation", "value", "nothing"]
    weights: Mapping[str, float]
    values: tuple[Value, ...]
    kinds: frozenset[str]  # of values: "date", "clock", "quantity"
    dimensions: tuple[str, ...]  # () where any will do
    counted: frozenset[str]  # terms of what is counted

    @classmethod
    def of(cls, question: str, weights: Mapping[str, float]) -> _Asked:
        text = plain(question).strip()
        values = find_values(text)
        numbers = {term for value in values for term in passage_terms(text[value.start : value.end])}
        bare = set(passage_terms(_FORM_ZH.sub(" ", text)))
        own = {term: weight for term, weight in weights.items() if term in bare - numbers - _MEASURES}
        counted: frozenset[str] = frozenset()
        dimensions: tuple[str, ...] = ()
        kinds = {"date"} if _WHEN.search(text) else set[str]()
        if _CLOCK.search(text):
            kinds.add("clock")
        if not kinds:
            kinds = {"quantity", "date", "clock"} if not asked_for(text) & {"number"} else {"quantity"}
            dimensions = next((units for pattern, units in _HOW_MUCH if pattern.search(text)), ())
            if not dimensions and (match := _COUNTED.search(text)):
                unit = match.group(1) or match.group(2)
                counted = frozenset(passage_terms(unit))
                known = dimension_of(unit) or dimension_of(unit[:1] if not unit.isascii() else unit)
                dimensions = (known,) if known else ()
        if _YES_OR_NO.search(text):
            wants: Literal["negation", "value", "nothing"] = "negation"
        else:
            wants = "nothing" if _NO_VALUE.search(text) and not asked_for(text) & {"number", "time"} else "value"
        return cls(text, wants, own, values, frozenset(kinds), dimensions, counted)

    def is_for(self, value: Value, text: str) -> bool:
        """Whether a sentence's value is of the kind that is asked for."""
        if value.kind not in self.kinds or (value.kind == "quantity" and value.dimension == "number"):
            return False
        if value.kind != "quantity":
            return True
        if self.dimensions:
            return value.dimension in self.dimensions
        if self.counted:
            place = text[value.start : value.end + 24]
            behind = frozenset(passage_terms(place)[:6])
            return bool(self.counted & behind) or any(
                not term.isascii() and term in place[: value.end - value.start + 6] for term in self.counted
            ) or (
                value.dimension == "count:person" and bool(self.counted & _PEOPLE)
            )
        return True


_PEOPLE = frozenset(passage_terms("people persons employees workers inhabitants residents members staff 员工 居民 人 职工 会员 成员"))

# A question's words for what kind of value it asks for; the sentence that answers needn't have them.
_MEASURES = frozenset(passage_terms(
    "percent percentage share proportion number amount year date day month time hour 百分之几 百分比 分之 比例 时间 日期 数量"
))

_FORM_ZH = re.compile(
    r"(?:有|是|为|占)?(?:多[高远宽深重大长快久]|多少|百分之几|几)|什么时候|什么时间|何时|哪一?[年天日月]|吗|能不能|可不可以|是不是|有没有|会不会|是否|能否|可否"
)

# the statements

# Words that deny, and those that say by themselves that something must not be.
_DENIES = re.compile(
    r"\b(?:not|no|never|cannot|without|none|nor|neither)\b|n['’]t\b|\b(?:prohibited|forbidden|banned|impossible)\b|"
    r"不(?!超过|少于|低于|高于|大于|小于|同|断|仅|但|论|管|久|只|过|得不|可或缺|足|到)|没有|没|无法|无需|无须|禁止|严禁|并非|未(?!来|满)|勿|别(?!墅|的|处|名)|无(?!论|线|人机)"
)
_PERMISSION = frozenset(passage_terms("allowed permitted prohibited forbidden banned may can possible cannot permit")) | {
    "允许", "可以", "禁止", "严禁", "不得", "不能", "不可", "以养", "许养",
}
_CLAUSE = re.compile(r"[，,；;。！!：:]|(?<=[.!?])\s|\b(?:but|while|whereas|although)\b|但是?|而是?")
_NAME_EN = re.compile(r"(?<=[a-z0-9,;:'’] )[A-Z][\w'’-]*|\b[A-Za-z]*[a-z][A-Z]\w*|\b[A-Z]{2,}\w*|\b[A-Za-z]+-?\d[\w.-]*")
_NAME_ZH = re.compile(r"[A-Za-z][A-Za-z0-9.-]*|《[^》]+》|“[^”]+”")
# What stands behind such a word may confine a statement to a part of what the other one is about.
_CONFINES = re.compile(r"\b(?:for|during|in|on|at|with|if|when|unless|except|only|under|by|after|before|from|among|per)\b")
# These add nothing that would tell two statements apart.
_SLIGHT = frozenset(passage_terms(
    "also still now currently exactly about around time times year total all every each per must get cost costs need will "
    "shall just well longer more"
))


_SLIGHT_ZH = "的是为有在于自从被由约达共计每各也都还就已将会应须可能以允许得及和与起内中该此其"


class _Statement:
    """One sentence as it is compared: its values, the terms of the rest, and what stands around it."""

    def __init__(self, item: Evidence, hit: Hit, asked: _Asked) -> None:
        self.item = item
        self.asked = asked
        self.text = plain(item.text)
        self.values = find_values(self.text)
        chunk = hit.chunk
        # What says by itself which one is spoken of: "Phone A", "Phone B".
        self.labels = (path_words(chunk.path), chunk.title, chunk.headings[-1] if chunk.headings else "")
        before = chunk.text[: item.start - chunk.start]
        self.around = f"{path_words(chunk.path)}. {chunk.place}. " + " ".join(re.split(r"(?<=[.。!！?？\n])", before)[-_BEFORE - 1 :])

    @cached_property
    def core(self) -> int:
        """Where the clause ends that holds the asked value, or else says most of the question.

        What follows is another matter: "the rent is 1,250 euros, heating is paid separately".
        """
        wanted = self.wanted()
        best, best_end, start = -1.0, len(self.text), 0
        for end in [*(match.end() for match in _CLAUSE.finditer(self.text)), len(self.text)]:
            if wanted and start <= wanted[0].start < end:
                return end
            terms = set(passage_terms(_DENIES.sub(" ", self.text[start:end])))
            held = sum(self.asked.weights.get(term, 0.0) for term in terms)
            if held > best:
                best, best_end = held, end
            start = end
        return best_end

    @cached_property
    def terms(self) -> dict[str, float]:
        """The weight of each term up to the end of that clause that is neither value nor denial."""
        return _weighed(self._without_values())

    @cached_property
    def context(self) -> frozenset[str]:
        return frozenset(passage_terms(self.around))

    @cached_property
    def share_of_question(self) -> float:
        weights = self.asked.weights
        total = sum(weights.values()) or 1.0
        there = self.context.union(passage_terms(self.text))
        own = set(self.terms) & set(weights)
        return sum(weight for term, weight in weights.items() if term in there) / total if own else 0.0

    @cached_property
    def names(self) -> frozenset[str]:
        pattern = _NAME_ZH if detect_language(self.item.text) == "zh" else _NAME_EN
        spans = [(value.start, value.end) for value in self.values]
        return frozenset(
            plain(match.group()) for match in pattern.finditer(self.item.text)
            if not any(start < match.end() and match.start() < end for start, end in spans)
        )

    @cached_property
    def qualifiers(self) -> dict[str, list[Value]]:
        """Dates and references that say which state is spoken of: the sentence's own, else those around."""
        own, near = _qualifying(self.values), _qualifying(find_values(plain(self.around)))
        return {**near, **own}

    @cached_property
    def denies(self) -> bool:
        """Whether the clause that says most of the question is denied."""
        clauses = [clause for clause in _CLAUSE.split(self.text[: self.core]) if clause]
        return bool(clauses) and len(_DENIES.findall(clauses[-1])) % 2 == 1

    def wanted(self) -> list[Value]:
        """The values that the question asks for; those that it gives itself are no answer."""
        if self.asked.wants != "value":
            return []
        return [
            value for value in self.values if self.asked.is_for(value, self.text)
            and not any(value.kind == given.kind and value.dimension == given.dimension and agree(value, given)
                        for given in self.asked.values)
        ]

    def words(self, value: Value) -> str:
        return self.item.text[value.start : value.end].strip(" .,;，。；")

    def _without_values(self) -> str:
        text = self.text
        for value in self.values:
            text = text[: value.start] + " " * (value.end - value.start) + text[value.end :]
        return _DENIES.sub(" ", text[: self.core])


def _weighed(text: str) -> dict[str, float]:
    terms = [term for term in question_terms(text) if term not in _PERMISSION and (len(term) > 1 or term.isalnum())]
    return term_weights(terms, {}, 0)


def _qualifying(values: Sequence[Value]) -> dict[str, list[Value]]:
    found: dict[str, list[Value]] = {}
    for value in values:
        if value.kind == "date" and value.date[0] is not None:
            found.setdefault("year", []).append(value)
        elif value.kind == "reference":
            found.setdefault(value.dimension, []).append(value)
    return found


# two of them


def _compare(asked: _Asked, first: _Statement, second: _Statement) -> Contradiction | None:
    if not _same_subject(asked, first, second):
        return None
    if asked.wants == "negation":
        if first.denies == second.denies or first.share_of_question < 0.6 or second.share_of_question < 0.6:
            return None
        return Contradiction("negation", first.item, second.item, first.item.text.strip(), second.item.text.strip())
    mine, other = first.wanted(), second.wanted()
    pairs = [(a, b) for a in mine for b in other if (a.kind, a.dimension) == (b.kind, b.dimension)]
    if not pairs or any(agree(a, b) for a, b in pairs):
        return None
    a, b = pairs[0]
    alike = [(value.kind, value.dimension) for value in (*first.values, *second.values)].count((a.kind, a.dimension))
    if len(pairs) > 1 or alike > 2 or (a.bound and b.bound and a.bound != b.bound):
        return None
    kind: Literal["number", "date"] = "date" if a.kind == "date" else "number"
    return Contradiction(kind, first.item, second.item, first.words(a), second.words(b))


def _same_subject(asked: _Asked, first: _Statement, second: _Statement) -> bool:
    """Whether nothing but the asked value or a denial tells the two statements apart."""
    wants_date = asked.wants == "value" and "date" in asked.kinds and any(v.kind == "date" for v in first.wanted())
    for name in first.qualifiers.keys() | second.qualifiers.keys():
        if name == "year" and wants_date:
            continue
        a, b = first.qualifiers.get(name, []), second.qualifiers.get(name, [])
        own = any(name in _qualifying(each.values) for each in (first, second))
        if not a or not b:
            if own:  # only one says of which year or version it speaks
                return False
        elif not any(x.date[0] == y.date[0] if name == "year" else x.amount == y.amount for x in a for y in b):
            return False
    lone_first = {name for name in first.names if name not in second.text and name not in plain(second.around)}
    lone_second = {name for name in second.names if name not in first.text and name not in plain(first.around)}
    if lone_first and lone_second:
        return False
    if any(_are_parallel(a, b) for a, b in zip(first.labels, second.labels, strict=True)):
        return False
    shared = set(first.terms) & set(second.terms)
    weight = sum(first.terms[term] for term in shared)
    least = min(sum(first.terms.values()), sum(second.terms.values())) or 1.0
    if weight < _SAME * least or not shared & set(asked.weights):
        return False
    extra_first, extra_second = _extras(asked, first, second), _extras(asked, second, first)
    if extra_first and extra_second:
        return False
    return not (_is_confined(first, extra_first) or _is_confined(second, extra_second))


_NUMBERING = re.compile(r"^[\W\d_]+|^第[\d一二三四五六七八九十百]+[章节条款篇部]\s*")


def _are_parallel(first: str, second: str) -> bool:
    """Whether two titles or file names say the same of different things: "Phone A manual", "Phone B
    manual". Those without a common word are only of different documents."""
    a, b = (set(passage_terms(_NUMBERING.sub("", label))) for label in (first, second))
    return bool(a & b and a - b and b - a)


def _extras(asked: _Asked, statement: _Statement, other: _Statement) -> set[str]:
    """Terms of weight that only this statement has, and neither the question nor the other's surroundings."""
    known = other.context.union(passage_terms(other.text), asked.weights, _SLIGHT)
    signs = set(f"{other.text}{plain(other.around)}{asked.text}{_SLIGHT_ZH}")
    return {
        term for term, weight in statement.terms.items()
        if term not in known and weight >= _HEAVY and (term.isascii() or not signs.issuperset(term))
    }


def _is_confined(statement: _Statement, extras: set[str]) -> bool:
    """Whether such terms confine the statement: in the clause of its value, behind a preposition or, in
    Chinese, before the value."""
    if not extras:
        return False
    wanted = statement.wanted()
    at = wanted[0].start if wanted else 0
    start, clause = 0, statement.text
    for piece in re.split(r"(?<=[，,；;])", statement.text):
        if start <= at < start + len(piece):
            clause, at = piece, at - start
            break
        start += len(piece)
    if detect_language(statement.item.text) == "zh":
        held = clause[:at] if wanted else clause
        return len(extras & set(passage_terms(held))) >= 1
    for match in _CONFINES.finditer(clause):
        if extras & set(passage_terms(" ".join(clause[match.end() :].split()[:4]))):
            return True
    # An adjective before what both speak of: "domestic flights".
    words = [passage_terms(word) for word in clause.split()]
    for word, following in zip(words, words[1:], strict=False):
        if set(word) & extras and set(following) & set(statement.asked.weights):
            return True
    return False
