"""A follow-up question -> the question to search for.

"And in Chinese?" finds nothing by itself. Where a question leans on what was said before, what the
last question asked about is put in front of it; a question that stands on its own is left as it is.
How often that helps and harms: `python -m benchmarks.followups`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rag.language import detect_language
from rag.simplified import simplify
from rag.terms import question_terms

_LEANS_EN = re.compile(
    r"^(?:and|but|so|then|what about|how about|why not|which one|why\s*\??$|how so)\b|\b(?:(?-i:[Ii]t)|its|they|them|"
    r"their|he|she|his|her|this one|that one|these|those|the (?:former|latter|same|other|second|first) ?(?:one)?)\b",
    re.IGNORECASE,
)
# "Is it possible to grow wheat on Mars?", "How long does it take to ...": this "it" stands for nothing said before.
_DUMMY_IT = re.compile(
    r"\bit (?=(?:still |really |ever |always |also )?(?:possible|necessary|legal|allowed|permitted|worth|hard|easy|difficult|"
    r"better|common|normal|true|important|safe|enough|useful) (?:to|that|for)\b)|\bit (?=(?:take|make sense|matter)s?\b)",
    re.IGNORECASE,
)
_SHORTEST_SAID = 4  # terms behind such an "it", so that it says what it is about; "Is it safe to use?" does not
_LEANS_ZH = re.compile(
    r"^(?:那么?|还有|另外|然后|为什么[?？]?$|为啥|怎么说|比如|举例|具体(?!化)|继续(?!教育|医学)|再(?![婚生审贷犯])|又)|"
    r"(?<!其)它们?|(?<![吉其利排])他(?![人国乡汀克])|她们?|(?<!土耳)(?<![尤极与何名])其(?!中|他|它|实|余|次)|"
    r"这[个种些样]?(?!里)|那[个种些样](?!里)|^其中|(?:^|为什么)里面|前者|后者|上述|上面|刚才|^.{1,14}呢[?？]?$"
)


# "What is RoPE?" is short and complete.
_ASKS_WHAT = re.compile(r"^(?:(?:what (?:is|are|does)|who (?:is|was)|define|explain)\b|什么是|何谓)\s*\w|是什么[?？]?$", re.IGNORECASE)
# The form of the last question, which says nothing of its subject and would count as if it did.
_FORM = re.compile(
    r"^(?:what (?:is|are|does|do|happens (?:during|to|if|in|when))|(?:how|why|when|where) (?:is|are|does|do)|"
    r"什么是|怎样|怎么|为什么)\s*|(?:是什么意思|是什么|指什么|有什么(?:不同|作用|区别)?|怎么计算|是怎[样么]\w+的|\bwork|\bdo)?\s*[?？]?$",
    re.IGNORECASE,
)


# A follow-up that names another subject, to which later ones go back: "And QLoRA?", "那 AWQ 呢？"
_NAMES_ANOTHER = re.compile(
    r"^(?:(?:and|what about|how about)\s+(?!(?:what|who|whom|whose|why|how|when|where|which|if|is|are|does|do|can|then)\b)"
    r"(?:\S+\s*){1,4}|那?.{1,14}呢)[?？]?$",
    re.IGNORECASE,
)


def search_question(question: str, history: Sequence[tuple[str, str]]) -> str:
    """What to search for. `history` holds (question, answer) pairs, oldest first."""
    if not history or not _leans(question):
        return question
    return f"{_subject([asked for asked, _ in history])} {question.strip()}"


def _subject(asked: Sequence[str]) -> str:
    """What the last of these questions is about: of those that lean themselves, what they lean on."""
    at = next((at for at in reversed(range(len(asked))) if not _leans(asked[at])), 0)
    named = next((last for last in reversed(asked[at + 1 :]) if _NAMES_ANOTHER.search(last.strip())), "")
    stood = asked[at].strip()
    return f"{_FORM.sub('', stood).strip() or stood} {named.strip()}".strip()


def _leans(question: str) -> bool:
    """Whether a question can't be understood without what was said before."""
    asked = question.strip()
    if detect_language(asked) == "zh":
        leans = _LEANS_ZH.search(simplify(asked))
    else:
        dummy = _DUMMY_IT.search(asked)
        alone = dummy and len(question_terms(asked[dummy.end() :])) >= _SHORTEST_SAID
        leans = _LEANS_EN.search(_DUMMY_IT.sub("", asked) if alone else asked)
    return bool(leans) or len(question_terms(asked)) <= 1 and not _ASKS_WHAT.search(asked)
