"""Many requests at once give what each gives alone; nothing is lost, leaked or computed twice."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rag.engine import Event, FinishEvent, Request, Sampling, TokenEvent
from rag.engine.drafting import Drafter
from rag.engine.kvcache import KVPool
from rag.engine.model import DecoderModel
from rag.engine.scheduler import Limits, PooledEngine
from rag.errors import GeneratorError
from tests.test_engine import reference
from tests.tiny_models import FAMILIES, make_random_model

LIMITS = Limits(512, 160, rows_per_call=32, rows=48, draft_tokens=32)


def make_engine(family: str = "llama", *, kv: int = 4096, **limits: int) -> PooledEngine:
    return PooledEngine(
        DecoderModel(make_random_model(family)),
        context_length=512,
        kv_tokens=kv,
        limits=dataclasses.replace(LIMITS, **limits),
    )


def tokens_of(events: Sequence[Event]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        if isinstance(event, TokenEvent):
            found.setdefault(event.request_id, []).append(event.token_id)
    return found


def finishes(events: Sequence[Event]) -> dict[str, FinishEvent]:
    return {event.request_id: event for event in events if isinstance(event, FinishEvent)}


def prompts(seed: int = 0) -> list[tuple[int, ...]]:
    """Eight prompts: three over one document, two over another, one repetitive, two alone."""
    rng = random.Random(seed)

    def some(length: int) -> list[int]:
        return [rng.randint(8, 407) for _ in range(length)]

    first, second, phrase = some(120), some(75), some(7)
    return [
        tuple(tokens)
        for tokens in (
            first + some(9), some(40), second + some(30), first + some(14), phrase * 9,
            second + some(3), [rng.randint(8, 407)], first[:90] + some(20),
        )
    ]  # fmt: skip


def assert_empty(engine: PooledEngine) -> None:
    """Every slot is free or cached, and nobody holds anything."""
    assert not engine._running and not engine._waiting
    cache = engine._cache
    assert cache.in_use == 0
    assert cache.evictable == cache.cached
    assert cache.root.references == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_cutting_the_work_gives_what_transformers_gives(family: str) -> None:
    model = make_random_model(family)
    expected = {str(i): reference(model, prompt, 20) for i, prompt in enumerate(prompts())}
    for name, limits in {
        "all at once": {},
        "one row at a time": {"rows_per_call": 1},
        "three rows, small steps": {"rows_per_call": 3, "step_tokens": 17, "busy_step_tokens": 7},
        "no drafts": {"draft_tokens": 0},
        "a pool that is too small": {"kv": 512, "step_tokens": 64},
    }.items():
        engine = make_engine(family, **limits)
        requests = [Request(str(i), prompt, 20) for i, prompt in enumerate(prompts())]
        for when in ("cold", "warm"):
            events = list(engine.generate(requests))
            assert tokens_of(events) == expected, (name, when)
            assert_empty(engine)


def test_drafts_are_made_and_change_nothing() -> None:
    """With smaller weights the random model falls into loops and out of them again."""
    model = make_random_model("qwen2", initializer_range=0.1)
    expected = reference(model, prompts()[4], 200)
    engine = PooledEngine(DecoderModel(model), context_length=512, kv_tokens=512)
    assert tokens_of(list(engine.generate([Request("a", prompts()[4], 200)])))["a"] == expected
    stats = engine.stats()
    assert stats.drafted_tokens > stats.accepted_tokens > 40
    assert stats.steps < 160
    assert_empty(engine)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_sampled_output_is_the_same_with_drafts_batches_and_cache(temperature: float) -> None:
    """The token at each place is drawn from the model's distribution with the request's own
    number, whether or not a draft proposed it; so the seed decides, not the company."""
    sampling = Sampling(temperature=temperature, top_p=0.95, repetition_penalty=1.1, seed=11)
    requests = [Request(str(i), prompt, 24, sampling) for i, prompt in enumerate(prompts())]
    plain = make_engine(draft_tokens=0)
    alone = [tokens_of(list(plain.generate([request])))[request.id] for request in requests]
    together = tokens_of(list(make_engine().generate(requests)))
    assert [together[request.id] for request in requests] == alone


def test_questions_over_one_document_compute_it_once() -> None:
    engine = make_engine()
    rng = random.Random(1)
    document = tuple(rng.randint(8, 407) for _ in range(200))
    questions = [tuple(rng.randint(8, 407) for _ in range(6)) for _ in range(10)]
    requests = [Request(str(i), document + question, 2) for i, question in enumerate(questions)]
    ends = finishes(list(engine.generate(requests)))
    assert sorted(end.reused_tokens for end in ends.values()) == [0] + [200] * 9
    # 200 once, ten questions of 6, and one decoded token each.
    assert engine.stats().computed_tokens == 200 + 10 * 6 + 10
    stats = engine.stats().cache
    assert stats.cached == 200 + 10 * 7 and stats.in_use == 0
    assert stats.hit_tokens == 9 * 200


def test_the_pool_never_holds_more_than_its_budget() -> None:
    engine = make_engine(kv=512)
    rng = random.Random(2)
    for number in range(60):
        prompt = tuple(rng.randint(8, 407) for _ in range(rng.randint(1, 400)))
        list(engine.generate([Request(str(number), prompt, 3)]))
        stats = engine.stats().cache
        assert stats.free + stats.cached == stats.capacity == 512
    assert stats.evicted_tokens > 5000
    assert stats.bytes == 3 * 2 * 2 * 16 * 512 * 4  # layers, K and V, heads, dims, slots, bytes


def test_an_idle_engine_gets_memory_for_the_slots_that_come_next(monkeypatch: pytest.MonkeyPatch) -> None:
    # A page of memory that was never written costs its first writer, in place of the prompt's reader.
    slot = 3 * 2 * 2 * 16 * 4  # layers, K and V, heads, dims, bytes
    monkeypatch.setattr("rag.engine.scheduler._AHEAD_BYTES", 200 * slot)
    touched: list[tuple[int, int]] = []
    touch = KVPool.touch
    monkeypatch.setattr(
        KVPool, "touch", lambda pool, a, b: (touched.append((a, b)), touch(pool, a, b))
    )
    engine = make_engine(kv=1000)

    def touched_after(end: int) -> bool:
        for _ in range(500):
            if engine._touched == end:
                return True
            time.sleep(0.01)
        return False

    assert touched_after(200), "before the first request"
    prompt = tuple(random.Random(5).choices(range(8, 408), k=100))
    first = tokens_of(list(engine.generate([Request("a", prompt, 4)])))
    (used, end) = engine._cache.free.last
    assert end == 1000 and touched_after(used + 200)
    assert [a for a, _ in touched] == [0, *(b for _, b in touched[:-1])], "no slot twice"
    assert all(b <= 200 or a >= 200 for a, b in touched)
    again = tokens_of(list(engine.generate([Request("a", prompt, 4)])))
    assert again == first and engine.stats().cache.hit_tokens > 0, "what is cached was left alone"


def test_where_slots_run_out_the_youngest_is_computed_again() -> None:
    """Each row asks 256 slots ahead of its 300 new tokens, so two start and later collide."""
    model = make_random_model("llama")
    first, second = prompts()[1], prompts()[2][:60]
    engine = make_engine(kv=640, draft_tokens=0)
    events = list(engine.generate([Request("a", first, 300), Request("b", second, 300)]))
    assert engine.stats().preemptions >= 1
    assert tokens_of(events) == {
        "a": reference(model, first, 300),
        "b": reference(model, second, 300),
    }
    assert_empty(engine)


def test_a_thousand_cancelled_streams_leak_nothing() -> None:
    engine = make_engine()
    threads = threading.active_count()
    rng = random.Random(3)
    for number in range(1000):
        prompt = tuple(rng.randint(8, 407) for _ in range(rng.randint(1, 60)))
        stream = engine.generate([Request(str(number), prompt, 100)])
        for _ in range(rng.randint(0, 2)):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    list(engine.generate([Request("last", (9,), 1)]))  # by its end every cancellation was seen
    assert_empty(engine)
    assert threading.active_count() <= threads + 1


def test_one_cancelled_request_leaves_the_others_of_its_call() -> None:
    model = make_random_model("llama")
    engine = make_engine()
    a, b = prompts()[:2]
    events: list[Event] = []
    for event in engine.generate([Request("a", a, 300), Request("b", b, 40)]):
        events.append(event)
        if len(events) == 6:
            engine.cancel("a")
    ends = finishes(events)
    assert (ends["a"].reason, ends["b"].reason) == ("cancelled", "length")
    assert ends["a"].new_tokens < 300
    assert tokens_of(events)["b"] == reference(model, b, 40)


def test_many_threads_share_one_engine() -> None:
    model = make_random_model("qwen3")
    engine = make_engine("qwen3")
    expected = [reference(model, prompt, 12) for prompt in prompts()]
    results: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        request = Request("same id", prompts()[index], 12)
        results[index] = tokens_of(list(engine.generate([request])))["same id"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [results[index] for index in range(8)] == expected
    assert_empty(engine)


def test_a_question_overtakes_a_batch() -> None:
    engine = make_engine(rows_per_call=4, rows=6, draft_tokens=0)
    rng = random.Random(5)
    batch = [Request(str(i), tuple(rng.randint(8, 407) for _ in range(50)), 30) for i in range(40)]
    events = engine.generate(batch)
    for _ in range(3):
        next(events)
    steps = engine.stats().steps
    list(engine.generate([Request("question", prompts()[1], 5)]))
    # Its 40 tokens fit the next step; the batch alone needs some 300.
    assert engine.stats().steps - steps < 20
    assert len(finishes(list(events))) == 40


@pytest.mark.parametrize("full", ["slots", "rows"])
def test_a_question_overtakes_a_batch_that_has_taken_everything(full: str) -> None:
    """One row of the batch is set back for it, instead of some 150 steps until a row ends; and is
    right in the end all the same."""
    model = make_random_model("llama")
    limits = {"kv": 640} if full == "slots" else {"rows": 4, "rows_per_call": 4}
    engine = make_engine(draft_tokens=0, **limits)
    rng = random.Random(6)
    batch = [Request(str(i), tuple(rng.randint(8, 407) for _ in range(50)), 150) for i in range(8)]
    events = engine.generate(batch)
    first = [next(events) for _ in range(6)]
    assert engine.stats().running == (3 if full == "slots" else 4)
    assert engine.stats().preemptions == 0
    found = list(engine.generate([Request("question", prompts()[1], 5)]))
    assert tokens_of(found)["question"] == reference(model, prompts()[1], 5)
    assert engine.stats().preemptions == 1
    told = tokens_of([*first, *events])
    for request in batch[:3]:
        assert told[request.id] == reference(model, request.prompt_ids, 150)
    assert len(told) == 8
    assert_empty(engine)


def test_a_crash_reaches_every_waiting_caller_and_the_engine_recovers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_random_model("llama")
    engine = make_engine()
    forward, started = engine._model.forward, threading.Event()

    def broken(*arguments: Any) -> torch.Tensor:
        started.wait(20)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine._model, "forward", broken)
    errors: list[str] = []

    def ask(index: int) -> None:
        try:
            list(engine.generate([Request(str(index), prompts()[index], 5)]))
        except GeneratorError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    while len(engine._waiting) + len(engine._running) < 4:
        pass
    started.set()
    for thread in threads:
        thread.join(timeout=20)
    assert len(errors) == 4 and all("RuntimeError: out of luck" in error for error in errors)
    monkeypatch.setattr(engine._model, "forward", forward)
    events = list(engine.generate([Request("again", prompts()[0], 10)]))
    assert tokens_of(events)["again"] == reference(model, prompts()[0], 10)
    assert_empty(engine)


def test_logits_that_are_no_numbers_fail_their_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    forward = engine._model.forward

    @torch.inference_mode()
    def spoiled(chunks: Any, pool: Any) -> torch.Tensor:
        logits = forward(chunks, pool).clone()
        row = 0
        for chunk in chunks:
            if 407 in chunk.tokens:
                logits[row : row + chunk.num_logits] = float("nan")
            row += chunk.num_logits
        return logits

    monkeypatch.setattr(engine._model, "forward", spoiled)
    with pytest.raises(GeneratorError, match="not numbers"):
        list(engine.generate([Request("bad", (9, 407), 5)]))
    assert finishes(list(engine.generate([Request("good", (9, 10), 2)])))["good"].new_tokens == 2
    assert_empty(engine)


def test_a_process_may_end_while_a_stream_still_runs() -> None:
    script = (
        "from tests.test_engine_scheduler import make_engine\n"
        "from rag.engine import Request\n"
        "stream = make_engine().generate([Request('a', (9, 10), 500)])\n"
        "next(stream)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_closed_engine_refuses_and_ends_what_runs() -> None:
    engine = make_engine()
    stream = engine.generate([Request("a", prompts()[0], 300)])
    next(stream)
    engine.close()
    with pytest.raises(GeneratorError, match="closed"):
        list(stream)
    with pytest.raises(GeneratorError, match="closed"):
        list(engine.generate([Request("b", (9,), 3)]))


def test_tokens_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(GeneratorError, match="vocabulary of 408"):
        make_engine().generate([Request("a", (9, 408), 5)])


def test_what_repeats_at_the_very_end_is_proposed_to_go_on_repeating() -> None:
    """The last occurrence of a run in a loop ends just before the end: only the loop's rest was
    proposed, a token a step where one token repeats, and prompt lookup gained next to nothing."""
    assert Drafter().propose([9, 5, 5, 5, 5], 4) == [5, 5, 5, 5]
    assert Drafter().propose([9, 1, 2, 3, 1, 2, 3], 4) == [1, 2, 3, 1]


def test_the_drafter_proposes_what_followed_and_learns() -> None:
    drafter = Drafter()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    assert drafter.propose(tokens, 8) == [4, 5, 6, 7]
    drafter.learn(4, 4, 15)
    assert drafter.propose(tokens, 8) == [4, 5, 6, 7, 8, 1, 2, 3]
    assert drafter.propose(tokens, 2) == [4, 5]
    assert drafter.propose([*tokens, 9], 8) == []  # never seen behind 9
    assert drafter.propose([*tokens, 9, 6, 7], 8) == [8, 1, 2, 3, 9, 6, 7, 8]  # two tokens recur
    drafter.learn(8, 0, 14)
    drafter.learn(2, 0, 14)
    assert drafter.propose([*tokens, 9, 6, 7], 8) == []  # rests after two failures
