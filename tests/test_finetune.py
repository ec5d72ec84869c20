"""LoRA: what is trained on, the loss, the adapter on top of its base and of no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import base_of
from tiny_models import make_model, make_random_model
from transformers import AutoModelForCausalLM

from rag import Rag, Settings
from rag.adapter import AdapterRecord, merge_adapter, read_record, weights_fingerprint
from rag.answer import Answer, Hit
from rag.confidence import Calibration
from rag.document import Chunk
from rag.embedder import load_embedder
from rag.errors import GeneratorError, InputError, SettingsError
from rag.finetune.__main__ import main
from rag.finetune.examples import Example, part_of, wanted_text
from rag.finetune.measuring import Written, fit_confidence
from rag.finetune.training import LoraTraining, TrainingOptions
from rag.generator import BUNDLED_READER, load_generator, weight_files
from rag.language import REFUSAL
from rag.prompt import Message, Prompt
from rag.quality.evaluation import EvalQuestion, EvalResult

peft = pytest.importorskip("peft", reason="needs the package peft: pip install 'local-rag[finetune]'")


def make_adapter(base: Path, out: Path, *, name: str, **config: Any) -> Any:
    """A LoRA adapter of random numbers, with its record. Returns peft's own merged model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chosen = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**chosen))
    adapted.save_pretrained(out, save_embedding_layers=False)
    AdapterRecord(name, weights_fingerprint(weight_files(base))).write(out)
    return adapted.merge_and_unload()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", max_position_embeddings=2048)


# the adapter on top of its base -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "bundled"])
def test_an_adapter_changes_the_weights_as_peft_would(tmp_path: Path, family: str) -> None:
    base = BUNDLED_READER if family == "bundled" else make_model(tmp_path / "base", family)
    merged = make_adapter(base, tmp_path / "adapter", name="base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    merge_adapter(model, tmp_path / "adapter")
    changed = 0
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(weight, before[name])
    assert changed == 7 * len(model.model.layers), "four matrices of attention and three of the feed-forward"


def test_the_engine_writes_what_the_adapted_model_writes(tmp_path: Path, llama: Path) -> None:
    merged = make_adapter(llama, tmp_path / "adapter", name=str(llama))
    settings = Settings(generator=str(llama), dtype="float32", device="cpu", max_prompt_tokens=256, max_new_tokens=12)
    adapted = Settings(**{**vars_of(settings), "adapter": str(tmp_path / "adapter")})
    prompt = Prompt(hits=(), messages=(Message("user", "Where is the cat?"),))
    written = {}
    for name, chosen in (("base", settings), ("adapted", adapted)):
        generator = load_generator(chosen)
        written[name] = generator.generate(prompt, max_new_tokens=12).token_ids
        if name == "adapted":
            assert generator.name == f"{llama}+adapter"
            ids = torch.tensor([generator.encode(prompt)])
            expected = merged.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[3, 1])[0, ids.shape[1] :]
            ends = [at for at, token in enumerate(expected.tolist()) if token in (1, 3)]
            assert list(written[name]) == expected.tolist()[: ends[0] if ends else None]
    assert written["base"] != written["adapted"]


