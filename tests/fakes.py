"""Small real classes that stand in for big ones, so that expected values can be worked out by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rag.terms import passage_terms


class WordEmbedder:
    """Each term falls into one of 64 boxes; a text is the unit vector of its counts."""

    name = "words"
    fingerprint = "words-64"
    dim = 64
    max_tokens: int | None = None

    def __init__(self, name: str = "words") -> None:
        self.name = name
        self.fingerprint = f"{name}-64"
        self.calls = 0

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        self.calls += len(texts)
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for term in passage_terms(text):
                row[hashlib.md5(term.encode()).digest()[0] % self.dim] += 1
            norm = np.linalg.norm(row)
            if norm:
                row /= norm
        return rows

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed_passages(texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(passage_terms(text)) for text in texts]
