"""Retrieval quality: BM25 alone, dense alone and the fusion, on the same chunks in one run.

    python -m benchmarks.retrieval --data DIR [--json OUT]

DIR holds SQuAD-format sets (squad_open_dev.json.xz, cmrc2018_dev.json.xz), every paragraph of which
becomes a document, and civil_code_pdf_zh/ with civil_code.pdf and questions.jsonl. Files go through
the real ingest, questions through the real retriever.
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ingest import sync
from rag import Rag, Settings
from rag.answer import Hit

SETS = ("squad_open_dev", "cmrc2018_dev")
STATUTE = "civil_code_pdf_zh"
DEPTH = 10
Right = Callable[[Hit], bool]


def paragraphs_as_files(source: Path, folder: Path) -> list[tuple[str, Right]]:
    """Write every paragraph as a text file. Returns (question, is this hit right?)."""
    folder.mkdir()
    questions: list[tuple[str, Right]] = []
    number = 0
    with lzma.open(source, "rt", encoding="utf8") as file:
        for article in json.load(file)["data"]:
            for paragraph in article["paragraphs"]:
                name = f"p{number:05d}.txt"
                (folder / name).write_text(paragraph["context"], encoding="utf-8")
                number += 1
                for asked in paragraph["qas"]:
                    questions.append((asked["question"], lambda hit, name=name: hit.chunk.path == name))
    return questions


def civil_code(source: Path, folder: Path) -> list[tuple[str, Right]]:
    """The statute as PDF; right is a page with a gold article, for questions wholly answered in it."""
    folder.mkdir()
    (folder / "civil_code.pdf").write_bytes((source / "civil_code.pdf").read_bytes())
    questions: list[tuple[str, Right]] = []
    for line in (source / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["all_gold_in_civil_code"]:
            pages = {gold["pdf_page_1based"] for gold in row["gold"]}
            questions.append((row["question"], lambda hit, pages=pages: hit.to_dict()["page"] in pages))
    return questions


def read_set(data: Path, name: str, folder: Path) -> list[tuple[str, Right]]:
    """Write the documents of one of SETS or of STATUTE to `folder`; its questions."""
    if name == STATUTE:
        return civil_code(data / name, folder)
    return paragraphs_as_files(data / f"{name}.json.xz", folder)


def bm25_hits(rag: Rag, question: str) -> list[Hit]:
    """Full-text search alone, with the question's stop words left out."""
    terms = rag.retriever.weigh(question).terms
    return _hits(rag, rag.base.search_terms(terms, DEPTH))


def dense_hits(rag: Rag, question: str) -> list[Hit]:
    return _hits(rag, rag.base.search_dense(rag.embedder.embed_questions([question]), DEPTH)[0])


def _hits(rag: Rag, found: Sequence[tuple[int, float]]) -> list[Hit]:
    stored = rag.base.stored_chunks([row for row, _ in found])
    return [Hit(stored[row].chunk, score, page=stored[row].chunk.page) for row, score in found]


def measure(rag: Rag, questions: Sequence[tuple[str, Right]]) -> dict[str, dict[str, float]]:
    """Method -> hit@1, hit@5, MRR over DEPTH, median milliseconds."""
    methods: dict[str, Callable[[str], list[Hit]]] = {
        "bm25": lambda question: bm25_hits(rag, question),
        "dense": lambda question: dense_hits(rag, question),
        "fused": lambda question: rag.retrieve(question, DEPTH),
    }
    return {name: measure_search(questions, search) for name, search in methods.items()}


def measure_search(
    questions: Sequence[tuple[str, Right]], search: Callable[[str], list[Hit]]
) -> dict[str, float]:
    """hit@1, hit@5, MRR over DEPTH and median milliseconds of one way to search."""
    ranks: list[int | None] = []
    seconds: list[float] = []
    for question, right in questions:
        began = time.perf_counter()
        hits = search(question)
        seconds.append(time.perf_counter() - began)
        ranks.append(next((at for at, hit in enumerate(hits) if right(hit)), None))
    found = [rank for rank in ranks if rank is not None]
    return {
        "hit@1": round(sum(rank == 0 for rank in found) / len(ranks), 4),
        "hit@5": round(sum(rank < 5 for rank in found) / len(ranks), 4),
        "mrr": round(sum(1 / (rank + 1) for rank in found) / len(ranks), 4),
        "ms": round(1000 * statistics.median(seconds), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the measuring sets")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--embedder", default="bundled")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="retrieval-") as work:
        for name in (*SETS, STATUTE):
            folder = Path(work) / name
            questions = read_set(options.data, name, folder)
            settings = Settings(kb=str(folder) + ".kb", embedder=options.embedder)
            sync([folder], settings=settings)
            rag = Rag.open(settings=settings)
            figures[name] = {
                "chunks": rag.base.count_chunks(), "questions": len(questions), **measure(rag, questions)
            }
            print(f"\n{name}: {figures[name]['chunks']} chunks, {len(questions)} questions\n")
            print("| | hit@1 | hit@5 | MRR | ms |\n|---|---|---|---|---|")
            for method in ("bm25", "dense", "fused"):
                row = figures[name][method]
                print(f"| {method} | {row['hit@1']:.3f} | {row['hit@5']:.3f} | {row['mrr']:.3f} | {row['ms']:.1f} |",
                      flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
