"""One's own documents -> questions with known answers, to measure and to calibrate with.

Sentences that state something are turned into questions (`question_templates`); each keeps the
sentence, its file and page. Questions without an answer are made of these by putting a name in
that occurs nowhere in the documents. Both share words with the text they come from, which people's
own questions do less: figures measured on them are upper bounds, differences between two settings
are what they are good for.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rag.document import Document
from rag.errors import InputError
from rag.language import detect_language
from rag.quality.question_templates import BASE_FORMS, MONTH, Draft, drafts
from rag.sentences import sentence_spans
from rag.store import Store
from rag.terms import HAN, passage_terms, question_terms


@dataclass(frozen=True, slots=True)
class MadeQuestion:
    """A question with the sentence it was made of. [start, end) are the sentence's offsets.

    Where `unanswerable`, the sentence is the one that would answer, were it not for `swapped`.
    """

    question: str
    kind: str
    path: str
    page: int | None
    start: int
    end: int
    quote: str
    answer: str
    unanswerable: bool = False
    swapped: str | None = None

    def to_dict(self, number: int) -> dict[str, Any]:
        """A line as `python -m rag eval` reads it."""
        language = detect_language(self.question)
        row: dict[str, Any] = {"id": f"q{number:04}", "question": self.question}
        if self.unanswerable:
            return {**row, "unanswerable": True, "type": f"{language} unanswerable"}
        row |= {"answer": self.answer, "path": self.path}
        if self.page is not None:
            row["page"] = self.page
        return {**row, "quote": self.quote, "type": f"{language} {self.kind}"}


def make_questions(
    base: Store, *, count: int = 200, unanswerable: float = 0.25, seed: int = 0
) -> list[MadeQuestion]:
    """Up to `count` questions, `unanswerable` of them (a share) without an answer, files in turn.

    Fewer where the documents hold too few sentences that fit a pattern. Raises InputError for
    numbers that make no sense, or where no sentence fits.
    """
    if count < 1 or not 0 <= unanswerable < 1:
        raise InputError(f"count must be at least 1 (is {count}), the unanswerable share from 0 to below 1 (is {unanswerable}).")
    rng = random.Random(seed)
    by_file = [list(questions_of(base.document(path))) for path, record in base.files().items() if record.status == "ok"]
    asked = Counter(_key(made.question) for made in sum(by_file, []))
    # What two sentences answer has no one right place.
    by_file = [[made for made in each if asked[_key(made.question)] == 1] for each in by_file]
    pool = _in_turn(by_file, rng)
    if not pool:
        raise InputError(
            f"no sentence of the {len(by_file)} documents fits a pattern. Write questions of your own: a .jsonl "
            'file with {"question": …, "answer": …, "path": …} a line.'
        )
    wanted = round(count * unanswerable)
    answerable = pool[: count - wanted]
    # From the rest first, so that a question and its twin without an answer seldom meet.
    without = list(_without_answer(base, [*pool[count - wanted :], *answerable], rng, wanted))
    return [*answerable, *without]


def _key(question: str) -> str:
    return " ".join(passage_terms(question))


def _in_turn(by_file: Sequence[list[MadeQuestion]], rng: random.Random) -> list[MadeQuestion]:
    """One of each file, then the next of each; within a file its kinds in turn, otherwise by chance."""
    queues: list[list[MadeQuestion]] = []
    for made in by_file:
        kinds: dict[str, list[MadeQuestion]] = {}
        for each in rng.sample(made, len(made)):
            kinds.setdefault(each.kind, []).append(each)
        groups = rng.sample(list(kinds.values()), len(kinds))
        queues.append(list(_round_robin(groups)))
    rng.shuffle(queues)
    return list(_round_robin(queues))


def _round_robin(groups: Sequence[list[MadeQuestion]]) -> Iterator[MadeQuestion]:
    for place in range(max(map(len, groups), default=0)):
        for group in groups:
            if place < len(group):
                yield group[place]


def questions_of(document: Document) -> Iterator[MadeQuestion]:
    """Every question that a sentence of the document answers, at most one a sentence, in reading order."""
    # Words that are written large inside a sentence are names.
    names = set(re.findall(r"(?<=[a-z,;] )[A-Z][\w'’-]*", document.text))
    headings = sorted(document.headings, key=lambda heading: heading.start)
    titles = {heading.title.strip() for heading in headings} | {document.title.strip()}
    for start, end in sentence_spans(document.text):
        sentence = document.text[start:end]
        if sentence.startswith("#") or sentence.strip("# ") in titles:
            continue
        found = drafts(sentence, heading=_heading_just_before(document, start), names=names)
        best = min(found, key=lambda draft: _PREFERRED.index(draft.kind), default=None)
        if best is not None and _says_enough(best, sentence):
            yield MadeQuestion(
                best.question, best.kind, document.path, document.page_at(start), start, end, sentence,
                sentence[best.start : best.end].strip(),
            )


_PREFERRED = ("reason", "time", "name", "definition", "number", "fact")


def _says_enough(draft: Draft, sentence: str) -> bool:
    """Whether the question names what it is about, and doesn't hold its answer."""
    terms = question_terms(draft.question)
    answer = sentence[draft.start : draft.end].strip()
    return len(terms) >= 2 and answer not in draft.question


