"""Looking inside a model: shares that sum to one, probabilities worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from app.inside import Architecture, Inspector, probabilities
from app.markup import size_text
from rag.answer import Hit
from rag.document import Chunk
from rag.errors import GeneratorError
from rag.prompt import Prompt, reader_prompt
from tests.tiny_models import make_model

PASSAGES = ("The cat sat on the mat.", "键值缓存保存已经算过的键和值。")


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector(str(make_model(tmp_path_factory.mktemp("inside") / "model", "qwen3")))


def make_prompt() -> Prompt:
    hits = tuple(Hit(Chunk("a.md", text, 0, len(text)), 1.0) for text in PASSAGES)
    return Prompt(hits=hits, text=reader_prompt("Where is the cat?", PASSAGES))


def test_attention_of_every_step_sums_to_one_over_the_parts(inspector: Inspector) -> None:
    prompt = make_prompt()
    assert prompt.text is not None
    ids = [id_ for id_, _ in inspector.tokenize(prompt.text)]
    found = inspector.inspect(ids, prompt, max_steps=4)
    assert found.num_parts == 4 and len(found.steps) == 4
    for step in found.steps:
        assert step.attention.shape == (3, 4, 4)  # layers, heads, parts
        np.testing.assert_allclose(step.attention.sum(axis=-1), 1.0, atol=1e-4)
    assert found.steps[0].attention[:, :, 3].max() == 0.0  # nothing had been written yet
    assert found.steps[1].attention[:, :, 3].min() > 0.0
    np.testing.assert_allclose(found.attention(None, None).sum(axis=1), 1.0, atol=1e-4)


def test_tokens_of_the_prompt_belong_to_the_passage_they_stand_in(inspector: Inspector) -> None:
    prompt = make_prompt()
    assert prompt.text is not None
    ids = [id_ for id_, _ in inspector.tokenize(prompt.text)]
    found = inspector.inspect(ids, prompt, max_steps=1)
    for part, passage in enumerate(PASSAGES, 1):
        own = [id_ for id_, owner in zip(ids, found.part_of, strict=True) if owner == part]
        assert inspector._tokenizer.decode(own).strip() == passage


def test_the_steps_are_what_the_model_writes_greedily(inspector: Inspector) -> None:
    import torch

    prompt = make_prompt()
    assert prompt.text is not None
    ids = [id_ for id_, _ in inspector.tokenize(prompt.text)]
    found = inspector.inspect(ids, prompt, max_steps=5)
    with torch.inference_mode():
        expected = list(ids)
        for _ in range(5):  # without any cache
            logits = inspector._model(torch.tensor([expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
    assert [step.token_id for step in found.steps] == expected[len(ids):]


def test_the_spread_of_every_kind_of_weights_sums_to_one(inspector: Inspector) -> None:
    middles, spread = inspector.weight_histograms(bins=5)
    assert middles.shape == (5,) and middles[2] == pytest.approx(0.0, abs=1e-6)
    assert "norms" not in spread and {"embedding", "query", "feed-forward"} <= set(spread)
    for shares in spread.values():
        assert shares.sum() == pytest.approx(1.0, abs=1e-5)
        assert shares.argmax() == 2  # normal around zero


def test_a_prompt_too_long_to_keep_its_attention_is_refused(inspector: Inspector) -> None:
    with pytest.raises(GeneratorError, match="5000 tokens; up to 4096"):
        inspector.inspect([1] * 5000, make_prompt())


def test_probabilities_follow_temperature_top_k_and_top_p() -> None:
    # logits ln 4, ln 2, ln 1, ln 1: probabilities 1/2, 1/4, 1/8, 1/8
    candidates = [(7, float(np.log(4))), (8, float(np.log(2))), (9, 0.0), (5, 0.0)]
    plain = probabilities(candidates, temperature=1.0, top_k=0, top_p=1.0)
    assert [round(p, 6) for _, p, _ in plain] == [0.5, 0.25, 0.125, 0.125]
    half = probabilities(candidates, temperature=0.5, top_k=0, top_p=1.0)  # 16 : 4 : 1 : 1
    assert [round(p, 6) for _, p, _ in half] == [round(n / 22, 6) for n in (16, 4, 1, 1)]
    two = probabilities(candidates, temperature=1.0, top_k=2, top_p=1.0)
    assert [kept for *_, kept in two] == [True, True, False, False]
    assert round(two[0][1], 6) == round(2 / 3, 6)
    nucleus = probabilities(candidates, temperature=1.0, top_k=0, top_p=0.6)
    assert [kept for *_, kept in nucleus] == [True, True, False, False]  # 0.5 alone is not 0.6
    greedy = probabilities(candidates, temperature=0.0, top_k=0, top_p=1.0)
    assert greedy[0] == (7, 1.0, True) and not any(kept for *_, kept in greedy[1:])


def test_the_cache_grows_by_what_its_heads_need() -> None:
    model = Architecture(32, 32, 8, 128, 4096, 128_256, 500_000.0)
    assert model.cache_bytes(1) == 131_072  # 2 x 32 x 8 x 128 x 2
    assert model.cache_bytes(1, num_kv_heads=32) == 4 * model.cache_bytes(1)
    assert size_text(131_072) == "128.0 kB"


def test_rotary_cosines_start_at_one_and_turn_at_their_frequency() -> None:
    model = Architecture(1, 1, 1, 4, 4, 10, 100.0)
    cosines = model.rope_cosines([0, 1])  # frequencies 1 and 100 ** -0.5 = 0.1
    np.testing.assert_allclose(cosines, [[1, 1], [np.cos(1), np.cos(0.1)]], rtol=1e-5)
