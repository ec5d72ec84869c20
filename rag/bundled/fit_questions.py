"""The questions that ranking and evidence are fitted on, searched in collections made for them."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rag import evidence
from rag.answer import Hit
from rag.bundled.asked_questions import AskedQuestion, asked_questions
from rag.bundled.heaviest_word import about_another, heaviest_word
from rag.bundled.made_questions import made_across_languages, made_by_patterns
from rag.bundled.training_data import held_out, is_measured, read_rows
from rag.document import Chunk, Document
from rag.embedder import Embedder
from rag.knowledge import FileRecord, KnowledgeBase, StoredChunk
from rag.language import Language, detect_language
from rag.quality.rewording import reword
from rag.retriever import CANDIDATES, Retriever, WeighedQuestion

LANGUAGES: tuple[Language, ...] = ("en", "zh")
_OTHER: dict[Language, Language] = {"en": "zh", "zh": "en"}
_PASSAGES_ACROSS = 1500
_ELSEWHERE = 400
_MOST_OF_A_COLLECTION = 1400  # questions as people ask: there are laws enough to drown the rest
_REWORDED = (0.25, 0.4, 0.55)  # share of a question's words that give way, drawn for each


@dataclass(frozen=True, slots=True)
class FitQuestion:
    question: str
    passage: str
    answer: str | None  # a span of the passage
    sentences: tuple[tuple[int, int], ...] = ()  # or [start, end) of what answers in it


@dataclass(frozen=True, slots=True)
class AskedParts:
    """Questions as people ask, of one language: to fit on and to measure on, each with an answer and
    without one; and about texts in the other language. `titles` has all texts of this language."""

    fit: list[FitQuestion]
    missing: list[FitQuestion]
    test: list[FitQuestion]
    missing_test: list[FitQuestion]
    across: list[FitQuestion]
    titles: dict[str, str]


def questions_asked(data: Path, rng: random.Random) -> dict[Language, AskedParts]:
    """Held-out questions of `asked_questions`. What is measured on is of other documents than what is
    fitted on."""
    found: dict[Language, AskedParts] = {
        language: AskedParts([], [], [], [], [], {}) for language in LANGUAGES
    }
    groups: dict[tuple[Language, str], list[AskedQuestion]] = {}
    for item in asked_questions(data):
        language = detect_language(item.text)
        found[language].titles.setdefault(item.text, item.title)
        if item.held_out:
            groups.setdefault((language, item.title), []).append(item)
    documents = list(groups.items())
    rng.shuffle(documents)
    taken: Counter[tuple[Language, str]] = Counter()
    for number, ((language, _), document) in enumerate(documents):
        collection = language, document[0].collection
        if taken[collection] >= _MOST_OF_A_COLLECTION:
            continue
        taken[collection] += len(document)
        fitted, of = number % 10 < 7, found[language]
        for item in document:
            question = FitQuestion(item.question, item.text, None, item.sentences)
            if item.kind == "across":
                found[_OTHER[language]].across.append(question)
            elif item.kind == "missing":
                (of.missing if fitted else of.missing_test).append(question)
            else:
                (of.fit if fitted else of.test).append(question)
    return found


def questions_of(data: Path, language: Language) -> tuple[list[FitQuestion], list[str]]:
    """Held-out questions, and every passage of the collection they are asked to."""
    answers = {
        (row["question"], row["context"]): str(row["answer"])
        for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz")
        if str(row["answer"]) in row["context"]
    }
    found: list[FitQuestion] = []
    passages: dict[str, None] = {}
    for row in read_rows(data / f"retrieval_pairs.{language}.jsonl.xz"):
        if row["src"] == "medquad":
            continue
        passages[row["positive"]] = None
        if held_out(row["positive"], language) and not is_measured(row["query"]):
            answer = answers.get((row["query"], row["positive"]))
            found.append(FitQuestion(row["query"], row["positive"], answer))
    return found, list(passages)


def questions_across(data: Path, rng: random.Random) -> dict[Language, tuple[list[FitQuestion], list[str]]]:
    """For each language of questions: held-out questions about translated passages in the other one,
    and a collection of such passages with theirs among them."""
    asked = [FitQuestion(*row) for row in made_across_languages(data, rng, fitting=True)]
    others = [text for _, text, _ in made_across_languages(data, rng)]
    found: dict[Language, tuple[list[FitQuestion], list[str]]] = {}
    for language in LANGUAGES:
        mine = [item for item in asked if detect_language(item.question) == language]
        theirs = [text for text in others if detect_language(text) != language]
        found[language] = mine, [*(item.passage for item in mine), *theirs[:_PASSAGES_ACROSS]]
    return found


def questions_elsewhere(data: Path, language: Language, rng: random.Random) -> list[FitQuestion]:
    """Questions about manuals and medicine, which no passage of the collections fitted on is about."""
    asked = [question for question, _, _ in made_by_patterns(data, rng) if detect_language(question) == language]
    if language == "en":
        rows = read_rows(data / "retrieval_pairs.en.jsonl.xz")
        asked += [row["query"] for row in rows if row["src"] == "medquad" and held_out(row["positive"], "en")]
    return [FitQuestion(question, "", None) for question in rng.sample(asked, min(len(asked), _ELSEWHERE))]


def titles_of(data: Path) -> dict[str, str]:
    """Passage -> title of the English article it stands in."""
    titles: dict[str, str] = {}
    for row in read_rows(data / "text.en.squad_train_articles.jsonl.xz"):
        for paragraph in row["text"].split("\n"):
            titles[paragraph.strip()] = row["title"].replace("_", " ")
    return titles


def in_other_words(item: FitQuestion, rng: random.Random) -> FitQuestion:
    """The question with some of its words replaced by near ones that its passage does not use."""
    return replace(item, question=reword(item.question, item.passage, rng.choice(_REWORDED), rng))


def of_another_subject(items: Sequence[Searched], rng: random.Random) -> list[FitQuestion]:
    """Every second question with its heaviest word replaced by another one's: nothing answers it."""
    places = [heaviest_word(item.question.question, item.weighed.weights) for item in items]
    swapped = []
    for at in range(0, len(items), 2):
        other = rng.randrange(len(items))
        mine, word = items[at].question, items[other].question.question[slice(*places[other])]
        if question := about_another(mine.question, places[at], word, mine.passage):
            swapped.append(replace(mine, question=question))
    return swapped


