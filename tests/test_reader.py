"""The reader that ships: its files, that it loads and reads, what it was not trained on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from rag.bundled.reader_eval import BUNDLED, ReaderModel, load_squad
from rag.bundled.training_data import read_rows
from rag.prompt import READER_TOKENS

DATA = os.environ.get("RAG_TRAINING_DATA")


@pytest.fixture(scope="module")
def reader() -> ReaderModel:
    return ReaderModel(BUNDLED)


def test_the_reader_is_small_enough_to_ship() -> None:
    sizes = [path.stat().st_size for path in BUNDLED.iterdir()]
    assert sum(sizes) <= 64_000_000
    assert max(sizes) <= 16_000_000


def test_every_weight_is_in_the_shards(reader: ReaderModel) -> None:
    index = json.loads((BUNDLED / "model.safetensors.index.json").read_text(encoding="utf8"))
    assert {BUNDLED / name for name in index["weight_map"].values()} == set(
        BUNDLED.glob("*.safetensors")
    )
    # the output matrix is the embedding matrix and is not written twice
    assert set(reader.model.state_dict()) - {"lm_head.weight"} == set(index["weight_map"])


def test_the_special_tokens_come_first_and_end_is_where_it_stops(reader: ReaderModel) -> None:
    assert reader.tokenizer.convert_ids_to_tokens(list(range(6))) == list(READER_TOKENS)
    assert reader.model.generation_config.eos_token_id == reader.tokenizer.eos_token_id == 4


def test_text_survives_the_tokenizer(reader: ReaderModel) -> None:
    text = "Größe: 3.5 kg, “quoted” — 《红楼梦》第12回，\n\tx = y**2 🙂"
    assert reader.tokenizer.decode(reader.tokenizer(text).input_ids) == text


@pytest.mark.parametrize("blocks", [False, True])
def test_an_answer_is_words_of_a_passage(reader: ReaderModel, blocks: bool) -> None:
    passages = [
        "The harbour was built in 1871 by Karen Holm. It has two quays.",
        "Bread is baked from flour, water and salt.",
    ]
    said = reader.answer("When was the harbour built?", passages, blocks=blocks)
    assert said.text and (said.refused or any(said.text in passage for passage in passages))
    assert said.confidence < 0


def test_settings_hold_layout_and_calibration() -> None:
    settings = json.loads((BUNDLED / "reader.json").read_text(encoding="utf8"))
    assert settings["layout"] == "reader"
    fit = settings["confidence"]
    assert fit["logprob"] > 0  # surer answers are likelier right
    assert 0 < fit["threshold"] < 1
    assert {"bias", "support"} <= set(fit)


def test_the_model_card_says_what_it_was_trained_with() -> None:
    card = (BUNDLED / "README.md").read_text(encoding="utf8")
    facts = json.loads((BUNDLED / "training.json").read_text(encoding="utf8"))
    for word in ("SQuAD", "DRCD", "CMRC", "CC BY-SA", "loss.svg"):
        assert word in card
    assert re.search(rf"\b{facts['minutes']:.0f}\b", card)


@pytest.mark.skipif(DATA is None, reason="RAG_TRAINING_DATA names no folder with train/ and eval/")
def test_no_question_it_is_measured_on_was_trained_on() -> None:
    folder = Path(str(DATA))

    def digest(question: str, context: str) -> str:
        return hashlib.sha256(f"{question.strip()}\n{context.strip()}".encode()).hexdigest()

    for language, name in (("en", "squad_open_dev"), ("zh", "cmrc2018_dev")):
        rows = list(read_rows(folder / "train" / f"reading_comprehension.{language}.jsonl.xz"))
        trained = {digest(row["question"], row["context"]) for row in rows}
        contexts = {row["context"].strip() for row in rows}
        paragraphs, questions, _ = load_squad(folder / "eval" / f"{name}.json.xz")
        measured = {digest(q.text, paragraphs[q.paragraph].text) for q in questions}
        assert not trained & measured
        assert not contexts & {p.text.strip() for p in paragraphs}
