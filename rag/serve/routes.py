"""The addresses and what they answer."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from rag.answer import Answer
from rag.errors import InputError, KnowledgeBaseError, PromptError, RagError
from rag.pipeline import Rag
from rag.prompt import Prompt
from rag.serve.admission import Admission, TurnedAway
from rag.serve.chat import (
    DOCUMENTS,
    DONE,
    AnswerRequest,
    ChatRequest,
    Reply,
    event,
    logprobs_of,
    usage_of,
)
from rag.serve.current import CurrentRag
from rag.serve.gate import error_body
from rag.serve.job import Job
from rag.serve.metrics import Metrics
from rag.stopping import Stop

if TYPE_CHECKING:
    from rag.generator import GenerationResult

_log = logging.getLogger("rag.serve")
_NO_BASE = (
    "the server's knowledge base is gone or can't be used; its log says why. Build it again with "
    "python -m ingest: this server then takes it up by itself."
)
_BROKEN = "the server has failed over this request; its log says why."


class Events(Response):
    """Server-sent events. The source is closed with the response, however that ends."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._source) as source:  # type: ignore[type-var]
            async for part in source:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Service:
    """The knowledge base and the model behind the addresses."""

    def __init__(
        self, rag: Rag, *, admission: Admission, executor: Executor, metrics: Metrics
    ) -> None:
        self.rag = rag  # its models and settings; its base may be gone
        self._current = CurrentRag(rag)
        self._admission = admission
        self._executor = executor
        self._metrics = metrics
        self._started = int(time.time())
        # A path says more of this machine than a client need know.
        self._model = Path(rag.generator.name.rpartition("#")[2]).name

    # what there is

    def has_base(self) -> bool:
        """Whether the knowledge base is there and can be used."""
        try:
            self._current.get()
        except RagError:
            return False
        return True

    def models(self) -> dict[str, Any]:
        """The documents, and the bare model; but the reader can only answer from passages."""
        names = [DOCUMENTS] + [self._model] * (self.rag.generator.layout != "reader")
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": self._started, "owned_by": "local-rag",
             "max_model_len": self.rag.generator.context_length}
            for name in names
        ]}

    # answers from the documents

    async def answer(self, asked: AnswerRequest, request: Request) -> Response:
        history = [(turn.question, turn.answer) for turn in asked.history]
        where = asked.where.chosen()

        def work(stop: Stop) -> Iterator[Any]:
            rag = _with(self._current.get(), top_k=asked.top_k)
            return rag.stream(asked.question, history=history, where=where, stop=stop)

        pieces = await self._begin(work, request)
        if asked.stream:
            return Events(self._guarded(self._answer_events(pieces)))
        answer = await self._last(pieces)
        return JSONResponse(answer.to_dict())

    async def _answer_events(self, pieces: AsyncIterator[Any]) -> AsyncIterator[bytes]:
        async for piece in pieces:
            if isinstance(piece, Answer):
                self._finished(piece)
                yield event(piece.to_dict())
            else:
                yield event({"piece": piece})
        yield DONE

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        if asked.model == DOCUMENTS:
            return await self._chat_documents(asked, request)
        if asked.model == self._model and self.rag.generator.layout != "reader":
            return await self._chat_model(asked, request)
        names = ", ".join(model["id"] for model in self.models()["data"])
        return _error(404, f"there is no model {asked.model!r} here. There is: {names}.", "model_not_found")

    async def _chat_documents(self, asked: ChatRequest, request: Request) -> Response:
        if asked.stops() or asked.logprobs or asked.top_logprobs:
            raise InputError(f"the model {DOCUMENTS!r} takes neither stop nor logprobs.")
        question, history = asked.conversation()
        changes = self._changes(asked)

        def work(stop: Stop) -> Iterator[Any]:
            return _with(self._current.get(), **changes).stream(question, history=history, stop=stop)

        pieces = await self._begin(work, request)
        reply = Reply(DOCUMENTS)
        if asked.stream:
            return Events(self._guarded(self._document_chunks(pieces, reply, _with_usage(asked))))
        answer = await self._last(pieces)
        return JSONResponse(reply.whole(
            answer.text, finish=_finish(answer), usage=_usage(answer), answer=answer.to_dict(),
        ))

    async def _document_chunks(
        self, pieces: AsyncIterator[Any], reply: Reply, with_usage: bool
    ) -> AsyncIterator[bytes]:
        yield reply.chunk({"role": "assistant", "content": ""})
        async for piece in pieces:
            if not isinstance(piece, Answer):
                yield reply.chunk({"content": piece})
                continue
            self._finished(piece)
            # The text in it is the one that counts: its citations have been checked.
            yield reply.chunk({}, finish=_finish(piece), answer=piece.to_dict())
            if with_usage:
                yield reply.usage_chunk(_usage(piece))
        yield DONE

    async def _last(self, pieces: AsyncIterator[Any]) -> Answer:
        answer = None
        async for piece in pieces:
            answer = piece
        assert isinstance(answer, Answer), "a stream ends with the Answer"
        self._finished(answer)
        return answer

    def _finished(self, answer: Answer) -> None:
        """Count it. Raises TurnedAway where it was ended early."""
        stats = answer.stats
        self._metrics.answers.labels(answer.kind).inc()
        self._metrics.count_tokens(
            prompt=stats.prompt_tokens, reused=stats.reused_tokens, new=stats.new_tokens
        )
        if stats.finish_reason == "cancelled":
            raise _cut_short()

    def _changes(self, asked: ChatRequest) -> dict[str, Any]:
        """The settings that a request names; None where it leaves one out."""
        return {
            "temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed,
            "sampling_top_k": asked.top_k, "repetition_penalty": asked.repetition_penalty,
            "max_new_tokens": asked.most_tokens(self.rag.settings.max_new_tokens),
        }

    # the model by itself

    async def _chat_model(self, asked: ChatRequest, request: Request) -> Response:
        from rag.generator import Generator
        from rag.remote import RemoteGenerator

        generator = self.rag.generator
        here = isinstance(generator, Generator) and not isinstance(generator, RemoteGenerator)
        if asked.top_logprobs and not asked.logprobs:
            raise InputError("top_logprobs needs logprobs to be true.")
        if asked.logprobs and not here:
            raise InputError("logprobs are given only where the model runs in this server.")
        prompt = Prompt(hits=(), messages=tuple(message.plain() for message in asked.messages))
        pieces = await self._begin(_bare(_with(self.rag, **self._changes(asked)), prompt, asked), request)
        reply = Reply(self._model)
        if asked.stream:
            return Events(self._guarded(self._model_chunks(pieces, reply, asked)))
        async for piece in pieces:
            result = piece
        self._finished_result(result)
        return JSONResponse(reply.whole(
            result.text, finish=result.finish_reason, usage=_result_usage(result),
            logprobs=self._logprobs(result, asked),
        ))

    async def _model_chunks(
        self, pieces: AsyncIterator[Any], reply: Reply, asked: ChatRequest
    ) -> AsyncIterator[bytes]:
        yield reply.chunk({"role": "assistant", "content": ""})
        async for piece in pieces:
            if isinstance(piece, str):
                yield reply.chunk({"content": piece})
                continue
            self._finished_result(piece)
            # All of them with the last chunk: a piece of text need not begin or end with a token.
            logprobs = self._logprobs(piece, asked)
            yield reply.chunk({}, finish=piece.finish_reason, logprobs=logprobs)
            if _with_usage(asked):
                yield reply.usage_chunk(_result_usage(piece))
        yield DONE

    def _finished_result(self, result: GenerationResult) -> None:
        self._metrics.count_tokens(
            prompt=result.prompt_tokens, reused=result.reused_tokens, new=result.new_tokens
        )
        if result.finish_reason == "cancelled":
            raise _cut_short()

    def _logprobs(self, result: GenerationResult, asked: ChatRequest) -> dict[str, Any] | None:
        if not asked.logprobs:
            return None
        text = self.rag.generator.token_text
        return logprobs_of(
            [text(token) for token in result.token_ids], result.token_logprobs,
            [[(text(token), logprob) for token, logprob in top] for top in result.top_logprobs],
        )

    # what both share

    async def _begin(
        self, work: Callable[[Stop], Iterator[Any]], request: Request
    ) -> AsyncIterator[Any]:
        """The pieces, once the first is there: until then an error can still be a status."""
        came = time.perf_counter()
        job = await Job.start(
            work, admission=self._admission, executor=self._executor, stop=request.state.stop
        )
        turn = time.perf_counter()
        self._metrics.queue_seconds.observe(turn - came)
        items = job.items()
        first = await anext(items, None)
        if first is None:
            raise _cut_short()
        self._metrics.first_seconds.observe(time.perf_counter() - turn)
        return _chain(first, items)

    async def _guarded(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """An error after the first byte can only be an event."""
        try:
            async for part in parts:
                yield part
        except Exception as error:
            status, message, _ = describe_error(error)
            yield event(error_body(status, message))


async def _chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for item in rest:
        yield item


def _bare(rag: Rag, prompt: Prompt, asked: ChatRequest) -> Callable[[Stop], Iterator[Any]]:
    """The model's pieces and last its GenerationResult."""

    def work(stop: Stop) -> Iterator[Any]:
        from rag.engine import Sampling

        generator, chosen = rag.generator, rag.settings
        max_new_tokens = chosen.max_new_tokens
        needed = generator.count_tokens(prompt) + max_new_tokens
        if needed > generator.context_length:
            raise PromptError(
                f"messages and new tokens need {needed} tokens, the model's context has "
                f"{generator.context_length}. Send less, or lower max_tokens."
            )
        more = {"top_logprobs": asked.top_logprobs} if asked.top_logprobs else {}
        result = yield from generator.stream(
            prompt, max_new_tokens=max_new_tokens, stop_strings=asked.stops(), stop=stop,
            sampling=Sampling(
                temperature=chosen.temperature, top_k=chosen.sampling_top_k, top_p=chosen.top_p,
                repetition_penalty=chosen.repetition_penalty, seed=chosen.seed,
            ),
            **more,
        )
        yield result

    return work


def _with(rag: Rag, **changes: Any) -> Rag:
    """The same base and models under other settings, for one request. None leaves a setting."""
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        return rag
    other = copy.copy(rag)  # the base, the models and their lock stay shared
    other.settings = replace(rag.settings, **given)
    return other


def _with_usage(asked: ChatRequest) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


def _finish(answer: Answer) -> str:
    return answer.stats.finish_reason or "stop"


def _usage(answer: Answer) -> dict[str, Any]:
    stats = answer.stats
    return usage_of(prompt=stats.prompt_tokens, reused=stats.reused_tokens, new=stats.new_tokens)


def _result_usage(result: GenerationResult) -> dict[str, Any]:
    return usage_of(prompt=result.prompt_tokens, reused=result.reused_tokens, new=result.new_tokens)


def _cut_short() -> TurnedAway:
    return TurnedAway("the server is shutting down; this answer was ended early.", retry_after=10, closing=True)


def describe_error(error: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, message and headers. What a client can't set right is for the log, not for it."""
    if isinstance(error, TurnedAway):
        return 503 if error.closing else 429, error.message, {"retry-after": str(error.retry_after)}
    if isinstance(error, (InputError, PromptError)):
        return 400, str(error), {}
    if isinstance(error, RagError):
        _log.error("a request failed: %s", error)
        is_base = isinstance(error, KnowledgeBaseError)
        message = _NO_BASE if is_base else "the server can't answer at present; its log says why."
        return 503, message, {"retry-after": "10"}
    _log.error("a request failed", exc_info=error)
    return 500, _BROKEN, {}


def _error(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error_body(status, message, code), status_code=status, headers=headers)


def make_app(service: Service, metrics: Metrics, *, closing: Callable[[], bool]) -> FastAPI:
    """The addresses. Pages of documentation are left out: they load scripts from elsewhere."""
    app = FastAPI(title="local-rag", docs_url=None, redoc_url=None)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await service.chat(asked, request)

    @app.post("/v1/answers")
    async def answers(asked: AnswerRequest, request: Request) -> Response:
        return await service.answer(asked, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(service.models())

    @app.get("/health")
    async def health() -> Response:
        if closing():
            return JSONResponse({"status": "closing"}, status_code=503)
        is_there = await asyncio.to_thread(service.has_base)
        status = "ok" if is_there else "no knowledge base"
        return JSONResponse({"status": status}, status_code=200 if is_there else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(TurnedAway)
    @app.exception_handler(RagError)
    async def known(request: Request, error: Exception) -> Response:
        status, message, headers = describe_error(error)
        return _error(status, message, headers=headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return _error(500, _BROKEN)  # the server below writes the traceback into its log

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{place or 'the body'}: {first['msg']}", "invalid_request")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    return app
