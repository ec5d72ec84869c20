"""The engine's promises, on tiny random Llama, Qwen2 and Qwen3 in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rag.engine import Engine, FinishEvent, Request, Sampling, TokenEvent, create_engine
from rag.engine.model import DecoderModel
from rag.engine.scheduler import PooledEngine
from rag.engine.slots import SlotEngine
from rag.errors import GeneratorError
from tests.tiny_models import FAMILIES, make_random_model

PROMPT = tuple(
    int(x) for x in torch.randint(8, 408, (70,), generator=torch.Generator().manual_seed(1))
)


def run(
    engine: Engine, prompt: Sequence[int], *, new: int = 24, id: str = "a", **sampling: float
) -> tuple[list[int], FinishEvent]:
    request = Request(id, tuple(prompt), new, Sampling(**sampling))  # type: ignore[arg-type]
    events = list(engine.generate([request]))
    finish = events[-1]
    assert isinstance(finish, FinishEvent)
    return [event.token_id for event in events if isinstance(event, TokenEvent)], finish


def reference(model: PreTrainedModel, prompt: Sequence[int], new: int = 24) -> list[int]:
    """transformers' own greedy generation, without any of our cache."""
    output = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in output[0, len(prompt) :]]


Maker = Callable[..., Engine]


def slot_engine(model: PreTrainedModel, context: int = 512, kv: int = 2048) -> Engine:
    return SlotEngine(model, context_length=context, kv_tokens=kv)


def pooled_engine(model: PreTrainedModel, context: int = 512, kv: int = 2048) -> Engine:
    return PooledEngine(DecoderModel(model), context_length=context, kv_tokens=kv)


@pytest.fixture(params=[slot_engine, pooled_engine], ids=["slots", "pooled"])
def make_engine(request: pytest.FixtureRequest) -> Maker:
    maker: Maker = request.param
    return maker


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_random_model(request.param)


def test_greedy_equals_transformers_with_and_without_cached_prefix(
    model: PreTrainedModel, make_engine: Maker
) -> None:
    engine = make_engine(model)
    expected = reference(model, PROMPT)
    cold, finish = run(engine, PROMPT)
    assert cold == expected
    assert (finish.prompt_tokens, finish.reused_tokens, finish.new_tokens) == (70, 0, 24)
    assert finish.reason == "length"
    warm, finish = run(engine, PROMPT)
    assert warm == expected
    assert finish.reused_tokens == 69  # all but the one whose logits are needed


def test_the_next_turn_computes_only_what_is_new(
    model: PreTrainedModel, make_engine: Maker
) -> None:
    engine = make_engine(model)
    answer, _ = run(engine, PROMPT)
    turn = (*PROMPT, *answer, *PROMPT[:9])
    tokens, finish = run(engine, turn)
    assert tokens == reference(model, turn)
    # The last token of the answer was never fed back, so 70 + 23 are cached.
    assert finish.reused_tokens == 93


def test_a_branch_leaves_the_longer_conversation_cached(
    model: PreTrainedModel, make_engine: Maker
) -> None:
    engine = make_engine(model)
    run(engine, PROMPT)
    branch = (*PROMPT[:20], *reversed(PROMPT[20:]))
    tokens, finish = run(engine, branch)
    assert tokens == reference(model, branch)
    assert finish.reused_tokens == 20
    _, finish = run(engine, PROMPT)
    assert finish.reused_tokens == 69


def test_sliding_windows_survive_reuse(make_engine: Maker) -> None:
    model = make_random_model("mistral", sliding_window=16)
    engine = make_engine(model)
    run(engine, PROMPT[:50])
    tokens, finish = run(engine, PROMPT)
    assert finish.reused_tokens == 50
    assert tokens == reference(model, PROMPT)


def test_two_interleaved_streams_do_not_mix(make_engine: Maker) -> None:
    model = make_random_model("llama")
    engine = make_engine(model)
    other = tuple(reversed(PROMPT))
    first = engine.generate([Request("a", PROMPT, 24)])
    second = engine.generate([Request("b", other, 24)])
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    for pair in zip(first, second, strict=True):
        for event in pair:
            if isinstance(event, TokenEvent):
                tokens[event.request_id].append(event.token_id)
    assert tokens == {"a": reference(model, PROMPT), "b": reference(model, other)}


def test_a_stop_token_ends_the_output_and_is_not_part_of_it(make_engine: Maker) -> None:
    model = make_random_model("llama")
    expected = reference(model, PROMPT)
    stop = expected[5]
    events = list(make_engine(model).generate([Request("a", PROMPT, 24, stop_ids=(stop,))]))
    tokens = [event.token_id for event in events if isinstance(event, TokenEvent)]
    assert tokens == expected[: expected.index(stop)]
    assert isinstance(events[-1], FinishEvent) and events[-1].reason == "stop"


