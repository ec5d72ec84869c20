"""Token ids in, token ids out. Knows nothing about documents, questions or text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag.engine.interface import Engine, Event, FinishEvent, Request, Sampling, TokenEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rag.engine.linear import Bits

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
    model: PreTrainedModel,
    *,
    context_length: int | None = None,
    kv_tokens: int | None = None,
    release: bool = False,
    bits: Bits | None = None,
    int8_kv: bool = False,
    splice_passages: bool = False,
) -> Engine:
    """The engine that runs `model` best, with a KV cache of `kv_tokens` tokens on its device.

    `context_length` is the most prompt + new tokens of one request (default: the model's own
    limit); `kv_tokens` bounds what is cached over all requests (default: four contexts). With
    `release` the model may give up its weights to the engine and can't be used afterwards.
    `bits` stores the weights in 8 or 4 bits, `int8_kv` keys and values in 8. With
    `splice_passages` requests may name passages to be reused approximately; `kv_tokens` of these
    are kept beside the cache. Raises GeneratorError where the model can't have that.
    """
    # Here, because importing rag must load neither torch nor transformers.
    from rag.engine.model import DecoderModel, why_unsupported
    from rag.engine.scheduler import PooledEngine
    from rag.engine.slots import SlotEngine
    from rag.engine.transformers_model import TransformersModel, Unsupported
    from rag.errors import GeneratorError

    config = model.config.get_text_config(decoder=True)
    if context_length is None:
        context_length = getattr(config, "max_position_embeddings", None) or 4096
    if kv_tokens is None:
        kv_tokens = 4 * context_length
    reason = why_unsupported(model)
    pooled: DecoderModel | TransformersModel
    if reason is None:
        pooled = DecoderModel(model, release=release, bits=bits)
        if splice_passages and pooled.has_windows:
            raise GeneratorError(
                "passages can't be reused approximately with sliding windows. "
                "Set passage_reuse to exact."
            )
        return PooledEngine(
            pooled,
            context_length=context_length,
            kv_tokens=kv_tokens,
            int8_kv=int8_kv,
            splicing=pooled if splice_passages else None,
            graphs_of=pooled,
        )
    if bits:
        raise GeneratorError(
            f"{bits}-bit weights need the engine's own forward, and {reason}. Choose another dtype."
        )
    if splice_passages:  # with dynamic or longrope RoPE a key can't be turned at all
        raise GeneratorError(
            f"passages can be reused approximately by the engine's own forward only, and {reason}. "
            "Set passage_reuse to exact."
        )
    try:
        pooled = TransformersModel(model)
    except Unsupported as why:
        if int8_kv:
            raise GeneratorError(
                f"an 8-bit KV cache needs the pool, and this model can't use it: {why}. "
                "Set kv_dtype to auto."
            ) from why
        return SlotEngine(
            model, context_length=context_length, kv_tokens=kv_tokens, reason=f" ({why})"
        )
    return PooledEngine(pooled, context_length=context_length, kv_tokens=kv_tokens, int8_kv=int8_kv)
