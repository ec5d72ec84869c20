"""A generator on a server: this project's own, driven by OpenAI's client, and some that misbehave."""
# ruff: noqa: E402  (what is optional is looked for before it is imported)

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fakes import drain

for _package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install -e '.[serve,openai]'")

from serving import KEY, QUESTION, TEXT, EndlessGenerator, Running, make_rag, until
from tiny_models import make_model

from rag.engine import Sampling
from rag.errors import GeneratorError
from rag.generator import find_model, load_generator
from rag.pipeline import Rag
from rag.prompt import Message, Prompt
from rag.remote import RemoteAddress, RemoteGenerator, estimate_tokens
from rag.serve.keys import Keys
from rag.settings import Settings
from rag.stopping import Stop

ASKED = Prompt(hits=(), messages=(Message("user", "Where does the cat sit?"),))


# against this project's own server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Rag]]:
    """A tiny random model with a chat template, behind keys."""
    folder = tmp_path_factory.mktemp("remote")
    model = make_model(folder / "tiny", "llama", max_position_embeddings=2048)
    settings = Settings(generator=str(model), device="cpu", dtype="float32", max_prompt_tokens=1024)
    rag = make_rag(folder / "kb", load_generator(settings))
    server = Running(rag, Keys.read(None, {"RAG_SERVE_KEYS": f"ann:{KEY}"}))
    yield server, rag
    server.end()


@pytest.fixture
def remote(served, monkeypatch: pytest.MonkeyPatch) -> RemoteGenerator:
    monkeypatch.setenv("RAG_GENERATOR_KEY", KEY)
    generator = load_generator(Settings(generator=f"openai:{served[0].url}/v1#tiny"))
    assert isinstance(generator, RemoteGenerator)
    return generator


def test_what_a_server_writes_is_what_the_model_writes_here(served, remote):
    local = served[1].generator.generate(ASKED, max_new_tokens=24)
    pieces, there = drain(remote.stream(ASKED, max_new_tokens=24))
    assert "".join(pieces) == there.text == local.text and len(pieces) > 1
    assert there.token_logprobs == pytest.approx(local.token_logprobs, abs=1e-4)
    assert (there.new_tokens, there.prompt_tokens) == (local.new_tokens, local.prompt_tokens)
    assert (there.finish_reason, there.counts_estimated) == (local.finish_reason, False)
    assert remote.context_length == served[1].generator.context_length


def test_a_batch_comes_in_its_order_and_sampling_arrives(served, remote):
    prompts = [Prompt(hits=(), messages=(Message("user", text),)) for text in ("cat", "dog", "the old house")]
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=7)
    there = remote.generate_batch(prompts, max_new_tokens=12, sampling=sampling, stop_strings=["zzz"])
    local = [served[1].generator.generate(each, max_new_tokens=12, sampling=sampling) for each in prompts]
    assert [each.text for each in there] == [each.text for each in local]


def test_prompts_that_begin_alike_are_found_in_the_servers_cache(remote):
    opening = Message("system", f"Answer from the passages. {TEXT * 3}")
    first, second = (Prompt(hits=(), messages=(opening, Message("user", text))) for text in ("cat?", "And the dog?"))
    drain(remote.stream(first, max_new_tokens=2))
    result = drain(remote.stream(second, max_new_tokens=2))[1]
    assert result.reused_tokens > 0.8 * result.prompt_tokens


def test_an_answer_from_documents_here_is_written_there(served, monkeypatch, tmp_path):
    monkeypatch.setattr("rag.pipeline.support_probability", lambda *_: (0.9, 0.5))
    generator = EndlessGenerator()
    server = Running(make_rag(tmp_path / "kb", generator))
    try:
        settings = Settings(kb=str(tmp_path / "kb"), generator=f"openai:{server.url}/v1#scripted")
        rag = Rag(served[1].base, served[1].embedder, settings)
        answer = rag.ask(QUESTION)
        assert answer.text == "The boiler is serviced every October [1]." and answer.citations
        assert TEXT in answer.prompt and [m.role for m in generator.prompts[0].messages] == ["system", "user"]
        assert answer.stats.generator == settings.generator and answer.stats.new_tokens == 6
    finally:
        server.end()


def test_stopping_closes_the_stream_and_frees_the_place_there(tmp_path):
    generator = EndlessGenerator("word " * 3000, seconds=0.01)
    server = Running(make_rag(tmp_path / "kb", generator))
    try:
        remote = RemoteGenerator(RemoteAddress(f"{server.url}/v1", "scripted"))
        stop = Stop()
        stream = remote.stream(ASKED, max_new_tokens=200, stop=stop)
        first = next(stream)
        stop.set()
        rest, result = drain(stream)
        assert result.finish_reason == "cancelled" and result.text == first + "".join(rest)
        until(lambda: generator.cancelled == 1)
        closed = remote.stream(ASKED, max_new_tokens=200)
        next(closed)
        closed.close()
        until(lambda: generator.cancelled == 2 and server.figure("rag_running") == 0)
        before = Stop()
        before.set()
        assert drain(remote.stream(ASKED, max_new_tokens=9, stop=before))[1].finish_reason == "cancelled"
    finally:
        server.end()


