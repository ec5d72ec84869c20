"""Count in how many passages each term stands: `python -m rag.bundled.count_terms --data DIR`.

A small knowledge base can't tell rare words from common ones. These counts over a large mixed
collection stand in as a prior, see `rag.term_weights`.
"""

from __future__ import annotations

import argparse
import lzma
import random
from collections import Counter
from pathlib import Path

from rag.bundled.training_data import read_rows, text_files, windows
from rag.terms import passage_terms

KEPT = 60_000
OUT = Path(__file__).parent / "term_counts.txt.xz"


def count_terms(data: Path, *, passages_per_file: int, seed: int) -> tuple[int, Counter[str]]:
    """Number of passages read, and for each term the number of passages that hold it."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    total = 0
    for path in text_files(data):
        language = path.name.split(".")[1]
        read = 0
        for row in read_rows(path):
            for window in windows(row["text"], rng=rng, count=3, characters=400 if language == "zh" else 900):
                counts.update(set(passage_terms("\n".join(window))))
                read += 1
            if read >= passages_per_file:
                break
        total += read
    return total, counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .jsonl.xz files")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--passages-per-file", type=int, default=8_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    total, counts = count_terms(options.data, passages_per_file=options.passages_per_file, seed=options.seed)
    with lzma.open(options.out, "wt", encoding="utf-8") as out:
        out.write(f"{total}\n")
        for term, count in sorted(counts.most_common(KEPT), key=lambda item: item[0]):
            out.write(f"{term} {count}\n")
    print(f"{total:,} passages, {len(counts):,} terms, {KEPT:,} kept in {options.out}")


if __name__ == "__main__":
    main()
