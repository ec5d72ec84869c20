"""Keys and values in 8 bits: how far off they may be, and what must not change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rag.engine import Request, create_engine
from rag.engine.attention import Chunk
from rag.engine.int8_pool import Int8KVPool
from rag.engine.model import DecoderModel
from rag.engine.placement import kv_bytes_per_token
from rag.engine.scheduler import PooledEngine
from rag.errors import GeneratorError
from rag.generator import load_generator
from tests.test_engine import PROMPT, run
from tests.test_engine_scheduler import LIMITS, assert_empty, prompts, tokens_of
from tests.test_generator import QUESTION, settings
from tests.tiny_models import make_model, make_random_model


def make_pool(dtype: torch.dtype, capacity: int = 64) -> Int8KVPool:
    return Int8KVPool(
        num_layers=2, num_kv_heads=3, head_dim=16, capacity=capacity, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_is_off_by_at_most_half_a_step_of_its_token_and_head(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    pool = make_pool(dtype)
    keys, values = torch.randn(5, 3, 16).to(dtype), (1e-3 * torch.randn(5, 3, 16)).to(dtype)
    keys[2, 1] = 0
    keys[3, 0] *= 100
    pool.write(1, (10, 15), keys, values)
    pool.write(0, torch.tensor([40, 7, 8, 9, 3]), keys, values)
    for written, contiguous, listed in (
        (keys, pool.keys(1, 10, 15), pool.gather_keys(0, torch.tensor([40, 7, 8, 9, 3]))),
        (values, pool.values(1, 10, 15), pool.gather_values(0, torch.tensor([40, 7, 8, 9, 3]))),
    ):
        exact = written.transpose(0, 1).double()
        # Half of 1/127 of the largest, and bfloat16's own rounding of scale and result.
        rounding = {torch.float32: 0.0, torch.float16: 0.0005, torch.bfloat16: 0.006}[dtype]
        bound = exact.abs().amax(-1, keepdim=True) * (0.5 / 127 + rounding) + 1e-9
        assert contiguous.dtype == dtype and torch.equal(contiguous, listed)
        assert ((contiguous.double() - exact).abs() <= bound).all()
        assert not torch.equal(contiguous.double(), exact)
    padded = pool.padded_keys(1, 10, 15)
    assert torch.equal(padded[:, :5], pool.keys(1, 10, 15)) and not padded[:, 5:].any()


def test_the_same_memory_holds_nearly_twice_the_tokens() -> None:
    config = SimpleNamespace(
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128
    )
    assert kv_bytes_per_token(config, torch.bfloat16) == 114_688
    assert kv_bytes_per_token(config, torch.bfloat16, int8=True) == 28 * 2 * 8 * 130 == 58_240
    # The estimate is what the pool takes.
    pool = make_pool(torch.bfloat16, capacity=100)
    tiny = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, head_dim=16
    )
    assert pool.bytes == 100 * kv_bytes_per_token(tiny, torch.bfloat16, int8=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_cut_as_it_may_be_the_work_gives_the_same_tokens(family: str) -> None:
    """Rounding happens once, when written: batches, chunks, reuse and drafts read the same."""
    model = make_random_model(family)
    found = []
    for limits in ({}, {"rows_per_call": 1}, {"rows_per_call": 3, "step_tokens": 17}):
        engine = create_engine(model, context_length=256, kv_tokens=2048, int8_kv=True)
        assert isinstance(engine, PooledEngine) and "KV cache in 8 bits" in engine.description
        engine.limits = type(LIMITS)(
            **{**{f: getattr(LIMITS, f) for f in LIMITS.__slots__}, **limits}
        )
        requests = [Request(str(i), prompt, 12) for i, prompt in enumerate(prompts())]
        for _ in range(2):
            found.append(tokens_of(list(engine.generate(requests))))
        assert_empty(engine)
    assert all(tokens == found[0] for tokens in found)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_move_less_than_bfloat16_moves_them(family: str) -> None:
    model = make_random_model(family, initializer_range=0.1)
    ours = DecoderModel(model)
    halved = DecoderModel(make_random_model(family, initializer_range=0.1).bfloat16())
    chunk = Chunk(PROMPT, 0, [(0, 70)], 70)
    exact = ours.forward([chunk], ours.new_pool(128))
    moved = (ours.forward([chunk], ours.new_pool(128, int8=True)) - exact).abs()
    by_bfloat16 = (halved.forward([chunk], halved.new_pool(128)) - exact).abs()
    assert 0 < moved.mean() < by_bfloat16.mean()
    assert moved.max() < by_bfloat16.max()


def test_what_is_no_number_stays_none() -> None:
    pool = make_pool(torch.float32)
    bad = torch.full((1, 3, 16), float("nan"))
    pool.write(0, (0, 1), bad, bad)
    assert pool.keys(0, 0, 1).isnan().all()


def test_it_is_a_setting_and_refused_where_a_model_has_no_pool(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3")
    generator = load_generator(settings(folder, kv_dtype="int8"))
    assert "in 8 bits" in generator.describe()
    assert generator.generate(QUESTION, max_new_tokens=4).new_tokens == 4
    bloom = make_random_model("bloom", n_layer=2, n_head=4)
    with pytest.raises(GeneratorError, match="8-bit KV cache needs the pool.*takes no positions"):
        create_engine(bloom, context_length=256, int8_kv=True)
    assert run(create_engine(bloom, context_length=256), PROMPT, new=2)[1].new_tokens == 2
