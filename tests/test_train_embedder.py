"""What the programs that fit the shipped files may and may not use."""


import os
import random
from pathlib import Path

import pytest

from rag.bundled.training_data import held_out, is_measured, question_hash, sentences, windows


def test_a_question_is_recognised_whatever_its_case_width_and_signs():
    assert question_hash("What does CD stand for?") == question_hash("what does ＣＤ stand for")
    assert question_hash("合同何时生效？") != question_hash("合同何时失效？")


def test_some_passages_are_held_out_and_always_the_same():
    passages = [f"passage number {number}" for number in range(2000)]
    assert 60 < sum(held_out(text, "en") for text in passages) < 140
    assert 330 < sum(held_out(text, "zh") for text in passages) < 470
    assert [held_out(text, "en") for text in passages] == [held_out(text, "en") for text in passages]


def test_windows_are_runs_of_neighbouring_sentences():
    text = "One is first. Two is next. Three is last."
    for window in windows(text, rng=random.Random(0), count=5, characters=20):
        assert len(window) >= 2 and " ".join(window) in text
    assert sentences("甲。乙！\n丙") == ["甲。", "乙！", "丙"]


@pytest.mark.skipif("RAG_TRAINING_DATA" not in os.environ, reason="RAG_TRAINING_DATA names no folder with train/ and eval/")
def test_questions_kept_for_measuring_are_in_nothing_that_is_trained_on():
    """The legal questions of the training pairs hold all 684 of the civil code set; they are left out."""
    from rag.bundled.fit_questions import questions_of
    from rag.bundled.train_embedder import collect_pairs

    data = Path(os.environ["RAG_TRAINING_DATA"]) / "train"
    pairs = collect_pairs(data, random.Random(1))
    for name in ("squad1.1-train", "medquad", "drcd-dev-s2t", "cmrc2018-trial", "lecoqa-train"):
        assert not any(is_measured(question) for question in pairs[name][0])
    for language in ("en", "zh"):
        assert not any(is_measured(item.question) for item in questions_of(data, language)[0])
