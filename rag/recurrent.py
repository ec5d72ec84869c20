"""Bidirectional LSTMs in NumPy, for the extractor: weights and gates as torch.nn.LSTM has them.

Hochreiter and Schmidhuber, 1997; forget gates after Gers et al., 2000.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class BothWays:
    """One layer that reads sequences from both ends at once."""

    def __init__(self, weights: Mapping[str, Floats], ahead: str, back: str) -> None:
        """`ahead` and `back` are the names' beginnings of the two directions, such as "layers.ahead.0"."""
        sides = (ahead, back)
        self._hidden = weights[f"{ahead}.weight_hh_l0"].shape[1]
        # sigmoid(x) is (tanh(x / 2) + 1) / 2: with three of the four gates halved, one tanh does for all
        half = np.full(4 * self._hidden, 0.5, dtype=np.float32)
        half[2 * self._hidden : 3 * self._hidden] = 1.0
        self._inputs = [(weights[f"{side}.weight_ih_l0"] * half[:, None]).T for side in sides]
        self._biases = [(weights[f"{side}.bias_ih_l0"] + weights[f"{side}.bias_hh_l0"]) * half for side in sides]
        states = [(weights[f"{side}.weight_hh_l0"] * half[:, None]).T for side in sides]
        self._states = np.ascontiguousarray(np.stack(states))  # (2, h, 4h)

    def read(self, sequences: Sequence[Floats], places: Sequence[npt.NDArray[np.int64]] | None = None) -> list[Floats]:
        """Arrays (T, inputs), each with its own T > 0, -> arrays (T, 2 h), both directions side by side.

        With `places`, `sequences` holds one array of rows, and each of `places` (T,) names the rows
        of one sequence: what comes more than once is then multiplied with the weights once.
        """
        hidden = self._hidden
        if places is None:
            gates = [[x @ w + b for x in sequences] for w, b in zip(self._inputs, self._biases, strict=True)]
        else:
            (rows,) = sequences
            gates = []
            for w, b in zip(self._inputs, self._biases, strict=True):
                all_rows = rows @ w + b
                gates.append([all_rows[place] for place in places])
        lengths = [len(x) for x in gates[0]]
        longest, many = max(lengths), len(lengths)
        # time first, so that each step's rows lie together; behind a sequence's end nothing counts
        given = np.zeros((longest, 2, many, 4 * hidden), dtype=np.float32)
        for at, length in enumerate(lengths):
            given[:length, 0, at] = gates[0][at]
            given[:length, 1, at] = gates[1][at][::-1]
        said = np.zeros((longest, 2, many, hidden), dtype=np.float32)
        state = np.zeros((2, many, hidden), dtype=np.float32)
        cell, more = np.zeros_like(state), np.empty_like(given[0])
        for now, out in zip(given, said, strict=True):
            now += np.matmul(state, self._states, out=more)
            np.tanh(now, out=now)
            entry, keep = now[..., :hidden], now[..., hidden : 2 * hidden]
            new, shown = now[..., 2 * hidden : 3 * hidden], now[..., 3 * hidden :]
            # (keep + 1) / 2 * cell + (entry + 1) / 2 * new
            cell += keep * cell
            cell += new
            cell += entry * new
            cell *= 0.5
            np.tanh(cell, out=out)
            out += shown * out
            out *= 0.5
            state = out
        return [
            np.concatenate([said[:length, 0, at], said[:length, 1, at][::-1]], axis=1)
            for at, length in enumerate(lengths)
        ]
