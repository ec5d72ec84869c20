import json
import logging
import random

import numpy as np
import pytest
from fakes import base_of

from rag import Settings
from rag.document import Chunk, Document
from rag.embedder import load_embedder
from rag.errors import InputError, KnowledgeBaseError
from rag.knowledge import FileRecord, KnowledgeBase
from rag.quality.calibrate import (
    Asked,
    Supports,
    balanced_accuracy,
    calibrate,
    fit,
    made_questions,
    measure,
    own_questions,
)
from rag.quality.evaluation import EvalQuestion
from rag.quality.rewording import reword
from rag.refusal_threshold import FILE, RefusalFit, kb_threshold, risk_curve

ROOMS = "Alder Birch Cedar Dogwood Elder Fir Ginkgo Hazel Ivy Juniper Kauri Larch Maple Nutmeg Oak Pine Quince Rowan Spruce Teak Ulmus Vine Willow Yew".split()
TEXTS = {
    f"{name.lower()}.txt": f"The {name} room has {at + 11} windows. The {name} room was painted in {1950 + at}."
    for at, name in enumerate(ROOMS)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    embedder = load_embedder("bundled")
    base = KnowledgeBase.create(tmp_path_factory.mktemp("kb"))
    with base.writing():
        base.bind_embedder(embedder)
        for path, text in TEXTS.items():
            cut = text.index(". ") + 2
            chunks = [Chunk(path, text[:cut], 0, cut), Chunk(path, text[cut:], cut, len(text))]
            base.put_file(FileRecord(path, path, 1, "ok"), Document(path, text, "txt"), chunks,
                          embedder.embed_passages([chunk.indexed_text for chunk in chunks]))
        base.publish()
    return base.folder


def questions():
    rows = [
        {"question": f"How many windows does the {name} room have?", "path": f"{name.lower()}.txt",
         "quote": f"The {name} room has {at + 11} windows.", "answer": f"{at + 11} windows"}
        for at, name in enumerate(ROOMS)
    ]
    rows += [{"question": f"Who invented the {thing}?", "unanswerable": True} for thing in ("telescope", "zip")]
    return [EvalQuestion.parse(row, at) for at, row in enumerate(rows)]


def test_hiding_a_passage_takes_its_support_away(folder):
    asked = own_questions(KnowledgeBase.open(folder), questions())
    supports = measure(Settings(kb=str(folder)), asked)
    assert len(supports.answerable) == len(ROOMS) and supports.lost == 0
    assert len(supports.elsewhere) == 2 and len(supports.hidden) + supports.still_there == len(ROOMS)
    assert np.median(supports.answerable) > np.median(supports.hidden)
    again = measure(Settings(kb=str(folder)), asked[:1])
    assert again.answerable == supports.answerable[:1]  # nothing stays hidden


def test_the_fit_is_kept_with_the_base_and_read_from_it(folder):
    asked = own_questions(KnowledgeBase.open(folder), questions())
    found, supports, path = calibrate(Settings(kb=str(folder)), asked)
    assert path == folder / FILE and kb_threshold(folder) == found.threshold
    assert RefusalFit.read(folder) == found
    answerable, unanswerable = np.array(supports.answerable), np.array(supports.unanswerable)
    fitted = balanced_accuracy(answerable, unanswerable, found.threshold)
    assert fitted >= balanced_accuracy(answerable, unanswerable, found.built_in) - 0.02
    path.unlink()
    assert kb_threshold(folder) is None


def test_the_threshold_parts_what_can_be_parted():
    found = fit(Settings(), Supports(tuple([0.7, 0.8, 0.9] * 10), tuple([0.1, 0.2] * 12), (0.3,), 0, 0))
    assert 0.3 < found.threshold < 0.7 and found.balanced_accuracy == 1.0
    assert (found.answerable, found.unanswerable) == (30, 25)


def test_too_few_questions_are_told_with_their_numbers():
    with pytest.raises(InputError, match="3 questions whose passage is found and 1 without"):
        fit(Settings(), Supports((0.9, 0.8, 0.7), (0.1,), (), 0, 0))


def test_the_curve_worked_out_by_hand():
    # At 0.5: 0.9 and 0.6 are kept, 0.5 let by: 3 of 5 answered, 1 of these 3 wrongly.
    points = {point.threshold: point for point in risk_curve([0.9, 0.6, 0.2], [0.5, 0.1])}
    half = points[0.5]
    assert (half.coverage, half.risk, half.kept, half.refused) == (0.6, 0.3333, 0.6667, 0.5)
    assert half.balanced_accuracy == pytest.approx((0.6667 + 0.5) / 2)
    assert (points[0.0].coverage, points[1.0].coverage, points[1.0].risk) == (1.0, 0.0, 0.0)


def written(folder, **changes):
    fit_ = fit(Settings(), Supports(tuple([0.8, 0.9] * 10), tuple([0.1, 0.2] * 10), (), 0, 0))
    path = fit_.write(folder)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))
    return fit_


