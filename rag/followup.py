"""A follow-up question -> the question to search for.

"And in Chinese?" finds nothing by itself. Where a question leans on what was said before, the last
question's words are put in front of it; a question that stands on its own is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rag.language import detect_language
from rag.terms import question_terms

_LEANS_EN = re.compile(
    r"^(?:and|but|so|then|what about|how about|why not|which one|why\s*\??$|how so)\b|\b(?:it|its|they|them|"
    r"their|he|she|his|her|this one|that one|these|those|the (?:former|latter|same|other|second|first) ?(?:one)?)\b",
    re.IGNORECASE,
)
_LEANS_ZH = re.compile(
    r"^(?:那么?|还有|另外|然后|为什么[?？]?$|为啥|怎么说|比如|举例|具体|继续|再|又)|它们?|他们?|她们?|其(?!中|他|它|实|余|次)|"
    r"这[个种些样]?(?!里)|那[个种些样](?!里)|前者|后者|上述|上面|刚才|呢[?？]?$"
)


def search_question(question: str, history: Sequence[tuple[str, str]]) -> str:
    """What to search for. `history` holds (question, answer) pairs, oldest first."""
    if not history:
        return question
    leans = _LEANS_ZH if detect_language(question) == "zh" else _LEANS_EN
    if not leans.search(question.strip()) and len(question_terms(question)) > 1:
        return question
    return f"{history[-1][0].strip()} {question.strip()}"
