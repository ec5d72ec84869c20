"""A follow-up question -> the question to search for.

"And in Chinese?" finds nothing by itself. Where a question leans on what was said before, what the
last question asked about is put in front of it; a question that stands on its own is left as it is.
How often that helps and harms: `python -m benchmarks.followups`.
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
    r"这[个种些样]?(?!里)|那[个种些样](?!里)|^其中|(?:^|为什么)里面|前者|后者|上述|上面|刚才|呢[?？]?$"
)


# "What is RoPE?" is short and complete.
_ASKS_WHAT = re.compile(r"^(?:(?:what (?:is|are|does)|who (?:is|was)|define|explain)\b|什么是|何谓)\s*\w|是什么[?？]?$", re.IGNORECASE)
# The form of the last question, which says nothing of its subject and would count as if it did.
_FORM = re.compile(
    r"^(?:what (?:is|are|does|do|happens (?:during|to|if|in|when))|(?:how|why|when|where) (?:is|are|does|do)|"
    r"什么是|怎样|怎么|为什么)\s*|(?:是什么意思|是什么|指什么|有什么(?:不同|作用|区别)?|怎么计算|是怎[样么]\w+的|\bwork|\bdo)?\s*[?？]?$",
    re.IGNORECASE,
)


def search_question(question: str, history: Sequence[tuple[str, str]]) -> str:
    """What to search for. `history` holds (question, answer) pairs, oldest first."""
    if not history:
        return question
    asked = question.strip()
    leans = _LEANS_ZH if detect_language(question) == "zh" else _LEANS_EN
    if not leans.search(asked) and (len(question_terms(asked)) > 1 or _ASKS_WHAT.search(asked)):
        return question
    last = history[-1][0].strip()
    return f"{_FORM.sub('', last).strip() or last} {asked}"
