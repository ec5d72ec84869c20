"""OpenAI's chat requests and answers: what is asked, and how a piece of an answer is written.

A field that would change the answer and can't be kept is refused, not ignored.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from rag.errors import InputError
from rag.filter import Filter
from rag.prompt import Message

DOCUMENTS = "documents"  # the model that answers from the knowledge base


def _whole(text: str) -> str:
    """The text, unless it holds half a character: JSON can say one (\\ud800), but no file or model can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "half_a_character", "the text holds {escape}, which is half a character. Send both halves, or none.",
            {"escape": f"\\u{ord(text[error.start]):04x}"},
        ) from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class Part(BaseModel):
    """A piece of a message's content; only text is read."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None  # read by nothing here, as by most models
    refusal: None = None

    def plain(self) -> Message:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`. What is left out takes the server's settings."""

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, ge=0.01, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)  # these two are what vLLM and SGLang call them
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Text | list[Text] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # only as much of these as is kept
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    response_format: TextFormat | None = None
    # notes for OpenAI's own books, which change no answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def most_tokens(self, limit: int) -> int:
        """How much may be written. Raises InputError above the server's `limit`."""
        wanted = self.max_completion_tokens or self.max_tokens or limit
        if wanted > limit:
            raise InputError(
                f"max_tokens is {wanted}; this server writes at most {limit} (its max_new_tokens)."
            )
        return wanted

    def conversation(self) -> tuple[str, list[tuple[str, str]]]:
        """The question, and the (question, answer) pairs before it. Raises InputError."""
        messages = [message.plain() for message in self.messages]
        roles = [message.role for message in messages]
        if "system" in roles:
            raise InputError(
                f"the model {DOCUMENTS!r} has instructions of its own: leave the system message out."
            )
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise InputError(
                f"the roles are {', '.join(roles)}; user and assistant must take turns, user first and last."
            )
        texts = [message.content for message in messages]
        return texts[-1], list(zip(texts[:-1:2], texts[1::2], strict=True))


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    question: Text
    answer: Text


class Where(BaseModel):
    """Which files are asked: any value of each condition, and every condition, as in rag.filter.Filter."""

    model_config = ConfigDict(extra="forbid")
    under: Text | list[Text] = Field(default_factory=list)
    file: Text | list[Text] = Field(default_factory=list)
    type: Text | list[Text] = Field(default_factory=list)
    since: date | None = None
    until: date | None = None

    def chosen(self) -> Filter:
        """Raises InputError for an empty text, or where no day lies between."""
        return Filter(self.under, self.file, self.type, self.since, self.until)


class AnswerRequest(BaseModel):
    """`POST /v1/answers`. `history` holds earlier turns, oldest first."""

    model_config = ConfigDict(extra="forbid")
    question: Text
    history: list[Turn] = Field(default_factory=list)
    top_k: int | None = Field(None, ge=1, le=50)
    where: Where = Field(default_factory=Where)
    stream: bool = False


class Reply:
    """Writes the parts of one chat answer."""

    def __init__(self, model: str) -> None:
        self._common: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
        }

    def chunk(
        self, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._common, "object": "chat.completion.chunk", "choices": [choice], **more})

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        return event({**self._common, "object": "chat.completion.chunk", "choices": [], "usage": usage})

    def whole(self, text: str, *, finish: str, usage: dict[str, Any], logprobs: Any = None, **more: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": usage, **more}


def event(value: object) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def usage_of(*, prompt: int, reused: int, new: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def logprobs_of(
    texts: Sequence[str], logprobs: Sequence[float], tops: Sequence[Sequence[tuple[str, float]]]
) -> dict[str, Any]:
    """Log-probabilities in OpenAI's form; `tops` is empty or has one list for each token."""
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        {**entry(text, logprob), "top_logprobs": [entry(*top) for top in (tops[at] if tops else ())]}
        for at, (text, logprob) in enumerate(zip(texts, logprobs, strict=True))
    ]
    return {"content": content, "refusal": None}
