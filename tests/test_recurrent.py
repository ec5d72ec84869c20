"""Both-ways LSTMs in NumPy give what torch's give, each sequence as if it stood alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rag.recurrent import BothWays

INPUTS, HIDDEN = 5, 3


@pytest.fixture(scope="module")
def network() -> torch.nn.LSTM:
    torch.manual_seed(1)
    return torch.nn.LSTM(INPUTS, HIDDEN, bidirectional=True, batch_first=True)


@pytest.fixture(scope="module")
def layer(network: torch.nn.LSTM) -> BothWays:
    weights = {}
    for name, value in network.named_parameters():
        side = "back" if name.endswith("_reverse") else "ahead"
        weights[f"{side}.{name.removesuffix('_reverse')}"] = value.detach().numpy()
    return BothWays(weights, "ahead", "back")


def expected(network: torch.nn.LSTM, sequence: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(sequence)[None])[0][0].numpy()


@pytest.mark.parametrize("lengths", [(1,), (7,), (4, 9, 1)])
def test_sequences_of_different_lengths_are_read_as_torch_reads_each_alone(network, layer, lengths):
    rng = np.random.default_rng(0)
    sequences = [rng.normal(size=(length, INPUTS)).astype(np.float32) for length in lengths]
    for found, sequence in zip(layer.read(sequences), sequences, strict=True):
        np.testing.assert_allclose(found, expected(network, sequence), atol=1e-6)


def test_rows_that_come_more_than_once_may_be_given_once(network, layer):
    rows = np.random.default_rng(0).normal(size=(3, INPUTS)).astype(np.float32)
    places = [np.array([2, 0, 2]), np.array([1])]
    for found, place in zip(layer.read([rows], places), places, strict=True):
        np.testing.assert_allclose(found, expected(network, rows[place]), atol=1e-6)


def test_large_inputs_saturate_without_a_warning(layer):
    with np.errstate(all="raise", under="ignore"):
        (found,) = layer.read([np.full((4, INPUTS), 1e4, dtype=np.float32)])
    assert np.isfinite(found).all()