def vars_of(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_an_adapter_is_refused_on_top_of_other_weights(tmp_path: Path, llama: Path) -> None:
    make_adapter(llama, tmp_path / "adapter", name="the right one")
    other = make_model(tmp_path / "other", "llama", seed=7, max_position_embeddings=2048)
    with pytest.raises(GeneratorError, match="was trained on 'the right one'.*but the generator is.*other"):
        load_generator(Settings(generator=str(other), adapter=str(tmp_path / "adapter"), device="cpu"))


def test_weights_have_one_fingerprint_however_they_are_spread_over_files(tmp_path: Path) -> None:
    model = make_random_model("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    parts = weight_files(tmp_path / "parts")
    assert len(parts) > 1
    whole = weights_fingerprint(weight_files(tmp_path / "whole"))
    assert weights_fingerprint(parts) == whole
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1
    model.save_pretrained(tmp_path / "changed")
    assert weights_fingerprint(weight_files(tmp_path / "changed")) != whole


def test_what_is_no_adapter_of_this_program_is_refused_with_the_way_out(tmp_path: Path, llama: Path) -> None:
    def load(adapter: Path) -> None:
        load_generator(Settings(generator=str(llama), adapter=str(adapter), device="cpu"))

    with pytest.raises(GeneratorError, match="holds no LoRA adapter"):
        load(tmp_path / "missing")
    make_adapter(llama, tmp_path / "foreign", name="x")
    (tmp_path / "foreign" / "trained_on.json").unlink()
    with pytest.raises(GeneratorError, match="Merge it into its base with peft"):
        load(tmp_path / "foreign")
    make_adapter(llama, tmp_path / "dora", name="x", use_dora=True)
    with pytest.raises(GeneratorError, match="LORA use_dora; only plain LoRA"):
        load(tmp_path / "dora")
    with pytest.raises(SettingsError, match="runs on a server"):
        Settings(generator="openai:http://here/v1#m", adapter="a")


def test_the_confidence_of_the_base_does_not_speak_for_the_adapted_model(tmp_path: Path) -> None:
    assert Calibration.read("bundled") is not None
    make_adapter(BUNDLED_READER, tmp_path / "a", name="bundled")
    assert Calibration.read("bundled", str(tmp_path / "a")) is None
    fit = {"bias": 1.0, "logprob": 2.0, "support": 0.0, "threshold": 0.5, "answers": 30.0}
    AdapterRecord("bundled", "f", fit).write(tmp_path / "a")
    assert Calibration.read("bundled", str(tmp_path / "a")) == Calibration(1.0, 2.0, 0.0, 0.5)


def test_a_confidence_of_too_few_answers_is_never_enough() -> None:
    result = EvalResult(EvalQuestion("1", "q?", ("yes",)), Answer("q?", "yes", "generated"), None, 0.0)
    fit = fit_confidence([Written(result, -0.1)] * 19)
    assert (fit["threshold"], fit["answers"], fit["right"]) == (1.0, 19.0, 1.0)
    wrong = EvalResult(EvalQuestion("2", "q?", ("no",)), Answer("q?", "yes", "generated"), None, 0.0)
    fit = fit_confidence([Written(result, -0.1)] * 30 + [Written(wrong, -3.0)] * 30)
    known = Calibration(*(fit[name] for name in ("bias", "logprob", "support", "threshold")))
    assert known.confidence([-0.1], 0.5) > 0.9 and known.confidence([-3.0], 0.5) < 0.1


# examples ---------------------------------------------------------------------------------------


def test_a_question_stays_in_its_part_however_it_is_written() -> None:
    questions = [f"What is the height of house number {number}?" for number in range(2000)]
    parts = [part_of(question) for question in questions]
    assert 0.66 < parts.count("train") / 2000 < 0.74 and 0.16 < parts.count("measure") / 2000 < 0.24
    assert parts == [part_of(f"  {question.upper()} ") for question in questions]


HITS = tuple(
    Hit(Chunk(path, text, 0, len(text), page=page), 1.0, page=page)
    for path, text, page in (
        ("a.pdf", "Cats sleep for sixteen hours.", 1), ("a.pdf", "Dogs bark at the postman.", 2),
        ("b.txt", "The postman comes at nine in the morning.", None),
    )
)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ({"answer": "sixteen hours", "path": "a.pdf", "page": 1}, "sixteen hours [1]"),
        ({"answer": "They bark. [7]", "path": "a.pdf", "quote": "bark at the postman"}, "They bark. [2]"),
        ({"answer": "at nine"}, "at nine [3]"),
        ({"answer": "nobody knows that"}, "nobody knows that"),
        ({"answer": "at noon", "path": "a.pdf", "page": 9}, None),
        ({"answer": "at noon", "path": "c.pdf"}, None),
        ({"answer": "at noon", "quote": "The cook comes at noon."}, None),
        ({"unanswerable": True}, REFUSAL["en"]),
    ],
)
def test_the_model_learns_the_answer_with_the_number_of_its_passage(line: dict[str, Any], wanted: str | None) -> None:
    assert wanted_text(EvalQuestion.parse({"question": "When?", **line}, 1), HITS) == wanted


