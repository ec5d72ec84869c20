"""One evaluation as a file: what was asked, what came, how it was judged; and two of them compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rag.errors import InputError
from rag.quality.evaluation import (
    FIGURES,
    MEASURES,
    EvalResult,
    Share,
    by_language,
    by_type,
    intervals_of,
    is_right,
    measures,
    risk_coverage,
    shares_of,
    summarise,
    type_of,
    with_balanced,
)
from rag.quality.significance import holm, interval, p_values, resampled, swapped

FORMAT = 1
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """An evaluation as it is saved: `summary` for all of it, `questions` one object each."""

    source: str
    created: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    questions: tuple[dict[str, Any], ...]

    def shares(self) -> list[dict[str, Share]]:
        return [{name: tuple(row["measures"][name]) for name in MEASURES} for row in self.questions]

    def write(self, path: Path) -> None:
        """Written under another name and renamed, so that a run is there whole or not at all."""
        fresh = path.with_name(path.name + ".new")
        try:
            fresh.write_text(json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise InputError(f"{path} can't be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises InputError where the file is no saved run."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["format"]
            if found != FORMAT:
                raise InputError(f"{path} is a run of format {found}, this program reads {FORMAT}. Measure again.")
            run = cls(values["source"], values["created"], values["settings"], values["summary"],
                      tuple(values["questions"]))
            run.shares()
            return run
        except OSError as error:
            raise InputError(f"{path} can't be read: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no run saved by `python -m rag eval IN.jsonl --save`: {error!r}"
            ) from error


def run_of(results: Sequence[EvalResult], *, source: str, settings: Mapping[str, Any]) -> Run:
    """The record of an evaluation."""
    rows = [measures(result) for result in results]
    return Run(
        source=source, created=datetime.now(UTC).isoformat(timespec="seconds"), settings=dict(settings),
        summary=summary_of(results, rows),
        questions=tuple(_question(result, row) for result, row in zip(results, rows, strict=True)),
    )


def summary_of(results: Sequence[EvalResult], rows: Sequence[Mapping[str, Share]]) -> dict[str, Any]:
    """What `eval --json` prints: the figures, their intervals, and the same by language and type."""
    return {
        **summarise(results), "by_language": by_language(results), "by_type": by_type(results),
        "intervals": intervals_of(rows), "risk_coverage": risk_coverage(results),
    }


def _question(result: EvalResult, row: Mapping[str, Share]) -> dict[str, Any]:
    return {
        "id": result.question.id, "type": type_of(result.question), "gold": asdict(result.question),
        "rank": result.rank, "right": is_right(result), "seconds": round(result.seconds, 4),
        "measures": dict(row), **result.answer.to_dict(),
    }


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure in two runs. `low` and `high`: 95% interval of b - a. `p`: by permutation.

    `p_holm` is p corrected for the number of figures that are compared.
    """

    name: str
    a: float
    b: float
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        return self.p_holm < SIGNIFICANT


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs over the questions they share. `better` and `worse`: ids where b ranks or answers so."""

    questions: int
    only_a: int
    only_b: int
    differences: tuple[Difference, ...]
    better: tuple[str, ...]
    worse: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        rows = {
            each.name: {**{key: value for key, value in asdict(each).items() if key != "name"},
                        "significant": each.significant}
            for each in self.differences
        }
        return {**asdict(self), "differences": rows}


def compare(a: Run, b: Run) -> Comparison:
    """b against a, on the questions that both hold. Raises InputError where they share fewer than two."""
    first = {_key(row): at for at, row in enumerate(a.questions)}
    pairs = [(first[_key(row)], at) for at, row in enumerate(b.questions) if _key(row) in first]
    if len(pairs) < 2:
        raise InputError(
            f"the runs share {len(pairs)} of {len(a.questions)} and {len(b.questions)} questions (same id and "
            "same words); a comparison needs at least 2. Measure both on the same file."
        )
    rows_a, rows_b = a.shares(), b.shares()
    shares_a = shares_of([rows_a[at] for at, _ in pairs])
    shares_b = shares_of([rows_b[at] for _, at in pairs])
    # the figures, the interval of their difference, the odds of it by chance
    totals_a, totals_b = with_balanced(shares_a.totals()), with_balanced(shares_b.totals())
    low, high = interval(with_balanced(resampled(shares_b)) - with_balanced(resampled(shares_a)))
    chance_a, chance_b = swapped(shares_a, shares_b)
    p = p_values(totals_b - totals_a, with_balanced(chance_b) - with_balanced(chance_a))
    known = [at for at in range(len(FIGURES)) if not np.isnan(p[at])]
    corrected = dict(zip(known, holm([float(p[at]) for at in known]), strict=True))
    differences = tuple(
        Difference(
            FIGURES[at], a=_rounded(totals_a[at]), b=_rounded(totals_b[at]), low=_rounded(low[at]),
            high=_rounded(high[at]), p=_rounded(p[at]), p_holm=_rounded(corrected[at]),
        )
        for at in known
    )
    better: list[str] = []
    worse: list[str] = []
    for at_a, at_b in pairs:
        change = _standing(b.questions[at_b]) - _standing(a.questions[at_a])
        if change:
            (better if change > 0 else worse).append(str(b.questions[at_b]["id"]))
    return Comparison(
        len(pairs), len(a.questions) - len(pairs), len(b.questions) - len(pairs), differences,
        tuple(better), tuple(worse),
    )


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["id"]), str(row["gold"]["question"])


def _standing(row: Mapping[str, Any]) -> float:
    """How well one question fared: a right answer counts most, then the place of the right passage."""
    return 2.0 * bool(row["right"]) + float(row["measures"]["mrr"][0])
