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
from rag.recurrent import BothWays
from rag.soft_match import bundled_table

Floats = npt.NDArray[np.float32]

BUNDLED = Path(__file__).parent / "bundled" / "extractor"
LONGEST_QUESTION = 48  # tokens; what a longer question adds at its end is not read here
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
        self._embedder = bundled_table()
        try:
            built_on = str(json.loads(config_file.read_text(encoding="utf-8"))["embedder"])
            if built_on != self._embedder.fingerprint:
                raise EmbedderError(
                    f"the extractor in {folder} was trained on the bundled embedder {built_on}, which is now "
                    f"{self._embedder.fingerprint}. Train it again: python -m rag.bundled.train_extractor --data DIR"
                )
            stored = load_file(weights_file)
            frequent = stored.pop("frequent_tokens")  # (F,) token ids, int32
            self._usage = stored.pop("usage")  # (V, 96), float16
            w = self._weights = {name: value.astype(np.float32) for name, value in stored.items()}
            self._places = np.zeros(len(self._embedder.table), dtype=np.int64)  # (V,)
            self._places[frequent] = np.arange(1, len(frequent) + 1)
            self._question_layers = [BothWays(w, f"question_layers.ahead.{n}", f"question_layers.back.{n}") for n in (0, 1)]
            self._passage_layer = BothWays(w, "passage_layers.ahead.0", "passage_layers.back.0")
            self._reading_layers = [BothWays(w, f"reading_layers.ahead.{n}", f"reading_layers.back.{n}") for n in (0, 1)]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise EmbedderError(
                f"the extractor in {folder} can't be read: {error}. Install the program again, or train "
                "it: python -m rag.bundled.train_extractor --data DIR"
            ) from error
        self._norms = np.linalg.norm(self._embedder.table, axis=1)  # (V,)
        self._mean_norm = float(self._norms.mean())

    def extract(self, question: str, passages: Sequence[str]) -> Extraction:
        """Read the passages for an answer to the question. Work is linear in their length."""
        asked = self._embedder.token_ids([question])[0][:LONGEST_QUESTION]
        encoded = self._embedder.token_spans(passages)
        spans = tuple(spans for _, spans in encoded)
        filled = [at for at, (ids, _) in enumerate(encoded) if len(ids)]
        if not asked or not filled:
            empty = tuple(np.full((len(ids), 2), -np.inf, dtype=np.float32) for ids, _ in encoded)
            return Extraction(empty, spans, 0.0)
        logits, null = self._forward(np.asarray(asked), [np.asarray(encoded[at][0]) for at in filled])
        total = np.logaddexp(_log_sum(np.concatenate(logits)), null)  # (2,)
        shares = [np.zeros((0, 2), dtype=np.float32) for _ in encoded]
        for at, part in zip(filled, logits, strict=True):
            shares[at] = (part - total).astype(np.float32)
        return Extraction(tuple(shares), spans, float((null - total).mean()))

    def _forward(self, asked: npt.NDArray[np.int64], said: list[npt.NDArray[np.int64]]) -> tuple[list[Floats], Floats]:
        """For each passage the logits (T, 2) of start and end, and (2,) of the null option."""
        w = self._weights
        # Most tokens come more than once: what depends on the token alone is computed once for each.
        distinct, place = np.unique(np.concatenate(said), return_inverse=True)  # (U,), all T together
        places = np.split(place, np.cumsum([len(ids) for ids in said])[:-1])
        e_q, e_u = self._tokens(asked), self._tokens(distinct)  # (Q, d), (U, d)
        features = self._met(asked, distinct)  # (U, 4)
        keys, queries = np.maximum(e_q @ w["align.weight"].T, 0), np.maximum(e_u @ w["align.weight"].T, 0)
        aligned = _softmax(queries @ keys.T) @ e_q  # (U, d)
        x_q = e_q
        for layer in self._question_layers:
            (x_q,) = layer.read([x_q])
        read = self._passage_layer.read([np.concatenate([e_u, aligned, features], axis=1)], places)
        shares = _softmax(self._linear(x_q, "pool").T)  # (1, Q)
        pooled = (shares @ x_q)[0]  # (d,)
        firsts = [self._meet(x_q, x) for x in read]
        layers = [firsts]
        for layer in self._reading_layers:
            layers.append(layer.read(layers[-1]))
        scale = np.float32(x_q.shape[1] ** 0.5)
        by_question = self._linear(pooled, "by_question").reshape(2, -1)
        asks = self._linear(x_q, "cover_question") / scale
        logits = []
        for parts in zip(*layers, strict=True):
            x = np.maximum(self._linear(np.concatenate(parts, axis=1), "gather"), 0)  # (T, d)
            found = _softmax(cast(Floats, asks @ self._linear(x, "cover_passage").T)) @ x  # (Q, d)
            compared = np.concatenate([x_q, found, x_q * found, np.abs(x_q - found)], axis=1)
            cover = shares @ self._linear(np.maximum(self._linear(compared, "compare"), 0), "covered")  # (1, 1)
            logits.append(self._linear(x, "sides") + x @ by_question.T / scale + cover)
        return logits, self._linear(pooled, "null")

    def _tokens(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Token ids -> vectors, whatever stands around them: (T,) -> (T, d)."""
        x = self._linear(self._embedder.table[ids], "from_meaning")
        x += self._usage[ids].astype(np.float32) @ self._weights["from_usage.weight"].T
        x += self._weights["frequent.weight"][self._places[ids]]
        centred = x - x.mean(axis=1, keepdims=True)
        variance = np.square(centred).mean(axis=1, keepdims=True)
        normed = centred / np.sqrt(variance + _EPSILON) * self._weights["token_norm.weight"]
        return cast(Floats, normed + self._weights["token_norm.bias"])

    def _met(self, asked: npt.NDArray[np.int64], distinct: npt.NDArray[np.int64]) -> Floats:
        """How tokens (U,) meet those of the question (Q,): exactly and nearly, each also weighed; (U, 4)."""
        table, norms = self._embedder.table, self._norms
        weights = norms[asked] / self._mean_norm  # (Q,)
        cosines = (table[distinct] / np.maximum(norms[distinct], 1e-12)[:, None]) @ (
            table[asked] / np.maximum(norms[asked], 1e-12)[:, None]).T
        np.maximum(cosines, 0.0, out=cosines)  # (U, Q)
        same = (distinct[:, None] == asked[None]).astype(np.float32)
        return np.stack([
            same.max(axis=1), (same * weights).max(axis=1), cosines.max(axis=1), (cosines * weights).max(axis=1)
        ], axis=1).astype(np.float32)

    def _meet(self, x_q: Floats, x_p: Floats) -> Floats:
        """Question (Q, d) and passage (T, d) against each other: the passage's tokens, (T, d)."""
        w = self._weights
        scores = (x_p * w["together"]) @ x_q.T + x_p @ w["passage_alone.weight"].T
        scores += (x_q @ w["question_alone.weight"].T).T  # (T, Q)
        to_question, to_passage = _softmax(scores), _softmax(scores.T)  # (T, Q), (Q, T)
        a, b = to_question @ x_q, to_question @ (to_passage @ x_p)
        return np.maximum(self._linear(np.concatenate([x_p, a, x_p * a, x_p * b], axis=1), "join"), 0)

    def _linear(self, x: Floats, name: str) -> Floats:
        return cast(Floats, x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"])


def _softmax(x: Floats) -> Floats:
    """Softmax over the last axis of (n, m)."""
    shares = np.exp(x - x.max(axis=1, keepdims=True))
    return cast(Floats, shares / shares.sum(axis=1, keepdims=True))


def _log_sum(values: Floats) -> Floats:
    """log(sum(exp(values))) over the first axis; minus infinity where there is nothing to add."""
    return cast(Floats, np.logaddexp.reduce(values, axis=0, initial=-np.inf))


@lru_cache(maxsize=1)
def bundled_extractor() -> Extractor:
    """The bundled extractor, loaded once a process."""
    return Extractor()
