"""Reading examples for the bundled reader: where questions come from and how a prompt is built.

Three sources: questions people wrote (extractive, English and Chinese), questions made from plain
text by blanking a span of a sentence (Taylor, 1953; recurring spans: Ram et al., 2021), and, for
the first stage, stretches of tokens said twice. The prompt itself comes from `rag.prompt`.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rag.bundled.training_data import is_measured, read_rows
from rag.language import REFUSAL, Language, detect_language
from rag.prompt import neutralise, reader_prompt

_SENTENCE_END = re.compile(r"[。！？!?；]+[”」』）\"']*|\.(?=[\"')\]]*\s+[\"'(]?[A-Z0-9])[\"')\]]*|\n+")
IGNORED = -1  # no source token, no gold sentence


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph of a training text. `sentences` are character ranges that cover `text`."""

    text: str
    title: str
    sentences: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the paragraph that answers it, and the answer's characters there."""

    text: str
    paragraph: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What the examples of one stage look like. `mix` are weights of the sources."""

    passages: tuple[int, int]  # fewest and most passages of a prompt
    sentences: tuple[int, int]  # fewest and most sentences of a passage
    unanswerable: float
    mix: tuple[float, float, float, float]  # people's en, people's zh, blanked en, blanked zh
    blocks: float = 0.0  # share in the second layout
    title: float = 0.5  # share of passages that open with a heading line


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its answer, as token ids.

    `targets` are (position, token): what the model must say behind that position. `sources` are,
    for each target, the position it is copied from, or IGNORED. `sentence_ends` are the last
    tokens of the passages' sentences, `gold_sentence` the one with the answer among them.
    `passage_starts` are the positions of the passage tokens, `question_start` where the last
    question begins: the borders of the second layout.
    """

    ids: NDArray[np.int32]
    targets: NDArray[np.int32]  # (answer tokens, 2)
    sources: NDArray[np.int32]  # (answer tokens,)
    sentence_ends: NDArray[np.int32]
    gold_sentence: int
    passage_starts: tuple[int, ...]
    question_start: int
    blocks: bool


def split_sentences(text: str) -> tuple[tuple[int, int], ...]:
    """Character ranges of the sentences; together they cover `text`. Short ones join the next."""
    ranges: list[tuple[int, int]] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        if match.end() - start >= 12:
            ranges.append((start, match.end()))
            start = match.end()
    if text[start:].strip():
        ranges.append((start, len(text)))
    elif ranges:
        ranges[-1] = (ranges[-1][0], len(text))
    return tuple(ranges) or ((0, len(text)),)


def words_of(text: str) -> list[str]:
    """Lower-case Latin words, numbers and single Han characters."""
    return re.findall(r"[a-z]+|\d+|[\u4e00-\u9fff]", text.lower())


# --- questions people wrote ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Collection:
    """Questions of one language with their paragraphs; `near` are the hardest other paragraphs."""

    paragraphs: tuple[Paragraph, ...]
    questions: tuple[Question, ...]
    near: NDArray[np.int32]  # (questions, k) paragraph numbers, nearest first, without the answer


def load_collection(data: Path, language: Language, *, limit: int | None = None) -> Collection:
    """Extractive questions of `reading_comprehension.<language>`; free-text answers are left out."""
    titles: dict[str, str] = {}
    articles = data / "text.en.squad_train_articles.jsonl.xz"
    if language == "en" and articles.exists():
        for row in read_rows(articles):
            for part in row["text"].split("\n"):
                titles[part.strip()[:80]] = row["title"]
    paragraphs: list[Paragraph] = []
    questions: list[Question] = []
    numbers: dict[str, int] = {}
    for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz"):
        answer, context = row["answer"], row["context"]
        if not isinstance(answer, str) or len(answer) > 120 or neutralise(context) != context:
            continue
        answer = answer.strip()
        if not answer or answer not in context or context.startswith("中华人民共和国"):
            continue
        if is_measured(row["question"]):
            continue
        if context not in numbers:
            numbers[context] = len(paragraphs)
            title = titles.get(context.strip()[:80], "")
            paragraphs.append(Paragraph(context, title, split_sentences(context)))
        paragraph = paragraphs[numbers[context]]
        start = _likely_occurrence(row["question"], answer, paragraph)
        questions.append(Question(row["question"], numbers[context], start, start + len(answer)))
        if limit is not None and len(questions) >= limit:
            break
    near = nearest_paragraphs(paragraphs, questions, k=8)
    return Collection(tuple(paragraphs), tuple(questions), near)


