"""Promises about the questions that the evidence is fitted on, and about reading them."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rag.bundled import asked_questions as module
from rag.bundled.asked_questions import FILE, asked_questions, window_id
from rag.errors import InputError

KINDS = {"plain", "indirect", "across", "missing"}
TEXT = "The kettle boils in two minutes. It switches itself off. Descale it every month."


def written(tmp_path: Path, rows: list[dict[str, Any]], items: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    with lzma.open(tmp_path / "text.en.manuals.jsonl.xz", "wt", encoding="utf8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr(module, "FILE", tmp_path / "asked.jsonl.xz")
    with lzma.open(module.FILE, "wt", encoding="utf8") as lines:
        lines.writelines(json.dumps(item) + "\n" for item in items)
    return tmp_path


def item(**changes: Any) -> dict[str, Any]:
    window = TEXT[33:]
    return {
        "source": "text.en.manuals", "row": 1, "start": 33, "end": len(TEXT), "window": window_id(window),
        "kind": "indirect", "question": "Will my kettle boil dry if I forget it?", "sentences": [[0, 23]],
        "answer": "no", **changes,
    }


def test_a_question_comes_with_its_text_and_what_answers_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"title": "Toaster", "text": "Hot."}, {"title": "Kettle", "text": TEXT}]
    data = written(tmp_path, rows, [item()], monkeypatch)
    (found,) = asked_questions(data)
    assert found.text == "It switches itself off. Descale it every month." and found.title == "Kettle"
    (start, end) = found.sentences[0]
    assert found.text[start:end] == "It switches itself off."


@pytest.mark.parametrize("rows", [[], [{"title": "a", "text": "b"}, {"title": "Kettle", "text": TEXT.upper()}]])
def test_other_texts_than_were_asked_about_are_refused(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path, rows, [item()], monkeypatch)
    with pytest.raises(InputError, match="is not the text that the questions"):
        list(asked_questions(data))


def test_questions_of_one_document_are_held_out_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another stretch of a document that was trained on would be no test.
    rows = [{"title": str(n), "text": TEXT} for n in range(200)]
    items = [item(row=n, start=start, window=window_id(TEXT[start:])) for n in range(200) for start in (0, 33)]
    data = written(tmp_path, rows, items, monkeypatch)
    by_title: dict[str, set[bool]] = {}
    for found in asked_questions(data):
        by_title.setdefault(found.title, set()).add(found.held_out)
    assert all(len(held) == 1 for held in by_title.values())
    share = sum(True in held for held in by_title.values()) / 200
    assert 0.2 < share < 0.5


def test_every_stretch_has_its_kinds_of_questions_and_only_missing_ones_lack_an_answer() -> None:
    with lzma.open(FILE, "rt", encoding="utf8") as lines:
        items = [json.loads(line) for line in lines]
    kinds: dict[str, Counter[str]] = {}
    for one in items:
        kinds.setdefault(one["window"], Counter())[one["kind"]] += 1
        length = one["end"] - one["start"]
        assert all(0 <= start < end <= length for start, end in one["sentences"])
        assert bool(one["sentences"]) == bool(one["answer"]) == (one["kind"] != "missing"), one
        assert 4 <= len(one["question"]) <= 240
    of_laymen = {"indirect": 3, "plain": 1, "missing": 1}  # about laws
    assert all(found in (dict.fromkeys(KINDS, 1), of_laymen) for found in kinds.values())
    laws = {one["window"] for one in items if one["source"] == "text.zh.laws"}
    assert {window for window, found in kinds.items() if found == of_laymen} < laws
    assert len({one["question"] for one in items}) > 0.995 * len(items)