def build_base(
    passages: Sequence[str], titles: dict[str, str], embedder: Embedder, folder: Path
) -> KnowledgeBase:
    """A knowledge base with each passage as one chunk, a hundred to a file.

    Only half of the passages know their title, as in real folders.
    """
    base = KnowledgeBase.create(folder)
    with base.writing():
        base.bind_embedder(embedder)
        for begin in range(0, len(passages), 100):
            path = "text" + "x" * (begin // 100)  # a name without a word of any question
            chunks, position = [], 0
            for number, text in enumerate(passages[begin : begin + 100]):
                title = titles.get(text.strip(), "") if number % 2 else ""
                chunks.append(Chunk(path, text, position, position + len(text), title=title))
                position += len(text) + 10  # a gap, so that no two are neighbours
            base.put_file(
                FileRecord(path, "", 0, "ok"), Document(path, "", "txt"), chunks,
                embedder.embed_passages([chunk.indexed_text for chunk in chunks]),
            )
        base.publish()
    return base


@dataclass(slots=True)
class Searched:
    question: FitQuestion
    weighed: WeighedQuestion
    stored: list[StoredChunk]
    features: np.ndarray  # (candidates, ranking.FEATURES)
    gold: int | None  # which candidate is the gold passage
    scores: dict[int, float] = field(default_factory=dict)  # of both stages, best first
    known: dict[tuple[int, ...], evidence.SentenceFeatures] = field(default_factory=dict)

    def read(self, order: tuple[int, ...], hits: Sequence[Hit]) -> evidence.SentenceFeatures:
        """The sentences of these candidates, kept, as two fits look at them."""
        if order not in self.known:
            weighed = self.weighed
            self.known[order] = evidence.sentence_features(weighed.text, weighed.terms, weighed.weights, hits)
        return self.known[order]


def search(retriever: Retriever, questions: Sequence[FitQuestion]) -> Iterator[Searched]:
    """Each question with its candidates. Chunks that several questions bring up are kept once: all of
    them, each for itself, would take some ten gigabytes."""
    kept: dict[int, StoredChunk] = {}
    for item in questions:
        vector = retriever.embedder.embed_questions([item.question])[0]
        with retriever.base.snapshot():
            dense = retriever.base.search_dense(vector[None], CANDIDATES)[0]
            weighed = retriever.weigh(item.question)
            stored, features = retriever._candidates(weighed, vector, dense, CANDIDATES)
        stored = [kept.setdefault(one.row, one) for one in stored]
        gold = next((at for at, one in enumerate(stored) if one.chunk.text == item.passage), None)
        yield Searched(item, weighed, stored, features, gold)


@dataclass(frozen=True, slots=True)
class AskedSearched:
    """As AskedParts."""

    fit: list[Searched]
    missing: list[Searched]
    test: list[Searched]
    missing_test: list[Searched]
    across: list[Searched]


@dataclass(frozen=True, slots=True)
class Parts:
    """Searched questions by their language: to fit on; the same in other words; about another subject,
    which nothing answers; to measure on, with and without an answer; of translations, about passages in
    the other language; and as people ask."""

    fit: dict[Language, list[Searched]]
    reworded: dict[Language, list[Searched]]
    swapped: dict[Language, list[Searched]]
    test: dict[Language, list[Searched]]
    far_test: dict[Language, list[Searched]]
    across: dict[Language, list[Searched]]
    asked: dict[Language, AskedSearched]

    def answered(self, language: Language) -> list[Searched]:
        """All in a language that have an answer somewhere in their collection."""
        asked = self.asked[language]
        return [*self.fit[language], *self.reworded[language], *self.test[language], *self.across[language],
                *asked.fit, *asked.test, *asked.across]

    def unanswered(self, language: Language) -> list[Searched]:
        """All in a language that have none."""
        asked = self.asked[language]
        return [*self.swapped[language], *self.far_test[language], *asked.missing, *asked.missing_test]


def search_all(data: Path, embedder: Embedder, *, most_questions: int, most_passages: int, seed: int) -> Parts:
    """All questions, each searched in a base of its kind's passages. At most `most_questions` of reading
    comprehension in a language, among at most `most_passages`."""
    rng = random.Random(seed)
    fit_parts: dict[Language, list[Searched]] = {}
    test_parts: dict[Language, list[Searched]] = {}
    reworded: dict[Language, list[Searched]] = {}
    swapped: dict[Language, list[Searched]] = {}
    far_test: dict[Language, list[Searched]] = {}
    work = Path(tempfile.mkdtemp(prefix="fit-ranking-"))
    try:
        for language in LANGUAGES:
            questions, passages = questions_of(data, language)
            rng.shuffle(questions)
            questions = questions[:most_questions]
            asked = dict.fromkeys(item.passage for item in questions)
            others = [text for text in passages if text not in asked]
            room = max(0, min(most_passages - len(asked), len(others)))
            mixed = [*asked, *rng.sample(others, room)]
            rng.shuffle(mixed)
            titles = titles_of(data) if language == "en" else {}
            base = build_base(mixed, titles, embedder, work / language)
            retriever = Retriever(base, embedder)
            items = list(search(retriever, questions))
            cut = int(len(items) * 0.7)
            fit_parts[language], test_parts[language] = items[:cut], items[cut:]
            swapped[language] = list(search(retriever, of_another_subject(items[:cut], rng)))
            reworded[language] = list(search(retriever, [in_other_words(item, rng) for item in questions[:cut]]))
            elsewhere = list(search(retriever, questions_elsewhere(data, language, rng)))
            half = len(elsewhere) * 7 // 10
            swapped[language] += elsewhere[:half]
            far_test[language] = elsewhere[half:]
            print(f"{language}: {len(items)} questions searched", flush=True)
        across: dict[Language, list[Searched]] = {}
        for language, (questions, passages) in questions_across(data, rng).items():
            base = build_base(list(dict.fromkeys(passages)), {}, embedder, work / f"across-{language}")
            across[language] = list(search(Retriever(base, embedder), rng.sample(questions, len(questions))))
            print(f"{language}: {len(questions)} questions about the other language searched", flush=True)
        as_people_ask: dict[Language, AskedSearched] = {}
        of_people = questions_asked(data, rng)
        retrievers = {
            language: Retriever(build_base(list(part.titles), part.titles, embedder, work / f"asked-{language}"), embedder)
            for language, part in of_people.items()
        }
        for language, part in of_people.items():
            own, other = retrievers[language], retrievers[_OTHER[language]]
            as_people_ask[language] = AskedSearched(
                fit=list(search(own, part.fit)), missing=list(search(own, part.missing)),
                test=list(search(own, part.test)), missing_test=list(search(own, part.missing_test)),
                across=list(search(other, part.across)),
            )
            print(f"{language}: {len(part.fit) + len(part.test)} questions as people ask searched", flush=True)
        return Parts(fit_parts, reworded, swapped, test_parts, far_test, across, as_people_ask)
    finally:
        shutil.rmtree(work)