def _likely_occurrence(question: str, answer: str, paragraph: Paragraph) -> int:
    """Where in the paragraph the answer stands: in the sentence most like the question."""
    asked = set(words_of(question))
    best, best_score = paragraph.text.index(answer), -1.0
    for start, end in paragraph.sentences:
        at = paragraph.text.find(answer, start, min(end + len(answer), len(paragraph.text)))
        if at < 0 or at >= end:
            continue
        said = set(words_of(paragraph.text[start:end]))
        score = len(asked & said) / (1 + len(said)) ** 0.3
        if score > best_score:
            best, best_score = at, score
    return best


def hold_out(collection: Collection, *, one_in: int = 32) -> tuple[Collection, Collection]:
    """The questions to train on and those held back, split by paragraph."""
    held = np.array(
        [zlib.crc32(p.text.encode()) % one_in == 0 for p in collection.paragraphs], dtype=bool
    )[[q.paragraph for q in collection.questions]]

    def part(kept: NDArray[np.bool_]) -> Collection:
        questions = tuple(q for q, keep in zip(collection.questions, kept) if keep)
        return Collection(collection.paragraphs, questions, collection.near[kept])

    return part(~held), part(held)


def nearest_paragraphs(
    paragraphs: Sequence[Paragraph], questions: Sequence[Question], *, k: int
) -> NDArray[np.int32]:
    """For every question the k paragraphs BM25 ranks highest that don't hold its answer.

    Returns int32 (questions, k). Han characters count as bigrams, Latin ones as words.
    """
    vocabulary: dict[str, int] = {}

    def terms(text: str) -> list[int]:
        found = words_of(text)
        pairs = [a + b for a, b in zip(found, found[1:]) if "\u4e00" <= a[0] <= "\u9fff"]
        kept = [word for word in found if not "\u4e00" <= word[0] <= "\u9fff"] + pairs
        return [vocabulary.setdefault(term, len(vocabulary)) for term in kept]

    bags = [np.unique(terms(p.title + " " + p.text), return_counts=True) for p in paragraphs]
    asked = [np.unique(terms(q.text)) for q in questions]
    lengths = np.array([counts.sum() for _, counts in bags], np.float32)
    row = np.concatenate([np.full(len(ids), n) for n, (ids, _) in enumerate(bags)])
    col = np.concatenate([ids for ids, _ in bags]).astype(np.int64)
    tf = np.concatenate([counts for _, counts in bags]).astype(np.float32)
    df = np.bincount(col, minlength=len(vocabulary))
    idf = np.log(1 + (len(bags) - df + 0.5) / (df + 0.5)).astype(np.float32)
    weight = idf[col] * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * lengths[row] / lengths.mean()))
    index = sp.csr_matrix((weight, (row, col)), shape=(len(bags), len(vocabulary))).T.tocsr()
    near = np.zeros((len(questions), k), np.int32)
    for first in range(0, len(questions), 1000):
        batch = asked[first : first + 1000]
        query = sp.csr_matrix(
            (
                np.ones(sum(map(len, batch)), np.float32),
                np.concatenate(batch).astype(np.int64),
                np.concatenate([[0], np.cumsum([len(b) for b in batch])]),
            ),
            shape=(len(batch), len(vocabulary)),
        )
        scores = (query @ index).toarray()
        wide = min(4 * k, len(bags) - 1)
        top = np.argpartition(-scores, wide, axis=1)[:, : wide + 1]
        for n in range(len(batch)):
            question = questions[first + n]
            answer = paragraphs[question.paragraph].text[question.start : question.end]
            ranked = top[n][np.argsort(-scores[n, top[n]])]
            good = [p for p in ranked if p != question.paragraph and answer not in paragraphs[p].text]
            good = (good or [p for p in ranked if p != question.paragraph])[:k]
            near[first + n] = [good[i % len(good)] for i in range(k)]
    return near