def _heading_just_before(document: Document, start: int) -> str | None:
    """The heading directly above a sentence, which a pronoun at its beginning means."""
    above = [heading for heading in document.headings if heading.start < start]
    if not above:
        return None
    last = max(above, key=lambda heading: heading.start)
    between = document.text[last.start : start].replace(last.title, "", 1).strip("#=- \n\t")
    return last.title.strip() if not between else None


# Names that hardly any document holds; one that does is not used. Most are made up.
_NAMES_EN = (
    "Velmora", "Kestrane", "Orvalix", "Brindlow", "Tarsenko", "Quillbane", "Norvessa", "Halverin", "Dromaric",
    "Ostrelle", "Palgrove", "Zinthar", "Marrowick", "Lysander Board", "Fenwright", "Caldrix", "Ulverton",
    "Pemberlin", "Rosthaven", "Ixtalan",
)  # fmt: skip
_NAMES_ZH = (
    "维莫拉", "青穗", "柯斯川", "奥瓦立", "云杉湾", "诺维萨", "哈沃林", "卓玛里", "赤砂洲", "帕格罗",
    "津塔尔", "玛洛维", "芬莱特", "卡德瑞", "蓝鸢镇", "潘博林", "罗斯港", "伊塔兰", "枫溪法", "银鲑号",
)  # fmt: skip
_MONTHS = re.compile(MONTH)
_VERBS = "|".join(BASE_FORMS.values())
_NAME_IN_QUESTION = re.compile(r"(?<=[\w,] )(?:[A-Z][\w'’-]*[A-Za-z]|[A-Za-z]*[A-Z]{2,}\w*)(?: [A-Z][\w'’-]+)*|《[^》]+》|“[^”]+”")
_SUBJECT_IN_QUESTION = re.compile(
    r"What (?:is|are|was|were) "
    r"(?P<is>(?:the |an? )?[\w'’-]+(?: [\w'’-]+)??)(?= (?:of|in|for|with|at|by|to|on)\b|\?)"
    rf"|.* (?:does|do) (?P<does>(?:the |an? )?[\w'’-]+(?: [\w'’-]+)??)(?= (?:of|in|for|with|{_VERBS})\b)"
)
_LATIN_IN_CHINESE = re.compile(r"(?<![（(A-Za-z0-9])[A-Za-z][A-Za-z0-9@_.+-]*(?: [A-Za-z0-9][A-Za-z0-9@_.+-]*)*(?![）)A-Za-z0-9])")


def _without_answer(
    base: Store, pool: Sequence[MadeQuestion], rng: random.Random, wanted: int
) -> Iterator[MadeQuestion]:
    unused: list[str] = []
    made_already: set[str] = set()
    for made in pool:
        if len(made_already) == wanted:
            return
        chinese = detect_language(made.question) == "zh"
        place = _swappable(made.question, chinese)
        if place is None:
            continue
        before, behind = made.question[: place[0]], made.question[place[1] :]
        if _asks_nothing(before + " " + behind):
            continue  # "What is X?", where X is a name that stands nowhere
        names = [name for name in unused if (name in _NAMES_ZH) == chinese]
        if not names:
            names = _absent_names(base, _NAMES_ZH if chinese else _NAMES_EN)
            if not names:
                continue
            unused += names
        name = rng.choice(names)
        unused.remove(name)
        question = before.rstrip() + name + behind.lstrip() if chinese else before + name + behind
        if question in made_already:
            continue
        made_already.add(question)
        yield MadeQuestion(
            question, made.kind, made.path, made.page, made.start, made.end, made.quote, "",
            unanswerable=True, swapped=made.question[place[0] : place[1]],
        )


_FORM = re.compile(r"是什么|是|什么|取决于|用来做|用来|包括|等于|称为|分为哪几种|为什么|\b(?:what|is|are|does|do|mean|need|use|have)\b|[\W_]")


def _asks_nothing(rest: str) -> bool:
    """Whether beside the name only the form of a question is left."""
    return not _FORM.sub("", rest.lower())


def _swappable(question: str, chinese: bool) -> tuple[int, int] | None:
    """[start, end) of the name that a question is about: a name in it, or else its subject."""
    pattern = _LATIN_IN_CHINESE if chinese else _NAME_IN_QUESTION
    names = [
        match for match in pattern.finditer(question) if len(match.group()) > 1 and not _MONTHS.search(match.group())
    ]
    if names:
        longest = max(names, key=lambda match: len(match.group()))
        return longest.span()
    if chinese:
        match = re.match(rf"(?:为什么)?([{HAN}]{{2,8}}?)(?:的(?!是)|是什么|由谁|取决于|包括|分为|用来|等于|必须|只?有[多几])", question)
    else:
        match = _SUBJECT_IN_QUESTION.match(question)
        if match:
            return match.span("does") if match["does"] else match.span("is")
        return None
    return match.span(1) if match else None


def _absent_names(base: Store, names: Sequence[str]) -> list[str]:
    """Those of the names that the documents hold nowhere."""
    counts = base.term_counts(sorted({term for name in names for term in passage_terms(name)}))
    return [name for name in names if not all(counts.get(term, 0) for term in passage_terms(name))]
