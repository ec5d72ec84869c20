"""Layers spread over several devices, as far as a machine with one can show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rag.engine import create_engine
from rag.engine.int8_pool import Int8KVPool
from rag.engine.kvcache import KVPool
from rag.engine.placement import (
    WORKSPACE_BYTES,
    check_map,
    choose_device,
    mapped_devices,
    memory_shares,
)
from rag.errors import GeneratorError
from rag.generator import load_generator, load_model
from tests.test_engine import PROMPT, reference, run
from tests.test_generator import QUESTION, settings
from tests.tiny_models import make_model, make_random_model

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("kind", [KVPool, Int8KVPool])
def test_each_layer_keeps_its_keys_on_its_own_device(kind: type[KVPool]) -> None:
    pool = kind(
        num_layers=3, num_kv_heads=2, head_dim=16, capacity=64, dtype=torch.bfloat16,
        device=[CPU, META, META],
    )  # fmt: skip
    places = [pool.keys(layer, 0, 8).device for layer in range(3)]
    assert places == [CPU, META, META]
    assert [pool.padded_values(layer, 0, 8).device for layer in range(3)] == places


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_model_that_was_dispatched_part_by_part_gives_the_same(
    family: str, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate", reason="the extra multi-gpu is not installed")
    expected = reference(make_random_model(family), PROMPT, 12)
    folder = make_model(tmp_path / "model", family)
    model = load_model(folder, "model", torch.float32, device_map={"": "cpu"})
    parts = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    model = accelerate.dispatch_model(model, parts, force_hooks=True)
    engine = create_engine(model, context_length=256)
    for reused in (0, 69):
        tokens, finish = run(engine, PROMPT, new=12)
        assert (tokens, finish.reused_tokens) == (expected, reused)


def test_without_gpus_the_map_is_this_one_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_device("auto-map") == choose_device("auto")
    assert mapped_devices("auto-map", CPU) == mapped_devices("cpu", CPU) == [CPU]
    chosen = dataclasses.replace(settings(make_model(tmp_path / "model")), device="auto-map")
    generator = load_generator(chosen)
    assert generator.generate(QUESTION, max_new_tokens=3).new_tokens == 3


def test_every_gpu_keeps_room_for_its_part_of_the_cache() -> None:
    gib = 2**30
    shares = memory_shares([24 * gib, 16 * gib], 6 * gib)
    assert shares == {0: 21 * gib - WORKSPACE_BYTES, 1: 13 * gib - WORKSPACE_BYTES}
    assert memory_shares([gib, 16 * gib], 6 * gib)[0] == 0


def test_layers_outside_of_the_gpus_are_refused() -> None:
    check_map({"model.layers.0": 0, "model.layers.1": 1}, "m")
    check_map({"": "cpu"}, "m")
    with pytest.raises(GeneratorError, match="1 of 2 parts would lie outside"):
        check_map({"model.layers.0": 0, "model.layers.1": "cpu"}, "m")
    with pytest.raises(GeneratorError, match="does not fit on the GPUs: 1 of 3"):
        check_map({"a": 0, "b": 1, "c": "disk"}, "m")
