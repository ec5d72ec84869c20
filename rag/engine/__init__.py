"""Token ids in, token ids out. Knows nothing about documents, questions or text."""

from rag.engine.interface import Engine, Event, FinishEvent, Request, Sampling, TokenEvent

__all__ = ["Engine", "Event", "FinishEvent", "Request", "Sampling", "TokenEvent"]
