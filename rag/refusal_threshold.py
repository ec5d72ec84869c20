"""Below which support a question is refused: the threshold that was fitted on a knowledge base.

`python -m rag calibrate` writes it as `refusal.json` beside the base, with the questions' counts
and the risk-coverage curve; deleting the file goes back to the built-in threshold. A fit belongs
to the embedder and to the support model it was made with: the same number means something else
under another one, so it is not used then, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rag.errors import KnowledgeBaseError

FILE = "refusal.json"
FORMAT = 1
_SUPPORT_MODEL = Path(__file__).parent / "bundled" / "evidence.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What a threshold brings. `coverage`: share of all questions that are answered; `risk`: share of
    those answered that have no answer in the documents. `kept`, `refused`: shares of the answerable
    ones that are answered and of the unanswerable ones that are refused."""

    threshold: float
    coverage: float
    risk: float
    kept: float
    refused: float

    @property
    def balanced_accuracy(self) -> float:
        return (self.kept + self.refused) / 2


@dataclass(frozen=True, slots=True)
class RefusalFit:
    """A fitted threshold with what it was fitted on. Balanced accuracies are cross-validated."""

    threshold: float
    built_in: float
    balanced_accuracy: float
    built_in_balanced_accuracy: float
    answerable: int
    unanswerable: int
    support_model: str  # fingerprint of the model whose probabilities these are
    embedder: str
    created: str
    curve: tuple[CurvePoint, ...]

    def write(self, folder: str | Path) -> Path:
        """Keep it with the knowledge base, in one rename."""
        path = Path(folder) / FILE
        fresh = path.with_name(FILE + ".new")
        try:
            fresh.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise KnowledgeBaseError(f"{path} can't be written: {error}") from error
        return path

    @classmethod
    def read(cls, folder: str | Path) -> RefusalFit | None:
        """None where none was fitted. Raises KnowledgeBaseError where the file is damaged."""
        path = Path(folder) / FILE
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            curve = tuple(CurvePoint(**point) for point in values.pop("curve"))
            fit = cls(curve=curve, **values)
            if not 0.0 <= float(fit.threshold) <= 1.0:
                raise ValueError(f"its threshold is {fit.threshold}")
            return fit
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise KnowledgeBaseError(
                f"{path} can't be read ({error}). Delete it, or run: python -m rag calibrate --kb {folder}"
            ) from error


@lru_cache(maxsize=1)
def support_model() -> str:
    """Fingerprint of the bundled support model: 16 hex digits."""
    return hashlib.blake2b(_SUPPORT_MODEL.read_bytes(), digest_size=8).hexdigest()


def kb_threshold(folder: str | Path, embedder: str | None = None) -> float | None:
    """The threshold fitted on this knowledge base, None where there is none that still holds.

    `embedder`: the fingerprint of the one in use, where it is to be compared.
    """
    fit = RefusalFit.read(folder)
    if fit is None:
        return None
    if fit.support_model != support_model() or (embedder is not None and fit.embedder != embedder):
        _log.warning(
            "the refusal threshold in %s was fitted with other models and is not used. "
            "Fit it again: python -m rag calibrate --kb %s", Path(folder) / FILE, folder,
        )
        return None
    return fit.threshold


def risk_curve(answerable: Sequence[float], unanswerable: Sequence[float]) -> tuple[CurvePoint, ...]:
    """The curve over thresholds from 0 to 1 in steps of 0.02, of questions' supports."""
    total = len(answerable) + len(unanswerable)
    points = []
    for step in range(51):
        threshold = step / 50
        kept = sum(support >= threshold for support in answerable)
        let_by = sum(support >= threshold for support in unanswerable)
        points.append(CurvePoint(
            threshold, round((kept + let_by) / total, 4), round(let_by / max(1, kept + let_by), 4),
            round(kept / max(1, len(answerable)), 4), round(1 - let_by / max(1, len(unanswerable)), 4),
        ))
    return tuple(points)
