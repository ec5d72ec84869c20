from pathlib import Path

import pytest

from benchmarks.followups import half_of, read_followups
from rag.followup import search_question

HISTORY = [("What is RoPE?", "A rotation."), ("How does byte-level BPE work?", "It merges pairs.")]
FOLLOWUPS = read_followups()


def test_a_question_without_history_is_left_as_it_is():
    assert search_question("Why can it represent any string?", []) == "Why can it represent any string?"


@pytest.mark.parametrize(
    ("history", "question", "searched"),
    [
        (HISTORY, "Why can it represent any string?", "byte-level BPE Why can it represent any string?"),
        (HISTORY, "And in Chinese?", "byte-level BPE And in Chinese?"),
        ([("什么是句向量？", "…")], "两个这样的怎么比较？", "句向量 两个这样的怎么比较？"),
        ([("hit@k 是什么意思？", "…")], "它和 MRR 有什么不同？", "hit@k 它和 MRR 有什么不同？"),
        ([("What is it?", "…")], "And then?", "it And then?"),
    ],
)
def test_what_leans_gets_the_last_subject_in_front(history, question, searched):
    assert search_question(question, history) == searched


@pytest.mark.parametrize(
    "question", ["What is QLoRA?", "什么是量化？", "Which exit code does the ingest command give?", "词表一般有多少项？"]
)
def test_a_question_that_stands_on_its_own_is_left_as_it_is(question):
    assert search_question(question, HISTORY) == question


def test_the_follow_ups_are_sixty_a_language_a_third_of_them_complete():
    for language in ("zh", "en"):
        own = [item for item in FOLLOWUPS if item.id.startswith(language)]
        assert len(own) == 60 and sum(item.complete for item in own) == 20
        assert all(1 <= len(item.history) <= 2 for item in own)
    knowledge = Path(__file__).parents[1] / "knowledge"
    assert all((knowledge / item.path).is_file() for item in FOLLOWUPS)
    assert len(half_of(FOLLOWUPS, "looking")) == len(half_of(FOLLOWUPS, "confirming")) == 60


def test_complete_ones_are_left_alone_and_nearly_all_others_completed():
    completed = {item.id for item in FOLLOWUPS if search_question(item.question, item.history) != item.question}
    assert not completed & {item.id for item in FOLLOWUPS if item.complete}
    assert len(completed) >= 0.9 * sum(not item.complete for item in FOLLOWUPS)
