"""Batches of the extractor's training: rows of several passages, and where they are answered."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rag.bundled.extractor_data import Asked, Reading
from rag.bundled.train_extractor import SHARES, batches, collate, loss_of


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


ROWS = [
    (ids(1, 2), [ids(5, 6, 7), ids(8)], [(1, 0, 0)]),  # answered by the only token of its second passage
    (ids(3), [ids(9, 9)], []),  # not answered
]


def test_logits_of_all_passages_stand_in_one_row_before_null():
    batch = collate(ROWS)
    assert batch.question.tolist() == [[1, 2], [3, -1]]
    assert batch.passages.tolist() == [[5, 6, 7], [8, -1, -1], [9, 9, -1]]
    assert batch.rows.tolist() == [0, 0, 1]
    logits = torch.arange(18.0).view(3, 3, 2)  # of token t of passage n, side s: 6 n + 2 t + s
    every = batch.all_logits(logits, torch.tensor([[100.0, 101.0], [102.0, 103.0]]))
    assert every[0, :, 0].tolist() == [0, 2, 4, 6, 8, 10, 100]
    assert every[1, :, 1].tolist() == [13, 15, 17, -1e4, -1e4, -1e4, 103]  # it has no second passage
    assert batch.right[0, :, 0].nonzero().flatten().tolist() == [3]
    assert batch.right[1, :, 1].nonzero().flatten().tolist() == [6]


def test_the_loss_is_what_the_right_places_lack_of_all_probability():
    batch = collate(ROWS)
    even = torch.zeros(2, 7, 2)  # a seventh for each place: - log(1/7) for start and for end
    assert float(loss_of(even, batch.right)) == pytest.approx(2 * np.log(7))
    sure = even.masked_fill(batch.right, 50.0)
    assert float(loss_of(sure, batch.right)) == pytest.approx(0, abs=1e-6)


def test_processes_share_the_questions_among_them_and_have_rows_of_like_length():
    passages = [np.full(length, 7, dtype=np.int32) for length in range(1, 41)]
    questions = [Asked(ids(at), at, ((0, 0),), "patterns") for at in range(40)]
    reading = Reading(passages, questions, np.tile(np.arange(40, dtype=np.int32), (40, 1)))
    streams = [batches(reading, 4, random.Random(1), process, 2) for process in (0, 1)]
    # one pass has some 28 of the 40 (SHARES), half of them each: three full batches
    assert SHARES["patterns"] == 0.7
    seen: list[set[int]] = [set(), set()]
    for _ in range(3):
        for process, stream in enumerate(streams):
            seen[process] |= {int(question[0]) for question, _, _ in next(stream)}
    assert seen[0] and seen[1] and not seen[0] & seen[1]
