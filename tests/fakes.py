"""Small real classes that stand in for big ones, so that expected values can be worked out by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rag.document import Chunk, Document
from rag.embedder import Embedder
from rag.generator import GenerationResult
from rag.knowledge import FileRecord, KnowledgeBase
from rag.prompt import Prompt
from rag.terms import passage_terms


class WordEmbedder:
    """Each term falls into one of 64 boxes; a text is the unit vector of its counts."""

    name = "words"
    fingerprint = "words-64"
    dim = 64
    max_tokens: int | None = None

    def __init__(self, name: str = "words") -> None:
        self.name = name
        self.fingerprint = f"{name}-64"
        self.calls = 0

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        self.calls += len(texts)
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for term in passage_terms(text):
                row[hashlib.md5(term.encode()).digest()[0] % self.dim] += 1
            norm = np.linalg.norm(row)
            if norm:
                row /= norm
        return rows

    def embed_questions(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed_passages(texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(passage_terms(text)) for text in texts]


def base_of(folder: Path, texts: Mapping[str, str], embedder: Embedder | None = None) -> KnowledgeBase:
    """A new knowledge base in `folder`: each text a file of one chunk."""
    embedder = embedder or WordEmbedder()
    base = KnowledgeBase.create(folder)
    with base.writing():
        base.bind_embedder(embedder)
        for path, text in texts.items():
            chunk = Chunk(path, text, 0, len(text))
            base.put_file(
                FileRecord(path, path, 1, "ok"), Document(path, text, "txt"), [chunk],
                embedder.embed_passages([chunk.indexed_text]),
            )
        base.publish()
    return base


def drain(stream: Iterator[str]) -> tuple[list[str], GenerationResult]:
    """All pieces of a generator's stream, and the result."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


class ScriptedGenerator:
    """Writes what it is told to, word by word, and keeps the prompts it was given."""

    name = "scripted"
    device = "cpu"
    dtype = "float32"
    context_length = 4096
    model_bytes = 3 * 2**20
    cache_bytes = 2 * 2**20
    cached_bytes = 2**20

    def __init__(self, *texts: str, layout: str = "chat", logprob: float = -0.1) -> None:
        self.texts = list(texts)
        self.layout = layout
        self.logprob = logprob
        self.prompts: list[Prompt] = []

    def count_tokens(self, prompt: Prompt) -> int:
        text = prompt.text or " ".join(message.content for message in prompt.messages)
        return len(text.split())

    def prompt_text(self, prompt: Prompt) -> str:
        return prompt.text or "\n".join(f"[{m.role}]\n{m.content}" for m in prompt.messages)

    def stream(self, prompt, *, max_new_tokens, sampling=None, stop_strings=(), stop=None):
        self.prompts.append(prompt)
        text = self.texts.pop(0)
        pieces = text.split(" ")
        for at, piece in enumerate(pieces):
            yield piece if at == 0 else f" {piece}"
        return self._result(prompt, text)

    def generate_batch(self, prompts, *, max_new_tokens, sampling=None, stop_strings=()):
        self.prompts += prompts
        return [self._result(prompt, self.texts.pop(0)) for prompt in prompts]

    def _result(self, prompt: Prompt, text: str) -> GenerationResult:
        words = text.split(" ")
        return GenerationResult(
            text=text, token_ids=tuple(range(len(words))), token_logprobs=(self.logprob,) * len(words),
            finish_reason="stop", prompt_tokens=self.count_tokens(prompt), reused_tokens=0,
            new_tokens=len(words), seconds_to_first_token=0.01, tokens_per_second=100.0,
        )
