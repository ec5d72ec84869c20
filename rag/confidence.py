"""How far a small model's answer can be trusted, from the log-probabilities of its own tokens.

`reader.json` beside a model's weights holds the fit: probability of being right =
sigmoid(bias + logprob * mean token log-probability + support * logit of the passages' support),
and the threshold below which a sentence is quoted instead. Fitted on questions kept from training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rag.errors import GeneratorError

_BUNDLED = Path(__file__).parent / "bundled" / "reader"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The fit of one model."""

    bias: float
    logprob: float
    support: float
    threshold: float

    @classmethod
    def read(cls, generator: str, adapter: str = "") -> Calibration | None:
        """The calibration that came with a model; None where it has none and is taken at its word.

        With an adapter it is the adapter's own: the model's was fitted on answers that the adapted
        weights no longer give. Raises GeneratorError where the file is there but can't be read.
        """
        if adapter:
            from rag.adapter import read_calibration

            return read_calibration(Path(adapter))
        folder = _BUNDLED if generator == "bundled" else Path(generator)
        file = folder / "reader.json"
        if not file.is_file():
            return None
        try:
            fit = json.loads(file.read_text(encoding="utf-8")).get("confidence")
            if fit is None:
                return None
            return cls(*(float(fit[name]) for name in ("bias", "logprob", "support", "threshold")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GeneratorError(f"{file} can't be read as a calibration: {error!r}") from error

    def confidence(self, token_logprobs: Sequence[float], support: float) -> float:
        """Probability (0 to 1) that the answer is right."""
        if not token_logprobs:
            return 0.0
        mean = sum(token_logprobs) / len(token_logprobs)
        clipped = min(max(support, 1e-6), 1 - 1e-6)
        score = self.bias + self.logprob * mean + self.support * math.log(clipped / (1 - clipped))
        return 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, score))))
