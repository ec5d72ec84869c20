"""The reader's training program: prompts, answers, losses, budget, resuming, export."""

from __future__ import annotations

import json
import lzma
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rag.bundled.reader_data import (
    IGNORED,
    Paragraph,
    Question,
    blank_span,
    copying_example,
    encode_example,
    nearest_paragraphs,
    split_sentences,
)
from rag.bundled.reader_eval import answer_tokens, exact_match, f1, fit_confidence
from rag.bundled.reader_export import export_tokenizer, export_weights
from rag.bundled.reader_model import PRESETS, Reader, block_mask, block_positions, collate
from rag.bundled.reader_tokenizer import train_tokenizer
from rag.bundled.train_reader import Training, orthogonalise, parse_options
from rag.language import REFUSAL
from rag.prompt import READER_TOKENS, reader_prompt

PEOPLE = ("Ada", "Bela", "Chen", "Dora", "Emil", "Fatma", "Goran", "Hilda")
TOWNS = ("Oslo", "Porto", "Quito", "Riga", "Split", "Turin", "Utrecht", "Vigo")
NAMES = ("王平", "李梅", "张军", "陈静", "赵刚", "孙丽", "周涛", "吴燕")
CITIES = ("上海", "成都", "西安", "长沙", "南京", "昆明", "兰州", "沈阳")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [f"{p} lives in {t} and likes it. Where does {p} live?" for p in PEOPLE for t in TOWNS]
    texts += [f"{n}住在{c}，工作也在那里。{n}住在哪里？" for n in NAMES for c in CITIES]
    texts += [*REFUSAL.values(), " [1] [2] [3] [4]"] * 3
    return train_tokenizer(texts, vocab_size=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training data, a few kilobytes of made-up sentences."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    english = [
        {
            "src": "made", "question": f"Where does {person} live?", "answer": town,
            "context": f"{person} works as a baker. {person} lives in {town} near the river.",
        }
        for person, town in zip(PEOPLE, TOWNS)
    ]
    chinese = [
        {
            "src": "made", "question": f"{name}住在哪里？", "answer": city,
            "context": f"{name}是一名面包师，每天起得很早。{name}住在{city}，离河边不远。",
        }
        for name, city in zip(NAMES, CITIES)
    ]
    write("reading_comprehension.en", english * 8)
    write("reading_comprehension.zh", chinese * 8)
    long_en = "\n".join(str(row["context"]) * 2 for row in english)
    long_zh = "\n".join(str(row["context"]) * 3 for row in chinese)
    write("text.en.made", [{"title": "Towns", "text": long_en}] * 6)
    write("text.zh.made", [{"title": "城市", "text": long_zh}] * 6)
    return folder


def start(data: Path, work: Path, *more: str) -> Training:
    arguments = ["--data", str(data), "--out", str(work / "out"), "--work", str(work)]
    arguments += ["--size", "tiny", "--device", "cpu", "--threads", "1", "--no-compile"]
    arguments += ["--tokens-per-step", "512", "--megabytes", "1", *more]
    options, resume = parse_options(arguments)
    training = Training(options)
    if resume:
        training.resume()
    return training


# --- examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
def test_the_prompt_of_training_is_the_prompt_of_use(
    tokenizer: PreTrainedTokenizerFast, blocks: bool
) -> None:
    passages = ["Towns > North\nBela lives in Riga.", "Ada lives in Oslo and likes it."]
    example = encode_example(
        tokenizer.backend_tokenizer, "Where does Ada live?", passages, 1, (13, 17), blocks=blocks
    )
    assert example is not None
    prompt = tokenizer(reader_prompt("Where does Ada live?", passages, blocks=blocks)).input_ids
    assert example.ids[: len(prompt)].tolist() == prompt
    # said behind the prompt: the words of the passage, the marker, the end
    said = example.targets[:, 1].tolist()
    assert tokenizer.decode(said) == " Oslo [2]<|end|>"
    assert example.ids[len(prompt) :].tolist() == said[:-1]
    assert example.targets[:, 0].tolist() == list(range(len(prompt) - 1, len(example.ids)))