def test_a_fit_of_other_models_is_not_used_and_that_is_said(tmp_path, caplog):
    fit_ = written(tmp_path)
    assert kb_threshold(tmp_path, fit_.embedder) == fit_.threshold
    with caplog.at_level(logging.WARNING):
        assert kb_threshold(tmp_path, "another") is None
        written(tmp_path, support_model="older")
        assert kb_threshold(tmp_path) is None
    assert caplog.text.count("python -m rag calibrate") == 2


@pytest.mark.parametrize("changes", [{"format": 9}, {"threshold": 7.0}, {"unknown": 1}, {"curve": 3}])
def test_a_damaged_fit_is_an_error_not_a_guess(tmp_path, changes):
    written(tmp_path, **changes)
    with pytest.raises(KnowledgeBaseError, match="Delete it, or run"):
        kb_threshold(tmp_path)


def test_own_questions_without_a_place_are_left_out(folder):
    base = KnowledgeBase.open(folder)
    lines = [{"question": "Q?", "path": "oak.txt", "answer": "no such words"}, {"question": "R?", "answer": "x"}]
    with pytest.raises(InputError, match="none of the 2 questions says where"):
        own_questions(base, [EvalQuestion.parse(row, 1) for row in lines])
    (asked,) = own_questions(base, [EvalQuestion.parse({"question": "Q?", "path": "oak.txt", "answer": "25 windows"}, 1)])
    assert TEXTS["oak.txt"][asked.start : asked.end] == "25 windows" and isinstance(asked, Asked)


def test_rewording_takes_words_that_the_text_does_not_hold():
    text = "The monthly rent of the apartment is paid on Monday."
    question = "When is the monthly rent of the apartment paid?"
    reworded = reword(question, text, 1.0, random.Random(0))
    assert reworded.startswith("When is the ") and reworded.endswith("?")
    for word in ("monthly", "rent", "apartment"):
        assert word not in reworded.lower().split()
    assert reword("What?", text, 1.0, random.Random(0)) == "What?"
    assert reword("租赁期限为几年？", "租赁期限为二十年。", 1.0, random.Random(0)) != "租赁期限为几年？"


def test_made_questions_hold_both_sorts_and_point_at_their_sentence(folder):
    base = KnowledgeBase.open(folder)
    asked = made_questions(base, count=20)
    assert {each.path is None for each in asked} == {True, False}
    for each in asked:
        if each.path is not None:
            assert each.answer in base.document(each.path).text[each.start : each.end]


def test_a_quote_is_found_however_its_lines_are_broken_and_what_is_left_out_is_named(tmp_path):
    """A quote with another line break than its file was left out, with the message that it says no place."""
    base = base_of(tmp_path / "kb", {
        "re\u0301sume\u0301.txt": "The oak room\nhas  25 windows. Ten doors.",
        "zh.txt": "静态嵌入是\n一种句向量，\n不经过 GPU 运算。",
    })
    lines = [
        {"question": "Q?", "path": "r\u00e9sum\u00e9.txt", "quote": "The oak room has 25 windows."},
        {"question": "Q?", "path": "zh.txt", "quote": "一种句向量，不经过GPU运算"},
        {"question": "Q?", "path": "zh.txt", "quote": "嵌入 是一种"},
        {"question": "Q?", "path": "r\u00e9sum\u00e9.txt", "quote": "The oakroom", "id": "oak"},
        {"question": "Q?", "path": "gone.txt", "quote": "x"}, {"question": "Q?", "quote": "x"},
        {"question": "Q?", "path": "zh.txt", "page": 4},
    ]
    told = []
    asked = own_questions(base, [EvalQuestion.parse(row, at) for at, row in enumerate(lines, 1)], tell=told.append)
    assert [base.document(each.path).text[each.start : each.end] for each in asked] == [
        "The oak room\nhas  25 windows.", "一种句向量，\n不经过 GPU 运算", "嵌入是\n一种",
    ]
    assert told == [
        "question oak is left out: neither its quote nor an answer stands in re\u0301sume\u0301.txt",
        "question 5 is left out: gone.txt is not in the knowledge base", "question 6 is left out: it has no path",
        "question 7 is left out: neither its quote nor an answer stands in zh.txt, which has no page 4",
    ]


def test_a_store_without_a_threshold_of_its_own_is_refused_before_any_work(tmp_path):
    """With a base in Milvus the one in `kb` was measured, and a threshold written that nothing reads."""
    with pytest.raises(InputError, match="store is 'milvus'"):
        calibrate(Settings(kb=str(tmp_path / "none"), store="milvus", milvus_uri="kb.db"), [])
