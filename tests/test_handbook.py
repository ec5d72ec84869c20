"""The handbook that ships and its questions: what the first run is judged by."""

import json
from collections import Counter
from pathlib import Path

import pytest

from ingest.loaders import load_document
from rag.language import detect_language
from rag.quality.evaluation import EvalQuestion

ROOT = Path(__file__).parent.parent
ROWS = [json.loads(line) for line in (ROOT / "tests" / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_it_holds_both_languages_and_the_five_formats():
    files = [file for file in (ROOT / "knowledge").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} >= {".md", ".html", ".pdf", ".docx", ".txt"}
    assert len(files) >= 24
    assert Counter(file.parent.name for file in files)["zh"] >= 12


def test_there_are_enough_questions_in_each_language_and_some_without_an_answer():
    questions = [EvalQuestion.parse(row, number) for number, row in enumerate(ROWS, 1)]
    languages = Counter(detect_language(question.question) for question in questions)
    assert len(questions) >= 80 and min(languages["zh"], languages["en"]) >= 40
    assert sum(question.unanswerable for question in questions) == 16


@pytest.mark.parametrize("row", [row for row in ROWS if "quote" in row], ids=lambda row: row["id"])
def test_every_quote_stands_in_its_file_on_its_page(row):
    document = _load(row["path"])
    at = document.text.find(row["quote"])
    assert at >= 0
    if "page" in row:
        assert document.page_at(at) == row["page"]


def _load(path, cache={}):  # noqa: B006 - a file is read once for all its questions
    if path not in cache:
        cache[path] = load_document(ROOT / "knowledge" / path, path)
    return cache[path]