def test_every_copied_token_stands_where_its_source_says(tokenizer: PreTrainedTokenizerFast) -> None:
    passages = ["李梅住在成都，工作也在那里。", "王平住在上海，工作也在那里。"]
    example = encode_example(tokenizer.backend_tokenizer, "王平住在哪里？", passages, 1, (4, 6))
    assert example is not None
    copied = [
        (int(example.ids[source]), int(token))
        for (_, token), source in zip(example.targets, example.sources)
        if source != IGNORED
    ]
    assert [token for _, token in copied] == [source for source, _ in copied]
    assert tokenizer.decode([token for _, token in copied]) == "上海2"


def test_a_question_without_answer_is_refused_in_its_language(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for question, language in (("王平住在哪里？", "zh"), ("Where does Ada live?", "en")):
        example = encode_example(
            tokenizer.backend_tokenizer, question, ["Bela lives in Riga."], None, None
        )
        assert example is not None
        said = tokenizer.decode(example.targets[:, 1].tolist())
        assert said == REFUSAL[language] + "<|end|>"
        assert example.gold_sentence == IGNORED


def test_an_answer_that_cuts_a_token_makes_no_example(tokenizer: PreTrainedTokenizerFast) -> None:
    passages = ["Ada lives in Oslo and likes it."]
    question = "Where does Ada live?"
    assert encode_example(tokenizer.backend_tokenizer, question, passages, 0, (13, 17)) is not None
    # "lik" of " likes": the tiny vocabulary has learned the whole word
    assert encode_example(tokenizer.backend_tokenizer, question, passages, 0, (22, 25)) is None


def test_sentences_cover_the_text() -> None:
    text = "It was founded in 1901. Dr. Lee came later.\n第一句话说到这里就结束。第二句话还没有说完"
    ranges = split_sentences(text)
    assert "".join(text[a:b] for a, b in ranges) == text
    assert text[slice(*ranges[0])] == "It was founded in 1901."


def test_a_blanked_chinese_question_puts_the_question_word_where_the_answer_stood() -> None:
    paragraph = Paragraph("该馆于1987年建成。", "", ((0, 10),))
    asked = set()
    for seed in range(40):
        blank = blank_span(paragraph, "zh", random.Random(seed))
        if blank is not None and (blank.start, blank.end) == (3, 8):
            asked.add(blank.question)
    assert asked & {"该馆于哪一年建成？", "该馆于何时建成？", "该馆于什么时候建成？", "该馆于哪年建成？"}


def test_the_nearest_paragraph_shares_rare_words_and_not_the_answer() -> None:
    texts = [
        "Ada lives in Oslo.",  # the paragraph asked about
        "Ada often visits Riga.",  # shares the rare word
        "Ada was seen in Oslo.",  # holds the answer, so refusing would be wrong
        "Bread is baked early in the day.",
    ]
    paragraphs = [Paragraph(text, "", ((0, len(text)),)) for text in texts]
    near = nearest_paragraphs(paragraphs, [Question("Where does Ada live?", 0, 13, 17)], k=2)
    assert near[0, 0] == 1
    assert 2 not in near[0] and 0 not in near[0]


def test_copying_says_a_stretch_again() -> None:
    document = np.arange(6, 106, dtype=np.int32)
    example = copying_example(random.Random(1), document, vocab_size=512, length=10)
    assert example.ids[1:11].tolist() == example.targets[:, 1].tolist()
    assert [int(example.ids[s]) for s in example.sources] == example.targets[:, 1].tolist()
    # each token is said at the position before its own in the second half
    assert example.targets[:, 0].tolist() == list(range(11, 21))


# --- the second layout --------------------------------------------------------------------------


def test_in_the_second_layout_a_passage_sees_itself_and_the_question_sees_all() -> None:
    # opening token; passage of 2; passage of 3; question and answer of 2
    starts, asked, length = (1, 3), 6, 8
    positions = block_positions(length, starts, asked)
    assert positions.tolist() == [0, 1, 2, 1, 2, 3, 4, 5]
    mask = block_mask(length, starts, asked).astype(int).tolist()
    assert mask[2] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert mask[3] == [1, 0, 0, 1, 0, 0, 0, 0]
    assert mask[5] == [1, 0, 0, 1, 1, 1, 0, 0]
    assert mask[7] == [1, 1, 1, 1, 1, 1, 1, 1]


def test_in_the_second_layout_keys_of_a_passage_do_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    reader = Reader(PRESETS["tiny"])
    starts, asked, length = (1, 4), 7, 9
    ids = torch.randint(6, 512, (2, length))
    ids[1, 4:7] = ids[0, 4:7]  # the same second passage behind two different first ones
    ids[1, 0] = ids[0, 0]
    positions = torch.from_numpy(block_positions(length, starts, asked))[None].expand(2, -1)
    mask = torch.from_numpy(block_mask(length, starts, asked))[None, None].expand(2, -1, -1, -1)
    with torch.no_grad():
        _, _, heads = reader.hidden(ids, positions, mask)
    for _, keys in heads:
        assert torch.allclose(keys[0, 4:7], keys[1, 4:7], atol=1e-6)
        assert not torch.allclose(keys[0, 1:4], keys[1, 1:4], atol=1e-2)


# --- training -----------------------------------------------------------------------------------


def test_padding_does_not_change_the_losses(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    reader = Reader(PRESETS["tiny"])
    short = encode_example(
        tokenizer.backend_tokenizer, "Where does Ada live?", ["Ada lives in Oslo."], 0, (13, 17)
    )
    long = encode_example(
        tokenizer.backend_tokenizer,
        "Where does Bela live?",
        ["Ada lives in Oslo and likes it.", "Bela lives in Riga and likes it."],
        1,
        (14, 18),
    )
    assert short is not None and long is not None and len(short.ids) < len(long.ids)
    losses = []
    for examples in ([short], [long], [short, long]):
        batch = collate(
            examples, device=torch.device("cpu"), rng=np.random.default_rng(0), vocab_size=512,
            others=100_000,  # every token is among the candidates
        )
        rows = reader.model.embed_tokens.weight[batch.candidates]
        found = reader.losses(batch, rows, pointer_weight=1.0, sentence_weight=1.0)
        # the loss, which looks at answer positions alone, is that of the whole network's logits
        logits = reader.logits(batch.ids)[batch.target_rows, batch.target_columns]
        each = torch.nn.functional.cross_entropy(logits, batch.target_ids, reduction="none")
        weight = 1.0 + batch.first.float()
        assert float(found.answer) == pytest.approx(((each * weight).sum() / weight.sum()).item(), abs=1e-4)
        losses.append((float(found.answer), float(found.pointer), float(found.sentence)))
    assert short.targets.shape == long.targets.shape  # so the mean of both weighs them alike
    assert losses[2] == pytest.approx(np.mean(losses[:2], 0), abs=1e-4)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 32, 16), (2, 16, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.max() < 1.3 and values.median() > 0.6


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(data: Path, tmp_path: Path) -> None:
    whole = start(data, tmp_path / "whole", "--steps", "8")
    whole.run()
    first = start(data, tmp_path / "parts", "--steps", "8")
    first.run(most_steps=3)
    assert first.progress.step == 3
    second = start(data, tmp_path / "parts", "--steps", "8", "--resume")
    second.run()
    assert second.progress.step == whole.progress.step == 8
    assert second.progress.tokens == whole.progress.tokens
    for mine, theirs in zip(second.optimiser.masters, whole.optimiser.masters):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(second.optimiser.average, whole.optimiser.average):
        assert torch.equal(mine, theirs)


def test_examples_drawn_by_other_processes_are_the_same(data: Path, tmp_path: Path) -> None:
    here = start(data, tmp_path / "here", "--steps", "1")
    apart = start(data, tmp_path / "apart", "--steps", "1", "--draw-processes", "2")
    for number in (0, 1):
        mine, theirs = here.pools.take(number, 0), apart.pools.take(number, 0)
        assert [len(batch) for batch in mine] == [len(batch) for batch in theirs]
        for one, other in zip(sum(mine, []), sum(theirs, [])):
            assert one.ids.tolist() == other.ids.tolist()
    assert apart.pools.executor is not None
    apart.pools.executor.shutdown(cancel_futures=True)


def test_a_run_keeps_to_its_minutes_and_says_when_it_resumes(data: Path, tmp_path: Path) -> None:
    training = start(data, tmp_path, "--minutes", "0.05")
    began = time.monotonic()
    training.run()
    taken = time.monotonic() - began
    assert 2.5 < taken < 12  # three seconds, the step that was under way, saving
    assert training.progress.step > 3
    assert training.progress.seconds == pytest.approx(taken, abs=2)


def test_training_goes_on_from_an_exported_reader(data: Path, tmp_path: Path) -> None:
    before = start(data, tmp_path, "--steps", "2")
    before.run()
    before.export(calibration_questions=0)
    after = start(data, tmp_path, "--steps", "2")
    after.start_from(tmp_path / "out")
    assert after.progress.copied
    trained_here = dict(zip(before.optimiser.names, before.optimiser.average))
    for name, master in zip(after.optimiser.names, after.optimiser.masters):
        if name.startswith("model."):
            assert torch.equal(master, trained_here[name].bfloat16().float())
    facts = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf8"))
    assert facts["steps"] == 2 and facts["tokens"] == before.progress.tokens


def test_the_loss_falls(data: Path, tmp_path: Path) -> None:
    training = start(data, tmp_path, "--steps", "40", "--seed", "3")
    training.run()
    losses = [row[4] for row in training.progress.history if row[3] >= 0]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_an_exported_folder_gives_the_logits_of_training(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    reader = Reader(PRESETS["tiny"]).to(torch.bfloat16).float()  # what the file can hold
    export_weights(dict(reader.named_parameters()), reader.config, tmp_path)
    export_tokenizer(tokenizer.backend_tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    prompt = reader_prompt("Where does Ada live?", ["Ada lives in Oslo.", "王平住在上海。"])
    ids = torch.tensor([loaded(prompt).input_ids])
    assert ids.tolist() == [tokenizer(prompt).input_ids]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, reader.logits(ids), atol=1e-4)
    assert model.generation_config.eos_token_id == loaded.eos_token_id == 4
    assert loaded.pad_token == "<|pad|>"
    assert loaded.convert_ids_to_tokens(range(6)) == list(READER_TOKENS)
    # any program that speaks in messages hands the prompt through
    said = loaded.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    assert said == prompt


# --- scores -------------------------------------------------------------------------------------


def test_scores_worked_out_by_hand() -> None:
    assert answer_tokens("The Treaty, of Rome!", "en") == ["treaty", "of", "rome"]
    assert answer_tokens("1945年，上海", "zh") == ["1945", "年", "上", "海"]
    assert exact_match("the Oslo", ["Bergen", "Oslo."], "en") == 1.0
    # 2 of 3 words right, 2 of 2 found: 2 * (2/3) * 1 / (2/3 + 1) = 0.8
    assert f1("old Oslo harbour", ["Oslo harbour"], "en") == pytest.approx(0.8)
    assert f1("Riga", ["Oslo"], "en") == 0.0


def test_confidence_is_the_share_that_was_right() -> None:
    # at -2 one of four is right, at -1 three of four: slope 2 ln 3, offset 3 ln 3
    confidences = np.repeat([-2.0, -1.0], 400)
    right = np.concatenate([np.repeat([1.0, 0.0], [100, 300]), np.repeat([1.0, 0.0], [300, 100])])
    slope, offset = fit_confidence(confidences, right)
    assert slope == pytest.approx(2 * np.log(3), abs=0.01)
    assert offset == pytest.approx(3 * np.log(3), abs=0.02)
