"""Vectors of how tokens are used: what may stand in another's place is like it."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest

from rag.bundled import token_usage as module
from rag.bundled.extractor_data import whole_tokenizer
from rag.bundled.token_usage import token_usage


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Of 3,000 sentences in which somebody goes to a place in a year, always in the same two ways."""
    folder: Path = tmp_path_factory.mktemp("texts")
    rng = random.Random(1)
    places, years = ("london", "paris", "india", "rome"), ("1997", "1998", "2001", "2005")
    text = "".join(
        f"she went to {rng.choice(places)} in {rng.choice(years)} , " if rng.random() < 0.5
        else f"since {rng.choice(years)} he lives near {rng.choice(places)} again . "
        for _ in range(3000)
    )
    with lzma.open(folder / "text.en.made.jsonl.xz", "wt", encoding="utf8") as file:
        file.write(json.dumps({"title": "", "text": text}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DIMENSIONS", 6)
        patch.setattr(module, "CONTEXTS", 20)
        return token_usage(folder, whole_tokenizer(), seed=1).astype(np.float32)


def likeness(table: np.ndarray, one: str, other: str) -> float:
    vocabulary = whole_tokenizer().get_vocab()
    a, b = table[vocabulary[one]], table[vocabulary[other]]
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(("one", "like", "unlike"), [("london", "rome", "1998"), ("2001", "2005", "india")])
def test_places_are_like_places_and_years_like_years(table, one, like, unlike):
    assert likeness(table, one, like) > 0.9
    assert likeness(table, one, unlike) < 0.5


def test_tokens_that_were_never_met_are_zero_and_none_is_longer_than_one(table):
    norms = np.linalg.norm(table, axis=1)
    assert norms[whole_tokenizer().get_vocab()["北京"]] == 0
    assert norms.max() <= 1.001
