"""How often does retrieval get better, and how often worse, by completing a follow-up?

    python -m benchmarks.followups --kb .kb [--half looking|confirming]

tests/followups.jsonl holds 60 follow-ups in each language over the handbook, written before the
rules were looked at; a third of them are complete questions about something else, which completing
can only harm. Rules are improved on the half for looking; the other half confirms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag import Rag
from rag.followup import search_question
from rag.question_file import read_lines

FOLLOWUPS = Path(__file__).parents[1] / "tests" / "followups.jsonl"
_LOOKED_AT = 10


@dataclass(frozen=True, slots=True)
class FollowUp:
    id: str
    question: str
    history: tuple[tuple[str, str], ...]
    path: str
    complete: bool


def read_followups(path: Path = FOLLOWUPS) -> list[FollowUp]:
    return [
        FollowUp(row["id"], row["question"], tuple((asked, said) for asked, said in row["history"]), row["path"],
                 row["complete"])
        for _, row in read_lines(path)
    ]


def half_of(followups: Sequence[FollowUp], half: str) -> list[FollowUp]:
    """Those of even numbers are for looking, those of odd ones for confirming."""
    rest = {"looking": (0,), "confirming": (1,), "all": (0, 1)}[half]
    return [item for item in followups if int(item.id.split("-")[1]) % 2 in rest]


def ranks(rag: Rag, items: Sequence[FollowUp], ask: Callable[[FollowUp], str]) -> list[int]:
    """0-based rank of the first passage of the right file for each; _LOOKED_AT where there is none."""
    found = rag.retriever.retrieve_batch([ask(item) for item in items], _LOOKED_AT)
    return [
        next((at for at, hit in enumerate(hits) if hit.chunk.path == item.path), _LOOKED_AT)
        for item, hits in zip(items, found, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kb", default=".kb", help="knowledge base of knowledge/ (default: .kb)")
    parser.add_argument("--half", choices=("looking", "confirming", "all"), default="all")
    parser.add_argument("--show", action="store_true", help="name each follow-up that completing made better or worse")
    options = parser.parse_args(arguments)
    rag = Rag.open(options.kb)
    print(f"{'':34}{'n':>4}{'completed':>11}{'hit@1':>15}{'hit@5':>15}{'better':>8}{'worse':>7}")
    for language in ("zh", "en"):
        for complete in (False, True):
            items = [item for item in half_of(read_followups(), options.half)
                     if item.id.startswith(language) and item.complete == complete]
            alone = ranks(rag, items, lambda item: item.question)
            with_history = ranks(rag, items, lambda item: search_question(item.question, item.history))
            changed = sum(search_question(item.question, item.history) != item.question for item in items)
            better = sum(b < a for a, b in zip(alone, with_history, strict=True))
            worse = sum(b > a for a, b in zip(alone, with_history, strict=True))
            name = f"{language} {'complete questions' if complete else 'that need what was said'}"
            row = "".join(
                f"{sum(rank < k for rank in alone) / len(items):>8.2f} ->{sum(rank < k for rank in with_history) / len(items):>5.2f}"
                for k in (1, 5)
            )
            print(f"{name:34}{len(items):>4}{changed:>11}{row}{better:>8}{worse:>7}")
            if options.show:
                for item, a, b in zip(items, alone, with_history, strict=True):
                    left = not complete and search_question(item.question, item.history) == item.question
                    if a != b or left:
                        print(f"    {item.id} {a} -> {b}: {search_question(item.question, item.history)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