def test_the_loss_is_that_of_the_answers_tokens_alone(llama: Path) -> None:
    training = LoraTraining(Settings(generator=str(llama), device="cpu"), TrainingOptions(rank=2))
    examples = [Example(EvalQuestion("1", "q"), (10, 11, 12, 13), (20, 21)), Example(EvalQuestion("2", "q"), (14, 15), (22,))]
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        first = plain(torch.tensor([[10, 11, 12, 13, 20, 21]])).logits[0].log_softmax(-1)
        second = plain(torch.tensor([[14, 15, 22]])).logits[0].log_softmax(-1)
    by_hand = -(first[3, 20] + first[4, 21] + second[1, 22]) / 3
    assert training.loss(examples) == pytest.approx(float(by_hand), abs=1e-4)


# the command ------------------------------------------------------------------------------------


COLOURS = ("red", "blue", "green", "white")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A knowledge base of doors with their colours, and questions about them."""
    folder = tmp_path_factory.mktemp("own")
    doors = {f"{number}.txt": f"Door number {number} is {COLOURS[number % 4]}." for number in range(100, 160)}
    base_of(folder / "kb", doors, load_embedder("bundled"))
    lines = [
        {"question": f"What colour is door number {number}?", "answer": COLOURS[number % 4], "path": f"{number}.txt"}
        for number in range(100, 160)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "kb", file


def test_a_model_learns_from_its_own_questions_and_is_used_with_what_it_learned(
    tmp_path: Path, llama: Path, own: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kb, questions = own
    out = tmp_path / "adapter"
    options = ["--generator", str(llama), "--device", "cpu", "--top-k", "1", "--max-new-tokens", "8"]
    code = main([
        str(questions), "--kb", str(kb), "--out", str(out), "--rate", "0.01", "--epochs", "2", "--batch", "2",
        "--rank", "4", *options,
    ])  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    record = read_record(out)
    before, after = record.training["loss_to_stop_by"]
    measured = record.training["loss_measured"]
    assert after < before / 2 and measured[1] < measured[0] / 2, "questions it was not trained on"
    assert record.training["figures"]["cut off"][1] < 0.5, "it has learned to be brief"
    assert record.confidence is None and sum(record.training["questions"].values()) == 60
    assert "loss of the answers" in shown.out and f"--adapter {out}" in shown.out
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "trained_on.json", "before.json", "after.json",
    }  # fmt: skip
    rag = Rag.open(str(kb), generator=str(llama), adapter=str(out), device="cpu", top_k=1, max_new_tokens=8)
    result = rag.generator.generate(rag.prompt("What colour is door number 101?"), max_new_tokens=8)
    assert result.finish_reason == "stop"
    code = main([str(questions), "--kb", str(kb), "--out", str(out), *options])
    assert code == 1 and "exists already" in capsys.readouterr().err


def test_what_can_not_be_trained_is_an_error_before_anything_is_written(
    tmp_path: Path, llama: Path, own: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kb, questions = own
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "Who?", "answer": "I"}\n{"question": "What?"}\n', encoding="utf-8")

    def refusal(*arguments: str) -> str:
        assert main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.new").exists()
        return capsys.readouterr().err

    assert "too few usable questions: " in (said := refusal(str(few), "--kb", str(kb))) and "1 lines have no answer" in said
    assert "is not a file" in refusal(str(tmp_path / "none.jsonl"), "--kb", str(kb))
    assert "no knowledge base" in refusal(str(questions), "--kb", str(tmp_path / "none"), "--generator", str(llama))
    assert "runs on a server" in refusal(str(questions), "--kb", str(kb), "--generator", "openai:http://here/v1#m")
    assert "--rate is 0.0" in refusal(str(questions), "--kb", str(kb), "--rate", "0")
    assert "weights are trained in" in refusal(str(questions), "--kb", str(kb), "--dtype", "int8")
    monkeypatch.setenv("RAG_ADAPTER", "earlier")
    assert "trained on the generator itself" in refusal(str(questions), "--kb", str(kb))
    monkeypatch.delenv("RAG_ADAPTER")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'local-rag[finetune]'" in refusal(str(questions), "--kb", str(kb))
    with pytest.raises(InputError, match="--dropout is 1"):
        TrainingOptions(dropout=1.0)
