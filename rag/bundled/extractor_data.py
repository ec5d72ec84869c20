"""Questions with passages, as the extractor learns from them: token ids, answer spans, hard negatives.

Three kinds: reading comprehension (the answer is a span of the passage), retrieval pairs (the whole
passage answers), and Chinese questions made from plain text, where the language helps: a question
word stands where its answer would, so a statement with one part replaced is a question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse
from tokenizers import Tokenizer

from rag.bundled.training_data import held_out, is_measured, read_rows, windows
from rag.embedder import BUNDLED
from rag.extractor import LONGEST_QUESTION

Ids = npt.NDArray[np.int32]
LONGEST_PASSAGE = 240  # tokens; a longer one is cut to a window that holds the answer
NEGATIVES = 12
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Asked:
    """One question. `spans` are [first, last] tokens of its passage; none where all of it answers."""

    question: Ids
    passage: int
    spans: tuple[tuple[int, int], ...]
    source: str


@dataclass(slots=True)
class Reading:
    """Questions with the passages they are asked of, and for each the passages most like it."""

    passages: list[Ids]
    questions: list[Asked]
    negatives: Ids  # (questions, NEGATIVES)


class _Builder:
    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(next(BUNDLED.rglob("tokenizer.json"))))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.passages: list[Ids] = []
        self.offsets: list[list[tuple[int, int]]] = []
        self.places: dict[str, int] = {}
        self.questions: list[Asked] = []

    def passage(self, text: str) -> int:
        if text not in self.places:
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
            self.places[text] = len(self.passages)
            self.passages.append(np.array(encoded.ids, dtype=np.int32))
            self.offsets.append(encoded.offsets)
        return self.places[text]

    def ask(self, question: str, text: str, answer: str | None, source: str) -> None:
        ids = self.tokenizer.encode(question, add_special_tokens=False).ids[:LONGEST_QUESTION]
        at = self.passage(text)
        spans: list[tuple[int, int]] = []
        if answer is not None:
            begin = text.find(answer)
            while begin >= 0 and len(spans) < 8:
                spans += self._tokens(at, begin, begin + len(answer))
                begin = text.find(answer, begin + 1)
            if not spans:
                return
        if ids and len(self.passages[at]):
            self.questions.append(Asked(np.array(ids, dtype=np.int32), at, tuple(spans), source))

    def _tokens(self, at: int, begin: int, end: int) -> list[tuple[int, int]]:
        inside = [n for n, (a, b) in enumerate(self.offsets[at]) if a < end and b > begin]
        return [(inside[0], inside[-1])] if inside else []


def read_training(data: Path, *, made: int, seed: int) -> Reading:
    """All training questions, none of them held out or measured. `made`: Chinese ones made from text."""
    builder = _Builder()
    rng = random.Random(seed)
    for language in ("en", "zh"):
        for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz"):
            if held_out(row["context"], language) or is_measured(row["question"]):
                continue
            answer = str(row["answer"])
            if answer in row["context"]:
                builder.ask(row["question"], row["context"], answer, row["src"])
        for row in read_rows(data / f"retrieval_pairs.{language}.jsonl.xz"):
            whole = row["src"] in ("medquad", "lecoqa-train")
            if whole and not held_out(row["positive"], language) and not is_measured(row["query"]):
                builder.ask(row["query"], row["positive"], None, row["src"])
    for question, text, answer in made_questions(data, made, rng):
        builder.ask(question, text, answer, "made")
    vocabulary = builder.tokenizer.get_vocab_size()
    negatives = np.zeros((len(builder.questions), NEGATIVES), dtype=np.int32)
    sources = [item.source for item in builder.questions]
    for group in ({"squad1.1-train"}, {"medquad"}, {"made"}, {"drcd-dev-s2t", "cmrc2018-trial"}, {"lecoqa-train"}):
        rows = [at for at, source in enumerate(sources) if source in group]
        negatives[rows] = most_alike([builder.questions[at] for at in rows], builder.passages, vocabulary)
    return Reading(builder.passages, builder.questions, negatives)


def read_heldout(data: Path, language: str) -> Reading:
    """Held-out questions with spans, of one language, to see how training goes."""
    builder = _Builder()
    for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz"):
        answer = str(row["answer"])
        if held_out(row["context"], language) and not is_measured(row["question"]) and answer in row["context"]:
            builder.ask(row["question"], row["context"], answer, row["src"])
    negatives = most_alike(builder.questions, builder.passages, builder.tokenizer.get_vocab_size())
    return Reading(builder.passages, builder.questions, negatives)


def most_alike(questions: Sequence[Asked], passages: Sequence[Ids], vocabulary: int) -> Ids:
    """For each question the NEGATIVES passages, its own left out, with most of its tokens by idf.

    Searched among the passages that any of the questions is asked of.
    """
    used = sorted({item.passage for item in questions})
    place = {passage: at for at, passage in enumerate(used)}
    passages = [passages[at] for at in used]
    held = _matrix([np.unique(ids) for ids in passages], vocabulary)
    frequency = np.asarray(held.sum(axis=0)).ravel()
    idf = np.log(1 + len(passages) / (1 + frequency)).astype(np.float32)
    lengths = np.array([20 + len(ids) ** 0.5 for ids in passages], dtype=np.float32)
    asked = _matrix([np.unique(item.question) for item in questions], vocabulary) @ sparse.diags(idf)
    found = np.zeros((len(questions), NEGATIVES), dtype=np.int32)
    transposed = held.T.tocsr()
    for begin in range(0, len(questions), _BLOCK):
        scores = (asked[begin : begin + _BLOCK] @ transposed).toarray() / lengths
        own = [place[item.passage] for item in questions[begin : begin + _BLOCK]]
        scores[np.arange(len(own)), own] = -1.0
        found[begin : begin + len(own)] = np.argpartition(-scores, NEGATIVES, axis=1)[:, :NEGATIVES]
    return np.array(used, dtype=np.int32)[found]


def _matrix(rows: Sequence[Ids], width: int) -> sparse.csr_matrix:
    flat = np.concatenate(rows)
    ends = np.cumsum([0, *(len(row) for row in rows)])
    return sparse.csr_matrix((np.ones(len(flat), dtype=np.float32), flat, ends), shape=(len(rows), width))


# questions made from Chinese text

_DATE = re.compile(r"\d{4}年(?:\d{1,2}月(?:\d{1,2}日)?)?|\d{1,2}月\d{1,2}日")
_COUNT = re.compile(r"(?<![\d.第年月])\d[\d,.]*\s?(?:万|亿)?(?=[个人名家只条台套元美元公里米吨岁天次倍%小时分钟层辆件户])")
_SURNAME = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕施张孔曹严华金魏陶姜谢邹苏潘葛范彭鲁韦马方任袁柳史唐薛雷贺汤罗毕安常于傅齐康余顾孟黄萧尹姚邵汪毛戴宋庞熊纪项祝董梁杜阮席季贾江童郭林钟徐邱高夏蔡田胡凌霍万卢莫房丁邓洪左石崔龚程陆翁段侯刘叶黎温庄阎"
_PERSON = re.compile(rf"(?<![\u4e00-\u9fff])[{_SURNAME}][\u4e00-\u9fff]{{1,2}}(?=表示|指出|认为|介绍|强调|告诉|说[，：“])")
_WORK = re.compile(r"《[^《》]{2,20}》")
_PLACE = re.compile(r"(?<=[在于到往])(?:[\u4e00-\u9fff]{2,4}(?:省|市|县|区|国|大学|学院))")
_NAME = r"^((?:(?!如果|必须|应当|可以|不|也|都|总|只|或|这|那|其|该|此|我|你|他|它|“|”)[^，。；：？！（）()]){2,12}?)"
_IS_KIND = re.compile(_NAME + r"(?:是指|是一种|是一个|是一类|指的是)([^，。；？！]{4,40})")
_BECAUSE = re.compile(r"(?:因为|由于)([^，。；]{4,40})[，,](?:所以|因此)?([^。；！？]{5,40})")
_USED = re.compile(_NAME + r"(?:用于|用来|负责)([^。；？！]{4,40})")
_CLAUSE = re.compile(r"[，,；;：:]")


def made_questions(data: Path, count: int, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Up to `count` of (question, passage, answer) from plain Chinese text."""
    sources = ("crud_news", "lctt", "laws", "python_docs", "crud_news")
    readers = [iter(_texts(data / f"text.zh.{name}.jsonl.xz", rng)) for name in sources]
    made = 0
    while made < count and readers:
        for reader in list(readers):
            window = next(reader, None)
            if window is None:
                readers.remove(reader)
                continue
            options = [(q, a) for sentence in window for q, a in _ask_about(sentence, rng)]
            if options:
                question, answer = rng.choice(options)
                yield question, "".join(window), answer
                made += 1


