"""Are documents that disagree told apart from those that only look so?

    python -m benchmarks.disagreements tests/disagreements.jsonl [--kb .kb --questions tests/questions.jsonl]

A line of the first file is two short documents, a question, and whether they disagree about what it
asks (`disagree`); `kind` says what a near miss is. Each pair becomes a knowledge base of its own and is
asked as a user asks. Pairs of `set` 2 were written after the rules stood; four faults that they
showed have been mended since. With --kb, every alarm over a real base is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from rag import Rag
from rag.confidence import Calibration
from rag.document import Chunk, Document
from rag.embedder import load_embedder
from rag.generator import Generator, load_generator
from rag.knowledge import FileRecord, KnowledgeBase
from rag.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--kb", help="a knowledge base whose documents don't disagree, or whose alarms are to be read")
    parser.add_argument("--questions", type=Path, help="questions to ask of it, one JSON object a line")
    options = parser.parse_args()
    _measure(_rows(options.pairs))
    if options.kb and options.questions:
        _list_alarms(options.kb, _rows(options.questions))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _measure(rows: list[dict[str, Any]]) -> None:
    told: Counter[tuple[str, int, bool]] = Counter()
    asked: Counter[tuple[str, int, bool]] = Counter()
    for row in rows:
        key = row["id"].split("-")[0], row["set"], row["disagree"]
        found = _ask(row)
        asked[key] += 1
        told[key] += bool(found)
        if bool(found) != row["disagree"]:
            print(f"{'missed' if row['disagree'] else 'false alarm'} ({row['kind']}): {row['question']} "
                  f"| {row['first']} | {row['second']}")
    print(f"\n{'':10}{'disagree':>10}{'told':>6}{'near miss':>12}{'false alarm':>13}")
    for language, number in sorted({key[:2] for key in asked}):
        yes, no = (language, number, True), (language, number, False)
        print(f"{language} set {number:<4}{asked[yes]:>9}{told[yes]:>6}{asked[no]:>12}{told[no]:>13}")


def _ask(row: dict[str, Any]) -> tuple[object, ...]:
    """The disagreements in the answer to a pair's question."""
    embedder = load_embedder("bundled")
    with tempfile.TemporaryDirectory() as folder:
        base = KnowledgeBase.create(folder)
        with base.writing():
            base.bind_embedder(embedder)
            for path in ("first", "second"):
                text = row[path]
                chunk = Chunk(f"{path}.txt", text, 0, len(text))
                base.put_file(FileRecord(chunk.path, path, len(text), "ok"), Document(chunk.path, text, "txt"), [chunk],
                              embedder.embed_passages([chunk.indexed_text]))
            base.publish()
        base.close()
        rag = Rag.open(folder)
        rag.use_generator(*_reader())
        return rag.ask(row["question"]).disagreements


@lru_cache(maxsize=1)
def _reader() -> tuple[Generator, Calibration | None]:
    settings = Settings.load()
    return load_generator(settings), Calibration.read(settings.generator, settings.adapter)


def _list_alarms(kb: str, rows: list[dict[str, Any]]) -> None:
    rag = Rag.open(kb)
    alarms = 0
    for row in rows:
        for each in rag.ask(row["question"]).disagreements:
            alarms += 1
            print(f"\n{row['question']}\n  {each.first.path}: {each.first_words} | {each.first.quote}\n"
                  f"  {each.second.path}: {each.second_words} | {each.second.quote}")
    print(f"\n{alarms} disagreements told in the answers to {len(rows)} questions of {kb}")


if __name__ == "__main__":
    main()
