"""A question in other words, as a stand-in for how people ask who haven't read the text.

Words give way to their nearest neighbours in the bundled embedding that the text doesn't use. The
result isn't good language and is shown to nobody: what matters is that, as with people's own
questions, a part of the words is not the text's, and that part is near in meaning.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache

import numpy as np

from rag.embedder import Vectors
from rag.soft_match import bundled_table
from rag.term_weights import background
from rag.terms import ENGLISH_STOP_WORDS, HAN, normalise

_VOCABULARY = 12_000  # the most frequent words of the collection that ships
_NEAREST = 40  # neighbours looked through for one that the text doesn't use
_WORD = re.compile(rf"[a-z]{{4,}}|[{HAN}]{{2}}")
_ASKING = re.compile(r"什么|多少|哪|谁|几|为何|怎|吗|the|what|when|where|which|many|does")


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[list[str], Vectors]:
    """Words, and bigrams that are words, with their unit vectors (words, dim)."""
    known = background()
    words = [
        term for term in sorted(known.shares, key=lambda term: -known.shares[term])
        if _WORD.fullmatch(term) and not _ASKING.search(term)
        and (term.isascii() or (known.cohesion(term) or -9.0) > 1.0)
    ][:_VOCABULARY]
    return words, bundled_table().embed_passages(words)


def reword(question: str, text: str, share: float, rng: random.Random) -> str:
    """The question with about `share` of its words replaced (one at least) by near ones that `text` doesn't hold."""
    words, vectors = _vocabulary()
    held = normalise(text)
    pieces = list(_places(question))
    if not pieces:
        return question
    # At least one: a question of two words would often stay as it is.
    chosen = [place for place in pieces if rng.random() < share] or [rng.choice(pieces)]
    own = bundled_table().embed_passages([question[start:end].lower() for start, end in chosen])
    for (start, end), vector in sorted(zip(chosen, own, strict=True), key=lambda item: -item[0][0]):
        old = question[start:end].lower()
        near = vectors @ vector
        best = np.argpartition(-near, _NEAREST)[:_NEAREST]
        for at in best[np.argsort(-near[best])]:
            new = words[int(at)]
            if new.isascii() == old.isascii() and not _akin(new, old) and new not in held:
                question = question[:start] + new + question[end:]
                break
    return question


def _places(question: str) -> list[tuple[int, int]]:
    """[start, end) of each word, and of each pair of Han characters that is one."""
    known = background()
    found = []
    at = 0
    while at < len(question):
        match = re.compile(rf"[A-Za-z][\w'’-]*|[{HAN}]{{2}}").match(question, at)
        if match is None:
            at += 1
            continue
        word = match.group().lower()
        if word.isascii():
            wanted = len(word) >= 4 and word not in ENGLISH_STOP_WORDS
        else:
            wanted = (known.cohesion(word) or -9.0) > -1.0 and not _ASKING.search(word)
        if wanted and not _ASKING.fullmatch(word):
            found.append(match.span())
        # A pair that is no word may hide one that begins with its second character.
        at = match.end() if wanted or word.isascii() else at + 1
    return found


def _akin(new: str, old: str) -> bool:
    """Whether two words are forms of one another: as good as the same to the search."""
    return new[:4] == old[:4] if new.isascii() else not set(new).isdisjoint(old)
