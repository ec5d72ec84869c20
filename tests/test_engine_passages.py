"""Block-diagonal prompts: a passage is computed once and read in any place, exactly."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from rag.engine import FinishEvent, Request, TokenEvent
from rag.engine.model import DecoderModel
from rag.engine.scheduler import PooledEngine
from rag.errors import GeneratorError
from rag.generator import Generator
from rag.prompt import Prompt, reader_prompt
from tests.test_engine_scheduler import LIMITS, assert_empty
from tests.tiny_models import FAMILIES, make_random_model, make_tokenizer

OPENING = [2]


def passage(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(8, 407) for _ in range(length)]


A, B, C = passage(1, 50), passage(2, 31), passage(3, 64)
QUESTION = passage(4, 12)


def request(id: str, passages: list[list[int]], question: list[int], new: int = 15) -> Request:
    ids, starts = list(OPENING), []
    for tokens in passages:
        starts.append(len(ids))
        ids += tokens
    return Request(
        id,
        (*ids, *question),
        new,
        block_starts=tuple(starts),
        question_start=len(ids),
    )


def reference(model: PreTrainedModel, asked: Request) -> list[int]:
    """Greedy tokens by transformers, everything computed anew for each token, the mask written
    out: a passage sees the opening and itself; question and output see everything before them."""
    ids = list(asked.prompt_ids)
    borders = [*asked.block_starts, asked.question_start]
    opening = borders[0]
    longest = max(end - start for start, end in zip(borders, borders[1:]))
    while len(ids) < len(asked.prompt_ids) + asked.max_new_tokens:
        length = len(ids)
        positions = list(range(opening))
        sees = torch.ones(length, length).tril().bool()
        for start, end in zip(borders, borders[1:]):
            positions += range(opening, opening + end - start)
            sees[start:end, opening:start] = False
        behind = opening + longest
        positions += range(behind, behind + length - borders[-1])
        mask = torch.zeros(length, length).masked_fill(~sees, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = model(
                torch.tensor([ids]),
                position_ids=torch.tensor([positions]),
                attention_mask=mask[None, None],
            ).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(asked.prompt_ids) :]


def run(engine: PooledEngine, *requests: Request) -> dict[str, tuple[list[int], int]]:
    """Tokens and reused tokens by request."""
    tokens: dict[str, list[int]] = {asked.id: [] for asked in requests}
    reused: dict[str, int] = {}
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            tokens[event.request_id].append(event.token_id)
        elif isinstance(event, FinishEvent):
            reused[event.request_id] = event.reused_tokens
    return {id_: (found, reused[id_]) for id_, found in tokens.items()}


def make_engine(model: PreTrainedModel, kv: int = 2048) -> PooledEngine:
    return PooledEngine(DecoderModel(model), context_length=512, kv_tokens=kv, limits=LIMITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_passages_in_any_order_give_what_the_whole_mask_gives(family: str) -> None:
    model = make_random_model(family)
    engine = make_engine(model)
    first = request("first", [A, B], QUESTION)
    assert run(engine, first) == {"first": (reference(model, first), 0)}
    # The other order, a passage more, another question: only C and the question are computed.
    second = request("second", [B, C, A], QUESTION[::-1])
    before = engine.stats().computed_tokens
    assert run(engine, second) == {"second": (reference(model, second), 1 + 50 + 31)}
    assert engine.stats().computed_tokens - before <= 64 + 12 + 14 + 32
    assert_empty(engine)
    # Nothing but passages is in the tree: what saw them side by side is not right elsewhere.
    assert engine.stats().cache.cached == 1 + 50 + 31 + 64


def test_batches_mixed_with_plain_prompts_and_a_small_pool_give_the_same() -> None:
    model = make_random_model("qwen3")
    requests = [
        request("0", [A, B], QUESTION),
        request("1", [B, A, C], QUESTION[:5], new=30),
        request("2", [C], QUESTION[3:]),
        request("3", [C, A, passage(9, 8)], QUESTION, new=1),
    ]
    expected = {asked.id: reference(model, asked) for asked in requests}
    plain = Request("plain", tuple(OPENING + A + QUESTION), 12)
    alone = run(make_engine(model), plain)["plain"][0]
    for kv in (2048, 512):
        engine = make_engine(model, kv)
        found = {id_: tokens for id_, (tokens, _) in run(engine, *requests, plain).items()}
        assert found == {**expected, "plain": alone}
        assert_empty(engine)


def test_cancelled_in_the_middle_of_its_passages_nothing_is_held() -> None:
    engine = make_engine(make_random_model("llama"))
    for number in range(30):
        stream = engine.generate([request(str(number), [passage(number, 90), A, B], QUESTION)])
        if number % 3:
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    run(engine, request("last", [A], QUESTION))
    assert_empty(engine)


def test_the_readers_second_layout_is_recognised() -> None:
    model = make_random_model("llama")
    engine = make_engine(model)
    tokenizer = make_tokenizer()
    generator = Generator(engine, tokenizer, name="reader", is_reader=True)
    passages = ["The cat sat on the mat.", "答案写在文档的第二段里。"]
    for question, warm in (("Where is the cat?", False), ("答案写在哪里？", True)):
        prompt = Prompt(hits=(), text=reader_prompt(question, passages, blocks=True))
        result = generator.generate(prompt, max_new_tokens=8)
        ids = generator.encode(prompt)
        asked = ids.index(tokenizer.convert_tokens_to_ids("<|question|>"))
        # Even when cold, the second passage begins as the first: <|passage|> and [.
        assert result.reused_tokens == (asked if warm else 2)
    plain = Prompt(hits=(), text=reader_prompt("Where?", passages))
    assert generator.generate(plain, max_new_tokens=2).reused_tokens == 0


def test_where_it_is_not_defined_it_is_refused() -> None:
    windowed = make_engine(make_random_model("mistral", sliding_window=16))
    with pytest.raises(GeneratorError, match="sliding windows"):
        windowed.generate([request("a", [A], QUESTION)])
    engine = make_engine(make_random_model("llama"))
    with pytest.raises(GeneratorError, match="do not divide a prompt of 20 tokens"):
        engine.generate([Request("a", tuple(range(20)), 3, block_starts=(5, 3), question_start=9)])