# --- questions made from plain text -------------------------------------------------------------

_ZH_SPANS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"[12]\d{3}年(?!\d*月)"), ("哪一年", "何时", "什么时候", "哪年")),
    (re.compile(r"(?:[12]\d{3}年)?\d{1,2}月(?:\d{1,2}日)?"), ("什么时候", "何时", "什么时间", "哪一天")),
    (re.compile(r"\d[\d,.]*[万亿]?(?=[个人名元家次岁条项种部座所位辆]|美元|公里|平方|小时|分钟)"), ("多少", "几")),
    (re.compile(r"\d[\d,.]*(?:%|％|[万亿]元?|公里|米|小时|分钟)"), ("多少",)),
    (re.compile(r"《[^《》]{1,20}》"), ("什么", "哪部作品", "哪部法律", "什么作品", "哪本书")),
    (re.compile(r"(?<=[“「])[^“”「」]{2,16}(?=[”」])"), ("什么",)),
    (
        re.compile(
            r"(?<=主席|总统|总理|教授|记者|经理|部长|市长|主任|导演|演员|作家|博士|院长|律师|将军|皇帝)"
            r"[\u4e00-\u9fff·]{2,4}(?=表示|说|指出|认为|称|，|介绍|在|的)"
        ),
        ("谁", "什么人", "哪位"),
    ),
    (re.compile(r"[\u4e00-\u9fff]{2,10}(?:公司|集团|银行)"), ("哪家公司", "什么公司", "哪个公司")),
    (re.compile(r"[\u4e00-\u9fff]{2,8}(?:大学|学院|中学|医院|法院|委员会|政府|局)"), ("哪个机构", "哪里", "什么机构")),
    (
        re.compile(r"(?<=位于|来自|前往|抵达|生于|立于|到达|定居)[\u4e00-\u9fff]{2,8}"),
        ("哪里", "什么地方", "何处", "哪个地方"),
    ),
    (re.compile(r"(?<=[在从])[\u4e00-\u9fff]{2,6}(?=举行|召开|成立|出生|举办|出发|去世|上市)"), ("哪里", "什么地方")),
    (re.compile(r"(?<=称为|叫做|叫作|名为)[\u4e00-\u9fffA-Za-z0-9]{2,12}"), ("什么",)),
    (re.compile(r"[A-Za-z][A-Za-z0-9.\-+ ]{1,20}[A-Za-z0-9]"), ("什么", "谁", "哪个")),
    (re.compile(r"(?<=[\u4e00-\u9fff]是)[\u4e00-\u9fff]{3,14}(?=[，。；])"), ("什么",)),
    (re.compile(r"(?<=因为|由于)[\u4e00-\u9fff]{3,20}(?=[，。；])"), ("什么原因", "什么")),
)
_EN_SPANS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"\b(?:January|February|March|April|May|June|July|August|September|October|November"
                r"|December)(?: \d{1,2},?)?(?: \d{4})?\b"), ("when", "what date")),
    (re.compile(r"\b1\d{3}\b|\b20\d\d\b"), ("when", "what year")),
    (re.compile(r"(?<![\d$])\b\d[\d,.]*\b(?= [a-z]+s\b)"), ("how many",)),
    (re.compile(r"[$£€]\d[\d,.]*(?: [mb]illion)?|\b\d[\d,.]* ?(?:%|percent|million|billion)"), ("how much",)),
    (re.compile(r"\b[A-Z][a-z]+(?: (?:of |the )?[A-Z][a-z]+){0,3}\b"), ("who", "what", "which", "where")),
    (re.compile(r"(?<=\bin )(?:the )?[A-Z][a-z]+(?: [A-Z][a-z]+)*"), ("where", "what place")),
    (re.compile(r"(?<=\bcalled )[\w\- ]{3,25}(?=[,.;)])"), ("what",)),
    (re.compile(r"(?<=\bbecause )[\w\-, ]{8,50}(?=[.;])"), ("why",)),
)


@dataclass(frozen=True, slots=True)
class Blank:
    """A made-up question; `own` is the sentence it was made from, `start`..`end` the answer."""

    question: str
    own: int
    start: int
    end: int


