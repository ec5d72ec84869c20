import pytest

from rag.answer import Answer, Citation, Hit
from rag.document import Chunk
from rag.errors import InputError
from rag.quality.evaluation import (
    EvalQuestion,
    EvalResult,
    by_type,
    exact_match,
    holds,
    placed,
    risk_coverage,
    summarise,
    token_f1,
    type_of,
)
from rag.quality.report import report
from rag.quality.run import Run, compare, run_of


def test_f1_counts_words_in_english_and_characters_in_chinese():
    assert token_f1("the red cat", ["red cat sat"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert token_f1("北京市", ["北京"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert token_f1("nothing", ["everything"]) == 0.0


def test_articles_case_and_punctuation_do_not_count():
    assert exact_match("The Cat!", ["cat"]) == 1.0


def test_an_answer_inside_a_longer_word_is_not_held():
    assert holds("it took 12 days", "12 days")
    assert not holds("it took 112 days", "12 days")


@pytest.mark.parametrize(
    ("text", "part", "expected"),
    [
        ("The rent is 1,250 euros.", "250 euros", False), ("The rent is 1,250 euros.", "1250 euros", True),
        ("The rent is 1250 euros.", "1,250 euros", True), ("It costs 1,250,000.50 dollars", "1250000.50", True),
        ("利率为1.5%", "5%", False), ("利率为1.5%", "1.5%", True), ("The rate is 1,5 %.", "5 %", False),
        ("on 3.5.2021", "2021", True), ("articles 1,2,3", "2", True), ("since 2020, 300 times", "300", True),
        ("It is 3.5.", "3.5", True), ("It is 3.", "3", True), ("It weighs 1.5kg.", "1.5 kg", True),
        ("He lives in the U.S. now.", "US", True), ("the US army", "U.S.", True), ("at 9 a.m.", "9 am", True),
        ("see a.b.c", "b", False), ("at the end.The cat", "cat", True),
        ("The answer is A.", "A", True), ("Vitamin A", "A", True), ("It is a cat.", "A", False), ("B", "A", False),
        ("a", "A", True), ("The cat sat", "a cat", True), ("The cat", "", False),
    ],
)
def test_numbers_initials_and_choices_are_held_as_people_read_them(text, part, expected):
    """Numbers were cut at commas and points, so that 1,250 euros was right where 250 were wanted."""
    assert holds(text, part) is expected


def test_choices_and_initials_can_be_matched_exactly():
    assert exact_match("A.", ["a"]) == 1.0 and exact_match("The", ["A"]) == 0.0
    assert exact_match("1,250", ["1250"]) == 1.0 and token_f1("U.S.", ["US"]) == 1.0
    assert token_f1("The answer is A.", ["A"]) == pytest.approx(2 * (1 / 4) * 1 / (1 / 4 + 1))


def test_unanswerable_is_true_or_false_and_no_text():
    """A line with "false" in quotes used to count as unanswerable."""
    with pytest.raises(InputError, match="line 2: unanswerable must be true or false"):
        EvalQuestion.parse({"question": "q", "unanswerable": "false"}, 2)
    assert EvalQuestion.parse({"question": "q", "unanswerable": None}, 2).unanswerable is False


def test_a_path_means_its_file_however_its_accents_are_written():
    lines = [
        {"question": "q", "path": "re\u0301sume\u0301.md"}, {"question": "q", "path": "gone.md"}, {"question": "q"},
        {"question": "q", "path": "gone.md"}, {"question": "q", "path": "unimportant.md", "unanswerable": True},
    ]
    questions, missing = placed([EvalQuestion.parse(line, 1) for line in lines], ["r\u00e9sum\u00e9.md", "b.md"])
    assert [question.path for question in questions[:3]] == ["r\u00e9sum\u00e9.md", "gone.md", None]
    assert len(questions) == 5 and missing == ["gone.md"]


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


# what grew beside the contract's figures


def answer(text="blue [1]", kind="generated", confidence=0.5, path="a.md"):
    quote = "the sky is blue"
    hit = Hit(Chunk("a.md", quote, 0, len(quote)), 1.0)
    citations = () if kind == "refused" else (Citation(1, path, None, 0, len(quote), quote),)
    return Answer("q", text, kind, citations, (hit,), confidence=confidence)


WANTED = {"question": "What colour is the sky?", "answer": "blue", "path": "a.md"}
NOWHERE = {"question": "Who is the king of the moon?", "unanswerable": True}


def test_balanced_refusal_accuracy_is_a_half_for_who_never_refuses():
    figures = summarise([result(WANTED, answer(), 0)] * 9 + [result(NOWHERE, answer())])
    assert figures["refusal_accuracy"] == 0.9
    assert figures["balanced_refusal_accuracy"] == 0.5
    assert summarise([result(WANTED, answer(), 0)])["balanced_refusal_accuracy"] is None


def test_the_type_is_the_lines_own_or_language_and_what_is_asked():
    def type_of_line(**line):
        return type_of(EvalQuestion.parse(line, 1))

    assert type_of_line(question="How many cats?", type="pets") == "pets"
    assert type_of_line(question="How many cats?") == "en number"
    assert type_of_line(question="为什么下雨？") == "zh reason"
    assert type_of_line(question="In which year did it open?") == "en time"
    assert type_of_line(question="Explain it.") == "en other"
    assert type_of_line(**NOWHERE) == "en unanswerable"
    with pytest.raises(InputError, match="type must be a string"):
        type_of_line(question="Q?", type=3)


def test_the_breakdown_by_type_holds_every_question_once():
    parts = by_type([result(WANTED, answer(), 0), result(WANTED, answer(), None), result(NOWHERE, answer(kind="refused"))])
    assert {name: part["n"] for name, part in parts.items()} == {"en other": 2, "en unanswerable": 1}
    assert parts["en other"]["hit@1"] == 0.5 and parts["en unanswerable"]["hit@1"] is None


def test_the_risk_coverage_curve_worked_out_by_hand():
    results = [
        result(WANTED, answer(confidence=0.9), 0),
        result(WANTED, answer("green", confidence=0.7), 0),
        result(NOWHERE, answer(confidence=0.7)),
        result(WANTED, answer(kind="refused", confidence=0.1), 0),
    ]
    # At 0.9 one of four is answered, rightly; at 0.7 three of four, two of them wrongly. The refused one never.
    assert risk_coverage(results) == [(0.9, 0.25, 0.0), (0.7, 0.75, round(2 / 3, 4))]


def saved(tmp_path, name, results):
    run = run_of(results, source="q.jsonl", settings={"generator": "g", "embedder": "e", "kb": "k"})
    run.write(tmp_path / name)
    again = Run.read(tmp_path / name)
    assert again.summary["hit@1"] == run.summary["hit@1"] and len(again.questions) == len(results)
    return again


def many(*answers, ranks=None):
    return [
        EvalResult(EvalQuestion.parse({**WANTED, "id": at}, at), each, ranks[at] if ranks else 0, 0.1)
        for at, each in enumerate(answers)
    ]


def test_two_runs_are_compared_on_the_questions_they_share(tmp_path):
    a = saved(tmp_path, "a.json", many(*[answer("green", confidence=0.4)] * 12, ranks=[1] * 12))
    b = saved(tmp_path, "b.json", many(*[answer()] * 10))
    found = compare(a, b)
    assert (found.questions, found.only_a, found.only_b) == (10, 2, 0)
    by_name = {each.name: each for each in found.differences}
    assert (by_name["hit@1"].a, by_name["hit@1"].b) == (0.0, 1.0)
    assert by_name["hit@1"].significant and (by_name["hit@1"].low, by_name["hit@1"].high) == (1.0, 1.0)
    assert not by_name["hit@5"].significant and by_name["hit@5"].p == 1.0
    assert "unanswerable_refused" not in by_name  # nothing there to measure it on
    assert len(found.better) == 10 and found.worse == ()


def test_runs_of_other_questions_and_other_files_are_refused(tmp_path):
    a = saved(tmp_path, "a.json", many(answer(), answer()))
    other = [EvalResult(EvalQuestion.parse({"question": "Other?", "id": at}, at), answer(), None, 0.1) for at in range(2)]
    with pytest.raises(InputError, match="share 0 of 2 and 2"):
        compare(a, saved(tmp_path, "b.json", other))
    (tmp_path / "c.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="no run saved by"):
        Run.read(tmp_path / "c.json")
    (tmp_path / "d.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="format 99"):
        Run.read(tmp_path / "d.json")


def test_the_report_fetches_nothing_and_shows_documents_as_text(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are an extra")
    nasty = answer('<script>alert(1)</script> <a href="https://example.org">x</a>', confidence=0.9)
    results = many(nasty, answer(), answer(kind="refused"))
    results.append(EvalResult(EvalQuestion.parse({**NOWHERE, "type": "没有<答案>"}, 9), answer(confidence=0.8), None, 0.1))
    run = saved(tmp_path, "a.json", results)
    page = report(run, compare(run, run))
    assert page.count("<svg") == 5  # figures, risk, types, places, differences
    for forbidden in ("<script", "<a ", "<img", "@import", "url(http", "src="):
        assert forbidden not in page
    assert "&lt;script&gt;" in page and "没有&lt;答案&gt;" in page
    # The confident wrong answer comes first, the refused one last; the right one isn't there.
    cases = [page.index(f"confidence {value}") for value in ("0.900", "0.800", "0.500")]
    assert cases == sorted(cases) and page.count("<details>") == 3
    assert "the sky is <mark>blue</mark>" in page
