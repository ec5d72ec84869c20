"""Models from folders, prompts in their own layout, text that is never half-shown."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fakes import drain
from transformers import AutoConfig

import rag.generator
from rag.engine import Event, FinishEvent, Request, TokenEvent
from rag.engine.placement import count_weights, plan_memory, weight_bytes
from rag.errors import GeneratorError
from rag.generator import (
    Generator,
    TextStream,
    load_generator,
    merge_system,
    plain_text,
)
from rag.prompt import Message, Prompt
from rag.settings import Settings
from tests.tiny_models import make_model, make_tokenizer

QUESTION = Prompt(
    hits=(), messages=(Message("system", "Use the passages."), Message("user", "Where is the cat?"))
)


def settings(generator: Path | str, **changes: object) -> Settings:
    values: dict[str, object] = {"max_prompt_tokens": 400, "max_new_tokens": 40, "dtype": "float32"}
    return Settings(generator=str(generator), device="cpu", **{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return load_generator(settings(folder))


class ScriptedEngine:
    """Says the same tokens to every request, whatever the model."""

    device, dtype, context_length, description = "cpu", "float32", 4096, "scripted"

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.cancelled: set[str] = set()

    def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    def generate(self, requests: Sequence[Request]) -> Iterator[Event]:
        for request in requests:
            said = 0
            for token in self.tokens:
                if request.id in self.cancelled:
                    break
                said += 1
                yield TokenEvent(request.id, token, -0.5)
            prompt = len(request.prompt_ids)
            yield FinishEvent(request.id, "length", prompt, 0, said, 0.1, 0.3)


def scripted(text: str) -> Generator:
    tokenizer = make_tokenizer()
    return Generator(ScriptedEngine(tokenizer(text)["input_ids"]), tokenizer, name="scripted")


def test_a_local_folder_loads_and_answers_with_the_network_cut_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = load_generator(settings(folder))
    assert (loaded.name, loaded.device, loaded.dtype) == (str(folder), "cpu", "float32")
    assert (loaded.layout, loaded.context_length) == ("chat", 512)
    result = loaded.generate(QUESTION, max_new_tokens=12)
    assert result.new_tokens == len(result.token_ids) == len(result.token_logprobs)
    assert result.prompt_tokens == loaded.count_tokens(QUESTION)


def test_a_hub_name_is_read_from_the_local_cache_and_asked_for_only_when_absent(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    shutil.copytree(folder, home / "snapshots" / "abc123")
    loaded = load_generator(settings("someone/tiny"))
    assert (loaded.name, asked) == ("someone/tiny", [])
    (home / "snapshots" / "abc123" / "model.safetensors").unlink()  # a download that broke off
    with pytest.raises(
        GeneratorError, match="someone/tiny.* is not whole in .*could not be reached"
    ):
        load_generator(settings("someone/tiny"))
    assert asked
    with pytest.raises(GeneratorError, match="nobody/nothing.*could not be fetched from the hub"):
        load_generator(settings("nobody/nothing"))


def test_streamed_pieces_joined_are_the_text_and_the_next_turn_is_reused(
    generator: Generator,
) -> None:
    pieces, result = drain(generator.stream(QUESTION, max_new_tokens=40))
    assert "".join(pieces) == result.text
    pieces, again = drain(generator.stream(QUESTION, max_new_tokens=40))
    assert again.token_ids == result.token_ids
    assert again.reused_tokens == result.prompt_tokens - 1


def test_many_threads_stream_from_one_generator(generator: Generator) -> None:
    prompts = [
        Prompt(hits=(), messages=(Message("user", f"{number} 猫在哪里？"),)) for number in range(8)
    ]
    expected = [generator.generate(prompt, max_new_tokens=12).text for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        streams = [generator.stream(prompt, max_new_tokens=12) for prompt in prompts]
        found = list(pool.map(lambda stream: "".join(drain(stream)[0]), streams))
    assert found == expected


def test_a_batch_gives_what_single_calls_give(generator: Generator) -> None:
    prompts = [
        Prompt(hits=(), messages=(Message("user", text),))
        for text in ("Where?", "答案写在哪里？", "cat")
    ]
    batch = generator.generate_batch(prompts, max_new_tokens=10)
    single = [generator.generate(prompt, max_new_tokens=10) for prompt in prompts]
    assert [r.token_ids for r in batch] == [r.token_ids for r in single]


def test_the_most_probable_tokens_come_with_the_result_for_each_kept_token(
    generator: Generator,
) -> None:
    result = generator.generate(QUESTION, max_new_tokens=6, top_logprobs=3)
    assert [len(top) for top in result.top_logprobs] == [3] * result.new_tokens
    # Greedy: the chosen one is the first.
    firsts = [top[0] for top in result.top_logprobs]
    assert firsts == list(zip(result.token_ids, result.token_logprobs))
    _, streamed = drain(generator.stream(QUESTION, max_new_tokens=6, top_logprobs=3))
    assert [[token for token, _ in top] for top in streamed.top_logprobs] == [
        [token for token, _ in top] for top in result.top_logprobs
    ]
    assert generator.generate(QUESTION, max_new_tokens=6).top_logprobs == ()


def test_a_tokens_text_is_what_it_stands_for_by_itself(generator: Generator) -> None:
    tokenizer = make_tokenizer()
    (end,) = tokenizer("<|end|>")["input_ids"]
    assert generator.token_text(end) == "<|end|>"
    (first, *rest) = tokenizer("🙂")["input_ids"]
    assert rest and generator.token_text(first) == "\ufffd"


def test_chat_prompts_follow_the_template_and_reader_prompts_stand_as_they_are(
    folder: Path, generator: Generator
) -> None:
    tokenizer = make_tokenizer()
    expected = (
        "<|im_start|>system\nUse the passages.<|im_end|>\n<|im_start|>user\nWhere is the cat?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(generator.encode(QUESTION)) == expected
    reader = Prompt(hits=(), text="<|question|>cat<|answer|>")
    ids = generator.encode(reader)
    assert (ids[0], ids[-1]) == tuple(
        tokenizer.convert_tokens_to_ids(["<|question|>", "<|answer|>"])
    )
    (folder / "reader.json").write_text('{"layout": "reader"}')
    try:
        loaded = load_generator(settings(folder))
    finally:
        (folder / "reader.json").unlink()
    assert loaded.layout == "reader"
    assert tokenizer.convert_tokens_to_ids("<|end|>") in loaded.stop_ids


def test_templates_without_a_system_role_get_it_in_the_first_user_message() -> None:
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|im_start|>{{ m['content'] }}{% endfor %}"
    )
    silent = (
        "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    for template in (strict, silent):
        tokenizer = make_tokenizer(chat_template=template)
        generator = Generator(ScriptedEngine([9]), tokenizer, name="x")
        written = tokenizer.decode(generator.encode(QUESTION))
        assert written == "<|im_start|>Use the passages.\n\nWhere is the cat?"
        assert "system merged" in generator.describe()
    assert merge_system((Message("system", "a"),)) == (Message("user", "a"),)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 > 1 %}{{ raise_exception('too long') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    generator = Generator(ScriptedEngine([9]), make_tokenizer(chat_template=template), name="x")
    longer = Prompt(hits=(), messages=(*QUESTION.messages, Message("assistant", "There.")))
    with pytest.raises(GeneratorError, match="refuses a conversation of system, user, assistant"):
        generator.encode(longer)


def test_thinking_is_switched_off_where_the_template_knows_it() -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking is false %}<|end|>{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    generator = Generator(ScriptedEngine([9]), tokenizer, name="x")
    assert generator.encode(QUESTION)[-1] == tokenizer.convert_tokens_to_ids("<|end|>")


def test_base_models_get_the_plain_layout_and_say_so() -> None:
    generator = Generator(ScriptedEngine([9]), make_tokenizer(chat_template=None), name="x")
    assert generator.layout == "plain"
    assert "no chat template" in generator.describe()
    messages = (
        Message("system", "Rules."),
        Message("user", "One?"),
        Message("assistant", "1."),
        Message("user", "Two?"),
    )
    assert plain_text(messages) == "Rules.\n\nQuestion: One?\nAnswer: 1.\n\nQuestion: Two?\nAnswer:"
    assert plain_text([Message("user", "二？")]) == "问题：二？\n回答："


def test_characters_split_over_tokens_are_never_half_shown() -> None:
    text = "cat 🐈‍⬛ 与龘字 naïve 🇨🇳!"
    generator = scripted(text)
    pieces, result = drain(generator.stream(QUESTION, max_new_tokens=200))
    assert len(result.token_ids) > len(text)  # the test is worth something only if characters split
    assert "".join(pieces) == result.text == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("ab🐈")["input_ids"]
    stream = TextStream(tokenizer)
    for token in ids[:-1]:
        stream.push(token)
    stream.finish()
    assert stream.text == "ab"


def test_stop_strings_end_the_text_and_are_never_half_shown() -> None:
    generator = scripted("the answer is in the second passage STOP and more")
    pieces, result = drain(
        generator.stream(QUESTION, max_new_tokens=99, stop_strings=["STOP", "zzz"])
    )
    assert "".join(pieces) == result.text == "the answer is in the second passage "
    assert result.finish_reason == "stop"
    assert not any(piece.rstrip().endswith(("S", "ST", "STO")) for piece in pieces)
    held = scripted("it ends with ST")  # looks like a stop string to the end, and is none
    pieces, result = drain(held.stream(QUESTION, max_new_tokens=99, stop_strings=["STOP"]))
    assert "".join(pieces) == result.text == "it ends with ST"
    batch = generator.generate_batch([QUESTION, QUESTION], max_new_tokens=99, stop_strings=["STOP"])
    assert [r.text for r in batch] == ["the answer is in the second passage "] * 2


def test_too_long_a_prompt_is_refused_with_the_numbers(generator: Generator) -> None:
    with pytest.raises(GeneratorError, match="exceed the context of 512"):
        generator.generate(QUESTION, max_new_tokens=500)


def test_a_model_that_does_not_fit_is_refused_before_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        GeneratorError, match=r"weights 14.90 GiB .*cache 0.88 GiB .* 8.00 GiB free"
    ):
        plan_memory(
            name="m", weight_bytes=16_000_000_000, loading_bytes=0, dtype="bfloat16",
            bytes_per_token=147_456, needed_tokens=6400, device=torch.device("cpu"), free=8 * 2**30,
        )  # fmt: skip
    monkeypatch.setattr("rag.engine.placement.free_bytes", lambda device: 300 * 2**20)
    monkeypatch.setattr(rag.generator, "load_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(GeneratorError, match="does not fit"):
        long = make_model(folder.parent / "long", "llama", max_position_embeddings=400_000)
        load_generator(settings(long, max_prompt_tokens=390_000))


def test_weights_in_fewer_bits_are_a_setting_and_counted_before_loading(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    count = count_weights([folder / "model.safetensors"])
    embedding = 408 * 64
    # 8 bits for all weights but the embedding, which is kept in 16 and once more as the output.
    assert weight_bytes(count, config, torch.bfloat16, bits=8) == count + 2 * embedding
    # 4 bits, and two 16-bit numbers for every 32: 20 bytes. The output matrix stays in 8 bits.
    layers = count - embedding
    assert weight_bytes(count, config, torch.bfloat16, bits=4) == layers * 20 // 32 + 3 * embedding
    eight = load_generator(settings(folder, dtype="int8"))
    assert eight.dtype == "int8" and "8-bit weights" in eight.describe()
    four = load_generator(settings(folder, dtype="int4"))
    assert four.dtype == "int4" and "4-bit weights" in four.describe()
    for fewer in (eight, four):
        result = fewer.generate(QUESTION, max_new_tokens=5)
        assert result.new_tokens == 5 or result.finish_reason == "stop"
    gpt2 = make_model(folder.parent / "gpt2", "gpt2", n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(GeneratorError, match="GPT2LMHeadModel is not of the Llama family"):
        load_generator(settings(gpt2, dtype="int8"))
    narrow = make_model(folder.parent / "narrow", "llama", hidden_size=48, intermediate_size=96)
    with pytest.raises(GeneratorError, match="groups of 32, and a matrix of this model has 48"):
        load_generator(settings(narrow, dtype="int4"))


def test_what_cannot_be_loaded_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match="not a folder"):
        load_generator(settings(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(GeneratorError, match=r"no config\.json"):
        load_generator(settings(tmp_path / "empty"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "llama"}')
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(GeneratorError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_generator(settings(pickled))
    (pickled / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(GeneratorError, match="cut off or not a safetensors"):
        load_generator(settings(pickled))
    (pickled / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors"}})
    )
    with pytest.raises(GeneratorError, match=r"missing model-1\.safetensors"):
        load_generator(settings(pickled))
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    with pytest.raises(GeneratorError, match="LoRA adapter"):
        load_generator(settings(lora))


def test_an_absent_device_is_an_error_not_another_device(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(GeneratorError, match="sees 0 CUDA devices"):
        load_generator(Settings(generator=str(folder), device="cuda"))


def test_the_bundled_reader_where_absent_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rag.generator, "BUNDLED_READER", tmp_path)
    with pytest.raises(GeneratorError, match=r"rag\.bundled\.train_reader"):
        load_generator(settings("bundled"))


def test_missing_weights_are_an_error_not_random_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_model(tmp_path / "broken", "llama")
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        GeneratorError, match=r"lacks 1 of its weights, such as model\.norm\.weight"
    ):
        load_generator(settings(broken))
