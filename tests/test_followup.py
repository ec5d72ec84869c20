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
    "question", [
        "What is QLoRA?", "什么是量化？", "Which exit code does the ingest command give?", "词表一般有多少项？",
        # Each of these was completed, and answered from the last question's document: "IT" and a dummy "it" were
        # taken for pronouns, and so was a part of a longer word.
        "Who runs the IT department?", "Is it possible to breed horses on Mars?", "How long does it take to fly from Oslo to Rome?",
        "土耳其的首都是哪里？", "吉他怎么保养？", "有哪些其他费用？", "继续教育的学费是多少？", "他汀类药物有什么副作用？", "尤其要注意哪些费用？",
        "再婚之后户口怎么办？", "为什么算注意力分数的时候要除以根号 d 呢？",
    ]
)
def test_a_question_that_stands_on_its_own_is_left_as_it_is(question):
    assert search_question(question, HISTORY) == question


@pytest.mark.parametrize("question", ["Is it safe to use?", "How long does it take?", "它其实是什么？", "那显存呢？", "這個和它有什麼不同？"])
def test_a_question_with_a_pronoun_is_completed(question):
    assert search_question(question, HISTORY) == f"byte-level BPE {question}"


def test_a_second_follow_up_goes_back_to_what_the_first_was_about():
    """It was put behind the first follow-up, so that "And who proposed it? And how big is it?" was searched."""
    history = [("What is LoRA?", "…"), ("And who proposed it?", "…")]
    assert search_question("How big is it on disk?", history) == "LoRA How big is it on disk?"
    history = [("What is LoRA?", "…"), ("And QLoRA?", "…"), ("Who proposed it?", "…")]
    assert search_question("How big is it on disk?", history) == "LoRA And QLoRA? How big is it on disk?"


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