def test_a_wrong_key_or_model_says_what_to_set(served, monkeypatch):
    url = served[0].url
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # meant for another server, and not sent to this one
    with pytest.raises(GeneratorError, match="without a key; put one into RAG_GENERATOR_KEY"):
        load_generator(Settings(generator=f"openai:{url}/v1#tiny"))
    monkeypatch.setenv("RAG_GENERATOR_KEY", "wrong" * 8)
    with pytest.raises(GeneratorError, match="refuses the key in RAG_GENERATOR_KEY") as raised:
        load_generator(Settings(generator=f"openai:{url}/v1#tiny"))
    assert "wrongwrong" not in str(raised.value)
    monkeypatch.setenv("RAG_GENERATOR_KEY", KEY)
    with pytest.raises(GeneratorError, match="no model 'big'. It has: documents, tiny"):
        load_generator(Settings(generator=f"openai:{url}/v1#big"))
    with pytest.raises(GeneratorError, match="has 2 models"):
        load_generator(Settings(generator=f"openai:{url}/v1"))


# against servers that are otherwise


class Odd(ThreadingHTTPServer):
    """Answers each chat request with the next of its replies: (status, headers, parts)."""

    daemon_threads = True

    def __init__(self, *replies, models=None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = list(replies)
        self.models = models if models is not None else [{"id": "m", "object": "model", "max_model_len": 4096}]
        self.bodies: list[dict] = []
        self.headers: list = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.address = RemoteAddress(f"http://127.0.0.1:{self.server_port}/v1", "m")


class _Handler(BaseHTTPRequestHandler):
    server: Odd

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.headers.append(self.headers)
        self._send(200, {}, [json.dumps({"object": "list", "data": self.server.models})])

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._send(*self.server.replies.pop(0))

    def _send(self, status, headers, parts) -> None:
        self.send_response(status)
        kind = "text/event-stream" if parts and parts[0].startswith("data") else "application/json"
        for name, value in {"content-type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for part in parts:
            if part.startswith("sleep"):
                time.sleep(float(part[5:]))
            else:
                self.wfile.write(part.encode())


def said(text="", *, finish=None, usage=None, **delta) -> str:
    choices = [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish}]
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    return f"data: {json.dumps({**chunk, 'usage': usage})}\n\n"


WHOLE = (200, {}, [said("Every "), said("October."), said(finish="stop"), "data: [DONE]\n\n"])


@pytest.fixture
def odd() -> Iterator:
    made: list[Odd] = []

    def making(*replies, **options) -> Odd:
        made.append(Odd(*replies, **options))
        return made[-1]

    yield making
    for server in made:
        server.shutdown()
        server.server_close()


def test_without_usage_counts_are_called_an_estimate(odd):
    remote = RemoteGenerator(odd(WHOLE).address)
    pieces, result = drain(remote.stream(ASKED, max_new_tokens=20))
    assert (pieces, result.text, result.token_logprobs) == (["Every ", "October."], "Every October.", ())
    # "Every October" is 13 letters and spaces, 5 tokens, and the full stop; "Where does the cat sit" 22, 8 tokens.
    assert (result.counts_estimated, result.new_tokens, result.prompt_tokens) == (True, 6, 8 + 1 + 8)


@pytest.mark.parametrize(
    ("usage", "prompt", "new"),
    [
        ({}, 17, 6), ({"prompt_tokens": 5, "total_tokens": 7}, 5, 6),
        ({"prompt_tokens": None, "completion_tokens": 2}, 17, 2),
    ],
)
def test_what_a_servers_usage_leaves_out_is_estimated_and_the_answer_kept(odd, usage, prompt, new):
    # The counts missing lost an answer that was complete.
    parts = [said("Every "), said("October."), said(finish="stop", usage=usage), "data: [DONE]\n\n"]
    _, result = drain(RemoteGenerator(odd((200, {}, parts)).address).stream(ASKED, max_new_tokens=20))
    assert (result.text, result.counts_estimated) == ("Every October.", True)
    assert (result.prompt_tokens, result.new_tokens, result.reused_tokens) == (prompt, new, 0)


@pytest.mark.parametrize("last", [{"delta": None, "finish_reason": "stop"}, {"finish_reason": "stop"}])
def test_a_last_chunk_without_a_piece_ends_the_answer(odd, last):
    choices = [{"index": 0, **last}]
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    parts = [said("Every October."), f"data: {json.dumps(chunk)}\n\n", "data: [DONE]\n\n"]
    _, result = drain(RemoteGenerator(odd((200, {}, parts)).address).stream(ASKED, max_new_tokens=20))
    assert (result.text, result.finish_reason) == ("Every October.", "stop")


def test_a_server_that_gives_no_logprobs_is_asked_without_and_said_to(odd):
    refusal = (400, {}, [json.dumps({"error": {"message": "logprobs is not supported"}})])
    server = odd(refusal, WHOLE, WHOLE)
    remote = RemoteGenerator(server.address)
    for _ in range(2):
        assert drain(remote.stream(ASKED, max_new_tokens=20))[1].text == "Every October."
    assert ["logprobs" in body for body in server.bodies] == [True, False, False]
    assert remote.describe().endswith("no log-probabilities")


def test_a_busy_server_is_asked_again_when_it_said(odd):
    busy = (429, {"retry-after": "1"}, ["{}"])
    server = odd(busy, WHOLE, busy, busy, busy)
    remote = RemoteGenerator(server.address)
    began = time.perf_counter()
    assert drain(remote.stream(ASKED, max_new_tokens=20))[1].text == "Every October."
    assert time.perf_counter() - began >= 0.9
    stop = Stop()
    threading.Timer(0.3, stop.set).start()  # while it waits to ask again
    assert drain(remote.stream(ASKED, max_new_tokens=20, stop=stop))[1].finish_reason == "cancelled"
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([said("Every ")], "without saying that it is finished, after 6 characters"),
        ([said("Every "), 'data: {"error": {"message": "out of memory"}}\n\n'], "out of memory"),
        ([said("Every "), said(finish="content_filter")], "content_filter"),
        ([said(reasoning_content="Let me see"), said(finish="length")], "10 characters of reasoning and no answer"),
        ([said("Every "), "sleep2"], "remote_seconds"),
        (["data: <html>\n\n"], "not what OpenAI's API"),
    ],
)
def test_an_answer_that_breaks_off_is_an_error_and_never_half_an_answer(odd, parts, message):
    remote = RemoteGenerator(odd((200, {}, parts)).address, seconds=0.5)
    with pytest.raises(GeneratorError, match=message):
        drain(remote.stream(ASKED, max_new_tokens=20))


