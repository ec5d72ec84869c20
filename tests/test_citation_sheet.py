"""A hundred answers of the bundled reader over the handbook, read and judged one by one by four readers,
a quarter each, by the same rules.

A line of citation_sheet.jsonl is one answer. `answers` says whether it answers the question (yes,
partly, no; for a refusal right or wrong). Each citation says:
  holds  the words stand at their place and support the sentence that carries the marker; no where
         they state nothing, as the head of a table does
  reads  clear; unclear where the words leave out what they speak of ("without this term");
         misleading where, put under this question, they seem to say what the source does not say
  point  answers the question or a needed part of it, near (the same subject only), or off
The bundled reader only quotes, so `holds` asks little of it (185 of 188): `reads` (9 misleading)
and `point` (82 to the point, 58 near, 48 off) tell more.
The judgements belong to the answers of the day they were read: a change to search or reader needs a new sheet.
"""

import json
from pathlib import Path

import pytest

from ingest.loaders import load_document

KNOWLEDGE = Path(__file__).parents[1] / "knowledge"
SHEET = Path(__file__).with_name("citation_sheet.jsonl")


@pytest.fixture(scope="module")
def answers():
    return [json.loads(line) for line in SHEET.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def citations(answers):
    return [citation for answer in answers for citation in answer["citations"]]


def test_a_hundred_different_questions_are_judged_in_full(answers, citations):
    assert len({answer["id"] for answer in answers}) == len(answers) == 100
    for answer in answers:
        verdicts = {"right", "wrong"} if answer["refused"] else {"yes", "partly", "no"}
        assert answer["answers"] in verdicts
        assert bool(answer["citations"]) is not answer["refused"]
    for citation in citations:
        assert citation["holds"] in {"yes", "no"}
        assert citation["reads"] in {"clear", "unclear", "misleading"}
        assert citation["point"] in {"answers", "near", "off"}


def test_every_quote_stands_at_its_place_in_the_text_of_its_file(citations):
    paths = {citation["path"] for citation in citations}
    texts = {path: load_document(KNOWLEDGE / path, path).text for path in paths}
    for citation in citations:
        start, end, text = citation["start"], citation["end"], texts[citation["path"]]
        assert 0 <= start < end <= len(text)
        assert text[start:end] == citation["quote"]


def test_at_least_nine_in_ten_citations_hold(citations):
    held = [citation for citation in citations if citation["holds"] == "yes"]
    assert len(held) / len(citations) >= 0.9, f"{len(held)} of {len(citations)} citations hold"