def blank_span(paragraph: Paragraph, language: Language, rng: random.Random) -> Blank | None:
    """A question made from one sentence by putting a question word where a span was.

    In Chinese the question word stands where the answer stood, so such a question reads like one
    a person asks. Words fall out at random, so that it isn't the sentence over again. None where
    no span of the drawn sentence will do.
    """
    own = rng.randrange(len(paragraph.sentences))
    first, last = paragraph.sentences[own]
    sentence = paragraph.text[first:last]
    found: list[tuple[int, int, str]] = []
    for pattern, asks in _ZH_SPANS if language == "zh" else _EN_SPANS:
        found += [(*m.span(), rng.choice(asks)) for m in pattern.finditer(sentence)][:3]
    if not found or rng.random() < 0.2:
        pieces = (
            list(re.finditer(r"[\u4e00-\u9fff]{2,8}", sentence))
            if language == "zh"
            else list(re.finditer(r"[A-Za-z\-]{4,}(?: [A-Za-z\-]{3,}){0,2}", sentence))
        )
        found += [(*m.span(), "什么" if language == "zh" else "what") for m in pieces[:6]]
    if not found:
        return None
    start, end, ask = rng.choice(found)
    left, right = sentence[:start], sentence[end:]
    if language == "zh":
        left_kept = re.split(r"[，。；：、\n]", left)[-rng.choice((1, 1, 2)) :]
        right_kept = re.split(r"[，。；\n]", right)[: rng.choice((1, 1, 2))]
        before = "".join(c for c in "，".join(left_kept)[-30:] if rng.random() > 0.08)
        after = "".join(c for c in "，".join(right_kept)[:30] if rng.random() > 0.08)
        question = f"{before}{ask}{after}".strip("，。；！？ \n") + "？"
        enough = len(question) - len(ask) >= 5
    else:
        before_words = [w for w in left.split()[-rng.randint(4, 12) :] if rng.random() > 0.12]
        after_words = [w for w in right.split()[: rng.randint(3, 10)] if rng.random() > 0.12]
        if rng.random() < 0.5 and after_words:  # what people do: the question word first
            words = [ask, *after_words, *before_words]
        else:
            words = [*before_words, ask, *after_words]
        question = " ".join(words).strip(" ,.;:")
        question = question[:1].upper() + question[1:] + "?"
        enough = len(words) >= 5
    if not enough or neutralise(question) != question:
        return None
    return Blank(question, own, first + start, first + end)


def load_plain(
    data: Path, language: Language, *, megabytes: float, seed: int
) -> list[list[Paragraph]]:
    """Paragraphs of 60 to 700 characters from text.<language>.*, document by document."""
    rng = random.Random(seed)
    documents: list[list[Paragraph]] = []
    files = [
        path
        for path in sorted(data.glob(f"text.{language}.*.jsonl.xz"))
        # every page of that one has the same few headings
        if "medquad" not in path.name
    ]
    for path in files:
        held = 0.0
        for row in read_rows(path):
            if rng.random() < 0.3:
                continue
            text, paragraphs = row["text"][:60_000], []
            title = row["title"] if re.fullmatch(r"[\w\s《》·（）()\-]{2,40}", row["title"]) else ""
            for part in text.split("\n"):
                part = part.strip()
                if len(part) < 60 or neutralise(part) != part:
                    continue
                ranges = split_sentences(part)
                # long paragraphs fall into runs of sentences of at most 500 characters
                start, run = ranges[0][0], ranges[0][1]
                for _, end in ranges[1:]:
                    if end - start > 500:
                        piece = part[start:run]
                        paragraphs.append(Paragraph(piece, title, split_sentences(piece)))
                        start = run
                    run = end
                if 60 <= run - start <= 700:
                    piece = part[start:run]
                    paragraphs.append(Paragraph(piece, title, split_sentences(piece)))
            if paragraphs:
                documents.append(paragraphs)
                held += sum(len(p.text) for p in paragraphs) / 1e6
            if held > megabytes / len(files):
                break
    return documents


# --- prompts ------------------------------------------------------------------------------------


