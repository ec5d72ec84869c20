"""Questions made from plain text and from translations, as the extractor learns from them.

Chinese helps: a question word stands where its answer would, so a statement with one part replaced
is a question. English statements are turned round by the patterns of `rag.quality.question_templates`.
Of translated texts, a sentence in one language asks for its counterpart among those of the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rag.bundled.training_data import read_rows, windows
from rag.quality.question_templates import drafts

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


def made_from_chinese(data: Path, count: int, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Up to `count` of (question, passage, answer) from plain Chinese text."""
    sources = ("crud_news", "lctt", "laws", "python_docs", "crud_news")
    readers = [iter(_texts(data / f"text.zh.{name}.jsonl.xz", rng, 150, 420)) for name in sources]
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


def made_by_patterns(data: Path, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(question, passage, answer) from manuals and articles in both languages, one a window at most."""
    for language, name in (("en", "lctt"), ("en", "python_docs"), ("zh", "lctt"), ("zh", "python_docs"), ("zh", "laws")):
        low, high, joiner = (400, 1200, " ") if language == "en" else (150, 420, "")
        for window in _texts(data / f"text.{language}.{name}.jsonl.xz", rng, low, high):
            options = [(draft.question, sentence[draft.start : draft.end]) for sentence in window for draft in drafts(sentence)]
            if options:
                question, answer = rng.choice(options)
                yield question, joiner.join(window), answer


_ROWS_TOGETHER = 6  # neighbouring rows of the translations are neighbours in their text
_HELD_OUT_OF = 12  # one stretch of so many is kept to fit on


def made_across_languages(data: Path, rng: random.Random, *, fitting: bool = False) -> Iterator[tuple[str, str, str]]:
    """(question, passage in the other language, the sentence that answers), one a stretch at most.

    A sentence that fits a pattern becomes a question; its translation answers. Of the others some ask
    as they are. `fitting`: of the stretches that nothing is trained on, both ways, and only questions.
    """
    rows = read_rows(data / "parallel.en-zh.jsonl.xz")
    for (_, number), group in groupby(enumerate(rows), key=lambda item: (item[1]["src"], item[0] // _ROWS_TOGETHER)):
        part = [row for _, row in group if 12 <= len(row["en"]) <= 400]
        if len(part) < 4 or (number % _HELD_OUT_OF == 0) is not fitting:
            continue
        ways = rng.sample([("en", "zh"), ("zh", "en")], 2 if fitting else 1)
        for asked, said in ways:
            options = [(draft.question, at) for at, row in enumerate(part) for draft in drafts(row[asked].strip())]
            if not options and not fitting and rng.random() < 0.1:
                at = rng.randrange(len(part))
                options = [(part[at][asked], at)] if len(part[at][asked]) <= (60 if asked == "zh" else 160) else []
            if options:
                question, at = rng.choice(options)
                yield question, ("" if said == "zh" else " ").join(row[said] for row in part), part[at][said]


def _texts(path: Path, rng: random.Random, low: int, high: int) -> Iterator[list[str]]:
    for row in read_rows(path):
        yield from windows(row["text"], rng=rng, count=2, characters=rng.randrange(low, high))


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
