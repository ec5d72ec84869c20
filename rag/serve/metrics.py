"""Figures for Prometheus: requests, tokens, reuse, queue, latency."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """One server's figures. Labels are bounded: known routes, owners of keys, codes."""

    def __init__(
        self, *, waiting: Callable[[], float], running: Callable[[], float],
        cached_bytes: Callable[[], float],
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "rag_requests", "Requests by route, owner of the key, and status (499: the client hung up)",
            ("route", "owner", "status"), registry=registry,
        )
        self.seconds = Histogram(
            "rag_request_seconds", "Time until the last byte", ("route",), buckets=_SECONDS, registry=registry
        )
        self.queue_seconds = Histogram(
            "rag_queue_seconds", "Time a request waited for its turn", buckets=_SECONDS, registry=registry
        )
        self.first_seconds = Histogram(
            "rag_first_piece_seconds", "Time from a request's turn to the first piece of its answer",
            buckets=_SECONDS, registry=registry,
        )
        self.prompt_tokens = Counter("rag_prompt_tokens", "Tokens of prompts", registry=registry)
        self.reused_tokens = Counter(
            "rag_reused_tokens", "Tokens of prompts that were in the KV cache", registry=registry
        )
        self.new_tokens = Counter("rag_new_tokens", "Tokens written", registry=registry)
        self.answers = Counter(
            "rag_answers", "Answers from the documents by how they came about", ("kind",), registry=registry
        )
        for name, text, read in (
            ("rag_waiting", "Requests that wait for their turn", waiting),
            ("rag_running", "Requests that run", running),
            ("rag_kv_cache_bytes", "Memory that cached keys and values take", cached_bytes),
        ):
            Gauge(name, text, registry=registry).set_function(read)

    def count_tokens(self, *, prompt: int, reused: int, new: int) -> None:
        self.prompt_tokens.inc(prompt)
        self.reused_tokens.inc(reused)
        self.new_tokens.inc(new)

    def text(self) -> bytes:
        return generate_latest(self.registry)
