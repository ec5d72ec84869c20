"""Chinese or English: which of the two a text is written in, and the few words said in both."""

from __future__ import annotations

import re
from typing import Literal

Language = Literal["zh", "en"]

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")

REFUSAL = {
    "zh": "文档中没有找到这个问题的答案。",
    "en": "The documents do not contain an answer to this question.",
}


def detect_language(text: str) -> Language:
    """The language of a question. A Chinese question may name things in English words.

    One Han character weighs as much as one Latin word, twice over: "什么是 KV cache" is Chinese,
    "What does 注意力 mean in this paper" is English.
    """
    han = len(_HAN.findall(text))
    words = len(_LATIN_WORD.findall(text))
    return "zh" if han * 2 > words and han > 0 else "en"
