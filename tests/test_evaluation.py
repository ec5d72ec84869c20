import pytest

from rag.answer import Answer, Citation, Hit
from rag.document import Chunk
from rag.errors import InputError
from rag.evaluation import EvalQuestion, EvalResult, exact_match, holds, summarise, token_f1


def test_f1_counts_words_in_english_and_characters_in_chinese():
    assert token_f1("the red cat", ["red cat sat"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert token_f1("北京市", ["北京"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert token_f1("nothing", ["everything"]) == 0.0


def test_articles_case_and_punctuation_do_not_count():
    assert exact_match("The Cat!", ["cat"]) == 1.0


def test_an_answer_inside_a_longer_word_is_not_held():
    assert holds("it took 12 days", "12 days")
    assert not holds("it took 112 days", "12 days")


def result(question, answer, rank=None):
    return EvalResult(EvalQuestion.parse(question, 1), answer, rank, 0.5)


def test_figures_worked_out_by_hand():
    hit = Hit(Chunk("a.md", "the sky is blue", 0, 15), 1.0)
    right = Answer("q", "blue [1]", "generated", (Citation(1, "a.md", None, 0, 15, "the sky is blue"),), (hit,))
    wrong = Answer("q", "green [1]", "quoted", (Citation(1, "b.md", None, 0, 3, "sea"),), (hit,))
    refused = Answer("q", "no", "refused", (), (hit,))
    figures = summarise([
        result({"question": "q", "answer": "blue", "path": "a.md"}, right, 0),
        result({"question": "q", "answer": "blue", "path": "a.md"}, wrong, 1),
        result({"question": "q", "unanswerable": True}, refused),
        result({"question": "q", "answer": "blue", "path": "a.md"}, refused, None),
    ])
    assert figures["n"] == 4
    assert figures["hit@1"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["hit@5"] == pytest.approx(2 / 3, abs=1e-4)
    assert figures["mrr"] == pytest.approx((1 + 1 / 2) / 3, abs=1e-4)
    assert figures["em"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["answer_in_text"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["citation_precision"] == 0.5
    assert figures["refusal_accuracy"] == 0.75


def test_a_line_of_the_wrong_form_is_named():
    with pytest.raises(InputError, match="line 3"):
        EvalQuestion.parse({"question": "q", "page": "4"}, 3)
