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
from scipy import sparse

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
        asked_ids, *ids = table.token_ids([question, *sentences])
        asked = table.table[asked_ids]  # (Q, d)
        norms = np.linalg.norm(asked, axis=1)
        self.weights: Vectors = norms / max(float(norms.sum()), 1e-9)  # (Q,)
        self.nearest: Vectors = np.zeros((len(sentences), len(norms)), dtype=np.float32)
        self.dense: Vectors = np.zeros(len(sentences), dtype=np.float32)
        ids = [part[:_MOST_TOKENS] for part in ids]
        filled = [at for at, part in enumerate(ids) if part]
        if not filled or not len(norms):
            return
        # Most tokens stand in many sentences: each is compared with the question once.
        flat = np.concatenate([np.asarray(ids[at]) for at in filled])  # (T,)
        distinct, place = np.unique(flat, return_inverse=True)  # (U,), (T,)
        vectors = table.table[distinct]  # (U, d)
        unit = asked / np.maximum(norms[:, None], 1e-9)
        lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        cosines = vectors @ unit.T / lengths  # (U, Q)
        sizes = [len(ids[at]) for at in filled]
        starts = np.cumsum([0, *sizes[:-1]])
        self.nearest[filled] = np.maximum.reduceat(cosines[place], starts, axis=0)
        np.maximum(self.nearest, 0.0, out=self.nearest)
        counts = sparse.csr_matrix(
            (np.ones(len(flat), dtype=np.float32), place, [0, *np.cumsum(sizes)]),
            shape=(len(filled), len(distinct)),
        )
        whole = counts @ vectors  # (sentences, d), each its tokens' sum
        total = asked.sum(axis=0)
        scale = np.linalg.norm(whole, axis=1) * np.linalg.norm(total)
        self.dense[filled] = whole @ total / np.maximum(scale, 1e-9)

    def coverage(self, rows: Sequence[int]) -> float:
        """Weighed share of the question that the sentences `rows` say together, 0 to 1."""
        return float(self.nearest[list(rows)].max(axis=0) @ self.weights) if len(rows) else 0.0

    def coverages(self) -> npt.NDArray[np.float32]:
        """`coverage` of each sentence alone, (sentences,)."""
        return self.nearest @ self.weights
