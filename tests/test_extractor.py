"""The extractor: NumPy gives what the trained network gives, and scores mean what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rag.bundled.extractor_model import ExtractorModel, ExtractorShape
from rag.errors import EmbedderError
from rag.extractor import Extractor
from rag.soft_match import bundled_table

PASSAGES = ("Cats sleep sixteen hours a day.", "", "狗一天睡十个小时。它们白天也睡。")


@pytest.fixture(scope="module")
def network() -> ExtractorModel:
    torch.manual_seed(3)
    table = torch.from_numpy(bundled_table().table)
    return ExtractorModel(ExtractorShape(width=16, align=8, dilations=(1, 4)), table).eval()


@pytest.fixture(scope="module")
def extractor(network: ExtractorModel, tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    folder = tmp_path_factory.mktemp("extractor")
    save_file({name: value.contiguous() for name, value in network.named_parameters()}, folder / "model.safetensors")
    shape = asdict(ExtractorShape(width=16, align=8, dilations=(1, 4)))
    config = {"shape": shape, "embedder": bundled_table().fingerprint}
    (folder / "extractor.json").write_text(json.dumps(config), encoding="utf-8")
    return Extractor(folder)


def test_numpy_gives_the_shares_that_the_trained_network_gives(
    network: ExtractorModel, extractor: Extractor
) -> None:
    question = "How long do cats sleep?"
    asked, *said = bundled_table().token_ids([question, *PASSAGES])
    row = [*said[0], *[-1] * 16, *said[1], *[-1] * 16, *said[2]]
    with torch.no_grad():
        start, end = network(torch.tensor([asked]), torch.tensor([row]))
    found = extractor.extract(question, PASSAGES)
    for side, logits in enumerate((start, end)):
        shares = logits[0].log_softmax(0).numpy()
        np.testing.assert_allclose(found.starts[0][:, side], shares[: len(said[0])], atol=2e-4)
        np.testing.assert_allclose(found.starts[2][:, side], shares[-1 - len(said[2]) : -1], atol=2e-4)
    null = (start[0].log_softmax(0)[-1] + end[0].log_softmax(0)[-1]) / 2
    assert found.null == pytest.approx(float(null), abs=2e-4)


def test_the_shares_of_all_passages_and_of_none_add_up_to_one(extractor: Extractor) -> None:
    found = extractor.extract("狗睡多久？", PASSAGES)
    begin = sum(np.exp(found.passage_mass(at)) for at in range(3))
    asked = found.starts
    assert begin < 1.0
    end = sum(float(np.exp(part[:, 1]).sum()) for part in asked)
    # null is the mean of two logarithms, so the geometric mean of what is left on both sides
    assert np.exp(found.null) == pytest.approx(np.sqrt((1 - begin) * (1 - end)), abs=1e-4)


def test_a_sentence_has_the_mass_of_its_own_characters(extractor: Extractor) -> None:
    found = extractor.extract("狗睡多久？", PASSAGES)
    text = PASSAGES[2]
    cut = text.index("它们")
    both = np.exp(found.mass(2, 0, cut)) + np.exp(found.mass(2, cut, len(text)))
    assert both == pytest.approx(np.exp(found.passage_mass(2)), rel=1e-4)
    assert found.mass(1, 0, 10) == -np.inf


def test_a_passage_is_read_the_same_wherever_it_stands(extractor: Extractor) -> None:
    first = extractor.extract("狗睡多久？", [PASSAGES[0], PASSAGES[2]])
    second = extractor.extract("狗睡多久？", [PASSAGES[2], PASSAGES[0]])
    assert first.passage_mass(1) == pytest.approx(second.passage_mass(0), abs=1e-4)


def test_an_extractor_of_another_embedder_is_refused(extractor: Extractor, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = {"shape": asdict(ExtractorShape()), "embedder": "0" * 16}
    (tmp_path / "extractor.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(EmbedderError, match="0000000000000000.*train_extractor"):
        Extractor(tmp_path)
    with pytest.raises(EmbedderError, match="can't be read"):
        Extractor(tmp_path / "missing")
