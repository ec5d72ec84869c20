"""Are questions refused that the documents don't answer, and those answered that they do?

    python -m benchmarks.refusal --data DIR [--questions 250]

Half of a set's articles become the documents, less every fifth paragraph. Asked are questions about
what is there; about the paragraphs left out, whose article is there ("near"); and about the other
half's articles ("far"). The statute is asked lay questions, and the Chinese set's questions as far
ones. Nothing is generated: an answer is refused, or not, before that.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.retrieval import SETS, STATUTE
from ingest import sync
from rag import Rag, Settings
from rag.evidence import built_in_threshold

_LEFT_OUT = 5
_LINE = "{:44} {:>7} {:>9} {:>9} {:>7}"


def read_articles(file: Path) -> list[list[dict[str, Any]]]:
    """The paragraphs of each article of a set in SQuAD's format."""
    with lzma.open(file, "rt", encoding="utf8") as opened:
        return [article["paragraphs"] for article in json.load(opened)["data"]]


def questions_of(paragraphs: Sequence[dict[str, Any]]) -> list[str]:
    return [asked["question"] for paragraph in paragraphs for asked in paragraph["qas"]]


def build(folder: Path, files: dict[str, bytes]) -> Rag:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    kb = str(folder) + ".kb"
    sync([folder], settings=Settings(kb=kb))
    return Rag.open(kb)


def report(name: str, kept: Sequence[float], refused: Sequence[float]) -> None:
    """One line: shares kept and refused at the built-in threshold, their mean, and the AUC of support."""
    threshold = built_in_threshold()
    yes, no = np.array(kept), np.array(refused)
    right = float((yes >= threshold).mean()), float((no < threshold).mean())
    auc = float((yes[:, None] > no[None]).mean())
    print(_LINE.format(name, *(f"{value:.3f}" for value in (*right, sum(right) / 2, auc))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the measuring sets")
    parser.add_argument("--questions", type=int, default=250, help="most questions of each kind")
    options = parser.parse_args()
    rng = random.Random(5)

    def some(questions: list[str]) -> list[str]:
        return rng.sample(questions, min(len(questions), options.questions))

    print(_LINE.format("", "kept", "refused", "balanced", "AUC"))
    with tempfile.TemporaryDirectory(prefix="refusal-") as work:
        for name in SETS:
            articles = read_articles(options.data / f"{name}.json.xz")
            half = len(articles) // 2
            there = [paragraph for article in articles[:half] for paragraph in article]
            kept = [paragraph for at, paragraph in enumerate(there) if at % _LEFT_OUT]
            rag = build(Path(work) / name, {f"p{at:05}.txt": item["context"].encode() for at, item in enumerate(kept)})
            support = [rag.support(question) for question in some(questions_of(kept))]
            near = some(questions_of(there[::_LEFT_OUT]))
            far = some([question for article in articles[half:] for question in questions_of(article)])
            report(f"{name}, paragraph left out", support, [rag.support(question) for question in near])
            report(f"{name}, article left out", support, [rag.support(question) for question in far])
        source = options.data / STATUTE
        rag = build(Path(work) / "statute", {"civil_code.pdf": (source / "civil_code.pdf").read_bytes()})
        rows = map(json.loads, (source / "questions.jsonl").read_text(encoding="utf-8").splitlines())
        asked = some([row["question"] for row in rows if row["all_gold_in_civil_code"]])
        report("statute, lay questions; others of all kinds", *(
            [rag.support(question) for question in questions] for questions in (asked, far)
        ))


if __name__ == "__main__":
    main()