def _texts(path: Path, rng: random.Random) -> Iterator[list[str]]:
    for row in read_rows(path):
        yield from windows(row["text"], rng=rng, count=2, characters=rng.randrange(150, 420))


def _ask_about(sentence: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions that one sentence answers, with the part of it that is the answer."""
    for pattern, words in (
        (_DATE, ("什么时候", "哪一年", "何时")), (_COUNT, ("多少", "几")), (_PERSON, ("谁", "哪位")),
        (_WORK, ("什么", "哪部作品", "哪份文件")), (_PLACE, ("哪里", "什么地方", "哪个地方")),
    ):
        for match in list(pattern.finditer(sentence))[:2]:
            question = _around(sentence, match.start(), match.end(), rng.choice(words), rng)
            if question:
                yield question, match.group()
    if kind := _IS_KIND.match(sentence):
        name = kind[1].strip()
        yield rng.choice(("什么是{}？", "{}是什么？", "{}是什么意思？", "怎么理解{}？")).format(name), kind[2]
    if used := _USED.match(sentence):
        yield rng.choice(("{}有什么用？", "{}的作用是什么？", "{}能做什么？")).format(used[1].strip()), used[2]
    if because := _BECAUSE.search(sentence):
        yield rng.choice(("为什么{}？", "{}的原因是什么？", "为何{}？")).format(because[2].strip("，, ")), because[1]


def _around(sentence: str, start: int, end: int, word: str, rng: random.Random) -> str | None:
    """The clause with the question word in it, and sometimes a clause beside it, words left out."""
    cuts = [0, *(m.end() for m in _CLAUSE.finditer(sentence)), len(sentence)]
    at = next(n for n in range(len(cuts) - 1) if cuts[n + 1] > start)
    if cuts[at + 1] < end:
        return None
    own = sentence[cuts[at] : start] + word + sentence[end : cuts[at + 1]]
    others = [sentence[cuts[n] : cuts[n + 1]] for n in range(len(cuts) - 1) if n != at]
    own = own.strip("，,；;：:。！？ ")
    if others and rng.random() < 0.75:
        beside = rng.choice(others).strip("，,；;：:。！？ ")
        own = f"{beside}，{own}" if rng.random() < 0.6 else f"{own}，{beside}"
    kept = _thinned(own, word, rng)
    return kept + "？" if 6 <= len(kept) <= 60 else None


def _thinned(text: str, word: str, rng: random.Random) -> str:
    """Without some of its two-character stretches: people remember half of what they ask about."""
    share = rng.choice((0.0, 0.0, 0.1, 0.2))
    parts = text.split(word, 1)
    if len(parts) != 2:
        return text
    thin = ["".join(p[i : i + 2] for i in range(0, len(p), 2) if rng.random() >= share) for p in parts]
    return word.join(thin)
