"""Which tokens of the passages answer the question, in a small network without torch.

Runs the weights of `rag.bundled.extractor_model` (described there) in NumPy, so that a command needs
no torch before the language model writes. All passages of a question share one softmax with the
option that none answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from rag.errors import EmbedderError
from rag.soft_match import bundled_table

Floats = npt.NDArray[np.float32]

BUNDLED = Path(__file__).parent / "bundled" / "extractor"
LONGEST_QUESTION = 48  # tokens; what a longer question adds at its end is not read here
QUESTION_DILATIONS = (1, 2)
GAP = 16  # empty rows between passages: no convolution sees across
_EPSILON = 1e-5  # of torch's LayerNorm


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was read in the passages of one question.

    `starts` holds for each passage float32 (tokens, 2): the natural logarithm of each token's share
    in being where an answer begins and where it ends; `spans` the tokens' [start, end) characters.
    `null` is the logarithm of the share of "no passage answers", mean of both.
    """

    starts: tuple[Floats, ...]
    spans: tuple[npt.NDArray[np.int64], ...]
    null: float

    def mass(self, passage: int, start: int, end: int) -> float:
        """Logarithm of the share of answers that begin in the characters [start, end) of a passage."""
        spans = self.spans[passage]
        inside = (spans[:, 0] >= start) & (spans[:, 0] < end)
        return float(_log_sum(self.starts[passage][inside, 0]))

    def passage_mass(self, passage: int) -> float:
        """Logarithm of the share of answers that begin anywhere in a passage."""
        return float(_log_sum(self.starts[passage][:, 0]))


