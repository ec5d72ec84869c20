"""Both stores on the same documents and questions: quality, agreement, latency, and the move between them.

    python -m benchmarks.stores --data DIR [--set cmrc2018_dev] [--milvus URI]

DIR holds SQuAD-format sets (cmrc2018_dev.json.xz), every paragraph of which becomes a document. They
are ingested into the embedded store, moved to Milvus (Milvus Lite in a temporary folder without
--milvus), and every question is asked of both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.retrieval import DEPTH, Right, paragraphs_as_files
from ingest import sync
from ingest.mover import move_to_milvus
from rag import Rag, Settings
from rag.answer import Hit
from rag.knowledge import KnowledgeBase


def ask_all(rag: Rag, questions: Sequence[tuple[str, Right]]) -> tuple[list[list[Hit]], list[float], float]:
    """Hits of each question, its milliseconds, and seconds of processor time in all."""
    hits, times = [], []
    rag.retrieve(questions[0][0], DEPTH)
    spent = time.process_time()
    for question, _ in questions:
        began = time.perf_counter()
        hits.append(rag.retrieve(question, DEPTH))
        times.append(1000 * (time.perf_counter() - began))
    return hits, times, time.process_time() - spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the measuring sets")
    parser.add_argument("--set", default="cmrc2018_dev")
    parser.add_argument("--milvus", metavar="URI", help="a server or file (default: Milvus Lite)")
    parser.add_argument("--questions", type=int, default=0, help="ask this many, evenly taken; 0 asks all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stores-") as work:
        folder = Path(work) / "docs"
        questions = paragraphs_as_files(options.data / f"{options.set}.json.xz", folder)
        if options.questions:
            questions = questions[:: max(1, len(questions) // options.questions)][: options.questions]
        kb, uri = str(Path(work) / "kb"), options.milvus or str(Path(work) / "kb.db")
        sync([folder], settings=Settings(kb=kb))
        print(f"move: {move_to_milvus(KnowledgeBase.open(kb), uri).describe()}")
        found = {}
        print(f"\n{options.set}: {len(questions)} questions\n")
        print("| store | hit@1 | hit@5 | MRR | ms median | ms p95 | processor s |\n|---|---|---|---|---|---|---|")
        for settings in (Settings(kb=kb), Settings(kb=kb, store="milvus", milvus_uri=uri)):
            hits, times, spent = ask_all(Rag.open(settings=settings), questions)
            found[settings.store] = hits
            ranks = [
                next((at for at, hit in enumerate(some) if right(hit)), None)
                for some, (_, right) in zip(hits, questions, strict=True)
            ]
            hit1, hit5 = (sum(rank is not None and rank < k for rank in ranks) / len(ranks) for k in (1, 5))
            mrr = sum(1 / (rank + 1) for rank in ranks if rank is not None) / len(ranks)
            print(f"| {settings.store} | {hit1:.4f} | {hit5:.4f} | {mrr:.4f} | {statistics.median(times):.1f} "
                  f"| {statistics.quantiles(times, n=20)[-1]:.1f} | {spent:.0f} |", flush=True)
        first, second = found["embedded"], found["milvus"]
        same = [[a.chunk.id for a in x] == [b.chunk.id for b in y] for x, y in zip(first, second, strict=True)]
        same4 = [[a.chunk.id for a in x[:4]] == [b.chunk.id for b in y[:4]] for x, y in zip(first, second, strict=True)]
        gap = max(
            (abs(a.score - b.score) for x, y in zip(first, second, strict=True)
             for a, b in zip(x, y, strict=False) if a.chunk.id == b.chunk.id), default=0.0,
        )
        print(f"\nthe same {DEPTH} hits in the same order: {sum(same)} of {len(same)}; the same 4: {sum(same4)}; "
              f"largest difference of a hit's score: {gap:.2g}")


if __name__ == "__main__":
    main()
