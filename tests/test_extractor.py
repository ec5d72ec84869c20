"""The extractor: NumPy gives what the trained network gives, and scores mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rag.bundled.extractor_model import ExtractorModel, ExtractorShape
from rag.bundled.train_extractor import write
from rag.errors import EmbedderError
from rag.extractor import Extractor
from rag.soft_match import bundled_table

PASSAGES = ("Cats sleep sixteen hours a day.", "", "狗一天睡十个小时。它们白天也睡。")


SHAPE = ExtractorShape(usage=8, width=16, frequent=50)


@pytest.fixture(scope="module")
def network() -> ExtractorModel:
    torch.manual_seed(3)
    table = torch.from_numpy(bundled_table().table)
    usage = torch.randn(len(table), SHAPE.usage)
    network = ExtractorModel(SHAPE, table, usage, torch.arange(700, 750), drop=0.5).eval()
    return network.half().float()  # numbers that float16, in which they are stored, holds exactly


@pytest.fixture(scope="module")
def extractor(network: ExtractorModel, tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    folder = tmp_path_factory.mktemp("extractor")
    write(network, dict(network.named_parameters()), folder, {})
    return Extractor(folder)


def test_numpy_gives_the_shares_that_the_trained_network_gives(
    network: ExtractorModel, extractor: Extractor
) -> None:
    question = "How long do cats sleep?"
    asked, *said = bundled_table().token_ids([question, PASSAGES[0], PASSAGES[2]])
    assert len(said[0]) < len(said[1])  # so the first is padded in the network, and read alone in NumPy
    padded = [said[0] + [-1] * (len(said[1]) - len(said[0])), said[1]]
    with torch.no_grad():
        logits, null = network(torch.tensor([asked]), torch.tensor(padded), torch.tensor([0, 0]))
    shares = torch.cat([logits.flatten(0, 1), null]).log_softmax(0).numpy()  # (2 T + 1, 2)
    found = extractor.extract(question, PASSAGES)
    np.testing.assert_allclose(found.starts[0], shares[: len(said[0])], atol=2e-4)
    np.testing.assert_allclose(found.starts[2], shares[len(said[1]) : -1], atol=2e-4)
    assert found.starts[1].shape == (0, 2)
    assert found.null == pytest.approx(float(shares[-1].mean()), abs=2e-4)


def test_padding_and_company_do_not_change_what_the_network_says_of_a_passage(network: ExtractorModel) -> None:
    asked = torch.tensor([[900, 901, -1, -1], [710, 711, 712, 713]])
    said = torch.tensor([[5000, 5001, 5002, -1, -1, -1], [720, 721, 722, 723, 724, 725]])
    with torch.no_grad():
        together, null = network(asked, said, torch.tensor([0, 1]))
        alone, null_alone = network(asked[:1, :2], said[:1, :3], torch.tensor([0]))
    np.testing.assert_allclose(together[0, :3], alone[0], atol=1e-5)
    np.testing.assert_allclose(null[0], null_alone[0], atol=1e-5)


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
    config = {"embedder": "0" * 16}
    (tmp_path / "extractor.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(EmbedderError, match="0000000000000000.*train_extractor"):
        Extractor(tmp_path)
    with pytest.raises(EmbedderError, match="can't be read"):
        Extractor(tmp_path / "missing")
