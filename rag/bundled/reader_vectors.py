"""Word vectors from co-occurrence: what the reader's token embeddings start from.

Half an hour of reading can't teach which words mean nearly the same; counting which tokens stand
near each other takes a minute. Positive pointwise mutual information, reduced by a truncated
singular value decomposition (Levy and Goldberg, 2014; Levy, Goldberg and Dagan, 2015).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

CHUNK_TOKENS = 1_000_000


def count_neighbours(
    documents: Iterable[NDArray[np.int32]], *, vocab_size: int, window: int = 5
) -> sp.csr_matrix:
    """How often two tokens stand within `window` of each other, nearer ones weighing more.

    Returns float32 (vocab_size, vocab_size), symmetric; at distance d a pair counts 1/d.
    """
    total = sp.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    chunk: list[NDArray[np.int32]] = []
    held = 0
    # -1 between documents: no pair reaches across it
    border = np.full(window, -1, np.int32)

    def add(total: sp.csr_matrix) -> sp.csr_matrix:
        tokens = np.concatenate(chunk)
        for distance in range(1, window + 1):
            left, right = tokens[:-distance], tokens[distance:]
            kept = (left >= 0) & (right >= 0)
            pairs = sp.coo_matrix(
                (np.full(int(kept.sum()), 1.0 / distance, np.float32), (left[kept], right[kept])),
                shape=total.shape,
            )
            total = total + pairs.tocsr()
        return total

    for document in documents:
        chunk += [document, border]
        held += len(document)
        if held >= CHUNK_TOKENS:
            total = add(total)
            chunk, held = [], 0
    if chunk:
        total = add(total)
    return (total + total.T).tocsr()


def factorise(
    counts: sp.csr_matrix, *, dim: int, seed: int, smoothing: float = 0.75
) -> NDArray[np.float32]:
    """Vectors from co-occurrence counts. Returns float32 (tokens, dim), rows of unit length.

    Positive PMI with context counts raised to `smoothing`; randomised SVD (Halko et al., 2011);
    singular values to the power 0.5. Rows of tokens never seen are random.
    """
    rng = np.random.default_rng(seed)
    counts = counts.tocoo()
    row_sum = np.asarray(counts.tocsr().sum(1)).ravel()
    context = row_sum**smoothing
    context /= context.sum()
    pmi = np.log(counts.data / (row_sum[counts.row] * context[counts.col] + 1e-12) + 1e-12)
    kept = pmi > 0
    matrix = sp.csr_matrix(
        (pmi[kept].astype(np.float32), (counts.row[kept], counts.col[kept])), shape=counts.shape
    )
    # randomised range finder with two power iterations; the matrix is symmetric in its support
    basis = rng.standard_normal((matrix.shape[1], dim + 32)).astype(np.float32)
    for _ in range(3):
        basis = np.linalg.qr(matrix @ basis)[0].astype(np.float32)
    small = (matrix.T @ basis).T  # (dim + 32, tokens)
    left, values, _ = np.linalg.svd(small @ small.T)
    vectors = (basis @ left[:, :dim]) * np.sqrt(values[:dim]) ** 0.5
    seen = row_sum > 0
    vectors[~seen] = rng.standard_normal((int((~seen).sum()), dim))
    return unit_rows(np.asarray(vectors, np.float32))


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors with rows of unit length."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-6), np.float32)


def spread(
    vectors: NDArray[np.float32], groups: NDArray[np.int64], *, directions: int = 2
) -> NDArray[np.float32]:
    """Vectors without what all of a group share. Returns float32 (tokens, dim), unit rows.

    The tokens of one script stand so much together that all of them look alike; their mean and
    first principal `directions` are taken off (Mu and Viswanath, 2018), group by group.
    """
    spread_out = vectors.astype(np.float32).copy()
    for group in np.unique(groups):
        rows = spread_out[groups == group]
        rows -= rows.mean(0)
        _, axes = np.linalg.eigh(rows.T @ rows)
        top = axes[:, -directions:]
        spread_out[groups == group] = rows - (rows @ top) @ top.T
    return unit_rows(spread_out)