class Extractor:
    """The network with its weights. Thread-safe: it keeps nothing between calls."""

    def __init__(self, folder: Path = BUNDLED) -> None:
        from safetensors.numpy import load_file

        weights_file, config_file = folder / "model.safetensors", folder / "extractor.json"
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
            self._dilations = [int(by) for by in config["shape"]["dilations"]]
            built_on = str(config["embedder"])
            self._weights = {name: value.astype(np.float32) for name, value in load_file(weights_file).items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EmbedderError(
                f"the extractor in {folder} can't be read: {error}. Install the program again, or train "
                "it: python -m rag.bundled.train_extractor --data DIR"
            ) from error
        self._embedder = bundled_table()
        if built_on != self._embedder.fingerprint:
            raise EmbedderError(
                f"the extractor in {folder} was trained on the bundled embedder {built_on}, which is now "
                f"{self._embedder.fingerprint}. Train it again: python -m rag.bundled.train_extractor --data DIR"
            )
        norms = np.linalg.norm(self._embedder.table, axis=1)
        self._norms = norms
        self._mean_norm = float(norms.mean())

    def extract(self, question: str, passages: Sequence[str]) -> Extraction:
        """Read the passages for an answer to the question. Work is linear in their length."""
        asked = self._embedder.token_ids([question])[0][:LONGEST_QUESTION]
        encoded = self._embedder.token_spans(passages)
        if not asked or not any(len(ids) for ids, _ in encoded):
            empty = tuple(np.zeros((len(ids), 2), dtype=np.float32) - np.inf for ids, _ in encoded)
            return Extraction(empty, tuple(spans for _, spans in encoded), 0.0)
        begins: list[int] = []
        length = 0
        for ids, _ in encoded:
            begins.append(length)
            length += len(ids) + GAP
        said = np.full(length, -1, dtype=np.int64)
        for begin, (ids, _) in zip(begins, encoded, strict=True):
            said[begin : begin + len(ids)] = ids
        logits, null = self._forward(np.asarray(asked), said)  # (T, 2), (2,)
        total = np.logaddexp(_log_sum(logits), null)  # (2,)
        shares = (logits - total).astype(np.float32)
        parts = tuple(shares[begin : begin + len(ids)] for begin, (ids, _) in zip(begins, encoded, strict=True))
        return Extraction(parts, tuple(spans for _, spans in encoded), float((null - total).mean()))

    def _forward(self, asked: npt.NDArray[np.int64], said: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Logits (T, 2) of start and end, -1e4 where there is no token, and (2,) of the null option."""
        w, table = self._weights, self._embedder.table
        mask = (said >= 0)[:, None]  # (T, 1)
        # Most tokens come more than once: what depends on the token alone is computed once for each.
        distinct, place = np.unique(np.maximum(said, 0), return_inverse=True)  # (U,), (T,)
        e_q, e_u = table[asked], table[distinct]  # (Q, e), (U, e)
        # the question
        first_q = x_q = self._norm(e_q @ w["project.weight"].T + w["project.bias"], "project_norm")
        for number, by in enumerate(QUESTION_DILATIONS):
            x_q = self._convolve(x_q, by, f"question_layers.{number}", None)
        scores = x_q @ w["pool.weight"][0] + w["pool.bias"]
        pooled = _softmax(scores[None])[0] @ x_q  # (d,)
        # how each passage token meets it
        weights = self._norms[asked] / self._mean_norm  # (Q,)
        cosines = (e_u / np.maximum(self._norms[distinct], 1e-12)[:, None]) @ (
            e_q / np.maximum(self._norms[asked], 1e-12)[:, None]).T
        np.maximum(cosines, 0.0, out=cosines)  # (U, Q)
        same = (distinct[:, None] == asked[None]).astype(np.float32)
        features = np.stack([
            same.max(axis=1), (same * weights).max(axis=1), cosines.max(axis=1), (cosines * weights).max(axis=1)
        ], axis=1)
        attention = _softmax((e_u @ w["align.weight"].T) @ (e_q @ w["align.weight"].T).T)
        aligned = attention @ first_q  # (U, d)
        x = self._norm(e_u @ w["project.weight"].T + w["project.bias"], "project_norm")
        x = np.concatenate([x, aligned, x * aligned, features], axis=1)
        x = self._norm(x @ w["join.weight"].T + w["join.bias"], "join_norm")[place] * mask  # (T, d)
        # the passages
        for number, by in enumerate(self._dilations):
            x = self._convolve(x, by, f"layers.{number}", pooled) * mask
        null = w["null.weight"] @ pooled + w["null.bias"]
        scale = x.shape[1] ** 0.5
        logits = np.stack([
            x @ (w[f"{side}.weight"][0] + (w[f"{side}_question.weight"] @ pooled + w[f"{side}_question.bias"]) / scale)
            + w[f"{side}.bias"]
            for side in ("start", "end")
        ], axis=1)
        return np.where(mask, logits, np.float32(-1e4)), null

    def _convolve(self, x: Floats, by: int, name: str, question: Floats | None) -> Floats:
        """A gated convolution of width 3 with its residual and norm: (T, d) -> (T, d)."""
        weight, width = self._weights[f"{name}.mix.weight"], x.shape[1]
        mixed = x @ weight[:, width : 2 * width].T + self._weights[f"{name}.mix.bias"]
        if by < len(x):
            mixed[by:] += x[:-by] @ weight[:, :width].T
            mixed[:-by] += x[by:] @ weight[:, 2 * width :].T
        if question is not None:
            mixed += self._weights[f"{name}.condition.weight"] @ question
        gate = 1.0 / (1.0 + np.exp(-np.clip(mixed[:, width:], -60, 60)))
        return self._norm(x + mixed[:, :width] * gate, f"{name}.norm")

    def _norm(self, x: Floats, name: str) -> Floats:
        centred = x - x.mean(axis=1, keepdims=True)
        spread = np.sqrt((centred**2).mean(axis=1, keepdims=True) + _EPSILON)
        normed = centred / spread * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return cast(Floats, normed)


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return cast(Floats, powers / powers.sum(axis=1, keepdims=True))


def _log_sum(values: Floats) -> Floats:
    """log(sum(exp(values))) over the first axis; minus infinity where there is nothing to add."""
    return cast(Floats, np.logaddexp.reduce(values, axis=0, initial=-np.inf))


@lru_cache(maxsize=1)
def bundled_extractor() -> Extractor:
    """The bundled extractor, loaded once a process."""
    return Extractor()


