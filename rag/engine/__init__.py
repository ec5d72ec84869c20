"""Token ids in, token ids out. Knows nothing about documents, questions or text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag.engine.interface import Engine, Event, FinishEvent, Request, Sampling, TokenEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Engine",
    "Event",
    "FinishEvent",
    "Request",
    "Sampling",
    "TokenEvent",
    "create_engine",
]


def create_engine(
    model: PreTrainedModel, *, context_length: int | None = None, kv_tokens: int | None = None
) -> Engine:
    """The engine that runs `model` best, with a KV cache of `kv_tokens` tokens on its device.

    `context_length` is the most prompt + new tokens of one request (default: the model's own
    limit); `kv_tokens` bounds what is cached over all requests (default: four contexts).
    """
    from rag.engine.slots import SlotEngine  # imports torch and transformers

    config = model.config.get_text_config(decoder=True)
    own_limit = getattr(config, "max_position_embeddings", None)
    if context_length is None:
        context_length = own_limit or 4096
    if kv_tokens is None:
        kv_tokens = 4 * context_length
    return SlotEngine(model, context_length=context_length, kv_tokens=kv_tokens)
