"""Questions written for this program as people ask their own documents, about training texts.

`asked_questions.jsonl.xz` holds questions and places only: which stretch of which text a question is
about, and which sentences answer it. Texts are read from the training data. Four a stretch: "plain"
(its fact in other words), "indirect" (a need or a situation; it names little of what answers),
"across" (asked in the other language) and "missing" (of the same subject, and not told there); of
a thousand stretches of law five, three of them indirect, as laymen ask a lawyer.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rag.bundled.training_data import read_rows
from rag.errors import InputError

FILE = Path(__file__).parent / "asked_questions.jsonl.xz"
Kind = Literal["plain", "indirect", "across", "missing"]
_HELD_OUT = 3  # tenths of the documents


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """`sentences` are [start, end) of what answers in `text`, the most telling first; none where
    nothing does. `answer` is the writer's short one."""

    question: str
    kind: Kind
    text: str
    title: str
    sentences: tuple[tuple[int, int], ...]
    answer: str
    held_out: bool  # kept from training with all of its document, to fit and measure
    collection: str  # of its text, such as "laws"


def asked_questions(data: Path) -> Iterator[AskedQuestion]:
    """All of them, with their texts. Raises InputError where the texts are not those asked about."""
    with lzma.open(FILE, "rt", encoding="utf8") as lines:
        asked = [json.loads(line) for line in lines]
    wanted: dict[str, set[int]] = {}
    for item in asked:
        wanted.setdefault(item["source"], set()).add(item["row"])
    for source, numbers in wanted.items():
        path = data / f"{source}.jsonl.xz"
        rows = {at: row for at, row in enumerate(read_rows(path)) if at in numbers}
        for item in asked:
            if item["source"] == source:
                yield _with_text(item, rows.get(item["row"]), path)


def _with_text(item: dict[str, Any], row: dict[str, Any] | None, path: Path) -> AskedQuestion:
    text = row["text"][item["start"] : item["end"]] if row else ""
    if window_id(text) != item["window"]:
        raise InputError(
            f"row {item['row']} of {path} is not the text that the questions in {FILE.name} are about. "
            "Use the data they were written for."
        )
    assert row is not None
    digest = hashlib.blake2b(f"{item['source']} {item['row']}".encode(), digest_size=4).digest()
    return AskedQuestion(
        item["question"], item["kind"], text, row["title"],
        tuple((start, end) for start, end in item["sentences"]), item["answer"],
        int.from_bytes(digest, "big") % 10 < _HELD_OUT, item["source"].split(".")[-1],
    )


def window_id(text: str) -> str:
    """12 hex digits that tell a stretch of text."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
