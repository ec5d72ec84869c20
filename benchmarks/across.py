"""Questions in one language about documents in the other.

    python -m benchmarks.across --kb .kb

tests/questions_across.jsonl are the handbook's own questions, translated; each is asked of the
half of the handbook that is in the other language, as if there were no other documents.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rag import Filter, Rag
from rag.quality.evaluation import EvalQuestion, hit_is_right, holds
from rag.question_file import read_lines

QUESTIONS = Path(__file__).parents[1] / "tests" / "questions_across.jsonl"
_DEPTH = 5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kb", default=".kb", help="knowledge base of knowledge/ (default: .kb)")
    options = parser.parse_args(arguments)
    rag = Rag.open(options.kb)
    questions = [EvalQuestion.parse(row, number) for number, row in read_lines(QUESTIONS)]
    found: dict[str, list[dict[str, bool]]] = defaultdict(list)
    for question in questions:
        folder = str(question.path).split("/", 1)[0]
        where = Filter(under=folder)
        files = [hit.chunk.path for hit in rag.retrieve(question.question, _DEPTH, where=where)]
        answer = rag.ask(question.question, where=where)
        found[f"about documents in {folder}"].append({
            "file@1": files[:1] == [question.path],
            "file@5": question.path in files,
            "passage@4": any(hit_is_right(hit, question) for hit in answer.hits),
            "answered": not answer.refused,
            "cites the file": any(citation.path == question.path for citation in answer.citations),
            "holds the sentence": any(holds(citation.quote, question.quote or "") for citation in answer.citations),
        })
    for group, rows in found.items():
        print(f"{group}: {len(rows)} questions")
        for name in rows[0]:
            print(f"  {name:20} {sum(row[name] for row in rows) / len(rows):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
