"""Stopping an answer of a real engine: its request is cancelled and its slots are free again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from app.conversations import Conversation, Turn
from app.jobs import Desk, Job
from rag.confidence import Calibration
from rag.generator import load_generator
from rag.pipeline import Rag
from rag.settings import Settings
from tests.fakes import WordEmbedder, base_of
from tests.tiny_models import make_model

TEXT = "The boiler in the cellar is serviced every October by the engineer of the house. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends by itself: it may write 3,000 tokens."""
    return make_model(
        tmp_path_factory.mktemp("stop") / "model", "llama", max_position_embeddings=8192
    )


@pytest.fixture
def rag(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rag:
    embedder = WordEmbedder()
    base = base_of(tmp_path / "kb", {"boiler.txt": TEXT}, embedder)
    # Whether a text of the test supports an answer is the pipeline's affair and tested there.
    monkeypatch.setattr("rag.pipeline.support_probability", lambda *_: (0.9, 0.5))
    settings = Settings(
        kb=str(base.folder), generator=str(folder), device="cpu", dtype="float32",
        max_prompt_tokens=4096, max_new_tokens=3000,
    )
    rag = Rag(base, embedder, settings)
    generator = load_generator(settings)
    generator.stop_ids = ()
    rag.use_generator(generator)
    return rag


def submit(rag: Rag) -> tuple[Desk, Turn]:
    desk, turn, conversation = Desk(), Turn("When is the boiler in the cellar serviced?"), Conversation()
    conversation.turns.append(turn)
    desk.submit(Job(turn, conversation, lambda: rag, lambda kept: None))
    return desk, turn


def wait_until(condition: Any) -> float:
    """Seconds until it holds."""
    began = time.perf_counter()
    while not condition():
        assert time.perf_counter() - began < 20
        time.sleep(0.002)
    return time.perf_counter() - began


def stats(rag: Rag) -> Any:
    return rag.generator.engine.stats()  # type: ignore[attr-defined]


def test_an_answer_that_streams_is_stopped_and_its_memory_is_free(rag: Rag) -> None:
    desk, turn = submit(rag)
    wait_until(lambda: turn.state == "writing")
    desk.stop(turn)
    assert wait_until(lambda: turn.is_ended) < 5  # 3,000 tokens would take longer
    assert turn.state == "stopped" and turn.text and turn.answer is None
    wait_until(lambda: stats(rag).running == stats(rag).waiting == 0)
    assert stats(rag).cache.in_use == 0 and stats(rag).new_tokens < 2900


def test_words_that_are_held_back_can_be_stopped_too(rag: Rag) -> None:
    rag.use_generator(rag.generator, Calibration(bias=0.0, logprob=1.0, support=1.0, threshold=0.5))
    desk, turn = submit(rag)
    wait_until(lambda: stats(rag).new_tokens > 5)
    desk.stop(turn)
    assert wait_until(lambda: turn.is_ended) < 5
    assert turn.state == "stopped" and turn.text == ""
    wait_until(lambda: stats(rag).running == stats(rag).waiting == 0)
    assert stats(rag).cache.in_use == 0 and stats(rag).new_tokens < 2900


def test_a_prompt_that_is_being_read_is_given_up(rag: Rag, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop comes between two parts of the prompt; no token is ever written."""
    engine: Any = rag.generator.engine
    forward, turns = engine._model.forward, []

    def forward_once(chunks: Any, pool: Any) -> Any:
        desk.stop(turns[0])
        return forward(chunks, pool)

    monkeypatch.setattr(engine._model, "forward", forward_once)
    monkeypatch.setattr(
        engine, "limits", type(engine.limits)(64, 64, rows_per_call=1, rows=1, draft_tokens=0)
    )
    desk = Desk()
    turn, conversation = Turn("When is the boiler in the cellar serviced?"), Conversation()
    turns.append(turn)
    conversation.turns.append(turn)
    desk.submit(Job(turn, conversation, lambda: rag, lambda kept: None))
    wait_until(lambda: turn.is_ended)
    assert turn.state == "stopped" and stats(rag).new_tokens == 0
    wait_until(lambda: stats(rag).running == 0)
    assert stats(rag).computed_tokens == 64 and stats(rag).cache.in_use == 0
