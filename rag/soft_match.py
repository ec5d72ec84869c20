"""How much of a question a sentence says in other words.

Each token of the question looks for its nearest token in the sentence (the MaxSim of ColBERT,
Khattab and Zaharia, 2020, over static token vectors). The bundled embedder's table is used whatever
embedder the knowledge base has, so that the fitted weights mean the same everywhere. A token counts
by the length of its vector, which training made short for words that say little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt

from rag.embedder import StaticEmbedder, Vectors, load_embedder

_MOST_TOKENS = 400  # of one sentence; a table row without a full stop can be endless


@lru_cache(maxsize=1)
def bundled_table() -> StaticEmbedder:
    """The bundled embedder, loaded once a process."""
    return cast(StaticEmbedder, load_embedder("bundled"))


class SoftMatch:
    """One question against sentences.

    `nearest` is float32 (sentences, question tokens): the cosine of each question token's nearest
    token. `dense` is float32 (sentences,): the cosine of the whole question and sentence.
    """

    def __init__(self, question: str, sentences: Sequence[str]) -> None:
        table = bundled_table()
        question_tokens = table.token_vectors([question])[0]  # (Q, d)
        norms = np.linalg.norm(question_tokens, axis=1)
        self.weights: Vectors = norms / max(float(norms.sum()), 1e-9)  # (Q,)
        self.nearest: Vectors = np.zeros((len(sentences), len(norms)), dtype=np.float32)
        vectors = [rows[:_MOST_TOKENS] for rows in table.token_vectors(sentences)]
        filled = [at for at, rows in enumerate(vectors) if len(rows)]
        if filled and len(norms):
            tokens = np.concatenate([vectors[at] for at in filled])  # (T, d)
            tokens = tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-9)
            unit = question_tokens / np.maximum(norms[:, None], 1e-9)
            cosines = tokens @ unit.T  # (T, Q)
            starts = np.cumsum([0, *(len(vectors[at]) for at in filled[:-1])])
            self.nearest[filled] = np.maximum.reduceat(cosines, starts, axis=0)
        np.maximum(self.nearest, 0.0, out=self.nearest)
        whole = table.embed_passages([question, *sentences])
        self.dense: Vectors = whole[1:] @ whole[0]

    def coverage(self, rows: Sequence[int]) -> float:
        """Weighed share of the question that the sentences `rows` say together, 0 to 1."""
        return float(self.nearest[list(rows)].max(axis=0) @ self.weights) if len(rows) else 0.0

    def coverages(self) -> npt.NDArray[np.float32]:
        """`coverage` of each sentence alone, (sentences,)."""
        return self.nearest @ self.weights
