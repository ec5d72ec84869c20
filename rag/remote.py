"""A generator elsewhere: any server with OpenAI's API, such as vLLM, SGLang, llama.cpp or Ollama.

The prompt goes out as messages, in the order of `rag.prompt`, so that the server's own prefix cache
finds its beginning again. Questions and passages leave this machine; nothing else is sent.
"""

from __future__ import annotations

import asyncio
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from collections.abc import Generator as PyGenerator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from rag.engine.interface import Sampling
from rag.errors import GeneratorError
from rag.generator import GenerationResult, Generator
from rag.prompt import Message, Prompt
from rag.settings import Settings
from rag.stopping import Stop

PREFIX = "openai:"
KEY_VARIABLE = "RAG_GENERATOR_KEY"
_CONNECT_SECONDS = 10.0
_RETRIES = 2  # with growing pauses, or those the server asks for; only before the first piece
_AT_ONCE = 8  # requests of a batch that are under way together
_MESSAGE_TOKENS = 8  # what a chat template puts around a message, generously
# What openai's client runs into where a list of models is something else altogether.
_NO_LIST = (ValueError, AttributeError, TypeError, KeyError)
_OF_LOGPROBS = re.compile(r"log[\s_-]?prob", re.IGNORECASE)
_NOT_IN_ADDRESS = re.compile(r"[\s\x00-\x1f\x7f]")
_LETTERS = re.compile(r"[A-Za-z ]+")


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """Where the server is, and which of its models is meant ("" is its only one)."""

    url: str
    model: str

    @classmethod
    def parse(cls, generator: str) -> RemoteAddress:
        """From `openai:http://host:8000/v1#model`. Raises GeneratorError for another form."""
        url, _, model = generator.removeprefix(PREFIX).partition("#")
        parts = _split(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise GeneratorError(
                f"{_without_userinfo(generator)!r} names no server. Its form is "
                "openai:http://host:8000/v1#model."
            )
        if parts.username or parts.password or parts.query:
            raise GeneratorError(
                f"a key does not belong into the generator's address, which is shown and stored. "
                f"Put it into the environment variable {KEY_VARIABLE}."
            )
        return cls(url.rstrip("/"), model)


def _split(url: str) -> SplitResult | None:
    """The parts of an address; None where it is none, as with a port that is no number from 0 to 65535."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  is read only now
    except ValueError:
        return None
    return None if _NOT_IN_ADDRESS.search(url) else parts


def _without_userinfo(text: str) -> str:
    return re.sub(r"//[^/@]*@", "//", text.partition("?")[0])


def estimate_tokens(text: str) -> int:
    """Tokens of a text for a tokenizer that isn't here, rather too many than too few.

    Three letters or spaces a token; every other character, a Chinese one or a digit, is one.
    """
    letters = sum(len(run) for run in _LETTERS.findall(text))
    return len(text) - letters + -(-letters // 3)


@dataclass(slots=True)
class _Written:
    """What has come of one answer so far."""

    began: float
    text: str = ""
    finish: str = ""
    first: float | None = None
    logprobs: list[float] = field(default_factory=list)
    usage: Any = None
    thoughts: int = 0  # characters of reasoning, which are no answer


class RemoteGenerator(Generator):
    """A Generator whose model runs on a server. It has no tokens here: only text and counts."""

    def __init__(
        self, address: RemoteAddress, *, context_length: int = 0, seconds: float = 60.0, key: str = ""
    ) -> None:
        """Asks the server for its models. `context_length` 0 takes what it says; `seconds` is the
        longest wait for the next piece. Raises GeneratorError where it can't be used as it stands.
        """
        self._address = address
        self._seconds = seconds
        self._key = key
        self._memory = None  # what it takes is the server's affair
        self._gives_logprobs = True
        self._loop = asyncio.new_event_loop()
        clients: list[Any] = []
        thread = threading.Thread(target=_run, args=(self._loop, clients), name="rag-remote", daemon=True)
        thread.start()
        # The thread holds only the loop, so that a generator that nobody holds takes both along.
        self.close = weakref.finalize(self, _end, self._loop, thread)
        try:
            self._client = self._await(self._connect())
            clients.append(self._client)
            model, said = self._await(self._find_model())
        except BaseException:
            self.close()
            raise
        self._model = model
        self.name = f"{PREFIX}{address.url}#{model}"
        self.layout = "chat"
        self.device = urlsplit(address.url).netloc
        self.dtype = "its own dtype"
        self.stop_ids = ()
        self.context_length = context_length or said
        if not self.context_length:
            self.close()
            raise GeneratorError(
                f"{address.url} does not say how long the context of {model!r} is. Set "
                "remote_context_length to what it was started with, in tokens."
            )

    def describe(self) -> str:
        return (
            f"{self._model} at {self._address.url}: its chat template, context {self.context_length} "
            "tokens, prompts leave this machine, their tokens are estimated beforehand"
            + ("" if self._gives_logprobs else ", no log-probabilities")
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        raise self._not_here()

    def token_text(self, token_id: int) -> str:
        raise self._not_here()

    def prompt_text(self, prompt: Prompt) -> str:
        """The messages as they are sent; the server puts its template around them."""
        return "\n\n".join(f"[{message.role}]\n{message.content}" for message in prompt.messages)

    def count_tokens(self, prompt: Prompt) -> int:
        """An estimate, on the safe side: the tokenizer is the server's."""
        return sum(estimate_tokens(m.content) + _MESSAGE_TOKENS for m in prompt.messages)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        top_logprobs: int = 0,
        stop: Stop | None = None,
    ) -> PyGenerator[str, None, GenerationResult]:
        """As a Generator's; closing or stopping it closes the connection, which ends the work there."""
        self._refuse_top(top_logprobs)
        arguments = self._arguments(prompt, max_new_tokens, sampling, stop_strings)
        written = _Written(time.perf_counter())
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        task = asyncio.run_coroutine_threadsafe(
            self._write(arguments, written, pieces.put), self._loop
        )
        task.add_done_callback(lambda _: pieces.put(None))
        if stop is not None:
            stop.then(lambda: _cancel(task))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            if task.cancelled():
                return self._result(prompt, written, "cancelled")
            task.result()
            return self._result(prompt, written, _finish_reason(written, max_new_tokens))
        finally:
            task.cancel()

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> list[GenerationResult]:
        """As a Generator's; some of them are under way together, and the server orders them."""
        self._refuse_top(top_logprobs)
        results: list[GenerationResult] = self._await(
            self._batch(prompts, max_new_tokens, sampling, stop_strings)
        )
        return results

    # in the loop's thread

    async def _connect(self) -> Any:
        try:
            from openai import AsyncOpenAI, Omit, Timeout
        except ModuleNotFoundError as error:
            if error.name != "openai":
                raise
            raise GeneratorError(
                "a generator elsewhere needs the package openai: pip install 'local-rag[openai]'"
            ) from error
        # What stands in OPENAI_... variables is meant for OpenAI and not for this server.
        self._headers = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        if not self._key:
            self._headers["Authorization"] = Omit()
        return AsyncOpenAI(
            base_url=self._address.url, api_key=self._key or "none",
            max_retries=_RETRIES, timeout=Timeout(self._seconds, connect=_CONNECT_SECONDS),
        )

    async def _find_model(self) -> tuple[str, int]:
        """The model's name and, where the server says it, its context; 0 where it does not."""
        wanted = self._address.model
        from openai import NotFoundError, OpenAIError

        try:
            listed = self._client.models.list(extra_headers=self._headers)
            models = [model.model_dump() async for model in listed]
        except NotFoundError as error:  # a server without this list
            if wanted:
                return wanted, 0
            raise self._error(error) from error
        except (OpenAIError, *_NO_LIST) as error:
            raise self._error(error) from error
        if wanted and not models:  # a list that says nothing: whether it has the model, asking shows
            return wanted, 0
        names = [str(model["id"]) for model in models]
        for model in models:
            known = (model["id"], *(model.get("aliases") or ()))
            # Ollama lists `name:latest` and answers to `name`.
            if wanted in known or f"{wanted}:latest" in known or (not wanted and len(models) == 1):
                return wanted or str(model["id"]), _context_of(model)
        raise GeneratorError(
            f"{self._address.url} has no model {wanted!r}. It has: {', '.join(names) or 'none'}. "
            "Name one behind a '#'."
            if wanted else
            f"{self._address.url} has {len(names)} models: {', '.join(names)}. Name one: "
            f"{PREFIX}{self._address.url}#{names[0] if names else 'MODEL'}"
        )

    async def _write(
        self, arguments: dict[str, Any], written: _Written, put: Callable[[str], None]
    ) -> None:
        from openai import OpenAIError

        try:
            stream = await self._open(arguments)
            try:
                await _take(stream, written, put)
            finally:
                await stream.close()
        except (OpenAIError, ValueError) as error:  # ValueError: events that are no JSON
            raise self._error(error, written) from error

    async def _open(self, arguments: dict[str, Any]) -> Any:
        """The stream of an answer, with log-probabilities unless the server refuses them."""
        from openai import BadRequestError, UnprocessableEntityError

        create = self._client.chat.completions.create
        if self._gives_logprobs:
            try:
                return await create(**arguments, logprobs=True)
            except (BadRequestError, UnprocessableEntityError) as error:
                if not _OF_LOGPROBS.search(str(error)):
                    raise
                self._gives_logprobs = False  # shows in `describe`
        return await create(**arguments)

    async def _batch(
        self, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling | None,
        stop_strings: Sequence[str],
    ) -> list[GenerationResult]:
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(prompt: Prompt) -> GenerationResult:
            async with places:
                arguments = self._arguments(prompt, max_new_tokens, sampling, stop_strings)
                written = _Written(time.perf_counter())
                await self._write(arguments, written, lambda piece: None)
                return self._result(prompt, written, _finish_reason(written, max_new_tokens))

        tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # those that still run where one has failed
                task.cancel()

    # what is sent, and what is made of what comes

    def _arguments(
        self, prompt: Prompt, max_new_tokens: int, sampling: Sampling | None, stop_strings: Sequence[str]
    ) -> dict[str, Any]:
        if not prompt.messages:
            raise GeneratorError("a generator elsewhere is asked by messages; this prompt has none.")
        chosen = sampling or Sampling()
        arguments: dict[str, Any] = {
            "model": self._model, "messages": [_plain(message) for message in prompt.messages],
            "max_tokens": max_new_tokens, "temperature": chosen.temperature, "top_p": chosen.top_p,
            "stream": True, "stream_options": {"include_usage": True},
            "extra_headers": self._headers,
        }
        if chosen.seed is not None:
            arguments["seed"] = chosen.seed
        if stop_strings:
            arguments["stop"] = list(stop_strings)
        # Not OpenAI's, but vLLM's and SGLang's: sent only where they were asked for.
        more: dict[str, Any] = {}
        if chosen.top_k:
            more["top_k"] = chosen.top_k
        if chosen.min_p:
            more["min_p"] = chosen.min_p
        if chosen.repetition_penalty != 1.0:
            more["repetition_penalty"] = chosen.repetition_penalty
        return {**arguments, "extra_body": more} if more else arguments

    def _result(
        self, prompt: Prompt, written: _Written, reason: Literal["stop", "length", "cancelled"]
    ) -> GenerationResult:
        now, usage = time.perf_counter(), written.usage
        asked, new = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        is_estimated = asked is None or new is None
        if asked is None:
            asked = self.count_tokens(prompt)
        if new is None:
            new = len(written.logprobs) or estimate_tokens(written.text)
        decoding = now - written.first if written.first is not None else 0.0
        return GenerationResult(
            text=written.text, token_ids=(), token_logprobs=tuple(written.logprobs),
            finish_reason=reason,
            prompt_tokens=asked,
            reused_tokens=_count(getattr(usage, "prompt_tokens_details", None), "cached_tokens") or 0,
            new_tokens=new,
            seconds_to_first_token=(written.first or now) - written.began,
            tokens_per_second=(new - 1) / decoding if new > 1 and decoding > 0 else 0.0,
            counts_estimated=is_estimated,
        )

    def _error(self, error: Exception, written: _Written | None = None) -> GeneratorError:
        """What happened there, in words that say what to do. Never shows the key."""
        import openai

        where = self._address.url
        told = self._shown(error)
        if isinstance(error, openai.APITimeoutError):
            wait = f"{self._seconds:g} s (remote_seconds)"
            how = (
                f"fell silent for {wait} after {len(written.text)} characters"
                if written and written.text else f"did not answer within {wait}, {_RETRIES + 1} times over"
            )
            return GeneratorError(f"{where} {how}. It may be loading or busy: try again, or raise remote_seconds.")
        if isinstance(error, openai.APIConnectionError):
            broke = f"broke off after {len(written.text)} characters" if written and written.text else "can't be reached"
            return GeneratorError(
                f"{where} {broke}: {self._shown(error.__cause__ or error)}. Is the server running, "
                "and is this its address?"
            )
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            given = "the key in" if self._key else "a request without a key; put one into"
            return GeneratorError(f"{where} refuses {given} {KEY_VARIABLE} ({error.status_code}).")
        if isinstance(error, openai.NotFoundError):
            return GeneratorError(f"{where} does not know what it was asked for: {told} Check address and model.")
        if isinstance(error, openai.RateLimitError):
            return GeneratorError(f"{where} is busy, also after {_RETRIES} more tries: {told} Try again later.")
        if isinstance(error, openai.InternalServerError):
            return GeneratorError(f"{where} failed ({error.status_code}), also after {_RETRIES} more tries: {told}")
        if isinstance(error, openai.APIStatusError):
            return GeneratorError(
                f"{where} refuses the request ({error.status_code}): {told} Where it is too long for its "
                "context, lower max_prompt_tokens or top_k, or set remote_context_length."
            )
        if isinstance(error, _NO_LIST):
            return GeneratorError(
                f"{where} sends what is not what OpenAI's API sends ({type(error).__name__}: {told}). "
                "Check the address; most end with /v1."
            )
        return GeneratorError(f"{where} broke off: {told}")

    def _shown(self, error: BaseException) -> str:
        told = " ".join(str(error).split()) or type(error).__name__
        if self._key:
            told = told.replace(self._key, "***")
        return told if len(told) <= 400 else f"{told[:400]} ..."

    def _not_here(self) -> GeneratorError:
        return GeneratorError(
            f"the tokens of {self._model} are known only to {self._address.url}. Load a model on this "
            "machine to look inside."
        )

    def _refuse_top(self, top_logprobs: int) -> None:
        if top_logprobs:
            raise GeneratorError("a generator elsewhere gives the log-probabilities of its own tokens only.")

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return task.result()
        finally:
            task.cancel()


