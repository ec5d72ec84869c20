"""What flows from a question to the reader: Hit, Citation, Disagreement, GenerationStats, Answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rag.document import Chunk


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved passage. Scores are higher-is-better; `score` is the fused one that ranks.

    `page` is the page of the sentence that matches the question best, which in a passage that
    runs over a page break need not be the page it starts on.
    """

    chunk: Chunk
    score: float
    dense_score: float = 0.0
    bm25_score: float = 0.0
    page: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The hit as `ask --json` and `retrieve` write it."""
        return {
            "path": self.chunk.path,
            "page": self.page if self.page is not None else self.chunk.page,
            "heading": " > ".join(self.chunk.headings),
            "start": self.chunk.start,
            "end": self.chunk.end,
            "score": round(self.score, 6),
            "dense_score": round(self.dense_score, 6),
            "bm25_score": round(self.bm25_score, 6),
            "text": self.chunk.text,
        }


@dataclass(frozen=True, slots=True)
class Citation:
    """Where a sentence of the answer comes from.

    `marker` is the n of `[n]`, 1-based into the answer's hits. [start, end) are offsets into the
    cited file's extracted text, and `quote` is exactly that slice.
    """

    marker: int
    path: str
    page: int | None
    start: int
    end: int
    quote: str


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two places that say different things about what was asked, the one that answers best first.

    `first_words` and `second_words` are what they differ in: two amounts, two dates, or, where one
    denies what the other says, both sentences.
    """

    kind: Literal["number", "date", "negation"]
    first: Citation
    second: Citation
    first_words: str
    second_words: str


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one answer cost. Token counts are the generator's own tokens; times are seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens whose keys and values were already in the cache
    new_tokens: int = 0
    seconds_to_first_token: float = 0.0
    tokens_per_second: float = 0.0
    seconds_retrieval: float = 0.0
    seconds_total: float = 0.0
    device: str = ""
    dtype: str = ""
    generator: str = ""
    finish_reason: str = ""  # "stop", "length", "cancelled"; "" where nothing was generated
    # Memory on the device, in bytes; 0 where nothing was generated.
    model_bytes: int = 0
    cache_bytes: int = 0  # the most that the KV cache may hold
    cached_bytes: int = 0  # what it held when the answer was finished
    # A generator elsewhere that doesn't count: its tokens were reckoned from the text.
    counts_estimated: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its evidence.

    `kind` says how the text came about: "generated" by the model, "quoted" (the best-supported
    sentence of the sources, because the model's answer was not trustworthy enough) or "refused".
    `unsupported` holds the sentences of `text` that no retrieved passage supports. `prompt` is what
    the model read, special tokens and all; empty where it was not asked. `doubtful`: the passages are
    near the question, but as many such questions have no answer in them as have one. `disagreements`:
    where passages say different things about what was asked.
    """

    question: str
    text: str
    kind: Literal["generated", "quoted", "refused"]
    citations: tuple[Citation, ...] = ()
    hits: tuple[Hit, ...] = ()
    unsupported: tuple[str, ...] = ()
    confidence: float = 0.0
    stats: GenerationStats = field(default_factory=GenerationStats)
    prompt: str = ""
    doubtful: bool = False
    disagreements: tuple[Disagreement, ...] = ()

    @property
    def refused(self) -> bool:
        return self.kind == "refused"

    def to_dict(self, *, with_prompt: bool = False) -> dict[str, Any]:
        """The object that `ask --json` prints; the long prompt only where it is wanted."""
        values: dict[str, Any] = {
            "question": self.question,
            "answer": self.text,
            "refused": self.refused,
            "kind": self.kind,
            "confidence": round(self.confidence, 4),
            "doubtful": self.doubtful,
            "citations": [asdict(citation) for citation in self.citations],
            "unsupported": list(self.unsupported),
            "disagreements": [asdict(disagreement) for disagreement in self.disagreements],
            "hits": [hit.to_dict() for hit in self.hits],
            "stats": asdict(self.stats),
        }
        if with_prompt:
            values["prompt"] = self.prompt
        return values
