"""Fitting weights to questions: which of several is right, and whether anything is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rag import evidence

# People ask their documents mostly what stands in them: five questions of six.
ANSWERABLE_PRIOR = 5.0
_SUPPORT_SIGNS = {"bias": 2, "terms": 2, "no_kind": -1}


def fit_listwise(
    lists: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str], *,
    signs: dict[str, int], decay: float = 1e-3,
) -> dict[str, float]:
    """Weights that put the right ones (bool (n,)) of each list of features (n, f) first.

    `signs` holds +1 or -1 where a weight may only have that sign, 0 where it stays zero.
    """
    stacked = np.concatenate([features for features, _ in lists])
    scale = stacked.std(axis=0) + 1e-9
    # What never varies in these questions can't be fitted and stays at zero.
    signs = signs | {name: 0 for name, constant in zip(names, stacked.std(axis=0) == 0) if constant}
    free = torch.full((len(names),), -1.0, dtype=torch.float64, requires_grad=True)
    sign = torch.tensor([signs.get(name, 2) for name in names], dtype=torch.float64)
    longest = max(len(right) for _, right in lists)
    features = torch.zeros(len(lists), longest, len(names), dtype=torch.float64)
    valid = torch.zeros(len(lists), longest, dtype=torch.bool)
    right = torch.zeros(len(lists), longest, dtype=torch.bool)
    for at, (rows, correct) in enumerate(lists):
        features[at, : len(rows)] = torch.from_numpy(rows / scale)
        valid[at, : len(rows)] = True
        right[at, : len(rows)] = torch.from_numpy(correct)
    optimizer = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe")

    def signed() -> torch.Tensor:
        return torch.where(sign == 2, free + 1.0, sign * torch.nn.functional.softplus(free))

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = signed()
        scores = (features @ weights).masked_fill(~valid, -1e9)
        won = scores.masked_fill(~right, -1e9)
        value = (scores.logsumexp(1) - won.logsumexp(1)).mean() + decay * (weights**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    fitted = signed().detach().numpy() / scale
    return {name: round(float(value), 5) for name, value in zip(names, fitted, strict=True)}


def first_right(lists: Sequence[tuple[np.ndarray, np.ndarray]], weights: dict[str, float]) -> float:
    """Share of lists whose best-scored row is right."""
    vector = np.array(list(weights.values()))
    return float(np.mean([right[np.argmax(rows @ vector)] for rows, right in lists]))


def fit_support(rows: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], float, float]:
    """Logistic weights, the threshold that refuses most rightly, and the one below which to doubt.

    Each weight has the sign its meaning gives it: folders differ from the questions fitted on, and
    two features that cancel out here would not cancel there. For refusing, a question that has an
    answer counts ANSWERABLE_PRIOR times one that has none; for doubting, both count the same.
    """
    names = evidence.SUPPORT_FEATURES
    scale = rows.std(axis=0) + 1e-9
    scale[0] = 1.0
    x, y = torch.from_numpy(rows / scale), torch.from_numpy(labels.astype(np.float64))
    sign = torch.tensor([_SUPPORT_SIGNS.get(name, 1) for name in names], dtype=torch.float64)
    free = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=400, line_search_fn="strong_wolfe")

    def signed() -> torch.Tensor:
        return torch.where(sign == 2, free, sign * torch.nn.functional.softplus(free - 2.0))

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = signed()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y)
        value = value + 1e-3 * (weights[1:] ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    fitted = signed().detach().numpy() / scale
    probability = 1 / (1 + np.exp(-(rows @ fitted)))
    weights = {name: round(float(weight), 5) for name, weight in zip(names, fitted, strict=True)}
    refuse, doubt = (
        _best_threshold(probability, labels, prior) for prior in (ANSWERABLE_PRIOR, 1.0)
    )
    return weights, refuse, doubt


def _best_threshold(probability: np.ndarray, labels: np.ndarray, prior: float) -> float:
    """The threshold that decides rightly most often."""
    candidates = np.linspace(0.02, 0.95, 94)
    right = [prior * (probability[labels] >= at).mean() + (probability[~labels] < at).mean() for at in candidates]
    return float(candidates[int(np.argmax(right))])