def _run(loop: asyncio.AbstractEventLoop, clients: list[Any]) -> None:
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(_leave(clients))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _leave(clients: list[Any]) -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    for client in clients:
        await client.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():  # where it was collected in its own thread
        thread.join(5)


def _cancel(task: Future[None]) -> None:
    task.cancel()


async def _take(
    stream: AsyncIterator[Any], written: _Written, put: Callable[[str], None]
) -> None:
    async for chunk in stream:
        if chunk.usage is not None:
            written.usage = chunk.usage
        for choice in chunk.choices or ():
            content = choice.logprobs.content if choice.logprobs is not None else None
            written.logprobs += [token.logprob for token in content or ()]
            delta = getattr(choice, "delta", None)  # null or left out in the last chunk of some servers
            thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
            written.thoughts += len(thought or "")
            if piece := getattr(delta, "content", None):
                if written.first is None:
                    written.first = time.perf_counter()
                written.text += piece
                put(piece)
            written.finish = choice.finish_reason or written.finish


def _count(usage: Any, name: str) -> int | None:
    """A number of a server's usage; None where it gives none, as openai's client then has no such attribute."""
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else None


def _finish_reason(written: _Written, max_new_tokens: int) -> Literal["stop", "length"]:
    """Raises GeneratorError where the answer did not end as an answer does."""
    if written.thoughts and not written.text:
        raise GeneratorError(
            f"the model wrote {written.thoughts} characters of reasoning and no answer within "
            f"{max_new_tokens} tokens. Raise max_new_tokens, or switch thinking off at the server."
        )
    if written.finish == "stop":
        return "stop"
    if written.finish == "length":
        return "length"
    how = f"with {written.finish!r}" if written.finish else "without saying that it is finished"
    raise GeneratorError(f"the server ended its answer {how}, after {len(written.text)} characters. Ask again.")


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _context_of(model: dict[str, Any]) -> int:
    """Context in tokens as servers say it: vLLM, SGLang and this project's; llama.cpp's; hosted ones'.

    What a model was trained with (n_ctx_train) is not what it was started with.
    """
    meta = model.get("meta") or {}
    said: Iterable[Any] = (
        model.get("max_model_len"), meta.get("n_ctx") if isinstance(meta, dict) else None,
        model.get("context_length"), model.get("context_window"), model.get("max_context_length"),
    )
    return next((value for value in said if isinstance(value, int) and value > 0), 0)


def load_remote(settings: Settings) -> RemoteGenerator:
    """The generator `openai:...` that the settings name, its key from RAG_GENERATOR_KEY.

    Raises GeneratorError where the server can't be reached or does not have the model.
    """
    return RemoteGenerator(
        RemoteAddress.parse(settings.generator), context_length=settings.remote_context_length,
        seconds=settings.remote_seconds, key=os.environ.get(KEY_VARIABLE, "").strip(),
    )
