"""Questions made of plain text: each is answered by the part of its passage that is named."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import pytest

from rag.bundled.extractor_data import Asked, Reading
from rag.bundled.heaviest_word import heaviest_word
from rag.bundled.made_questions import made_across_languages, made_by_patterns
from rag.bundled.train_extractor import make_row

ROWS = [
    {"src": "manual", "en": "Open the front cover first.", "zh": "首先打开前面的盖子，注意不要用力过猛。"},
    {"src": "manual", "en": "A filter is a mesh that holds back dust.", "zh": "滤网是一种挡住灰尘的细网，装在进气口后面。"},
    {"src": "manual", "en": "Rinse it under running water.", "zh": "把它放在流动的清水下面冲洗干净。"},
    {"src": "manual", "en": "Let it dry for a whole day.", "zh": "然后放在通风的地方晾干一整天。"},
    {"src": "manual", "en": "Put it back with care.", "zh": "最后小心地把它重新装回原来的位置。"},
    {"src": "manual", "en": "Close the cover again.", "zh": "再把前面的盖子重新盖好并且扣紧。"},
]


def write(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_a_translated_sentence_answers_the_question_made_of_its_counterpart(tmp_path):
    write(tmp_path, "parallel.en-zh", ROWS)
    made = list(made_across_languages(tmp_path, random.Random(1), fitting=True))  # the first stretch is held out
    assert list(made_across_languages(tmp_path, random.Random(1))) == []
    answers = {question: answer for question, _, answer in made}
    assert answers["What is a filter?"] == ROWS[1]["zh"]
    for _, passage, answer in made:
        assert answer in passage


def test_sentences_of_manuals_become_questions_about_their_window(tmp_path):
    text = "Open the front cover first. A filter is a mesh that holds back dust. Rinse it under running water. " * 4
    for name in ("en.lctt", "en.python_docs", "zh.lctt", "zh.python_docs", "zh.laws"):
        write(tmp_path, f"text.{name}", [{"title": "Manual", "text": text}] if name == "en.lctt" else [])
    made = list(made_by_patterns(tmp_path, random.Random(1)))
    assert made and all(answer in passage for _, passage, answer in made)


@pytest.mark.parametrize(
    ("question", "weights", "word"),
    [("When was Rome founded?", {"rome": 5.0, "found": 2.0}, "Rome"), ("罗马城是谁建的？", {"罗马": 5.0, "谁建": 1.0}, "罗马")],
)
def test_the_heaviest_word_is_what_a_question_is_about(question, weights, word):
    start, end = heaviest_word(question, weights)
    assert question[start:end] == word


def test_a_question_about_another_subject_is_shown_its_passage_and_has_no_answer_there():
    import numpy as np

    ids = [np.arange(begin, begin + 5, dtype=np.int32) for begin in (0, 10, 20)]
    asked = Asked(np.array([1], dtype=np.int32), 0, ((1, 2),), "made", answered=False)
    reading = Reading(ids, [asked], np.array([[1, 2]], dtype=np.int32))
    for seed in range(10):
        _, passages, spans = make_row(asked, reading, [1, 2], random.Random(seed))
        assert any(0 in part for part in passages) and spans == []
