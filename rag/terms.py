"""Text -> terms for BM25: stemmed words, and bigrams of Han characters.

Bigrams need no dictionary and do as well as a word segmenter on Chinese retrieval. Passages and
questions go through the same normalisation, so full-width and half-width, case, and English
inflection, and traditional and simplified characters meet each other.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from operator import add

import snowballstemmer

from rag.simplified import simplify

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_RUN = re.compile(rf"[{HAN}]+|[^\W_{HAN}]+")
_HAN_START = re.compile(rf"[{HAN}]")
_POSSESSIVE = re.compile(r"(?<=\w)['’]s\b")
_stemmer = snowballstemmer.stemmer("english")

# Words that carry the form of a question rather than its subject. They are left out of what is
# searched for, never out of what is indexed.
ENGLISH_STOP_WORDS = frozenset(
    """a about am an and any are as at be been being but by can could did do does doing done for
    from give had has have having he her him his how i if in into is it its many may me might
    mine more most much must my name no not of on or our please shall she should so some such tell
    than that the their them then there these they this those to too us very was we were what
    when where which who whom whose why will with would you your""".split()
)
_CHINESE_QUESTION_WORDS = re.compile(
    "|".join(
        sorted(
            """请问 请 什么样 什么时候 什么 为什么 为何 怎么样 怎么办 怎么 怎样 如何 哪一年 哪一个
            哪些 哪个 哪里 哪儿 哪位 哪种 哪年 哪 谁 多少 多久 几个 几年 几种 是不是 能不能 可不可以
            有没有 是否 告诉我 介绍一下 吗 呢 吧 啊 什么是 是什么 指什么 指的是什么 有什么 有哪些 有多少
            为多少 是多少 是谁 谁是 是怎样 是怎么 是如何 在哪里 在哪 是哪 叫什么""".split(),
            key=len,
            reverse=True,
        )
    )
)
# A bigram with one of these is as common by chance as by meaning, but for a few words.
_PARTICLES = frozenset("的了吗呢吧啊着")
_WORDS_WITH_PARTICLES = frozenset(("目的", "标的", "着作", "着名", "了解", "终了", "的确", "着重"))


@lru_cache(maxsize=200_000)
def _stem(word: str) -> str:
    return str(_stemmer.stemWord(word)) if word.isascii() and word.isalpha() else word


def normalise(text: str) -> str:
    """NFKC (full-width to half-width, ligatures apart), lower case, simplified characters, English
    possessives dropped."""
    return _POSSESSIVE.sub("", simplify(unicodedata.normalize("NFKC", text).lower()))


_BREAK_IN_HAN = re.compile(rf"(?<=[{HAN}])[ \t]*\n[ \t]*(?=[{HAN}])")


def passage_terms(text: str) -> list[str]:
    """Every term of a passage, in order, repeated as often as it stands there.

    A line break between Han characters parts no word.
    """
    terms: list[str] = []
    if "\n" in text:
        text = _BREAK_IN_HAN.sub("", text)
    for run in _RUN.findall(normalise(text)):
        if run.isascii() or not _HAN_START.match(run):
            terms.append(_stem(run))
        elif len(run) == 1:
            terms.append(run)
        else:
            terms.extend(map(add, run, run[1:]))
    return terms


def question_terms(text: str) -> list[str]:
    """The terms worth searching for, each once, in order.

    Where nothing is left ("what is it?"), all terms of the question are given back, so that a
    question is never searched as nothing.
    """
    found: dict[str, None] = {}
    for run in _RUN.findall(normalise(text)):
        if _HAN_START.match(run):
            for part in _CHINESE_QUESTION_WORDS.split(run):
                if len(part) == 1 and len(run) > 1:
                    continue  # a lone character between question words says little
                for term in passage_terms(part):
                    if _PARTICLES.isdisjoint(term) or term in _WORDS_WITH_PARTICLES:
                        found[term] = None
        elif run not in ENGLISH_STOP_WORDS:
            found[_stem(run)] = None
    return list(found) or list(dict.fromkeys(passage_terms(text)))
