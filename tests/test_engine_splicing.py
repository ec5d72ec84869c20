"""Passages reused approximately: only where asked for, placed rightly, and never taken for exact."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rag.answer import Hit
from rag.document import Chunk
from rag.engine import Request, create_engine
from rag.engine.passage_store import PassageStore, StoredPassage, num_recomputed
from rag.engine.scheduler import PooledEngine
from rag.errors import GeneratorError
from rag.generator import load_generator
from rag.prompt import build_prompt, passage_text
from tests.test_engine import reference
from tests.test_engine_scheduler import assert_empty, finishes, tokens_of
from tests.test_generator import settings
from tests.tiny_models import make_model, make_random_model


def some(seed: int, length: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randint(8, 407) for _ in range(length))


OPENING, QUESTION = some(9, 12), some(8, 10)
A, B, C = some(1, 60), some(2, 41), some(3, 80)


def request(id: str, passages: list[tuple[int, ...]], new: int = 16) -> Request:
    ids, spans = OPENING, []
    for passage in passages:
        spans.append((len(ids), len(ids) + len(passage)))
        ids += passage
    return Request(id, ids + QUESTION, new, reusable=tuple(spans))


def make_engine(model: PreTrainedModel, **changes: Any) -> PooledEngine:
    values: dict[str, Any] = {"context_length": 512, "kv_tokens": 2048, **changes}
    engine = create_engine(model, splice_passages=True, **values)
    assert isinstance(engine, PooledEngine)
    return engine


def run(engine: PooledEngine, asked: Request) -> tuple[list[int], int]:
    events = list(engine.generate([asked]))
    return tokens_of(events)[asked.id], finishes(events)[asked.id].reused_tokens


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_one_layer_moved_passages_are_exact(family: str, rope: str) -> None:
    """Keys of the first layer know nothing but their token and place, so that whatever is not the
    same afterwards was turned, cut or placed wrongly."""
    changes: dict[str, Any] = {"num_hidden_layers": 1}
    if ROPES[rope]:
        changes["rope_parameters"] = {"rope_theta": 10000.0, **ROPES[rope]}
    model = make_random_model(family, **changes)
    engine = make_engine(model)
    first, moved = request("first", [A, B, C]), request("moved", [C, A, B])
    assert run(engine, first) == (reference(model, first.prompt_ids, 16), 0)
    tokens, reused = run(engine, moved)
    assert tokens == reference(model, moved.prompt_ids, 16)
    laid_in = sum(len(passage) - num_recomputed(len(passage)) for passage in (A, B, C))
    assert num_recomputed(60) == 9 and num_recomputed(41) == 8 and num_recomputed(80) == 12
    assert engine.stats().spliced_tokens == laid_in == 51 + 33 + 68
    assert reused == len(OPENING) + laid_in
    assert_empty(engine)


def test_behind_the_same_tokens_a_passage_is_what_it_was() -> None:
    model = make_random_model("qwen2")
    engine = make_engine(model)
    asked = request("a", [A, B])
    expected = reference(model, asked.prompt_ids, 16)
    assert run(engine, asked)[0] == expected
    engine._cache.clear()  # else the exact tree has it all
    tokens, _ = run(engine, asked)
    assert tokens == expected and engine.stats().spliced_tokens == 51 + 33


def test_what_was_laid_in_never_enters_the_exact_tree() -> None:
    model = make_random_model("llama")
    engine = make_engine(model)
    run(engine, request("first", [A, B, C]))
    moved = request("moved", [C, B, A])
    run(engine, moved)
    assert engine.stats().spliced_tokens
    # The same prompt, exactly: only the opening and C's first tokens, computed behind it, are right.
    exact = Request("exact", moved.prompt_ids, 16)
    assert run(engine, exact) == (
        reference(model, moved.prompt_ids, 16), len(OPENING) + num_recomputed(len(C)),
    )  # fmt: skip
    assert_empty(engine)


def test_in_a_small_pool_with_cancelled_streams_nothing_is_lost() -> None:
    engine = make_engine(make_random_model("llama"), kv_tokens=512)
    rng = random.Random(0)
    for number in range(60):
        passages = rng.sample([A, B, C, some(4, 70), some(5, 33)], 3)
        requests = [request(f"{number}-{n}", passages[n:], 120) for n in range(3)]
        stream = engine.generate(requests)
        for _ in range(rng.randint(0, 20)):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert run(engine, request("last", [A, B]))[0]
    assert engine.stats().spliced_tokens > 1000
    assert engine._store.size <= 512
    assert_empty(engine)


def test_a_row_that_was_set_back_is_laid_in_again() -> None:
    model = make_random_model("llama", num_hidden_layers=1)
    engine = make_engine(model, kv_tokens=640)
    run(engine, request("first", [A, B], 2))
    engine._cache.clear()
    asked = [request("x", [B], 300), Request("y", some(7, 63), 300)]
    found = tokens_of(list(engine.generate(asked[::-1])))
    assert engine.stats().preemptions and engine.stats().spliced_tokens >= 2 * 33
    assert found == {one.id: reference(model, one.prompt_ids, 300) for one in asked}
    assert_empty(engine)


def test_the_store_keeps_the_last_used_within_its_budget() -> None:
    store = PassageStore(100)
    nothing = StoredPassage(0, torch.empty(0), torch.empty(0))
    for passage in (A, some(6, 40)):
        store.keep(passage, nothing)
    assert store.size == 100 and store.find(A)
    store.keep(B, nothing)  # 41 more: the 40 that nobody asked for go, and then A
    assert (A in store, some(6, 40) in store, B in store, store.size) == (False, False, True, 41)
    store.keep(some(7, 101), nothing)
    assert store.size == 41


def test_where_it_was_not_asked_for_or_cannot_be_it_is_refused() -> None:
    model = make_random_model("llama")
    with pytest.raises(GeneratorError, match="exactly only.*passage_reuse approximate"):
        create_engine(model, context_length=512).generate([request("a", [A])])
    with pytest.raises(GeneratorError, match=r"reusable passages .* do not lie one behind"):
        make_engine(model).generate([Request("a", A, 3, reusable=((30, 40), (10, 20)))])
    dynamic = make_random_model(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    )
    with pytest.raises(GeneratorError, match="RoPE type dynamic changes.*passage_reuse to exact"):
        make_engine(dynamic)
    with pytest.raises(GeneratorError, match="sliding windows"):
        make_engine(make_random_model("mistral", sliding_window=16))


def test_the_setting_reuses_the_passages_of_a_chat(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3", max_position_embeddings=2048)
    chosen = settings(folder, passage_reuse="approximate", max_prompt_tokens=1500)
    generator = load_generator(chosen)
    assert "passages reused approximately" in generator.describe()
    texts = ("The cat sat on the mat. " * 6, "答案写在文档的第二段里。" * 6)
    hits = [Hit(Chunk("a.md", text, 0, len(text)), 1.0) for text in texts]
    prompts = [
        build_prompt(question, order, budget=1500, count_tokens=generator.count_tokens)
        for question, order in (("Where is it?", hits), ("Where is the cat?", hits[::-1]))
    ]
    first, second = (generator.generate(prompt, max_new_tokens=4) for prompt in prompts)
    assert first.reused_tokens == 0
    spliced = generator.engine.stats().spliced_tokens
    assert spliced > 0 and second.reused_tokens > spliced
    # What the spans hold is passage and nothing else.
    ids = generator.encode(prompts[1])
    for (start, end), hit in zip(generator._format.passages(prompts[1]), hits[::-1], strict=True):
        inside = generator._tokenizer.decode(ids[start:end]).strip("\ufffd")
        assert len(inside) > 0.8 * len(passage_text(hit)) and inside in passage_text(hit)
