"""How tokens are used: a vector for each from what stands just before and behind it in plain text.

The embedder's table says what a token means; it was trained to find passages and tells a year from a
verb badly. Here tokens that could stand in each other's place (two years, two towns, "who" and
"they") come out alike: positive pointwise mutual information with the commonest tokens at each of
four neighbouring places, its contexts smoothed, and the first dimensions of its singular value
decomposition (Bullinaria and Levy, 2007; Levy, Goldberg and Dagan, 2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import sparse
from tokenizers import Tokenizer

from rag.bundled.training_data import read_rows, text_files

PLACES = (-2, -1, 1, 2)
CONTEXTS = 2500  # of the commonest tokens, at each place
DIMENSIONS = 96
_CHARACTERS = {"en": 14_000_000, "zh": 8_000_000}  # read of each collection, at most
_SMOOTHING = 0.75
_BLOCK = 4_000_000


def token_usage(data: Path, tokenizer: Tokenizer, *, seed: int) -> npt.NDArray[np.float16]:
    """(vocabulary, DIMENSIONS) of the plain texts in `data`, a minute's work; rows are at most 1 long,
    and shorter where little is known of a token."""
    from sklearn.utils.extmath import randomized_svd  # type: ignore[import-untyped]

    vocabulary = tokenizer.get_vocab_size()
    ids = np.concatenate(list(_ids(data, tokenizer)))
    counts = _neighbours(ids, vocabulary)
    left, values, _ = randomized_svd(_information(counts), n_components=DIMENSIONS, n_iter=3, random_state=seed)
    table = left * np.sqrt(values)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    usual = np.median(norms[norms > 0])
    table = table / np.maximum(norms, 1e-6) * np.minimum(1.0, norms / usual)
    return cast(npt.NDArray[np.float16], table.astype(np.float16))


def _ids(data: Path, tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int32]]:
    """Token ids of text after text, -1 between them."""
    for path in text_files(data):
        left = _CHARACTERS[path.name.split(".")[1]]
        texts = []
        for row in read_rows(path):
            texts.append(row["text"][:left])
            left -= len(texts[-1])
            if left <= 0:
                break
        for encoded in tokenizer.encode_batch(texts, add_special_tokens=False):
            yield np.array([*encoded.ids, *[-1] * len(PLACES)], dtype=np.int32)


def _neighbours(ids: npt.NDArray[np.int32], vocabulary: int) -> sparse.csr_matrix:
    """How often each token has each common one at each of PLACES: (vocabulary, PLACES x CONTEXTS)."""
    common = np.argsort(-np.bincount(ids[ids >= 0], minlength=vocabulary), kind="stable")[:CONTEXTS]
    column = np.full(vocabulary + 1, -1, dtype=np.int64)
    column[common] = np.arange(CONTEXTS)
    ids = np.where(ids < 0, vocabulary, ids)
    reach = max(PLACES)
    counts = sparse.csr_matrix((vocabulary, len(PLACES) * CONTEXTS), dtype=np.float32)
    for at in range(reach, len(ids) - reach, _BLOCK):
        end = min(at + _BLOCK, len(ids) - reach)
        for number, place in enumerate(PLACES):
            token, context = ids[at:end], column[ids[at + place : end + place]]
            known = (token < vocabulary) & (context >= 0)
            ones = np.ones(int(known.sum()), dtype=np.float32)
            where = (token[known], context[known] + number * CONTEXTS)
            counts = counts + sparse.csr_matrix((ones, where), shape=counts.shape)
    return counts


def _information(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Positive pointwise mutual information, contexts smoothed."""
    found = counts.tocoo()
    of_token = np.asarray(counts.sum(axis=1)).ravel()
    of_context = np.asarray(counts.sum(axis=0)).ravel() ** _SMOOTHING
    total = of_token.sum()
    of_context *= total / of_context.sum()
    value = np.log(found.data * total / (of_token[found.row] * of_context[found.col]))
    above = value > 0
    return sparse.csr_matrix((value[above], (found.row[above], found.col[above])), shape=counts.shape)