class ExampleMaker:
    """Draws examples. Every draw comes from `rng`, so a resumed run goes on exactly."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        collections: dict[Language, Collection],
        plain: dict[Language, list[list[Paragraph]]],
        *,
        rng: random.Random,
        max_tokens: int = 2048,
    ) -> None:
        self.tokenizer = tokenizer
        self.collections = collections
        self.plain = plain
        self.rng = rng
        self.max_tokens = max_tokens

    def draw(self, stage: Stage) -> Example:
        """One example of `stage`."""
        while True:
            kind = self.rng.choices(range(4), stage.mix)[0]
            language: Language = "en" if kind % 2 == 0 else "zh"
            made = self._asked(language, stage) if kind < 2 else self._blanked(language, stage)
            example = made and encode_example(self.tokenizer, *made, blocks=self.rng.random() < stage.blocks)
            if example and len(example.ids) <= self.max_tokens:
                return example

    def _window(self, paragraph: Paragraph, stage: Stage, around: int | None) -> tuple[int, int]:
        """Characters of a run of sentences, with the sentence `around` in it."""
        count = len(paragraph.sentences)
        wanted = min(count, self.rng.randint(*stage.sentences))
        if around is None:
            first = self.rng.randint(0, count - wanted)
        else:
            first = self.rng.randint(max(0, around - wanted + 1), min(around, count - wanted))
        return paragraph.sentences[first][0], paragraph.sentences[first + wanted - 1][1]

    def _asked(self, language: Language, stage: Stage) -> tuple[Any, ...] | None:
        collection = self.collections[language]
        number = self.rng.randrange(len(collection.questions))
        question = collection.questions[number]
        gold = collection.paragraphs[question.paragraph]
        near = [collection.paragraphs[n] for n in collection.near[number]]
        return self._assemble(question.text, gold, (question.start, question.end), near, stage)

    def _blanked(self, language: Language, stage: Stage) -> tuple[Any, ...] | None:
        document = self.rng.choice(self.plain[language])
        at = self.rng.randrange(len(document))
        paragraph = document[at]
        blank = blank_span(paragraph, language, self.rng)
        if blank is None:
            return None
        others = [p for n, p in enumerate(document) if n != at]
        self.rng.shuffle(others)
        near = others[:8] or [self.rng.choice(self.rng.choice(self.plain[language]))]
        span = (blank.start, blank.end)
        answer = paragraph.text[blank.start : blank.end]
        # a recurring span: the question's own sentence is taken away, the answer stands elsewhere
        if len(answer) >= 2 and self.rng.random() < 0.7:
            first, last = paragraph.sentences[blank.own]
            rest = paragraph.text[:first] + paragraph.text[last:]
            if answer in rest:
                paragraph = Paragraph(rest, paragraph.title, split_sentences(rest))
                start = rest.index(answer)
                span = (start, start + len(answer))
        return self._assemble(blank.question, paragraph, span, near, stage)

    def _assemble(
        self,
        question: str,
        gold: Paragraph,
        span: tuple[int, int],
        near: Sequence[Paragraph],
        stage: Stage,
    ) -> tuple[Any, ...] | None:
        """(question, passages, gold passage or None, answer characters within it)."""
        rng = self.rng
        answer = gold.text[span[0] : span[1]]
        count = rng.randint(*stage.passages)
        answerable = rng.random() >= stage.unanswerable
        passages: list[str] = []
        start = 0
        gold_at = rng.randrange(count) if answerable else None
        others = [p for p in near if answer not in p.text]
        if not answerable and count == 1 and rng.random() < 0.5:
            others = [gold]  # another stretch of the same paragraph
        rng.shuffle(others)
        if len(others) < count - (gold_at is not None):
            return None
        for n in range(count):
            if n == gold_at:
                inside = [i for i, (a, b) in enumerate(gold.sentences) if a <= span[0] < b]
                first, last = self._window(gold, stage, inside[0])
                if span[1] > last:
                    return None
                chosen = gold
            else:
                chosen = others.pop()
                first, last = self._window(chosen, stage, None)
                if answer in chosen.text[first:last]:
                    return None
            text = chosen.text[first:last]
            first += len(text) - len(text.lstrip())
            text = text.strip()
            head = f"{chosen.title}\n" if chosen.title and rng.random() < stage.title else ""
            if n == gold_at:
                start = len(head) + span[0] - first
            passages.append(head + text)
        if gold_at is None:
            return question, passages, None, None
        if passages[gold_at][start : start + len(answer)] != answer:
            return None
        return question, passages, gold_at, (start, start + len(answer))


def encode_example(
    tokenizer: Tokenizer,
    question: str,
    passages: Sequence[str],
    gold: int | None,
    span: tuple[int, int] | None,
    *,
    blocks: bool = False,
) -> Example | None:
    """The prompt `rag.prompt.reader_prompt` builds and the answer behind it, as token ids.

    `span` are the answer's characters in passage `gold`; both None where nothing answers it.
    None is returned where the answer doesn't begin and end on token borders.
    """
    prompt = reader_prompt(question, passages, blocks=blocks)
    coded = tokenizer.encode(prompt)
    ids = coded.ids
    # where each passage's text begins in the prompt
    at = len("<|blocks|>") if blocks else len("<|question|>" + question.strip())
    begins: list[int] = []
    starts: list[int] = []
    for number, text in enumerate(passages, 1):
        starts.append(at)
        at += len(f"<|passage|>[{number}] ")
        begins.append(at)
        at += len(text)
    if prompt[at : at + 12] != "<|question|>":
        return None  # something was neutralised; such a text is no use as an example

    def token_at(character: int) -> int:
        token = coded.char_to_token(character)
        assert token is not None, "a special token stands there"
        return int(token)

    ends: list[int] = []
    gold_sentence = IGNORED
    for n, text in enumerate(passages):
        for first, last in split_sentences(text):
            end = coded.char_to_token(begins[n] + len(text[:last].rstrip()) - 1)
            if end is None or (ends and end <= ends[-1]):
                continue
            if gold == n and span and first <= span[0] < last:
                gold_sentence = len(ends)
            ends.append(end)
    before = len(ids)
    if gold is None or span is None:
        answer = tokenizer.encode(REFUSAL[detect_language(question)] + "<|end|>").ids
        sources = [IGNORED] * len(answer)
    else:
        first_char = begins[gold] + span[0]
        first_token = coded.char_to_token(first_char)
        last_token = coded.char_to_token(begins[gold] + span[1] - 1)
        if first_token is None or last_token is None or gold_sentence == IGNORED:
            return None
        if (
            coded.offsets[first_token][0] < first_char - 1
            or prompt[coded.offsets[first_token][0] : first_char].strip()
            or coded.offsets[last_token][1] != begins[gold] + span[1]
        ):
            return None
        tail = tokenizer.encode(f" [{gold + 1}]<|end|>").ids  # " [", "n", "]", end
        marker = token_at(starts[gold] + len("<|passage|>["))
        answer = ids[first_token : last_token + 1] + tail
        sources = list(range(first_token, last_token + 1))
        sources += [marker if token == ids[marker] else IGNORED for token in tail]
    targets = [(before - 1 + n, token) for n, token in enumerate(answer)]
    return Example(
        ids=np.array(ids + answer[:-1], np.int32),
        targets=np.array(targets, np.int32),
        sources=np.array(sources, np.int32),
        sentence_ends=np.array(ends, np.int32),
        gold_sentence=gold_sentence,
        passage_starts=tuple(token_at(start) for start in starts),
        question_start=token_at(at),
        blocks=blocks,
    )


def copying_example(
    rng: random.Random, document: NDArray[np.int32], *, vocab_size: int, length: int
) -> Example:
    """A stretch of text or of random tokens said twice; the whole second half is the answer."""
    if rng.random() < 0.5 and len(document) > length:
        first = rng.randrange(len(document) - length)
        half = document[first : first + length]
    else:
        half = np.array([rng.randrange(6, vocab_size) for _ in range(length)], np.int32)
    start = 1 + length
    ids = np.concatenate([[0], half, [2], half]).astype(np.int32)[:-1]
    positions = np.arange(start, start + length, dtype=np.int32)
    return Example(
        ids=ids,
        targets=np.stack([positions, half], 1),
        sources=np.arange(1, 1 + length, dtype=np.int32),
        sentence_ends=np.zeros(0, np.int32),
        gold_sentence=IGNORED,
        passage_starts=(),
        question_start=start,
        blocks=False,
    )