def test_logprobs_are_those_of_the_model(make_engine: Maker) -> None:
    model = make_random_model("qwen2")
    events = list(
        make_engine(model).generate([Request("a", PROMPT, 4, Sampling(temperature=0.7, seed=3))])
    )
    chosen = [event for event in events if isinstance(event, TokenEvent)]
    ids = torch.tensor([[*PROMPT, *(event.token_id for event in chosen)]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    for index, event in enumerate(chosen):
        expected = float(logprobs[len(PROMPT) - 1 + index, event.token_id])
        assert event.logprob == pytest.approx(expected, abs=1e-4)


def test_the_most_probable_tokens_are_those_of_log_softmax(make_engine: Maker) -> None:
    model = make_random_model("qwen2", initializer_range=0.1)
    sampling = Sampling(temperature=1.2, top_k=3, seed=3, repetition_penalty=1.3)
    requests = [
        Request("sampled", PROMPT, 6, sampling, top_logprobs=5),
        Request("greedy", PROMPT[:40] * 2, 30, top_logprobs=2),  # drafts are accepted here
        Request("none", PROMPT, 3),
    ]
    chosen: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for event in make_engine(model).generate(requests):
        if isinstance(event, TokenEvent):
            chosen[event.request_id].append(event)
    for request in requests:
        events = chosen[request.id]
        ids = [*request.prompt_ids, *(event.token_id for event in events)]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        for index, event in enumerate(events):
            row = logprobs[len(request.prompt_ids) - 1 + index]
            expected, tokens = row.topk(request.top_logprobs)
            assert [token for token, _ in event.top] == tokens.tolist()
            assert [value for _, value in event.top] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [len(chosen[request.id]) for request in requests] == [6, 30, 3]
    assert all(event.top[0] == (event.token_id, event.logprob) for event in chosen["greedy"])


def test_closing_or_cancelling_a_stream_frees_its_slot(make_engine: Maker) -> None:
    engine = make_engine(make_random_model("llama"), kv=512)
    for _ in range(5):
        stream = engine.generate([Request("a", PROMPT, 400)])
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    stream = engine.generate([Request("b", PROMPT, 400)])
    next(stream)
    engine.cancel("b")
    last = list(stream)[-1]
    assert isinstance(last, FinishEvent) and last.reason == "cancelled" and last.reused_tokens == 69


def test_requests_that_cannot_run_are_refused_at_once(make_engine: Maker) -> None:
    engine = make_engine(make_random_model("llama"), context=80)
    with pytest.raises(GeneratorError, match="70 prompt tokens \\+ 11 new tokens = 81 exceed"):
        engine.generate([Request("a", PROMPT, 11)])
    with pytest.raises(GeneratorError, match="empty"):
        engine.generate([Request("a", (), 11)])
    with pytest.raises(GeneratorError, match="max_new_tokens is 0"):
        engine.generate([Request("a", PROMPT, 0)])
    with pytest.raises(GeneratorError, match="top_logprobs is 101; it must be from 0 to 100"):
        engine.generate([Request("a", PROMPT, 5, top_logprobs=101)])
    with pytest.raises(GeneratorError, match="temperature is -1"):
        engine.generate([Request("a", PROMPT, 5, Sampling(temperature=-1))])


OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},  # softcap, two kinds of layers
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "starcoder2": {"sliding_window": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_their_own_forward_over_the_pool(family: str) -> None:
    model = make_random_model(family, **OTHERS[family])
    prompts = [PROMPT, PROMPT[:33], (*PROMPT[:50], *PROMPT[10:20])]
    expected = {str(n): reference(model, prompt, 12) for n, prompt in enumerate(prompts)}
    engine = create_engine(model, context_length=256)
    assert "over the pool" in engine.description
    run(engine, PROMPT[:40])
    requests = [Request(str(n), prompt, 12) for n, prompt in enumerate(prompts)]
    found: dict[str, list[int]] = {}
    reused = {}
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            found.setdefault(event.request_id, []).append(event.token_id)
        else:
            reused[event.request_id] = event.reused_tokens
    assert found == expected
    assert reused["0"] == 40 and reused["1"] == 32 and reused["2"] >= 40


def test_what_the_pool_cannot_serve_goes_slot_by_slot_or_is_refused() -> None:
    sinks = make_random_model("gpt_oss", num_local_experts=4, sliding_window=16)
    engine = create_engine(sinks, context_length=256)
    assert "its attention takes s_aux" in engine.description
    assert run(engine, PROMPT)[0] == reference(sinks, PROMPT)
    bloom = make_random_model("bloom", n_layer=2, n_head=4)
    engine = create_engine(bloom, context_length=256)
    assert "its forward takes no positions" in engine.description
    run(engine, PROMPT[:40])
    tokens, finish = run(engine, PROMPT)
    assert (tokens, finish.reused_tokens) == (reference(bloom, PROMPT), 40)
    with pytest.raises(GeneratorError, match="a way of its own"):
        create_engine(make_random_model("mamba"), context_length=256)


def test_recurrent_layers_take_the_prompt_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rag.engine.slots.PREFILL_CHUNK", 16)
    model = make_random_model(
        "qwen3_next",
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    engine = create_engine(model, context_length=256)
    assert "no prefix reuse (recurrent layers)" in engine.description
    expected = reference(model, PROMPT, 12)
    for _ in range(2):
        tokens, finish = run(engine, PROMPT, new=12)
        assert (tokens, finish.reused_tokens) == (expected, 0)
