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
    from rag.bundled.sentence_matching import _questions
    from rag.bundled.train_embedder import collect_pairs

    data = Path(os.environ["RAG_TRAINING_DATA"]) / "train"
    assert not any(is_measured(question) for _, question, _, _ in _questions(data))
    pairs = collect_pairs(data, random.Random(1))
    for name in ("squad1.1-train", "medquad", "drcd-dev-s2t", "cmrc2018-trial", "lecoqa-train"):
        assert not any(is_measured(question) for question in pairs[name][0])
    for language in ("en", "zh"):
        assert not any(is_measured(item.question) for item in questions_of(data, language)[0])


def test_matching_is_trained_on_the_score_that_retrieval_uses():
    """A score of its own would make vectors good at something that nobody asks for."""
    import numpy as np
    import torch

    from rag.bundled.sentence_matching import sentence_scores
    from rag.soft_match import SoftMatch, bundled_table

    questions = ["Who pays for the repair of the roof?", "屋顶漏水由谁负责修？"]
    sentences = ["The landlord repairs the roof at his own cost.", "出租人应当履行租赁物的维修义务。", "Rent is due monthly."]
    embedder = bundled_table()
    ids = [np.array(one) for one in embedder.token_ids([*questions, *sentences])]
    scores = sentence_scores(ids[:2], ids[2:], torch.from_numpy(embedder.table))
    used = np.stack([SoftMatch(question, sentences).coverages() for question in questions], axis=1)
    assert scores.shape == (3, 2)
    np.testing.assert_allclose(scores.numpy(), used, atol=1e-5)


def test_matching_teaches_a_word_the_other_word_that_answers_it():
    """Token 0 asks; of two passages the sentences 1, 2 and 3, 4; the second sentence of the first answers."""
    import numpy as np
    import torch

    from rag.bundled.sentence_matching import MatchingQuestion, matching_loss, sentence_scores

    passages = [[np.array([1]), np.array([2])], [np.array([3]), np.array([4])]]
    asked = [MatchingQuestion(np.array([0]), 0, (1,)), MatchingQuestion(np.array([5]), 1, (0,))]
    table = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    before = matching_loss(asked, passages, table).item()
    for _ in range(100):
        loss = matching_loss(asked, passages, table)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 < before
    scores = sentence_scores([np.array([0])], [np.array([token]) for token in (1, 2, 3, 4)], table)
    assert scores.argmax().item() == 1


def test_a_batch_for_matching_has_questions_of_one_source_and_none_twice():
    import numpy as np

    from rag.bundled.sentence_matching import Matching, MatchingQuestion

    sources = {
        name: [MatchingQuestion(np.array([number]), number, (0,)) for number in range(first, first + 300)]
        for name, first in (("squad1.1-train", 0), ("laws-zh", 1000))
    }
    matching = Matching(passages=[], sources=sources)
    seen = set()
    for seed in range(20):
        passages = [item.passage for item in matching.batch(64, random.Random(seed))]
        assert len(passages) == len(set(passages)) == 64
        assert {passage >= 1000 for passage in passages} in ({True}, {False})
        seen.add(passages[0] >= 1000)
    assert seen == {True, False}