def test_a_request_that_is_refused_says_why(odd):
    told = "This model's maximum context length is 4096 tokens"
    remote = RemoteGenerator(odd((400, {}, [json.dumps({"error": {"message": told}})])).address)
    with pytest.raises(GeneratorError, match=f"{told}.*max_prompt_tokens"):
        remote.generate(ASKED, max_new_tokens=20)


def test_the_context_is_what_the_server_says_or_what_is_set(odd):
    said_by = [{"id": "m", "meta": {"n_ctx": 8192, "n_ctx_train": 131072}}]
    assert RemoteGenerator(odd(models=said_by).address).context_length == 8192
    silent = odd(models=[{"id": "m:latest"}])  # as Ollama
    with pytest.raises(GeneratorError, match="remote_context_length"):
        RemoteGenerator(silent.address)
    assert RemoteGenerator(silent.address, context_length=2048).context_length == 2048
    assert silent.headers[-1]["authorization"] is None
    assert RemoteGenerator(odd(models=[]).address, context_length=2048).describe().startswith("m at http://127.0.0.1")


def test_a_server_of_another_kind_is_told_apart(odd):
    with pytest.raises(GeneratorError, match="most end with /v1"):
        RemoteGenerator(odd(models="<html>").address)


def test_a_server_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(GeneratorError, match="127.0.0.1:9.*can't be reached"):
        load_generator(Settings(generator="openai:http://127.0.0.1:9/v1#m"))
    with pytest.raises(GeneratorError, match="none of its files are here"):
        find_model("openai:http://127.0.0.1:9/v1#m")


@pytest.mark.parametrize(
    "name",
    [
        "openai:m", "openai:ftp://host/v1#m", "openai:http://me:sesame@host/v1#m",
        # addresses that urlsplit or the client meet with errors of their own
        "openai:http://localhost:80a/v1#m", "openai:http://me:sesame@[::1/v1#m", "openai:http://127.0.0.1:99999/v1#m",
        "openai:http://ho st/v1#m", "openai:http://ho\x00st/v1#m",
    ],
)
def test_an_address_of_another_form_is_refused_and_no_key_in_it_shown(name):
    with pytest.raises(GeneratorError) as raised:
        RemoteAddress.parse(name)
    assert "sesame" not in str(raised.value)


def test_an_estimate_is_rather_too_many_than_too_few():
    assert estimate_tokens("") == 0
    assert estimate_tokens("cat sat") == 3  # 7 letters and spaces
    assert estimate_tokens("猫坐在垫子上。") == 7
    assert estimate_tokens("1250 €") == 4 + 1 + 1
