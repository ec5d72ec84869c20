"""Our forward gives what transformers gives, however rows and chunks are cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rag.engine.attention import LONGEST_TAIL, Chunk, Part, plan_attention
from rag.engine.kvcache import KVPool
from rag.engine.linear import (
    FusedGate,
    Int4Linear,
    Linear,
    MergedGate,
    PackedLinear,
    make_linear,
    packs,
)
from rag.engine.model import DecoderModel, why_unsupported
from rag.engine.placement import weight_bytes
from tests.tiny_models import make_random_model

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "linear rope": ("llama", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn rope": ("qwen3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows in its upper layers": ("qwen2", {
        "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "as many key heads as queries": ("llama", {"num_key_value_heads": 4}),
}  # fmt: skip


def random_tokens(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(8, 408, (length,), generator=generator)]


def expected_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def forward(model: DecoderModel, chunks: list[Chunk], pool: KVPool) -> Sequence[torch.Tensor]:
    """The logits of each chunk."""
    return model.forward(chunks, pool).split([chunk.num_logits for chunk in chunks])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_equals_transformers(variant: str) -> None:
    """Three rows: a prompt at once, one in three chunks over scattered slots, and one that shares
    the first 30 tokens of the second and goes on with a short chunk of 4."""
    family, changes = VARIANTS[variant]
    model = make_random_model(family, **changes)
    assert why_unsupported(model) is None
    ours = DecoderModel(model)
    pool = ours.new_pool(400)
    for layer in range(3):  # whatever is read before it is written shows
        pool.keys(layer, 0, 400).fill_(float("nan"))
        pool.values(layer, 0, 400).fill_(float("nan"))
    first, second = random_tokens(60, 1), random_tokens(70, 2)
    third = [*second[:30], *random_tokens(4, 3)]
    scattered = [(100, 130), (200, 225), (150, 170)]  # 75 slots
    ours.forward([Chunk(second[:30], 0, [(100, 130)], 0)], pool)
    results = forward(
        ours,
        [
            Chunk(first, 0, [(0, 60)], 60),
            Chunk(third[30:], 30, [(100, 130), (300, 304)], 4),
            Chunk(second[30:66], 30, [(100, 130), (200, 225), (150, 161)], 36),
        ],
        pool,
    )
    torch.testing.assert_close(results[0], expected_logits(model, first), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(results[1], expected_logits(model, third)[30:], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(
        results[2], expected_logits(model, second)[30:66], atol=2e-3, rtol=1e-4
    )
    # Now all three decode together.
    first, second, third = [*first, 9], second[:67], [*third, 10]
    results = forward(
        ours,
        [
            Chunk(first[60:], 60, [(0, 61)]),
            Chunk(second[66:], 66, [*scattered[:2], (150, 162)]),
            Chunk(third[34:], 34, [(100, 130), (300, 305)]),
        ],
        pool,
    )
    for result, tokens in zip(results, (first, second, third), strict=True):
        torch.testing.assert_close(
            result, expected_logits(model, tokens)[-1:], atol=2e-3, rtol=1e-4
        )


def test_rows_that_share_slots_multiply_with_them_once() -> None:
    # Rows 0 and 2 share slots 0-50; row 2 reads on next to them, row 0 elsewhere; row 1 is alone.
    chunks = [
        Chunk([1], 54, [(0, 50), (90, 95)]),
        Chunk([1], 9, [(200, 210)]),
        Chunk([1, 2], 50, [(0, 52)]),
    ]
    plan = plan_attention(chunks, windows=[None], query_block=256, device=torch.device("cpu"))
    (group,) = plan.groups[None]
    assert plan.order == (0, 2, 1)
    assert group.parts == (Part(0, 3, 0, 0, 50),)  # read once for all three tokens
    assert group.tails is not None and group.tails.length == 32
    slots = group.tails.slots.view(3, 32).tolist()
    assert slots[0] == [90, 91, 92, 93] + [94] * 28
    assert slots[1] == [50] + [51] * 31
    assert slots[2] == [*range(200, 209)] + [209] * 23
    assert group.tails.tokens is not None
    assert group.tails.tokens.tolist() == [[0, 0], [1, 2], [3, 3]]
    assert (group.width, group.mask_from) == (82, 0)
    assert group.mask is not None
    seen = [row.nonzero().flatten().tolist() for row in ~group.mask[:, 0]]
    assert seen == [
        [*range(50), 50, 51, 52, 53, 54],
        [*range(50), 50],
        [*range(50), 50, 51],
        [*range(50, 60)],
    ]


def test_a_window_reads_only_the_slots_in_it() -> None:
    chunks = [Chunk([1], 99, [(300, 400)])]
    plan = plan_attention(chunks, windows=[None, 16], query_block=256, device=torch.device("cpu"))
    assert plan.groups[None][0].parts == (Part(0, 1, 0, 300, 100),)
    assert plan.groups[16][0].parts == (Part(0, 1, 0, 384, 16),)
    assert plan.groups[16][0].mask is None


def test_rows_with_long_contexts_of_their_own_are_read_in_place() -> None:
    model = make_random_model("llama")
    ours = DecoderModel(model)
    pool = ours.new_pool(1200)
    rows = [random_tokens(length, seed) for seed, length in enumerate((LONGEST_TAIL + 40, 30, 350))]
    starts = (0, 500, 600)
    for row, start in zip(rows, starts, strict=True):
        ours.forward([Chunk(row[:-3], 0, [(start, start + len(row) - 3)], 0)], pool)
    results = forward(
        ours,
        [
            Chunk(row[-3:], len(row) - 3, [(start, start + len(row))], 3)
            for row, start in zip(rows, starts, strict=True)
        ],
        pool,
    )
    for result, row in zip(results, rows, strict=True):
        torch.testing.assert_close(result, expected_logits(model, row)[-3:], atol=2e-3, rtol=1e-4)


def test_bfloat16_stays_within_a_bound_of_transformers() -> None:
    model = make_random_model("qwen3", initializer_range=0.05).bfloat16()
    exact = make_random_model("qwen3", initializer_range=0.05)
    tokens = random_tokens(60, 1)
    ours = DecoderModel(model)
    pool = ours.new_pool(90)
    pool.values(0, 0, 90).fill_(float("nan"))  # padding must not read what is not there
    logits = ours.forward([Chunk(tokens, 0, [(0, 60)], 60)], pool)
    rows = [[*tokens[:45], 7], [*tokens[:40], 8, 9]]
    chunks = [Chunk([7], 45, [(0, 45), (70, 71)]), Chunk([8, 9], 40, [(0, 40), (80, 82)])]
    logits = torch.cat([logits, ours.forward(chunks, pool)])

    def by_transformers(other: PreTrainedModel) -> torch.Tensor:
        last = [expected_logits(other, row)[-1:] for row in rows]
        return torch.cat([expected_logits(other, tokens), *last]).float()

    true = by_transformers(exact)
    theirs = (by_transformers(model) - true).abs().max()
    assert (logits - true).abs().max() < 1.5 * theirs  # no worse than transformers' own rounding


def test_what_the_forward_cannot_run_is_said() -> None:
    gelu = make_random_model("llama", hidden_act="gelu")
    assert why_unsupported(gelu) == "activation gelu"
    dynamic = make_random_model(
        "llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    assert why_unsupported(dynamic) == "RoPE type dynamic changes with the length"
    assert why_unsupported(object()) == "object is not of the Llama family"


def test_releasing_gives_the_weights_up() -> None:
    model = make_random_model("llama")
    tokens = random_tokens(20, 1)
    expected = expected_logits(model, tokens)
    ours = DecoderModel(model, release=True)
    logits = ours.forward([Chunk(tokens, 0, [(0, 20)], 20)], ours.new_pool(64))
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-4)
    assert not list(model.model.layers.parameters())


def test_prepacked_products_equal_plain_ones() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(5, 64)
    plain = make_linear(weight, bias)
    assert isinstance(plain, Linear)  # float32 is never packed
    if not packs():
        pytest.skip("this PyTorch has no oneDNN prepacking")
    packed = make_linear(weight.bfloat16(), bias.bfloat16())
    assert isinstance(packed, PackedLinear)
    expected = Linear(weight.bfloat16(), bias.bfloat16())(x.bfloat16())
    assert torch.equal(packed(x.bfloat16()), expected)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_what_is_done_behind_a_prepacked_product_is_rounded_once(rows: int) -> None:
    if not packs():
        pytest.skip("this PyTorch has no oneDNN prepacking")
    torch.manual_seed(0)
    weight, up, x = torch.randn(96, 64), torch.randn(96, 64), torch.randn(rows, 64)
    weight, up, x = weight.bfloat16(), up.bfloat16(), x.bfloat16()
    other = torch.randn(rows, 96).bfloat16()
    linear = PackedLinear(weight)
    exact = x.double() @ weight.double().T
    silu = torch.nn.functional.silu(exact)
    gated = silu * (x.double() @ up.double().T)
    for found, expected, roundings in (
        (linear.silu(x), silu, 1),
        (linear.plus(x, other), exact + other.double(), 1),
        (linear.times(x, other), exact * other.double(), 1),
        (FusedGate(linear, PackedLinear(up))(x), gated, 2),
    ):
        # bfloat16 has 8 bits; sums are made in float32.
        assert ((found.double() - expected).abs() <= roundings * expected.abs() / 256 + 1e-3).all()
    merged = MergedGate(make_linear(torch.cat((weight, up)).float()))(x.float())
    torch.testing.assert_close(merged.double(), gated, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_8_bits_are_off_by_less_than_their_steps(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = (
        torch.randn(96, 64).to(dtype),
        torch.randn(96).to(dtype),
        torch.randn(rows, 64),
    )
    x = x.to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    found = make_linear(weight, bias, bits=8)(x)
    assert found.dtype == dtype
    # Each weight is off by at most half a step of its row's largest / 127 (1 % for the scale).
    step = weight.double().abs().amax(1) * 1.011 / 127
    bound = x.double().abs().sum(1, keepdim=True) * step / 2
    rounding = 0.0 if dtype == torch.float32 else 0.02 * exact.abs() + 0.05
    assert ((found.double() - exact).abs() <= bound + rounding + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_4_bits_are_off_by_less_than_half_a_sixteenth_of_their_group(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 96).to(dtype)
    weight[5, :32] = 0.25  # a group of one value
    weight[6, 40] = 9.0
    linear = Int4Linear(weight)
    found = linear.turned_back().double()[:, :100].T
    grouped, error = weight.double().view(100, 3, 32), (found - weight.double()).view(100, 3, 32)
    step = (grouped.amax(-1) - grouped.amin(-1)) / 15
    # Half a step at most with 16 values over the whole range; the spread that is chosen is no
    # worse in the sum of squares. bfloat16 rounds what comes out once more.
    rounding = 0.0 if dtype == torch.float32 else 0.005 * grouped.abs().amax(-1)
    assert (error.square().mean(-1).sqrt() <= step / 2 + rounding + 1e-6).all()
    assert error.square().mean() < 0.9 * (step.square() / 12).mean()  # and better on the whole
    assert error[5, 0].abs().max() < 1e-3


@pytest.mark.parametrize("rows", [1, 4, 32, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_4_bits_are_those_of_the_weights_turned_back(
    rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(100, 96), torch.randn(100), torch.randn(rows, 96)
    x = x.to(dtype)
    linear = Int4Linear(weight.to(dtype), bias.to(dtype))
    found = linear(x)
    assert found.dtype == dtype and found.shape == (rows, 100)
    exact = x.double() @ linear.turned_back().double()[:, :100] + bias.to(dtype).double()
    rounding = 1e-4 if dtype == torch.float32 else 0.02 * exact.abs() + 0.08
    assert ((found.double() - exact).abs() <= rounding).all()


def test_the_estimate_counts_the_bytes_that_4_and_8_bits_take() -> None:
    model = make_random_model("qwen3", vocab_size=4096, tie_word_embeddings=True).bfloat16()
    count = sum(parameter.numel() for parameter in model.parameters())
    for bits in (8, 4):
        ours = DecoderModel(model, bits=bits)
        tensors = [ours._embedding, ours._norm]
        products = [ours._head]
        for layer in ours._layers:
            tensors += [layer.input_norm, layer.post_norm]
            products += [layer.qkv, layer.output, *layer.gate.products, layer.down]
        for product in products:
            tensors += [value for value in vars(product).values() if torch.is_tensor(value)]
        taken = sum(tensor.nbytes for tensor in tensors)
        estimate = weight_bytes(count, model.config, torch.bfloat16, bits=bits)
        assert abs(taken - estimate) < 0.03 * taken, bits


def test_bfloat16_greedy_differs_only_where_two_tokens_are_as_good_as_equal() -> None:
    model = make_random_model("qwen3")
    rounded = make_random_model("qwen3").bfloat16()
    ours = DecoderModel(rounded)
    tokens = random_tokens(40, 5)
    pool = ours.new_pool(128)
    length = 0
    while len(tokens) < 100:
        chunk = Chunk(tokens[length:], length, [(0, len(tokens))])
        (logits,) = ours.forward([chunk], pool)
        length = len(tokens)
        exact = expected_logits(model, tokens)[-1]
        theirs = expected_logits(rounded, tokens)[-1].float()
        bound = 2 * (theirs - exact).abs().max()  # what bfloat16 itself costs in this place
        assert exact.max() - exact[logits.argmax()] <= bound
        tokens.append(int(logits.argmax()))
