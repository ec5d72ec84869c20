"""Decoding at fixed sizes, as far as a machine without a GPU can show it: padding changes nothing."""

from __future__ import annotations

import pytest
import torch

from rag.engine import Request
from rag.engine.attention import Chunk
from rag.engine.decode_graph import MOST_SLOTS, DecodeGraphs, agree, pad_step, padded_size
from rag.engine.model import DecoderModel
from rag.engine.scheduler import PooledEngine
from tests.test_engine import reference
from tests.test_engine_model import random_tokens
from tests.test_engine_scheduler import LIMITS, assert_empty, prompts, tokens_of
from tests.tiny_models import FAMILIES, make_random_model

CPU = torch.device("cpu")


def decoding(position: int, start: int = 0) -> Chunk:
    return Chunk([7], position, [(start, start + position + 1)])


def test_the_next_larger_size_is_chosen() -> None:
    assert padded_size([decoding(0)]) == (1, 256)
    assert padded_size([decoding(255)] * 3) == (4, 256)
    assert padded_size([decoding(5), decoding(256)]) == (2, 512)
    assert padded_size([decoding(16383)] * 4) == (4, 16384) and 4 * 16384 == MOST_SLOTS


def test_what_is_no_small_decoding_step_takes_the_usual_forward() -> None:
    assert padded_size([]) is None
    assert padded_size([Chunk([7, 8], 3, [(0, 5)])]) is None  # a prompt
    assert padded_size([Chunk([7, 8], 3, [(0, 5)], num_logits=2)]) is None  # a draft
    assert padded_size([Chunk([7], 3, [(0, 4)], num_logits=0)]) is None
    assert padded_size([decoding(1)] * 65) is None
    assert padded_size([decoding(16384)]) is None
    assert padded_size([decoding(16383)] * 5) is None  # 8 rows of 16,384 slots


def test_padding_points_at_the_scratch_slot_only() -> None:
    chunks = [
        Chunk([7], 4, [(10, 13), (40, 42)], turn=6),
        Chunk([8], 1, [(20, 22)]),
        decoding(0, 5),
    ]
    step = pad_step(chunks, (4, 256), 99, CPU)
    assert step.ids.tolist() == [7, 8, 7, 0]
    assert step.positions.tolist() == [10.0, 1.0, 0.0, 0.0]
    assert step.written.tolist() == [41, 21, 5, 99]
    assert step.lengths.tolist() == [5, 2, 1, 1]
    assert step.table[0, :5].tolist() == [10, 11, 12, 40, 41]
    assert (step.table[0, 5:] == 99).all() and (step.table[3] == 99).all()


@pytest.mark.parametrize("int8", [False, True])
def test_only_the_rows_own_slots_and_the_scratch_slot_are_written(int8: bool) -> None:
    # With biases: else the padding token, whose embedding is nothing, has keys of nothing.
    model = DecoderModel(make_random_model("qwen2"))
    pool = model.new_pool(100, int8=int8)
    for layer in range(3):  # whatever is read though it is nobody's shows
        bad = torch.full((100, 2, 16), float("nan"))
        pool.write(layer, (0, 100), bad, bad)
    rows = [random_tokens(12, 1), random_tokens(7, 2), random_tokens(20, 3)]
    starts = (0, 20, 40)
    for row, start in zip(rows, starts, strict=True):
        model.forward([Chunk(row[:-1], 0, [(start, start + len(row) - 1)], 0)], pool)
    steps = [
        Chunk(row[-1:], len(row) - 1, [(start, start + len(row))])
        for row, start in zip(rows, starts, strict=True)
    ]
    model.decoding_graphs(pool, capture=False)
    before = [pool.keys(layer, 0, 100).clone() for layer in range(3)]
    padded = model.forward(steps, pool)
    changed = [
        slot
        for slot in range(100)
        if any(
            not torch.equal(pool.keys(layer, slot, slot + 1), before[layer][:, slot : slot + 1])
            and not pool.keys(layer, slot, slot + 1).isnan().all()
            for layer in range(3)
        )
    ]
    assert changed == [11, 26, 59, 99]
    usual = model._forward(steps, pool)
    torch.testing.assert_close(padded, usual, atol=2e-3, rtol=1e-4)
    assert agree(padded, usual) and not agree(padded, usual.roll(1, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_that_decodes_at_fixed_sizes_gives_what_transformers_gives(family: str) -> None:
    random_model = make_random_model(family)
    expected = {str(i): reference(random_model, prompt, 20) for i, prompt in enumerate(prompts())}
    model = DecoderModel(random_model)
    engine = PooledEngine(model, context_length=512, kv_tokens=1023, limits=LIMITS)
    engine._pool = model.new_pool(1024)  # what it makes on CUDA: a slot more than it may use
    calls = []

    class Counted(DecodeGraphs):
        def run(self, chunks, usual):  # type: ignore[no-untyped-def]
            found = super().run(chunks, usual)
            calls.append(found is not None)
            return found

    model._graphs = Counted(model._decode_padded, engine._pool, capture=False)
    requests = [Request(str(i), prompt, 20) for i, prompt in enumerate(prompts())]
    for _ in ("cold", "warm"):
        assert tokens_of(list(engine.generate(requests))) == expected
        assert_empty(engine)
    assert sum(calls) > 20


def test_without_cuda_no_engine_decodes_so() -> None:
    model = DecoderModel(make_random_model("llama"))
    engine = PooledEngine(model, context_length=512, kv_tokens=512, graphs_of=model)
    assert model._graphs is None and engine._pool.capacity == 512
