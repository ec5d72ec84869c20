"""What each step of retrieval is worth: every step left out in turn, on the same questions in one run.

    python -m benchmarks.ablation --data DIR [--questions 1000] [--json OUT]

The sets are those of `benchmarks.retrieval`; of each the same questions, evenly spread, go to every
variant.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.retrieval import DEPTH, SETS, STATUTE, measure_search, read_set
from ingest import sync
from rag import Rag, Settings
from rag.retrieval_steps import STEPS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the measuring sets")
    parser.add_argument("--questions", type=int, default=1000, help="most questions of a set")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ablation-") as work:
        for name in (*SETS, STATUTE):
            folder = Path(work) / name
            questions = read_set(options.data, name, folder)
            questions = questions[:: max(1, -(-len(questions) // options.questions))]
            kb = str(folder) + ".kb"
            sync([folder], settings=Settings(kb=kb))
            print(f"\n{name}, {len(questions)} questions\n\n| without | hit@1 | hit@5 | MRR | ms |\n|---|---|---|---|---|")
            figures[name] = {}
            for without in ("", *STEPS):
                rag = Rag.open(kb, retrieval_without=without)
                row = measure_search(questions, lambda question, rag=rag: rag.retrieve(question, DEPTH))
                figures[name][without or "nothing"] = row
                print(f"| {without or '(nothing)'} | {row['hit@1']:.3f} | {row['hit@5']:.3f} | {row['mrr']:.3f} "
                      f"| {row['ms']:.1f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
