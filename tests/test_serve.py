"""Answers over HTTP, asked by OpenAI's own client, and by clients that behave badly."""
# ruff: noqa: E402  (what is optional is looked for before it is imported)

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

for _package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install -e '.[serve,openai]'")

import httpx2
import openai
from fakes import WordEmbedder, base_of
from serving import (
    KEY,
    OTHER_KEY,
    QUESTION,
    TEXT,
    WRITTEN,
    EndlessGenerator,
    Running,
    ask,
    make_rag,
    until,
)

from rag.embedder import load_embedder
from rag.errors import InputError
from rag.serve import ServeOptions
from rag.serve.admission import Admission, TurnedAway
from rag.serve.keys import Keys, RateLimit
from rag.serve.server import read_keys

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether a text of the test supports an answer is the pipeline's affair and tested there.
    monkeypatch.setattr("rag.pipeline.support_probability", lambda *_: (0.9, 0.5))


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    running: list[Running] = []

    def starting(generator: object, keys: Keys = Keys(), *, settings=None, **options) -> Running:  # noqa: B008
        running.append(Running(make_rag(tmp_path / "kb", generator, **(settings or {})), keys, **options))
        return running[-1]

    yield starting
    for server in running:
        server.end()


# what is answered


def test_openais_client_gets_an_answer_with_its_citations(start):
    client = start(EndlessGenerator()).client()
    assert [model.id for model in client.models.list()] == ["documents", "scripted"]
    reply = ask(client)
    assert reply.choices[0].message.content == "The boiler is serviced every October [1]."
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("stop", 6)
    (citation,) = reply.answer["citations"]
    assert TEXT[citation["start"] : citation["end"]] == "The boiler in the cellar is serviced every October."


def test_a_stream_comes_in_pieces_and_ends_with_the_checked_answer_and_the_usage(start):
    client = start(EndlessGenerator()).client()
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert pieces == ["The", " boiler", " is", " serviced", " every", " October."]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].answer["answer"] == "The boiler is serviced every October [1]."
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 6


def test_answers_are_what_ask_json_prints(start):
    server = start(EndlessGenerator())
    reply = httpx2.post(f"{server.url}/v1/answers", json={"question": QUESTION, "top_k": 1})
    told = reply.json()
    assert reply.status_code == 200 and told["answer"] == "The boiler is serviced every October [1]."
    assert told["citations"][0]["path"] == told["hits"][0]["path"] == "boiler.txt"
    lines = httpx2.post(f"{server.url}/v1/answers", json={"question": QUESTION, "stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(each["piece"] for each in events[:-1]) == WRITTEN and lines[-2] == "data: [DONE]"
    assert events[-1]["answer"] == told["answer"]


def test_answers_can_be_kept_to_a_part_of_the_base(start):
    server = start(EndlessGenerator())

    def answer(**where):
        return httpx2.post(f"{server.url}/v1/answers", json={"question": QUESTION, "where": where})

    assert answer(under="boiler.txt", type=["txt", "pdf"]).json()["answer"] == f"{WRITTEN[:-1]} [1]."
    for where, said in (
        ({"under": "nowhere"}, "none of the 1 files"), ({"since": "2024-01-01"}, "no date yet"),
        ({"folder": "x"}, "where.folder"), ({"since": "May"}, "where.since"),
    ):
        reply = answer(**where)
        assert reply.status_code == 400 and said in reply.json()["error"]["message"], where


def test_earlier_turns_are_history_and_the_model_by_itself_reads_messages_as_they_are(start):
    generator = EndlessGenerator()
    client = start(generator).client()
    turns = [{"role": "user", "content": "Which boiler?"}, {"role": "assistant", "content": "That in the cellar."}]
    ask(client, messages=[*turns, {"role": "user", "content": QUESTION}])
    assert [m.content for m in generator.prompts[0].messages[1:]] == ["Which boiler?", "That in the cellar.", QUESTION]
    reply = ask(client, model="scripted", messages=[{"role": "system", "content": "Be brief."}, *turns[:1]])
    assert reply.choices[0].message.content == WRITTEN
    assert [(m.role, m.content) for m in generator.prompts[0].messages] == [
        ("system", "Be brief."), ("user", "Which boiler?"),
    ]


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt-9"}, 404, "There is: documents, scripted"),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, 400, "instructions of its own"),
        ({"messages": []}, 400, "messages"),
        ({"max_tokens": 100_000}, 400, "at most 256"),
        ({"n": 2}, 400, "n: "),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "empty"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"seed": 2**63}, 400, "seed"),
        ({"extra_body": {"top_k": 2_000_000}}, 400, "top_k"),
    ],
)
def test_what_cannot_be_done_as_asked_is_refused_with_its_reason(start, change, status, said):
    client = start(EndlessGenerator()).client()
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as raised:
            ask(client, stream=stream, **change)
        assert raised.value.status_code == status and said in str(raised.value)


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/v1/answers", '{"question": "\\ud800 When?"}', "question"),
        ("/v1/answers", '{"question": "When?", "where": {"under": "\\ud800"}}', "where.under"),
        ("/v1/answers", '{"question": "x", "history": [{"question": "a", "answer": "\\ud800"}]}', "history.0.answer"),
        (CHAT, '{"model": "documents", "messages": [{"role": "user", "content": "\\ud800"}]}', "content"),
        (CHAT, '{"model": "scripted", "stop": "\\ud800", "messages": [{"role": "user", "content": "x"}]}', "stop"),
    ],
)
def test_half_a_character_is_refused_where_it_stands(start, path, body, place):
    # JSON can say half of a surrogate pair; nothing behind the request can write it down.
    reply = httpx2.post(start(EndlessGenerator()).url + path, content=body, headers=JSON)
    message = reply.json()["error"]["message"]
    assert reply.status_code == 400 and place in message and "\\ud800, which is half a character" in message


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/answers", '{"question": "When?", "\\ud800": 1}', 400),
        (CHAT, '{"model": "m\\udc00", "messages": [{"role": "user", "content": "x"}]}', 404),
    ],
)
def test_an_error_can_be_sent_back_whatever_it_names(start, path, body, status):
    reply = httpx2.post(start(EndlessGenerator()).url + path, content=body, headers=JSON)
    assert reply.status_code == status and reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("POST", "/v1/answers", {"content-type": "application/json"}, b"{", 400),
        ("POST", "/v1/answers", {"content-type": "application/json"}, b"", 400),
        # what a page elsewhere may send without being asked
        ("POST", "/v1/answers", {"content-type": "text/plain"}, b'{"question": "x"}', 400),
        ("GET", "/v1/answers", {}, b"", 405),
        ("GET", "/v1/files", {}, b"", 404),
        ("GET", "/docs", {}, b"", 404),
    ],
)
def test_every_error_is_one_that_openais_clients_can_read(start, method, path, headers, body, status):
    reply = httpx2.request(method, start(EndlessGenerator()).url + path, headers=headers, content=body)
    assert reply.status_code == status and set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_what_breaks_inside_shows_in_the_log_and_not_to_the_client(start, caplog):
    class Broken(EndlessGenerator):
        def stream(self, prompt, **options):
            yield "The"
            raise ValueError("secret place /srv/models")

    client = start(Broken()).client()
    with pytest.raises(openai.APIError, match="its log says why") as raised:
        list(ask(client, stream=True))
    with pytest.raises(openai.InternalServerError, match="its log says why") as whole:
        ask(client)
    assert "/srv" not in str(raised.value) + str(whole.value) and "/srv/models" in caplog.text


# the base it answers from


def test_a_base_that_is_deleted_is_said_to_be_gone_and_one_made_anew_is_taken_up(start, tmp_path, caplog):
    # It went on quoting files that had been deleted, from the database it once opened.
    server, folder = start(EndlessGenerator()), tmp_path / "kb"

    def health():
        reply = httpx2.get(f"{server.url}/health")
        return reply.status_code, reply.json()["status"]

    def post():
        return httpx2.post(f"{server.url}/v1/answers", json={"question": QUESTION})

    assert post().json()["citations"][0]["path"] == "boiler.txt" and health() == (200, "ok")
    shutil.rmtree(folder)
    gone = post()
    assert gone.status_code == 503 and "python -m ingest" in gone.json()["error"]["message"]
    assert str(folder) not in gone.text and str(folder) in caplog.text
    with pytest.raises(openai.InternalServerError, match="python -m ingest"):
        ask(server.client())
    assert health() == (503, "no knowledge base") and not folder.exists()

    base_of(folder, {"house/cellar.txt": TEXT})
    assert post().json()["citations"][0]["path"] == "house/cellar.txt" and health() == (200, "ok")
    assert ask(server.client()).answer["citations"][0]["path"] == "house/cellar.txt"


def test_a_base_made_anew_with_another_embedder_is_not_answered_from(start, tmp_path):
    server, folder = start(EndlessGenerator()), tmp_path / "kb"
    shutil.rmtree(folder)
    base_of(folder, {"boiler.txt": TEXT}, WordEmbedder("other"))
    assert httpx2.post(f"{server.url}/v1/answers", json={"question": QUESTION}).status_code == 503
    assert httpx2.get(f"{server.url}/health").status_code == 503


# who may ask


def test_only_known_keys_are_let_in_and_each_has_its_own_rate(start, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\nann {KEY}\n\nbob {OTHER_KEY}\n")
    server = start(EndlessGenerator(), Keys.read(file, {}), rate=2)
    with pytest.raises(openai.AuthenticationError):
        server.client("x" * 32).models.list()
    assert httpx2.get(f"{server.url}/metrics").status_code == 401
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    for _ in range(2):
        ask(server.client())
    with pytest.raises(openai.RateLimitError) as raised:
        ask(server.client())
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 30
    ask(server.client(OTHER_KEY))  # another's share is untouched
    assert server.figure('rag_requests_total{owner="ann",route="/v1/chat/completions",status="200"}') == 2


def test_a_rate_comes_back_with_time():
    now = [0.0]
    rate = RateLimit(6, clock=lambda: now[0])
    assert [rate.take("ann") for _ in range(7)] == [0.0] * 6 + [10.0]
    now[0] = 4.0
    assert rate.take("ann") == pytest.approx(6.0) and rate.take("bob") == 0.0
    now[0] = 10.5
    assert rate.take("ann") == 0.0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_nobody_elsewhere_is_served_without_keys(host):
    with pytest.raises(InputError, match="keys"):
        read_keys(ServeOptions(host=host), {})
    assert read_keys(ServeOptions(host=host), {"RAG_SERVE_KEYS": f"ann:{KEY}"}).owner(KEY) == "ann"
    assert read_keys(ServeOptions(host="::1"), {}).digests == ()


@pytest.mark.parametrize("line", ["ann short", "justonekeywithoutaname", f"ann {KEY}\nann {OTHER_KEY}", "# none"])
def test_a_file_of_keys_that_is_wrong_is_refused_without_showing_them(tmp_path, line):
    file = tmp_path / "keys"
    file.write_text(line)
    with pytest.raises(InputError) as raised:
        Keys.read(file, {})
    assert KEY not in str(raised.value) and "short" not in str(raised.value)


def test_without_keys_a_page_under_another_name_is_not_answered(start):
    server = start(EndlessGenerator())
    reply = httpx2.get(f"{server.url}/v1/models", headers={"host": "evil.example:8000"})
    assert reply.status_code == 403


def test_a_request_that_is_too_large_is_refused_however_it_comes(start):
    server = start(EndlessGenerator(), max_body_bytes=1_000)
    stated = httpx2.post(f"{server.url}/v1/answers", json={"question": "x" * 2_000})
    unstated = httpx2.post(f"{server.url}/v1/answers", content=(b"x" * 600 for _ in range(3)))
    assert (stated.status_code, unstated.status_code) == (413, 413)


# how many at once


def test_a_full_queue_sends_away_with_a_time_to_come_back(start):
    generator = EndlessGenerator(seconds=0.2)
    server = start(generator, running=1, waiting=1)
    with ThreadPoolExecutor(4) as pool:
        first = [pool.submit(ask, server.client()) for _ in range(2)]
        until(lambda: server.figure("rag_waiting") == 1)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(server.client())
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
        assert all(each.result().choices[0].finish_reason == "stop" for each in first)
    assert generator.most == 1


def test_a_client_that_hangs_up_frees_its_place_at_once(start):
    generator = EndlessGenerator("word " * 3000, seconds=0.01)
    server = start(generator, running=1, waiting=4)
    stream = ask(server.client(), stream=True, messages=[{"role": "user", "content": QUESTION}])
    next(iter(stream))
    waiting = socket.create_connection(("127.0.0.1", server.server.port))
    body = json.dumps({"question": QUESTION}).encode()
    waiting.sendall(
        b"POST /v1/answers HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(body)}\r\n\r\n".encode() + body
    )
    until(lambda: server.figure("rag_waiting") == 1)
    waiting.close()  # one that waits
    until(lambda: server.figure("rag_waiting") == 0)
    assert generator.cancelled == 0
    stream.close()  # and one that runs: 30 s of it are left
    began = time.perf_counter()
    until(lambda: server.figure("rag_running") == 0)
    assert time.perf_counter() - began < 5 and generator.cancelled == 1
    assert server.figure('rag_requests_total{owner="local",route="/v1/answers",status="499"}') == 1


def test_a_place_given_to_one_who_just_left_goes_to_the_next():
    async def run() -> None:
        admission = Admission(running=1, waiting=2)
        await admission.enter()
        leaver, next_one = (asyncio.ensure_future(admission.enter()) for _ in range(2))
        await asyncio.sleep(0)
        admission.leave(1.0)  # the place is the leaver's, who doesn't know it yet
        leaver.cancel()
        await next_one
        assert (admission.running, admission.waiting) == (1, 0)
        admission.close()
        with pytest.raises(TurnedAway, match="shutting down"):
            await admission.enter()
        admission.leave(1.0)
        assert admission.running == 0

    asyncio.run(run())


MET = ("answered", "hung up", "429")
"""What a client under load may meet."""


def load(server: Running, *, clients: int, seconds: float) -> dict[str, int]:
    """Many clients, every third hanging up half-way, for some seconds and until each of `MET`
    was met more than five times (a minute at most: a slow machine answers few in three seconds).
    What they met, counted.
    """
    met: dict[str, int] = {}
    lock = threading.Lock()
    start = time.perf_counter()

    def going() -> bool:
        lasted = time.perf_counter() - start
        with lock:
            enough = all(met.get(what, 0) > 5 for what in MET)
        return lasted < (seconds if enough else 60)

    def note(what: str) -> None:
        with lock:
            met[what] = met.get(what, 0) + 1

    def one(number: int) -> None:
        with server.client(timeout=60) as client:
            while going():
                try:
                    stream = ask(client, stream=True)
                    for at, _ in enumerate(stream):
                        if number % 3 == 0 and at == 2:
                            stream.close()
                            note("hung up")
                            break
                    else:
                        note("answered")
                except openai.RateLimitError as error:
                    assert int(error.response.headers["retry-after"]) >= 1
                    note("429")
                    time.sleep(0.2)
                except Exception as error:  # named in the test's failure
                    note(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met


def test_64_clients_meet_no_error_but_the_announced_one_and_leave_nothing_behind(start):
    generator = EndlessGenerator(" ".join([WRITTEN] * 3), seconds=0.01)
    server = start(generator, running=8, waiting=32)
    met = load(server, clients=64, seconds=3)
    assert set(met) == set(MET), met
    assert min(met.values()) > 5, met
    until(lambda: server.figure("rag_running") == 0)
    assert (generator.running, server.figure("rag_waiting"), generator.most) == (0, 0, 8)


# how it ends


def test_what_runs_when_it_is_told_to_end_is_finished(start):
    server = start(EndlessGenerator(seconds=0.1))
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(ask, server.client())
        until(lambda: server.figure("rag_running") == 1)
        server.end()
        assert reply.result().choices[0].finish_reason == "stop"


def test_what_does_not_finish_in_time_is_told_so(start):
    generator = EndlessGenerator("word " * 3000, seconds=0.01)
    server = start(generator, grace_seconds=0.2)
    stream = ask(server.client(), stream=True)
    next(iter(stream))
    server.end()
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    assert generator.cancelled == 1


def test_the_command_serves_and_ends_with_sigterm(tmp_path):
    make_rag(tmp_path / "kb", EndlessGenerator(), load_embedder("bundled"))
    command = [sys.executable, "-m", "rag", "serve", "--kb", str(tmp_path / "kb"), "--port", "0"]
    environ = {**os.environ, "RAG_SERVE_KEYS": f"ann:{KEY}"}
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=environ)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("listening on "))
        client = openai.OpenAI(base_url=line.removeprefix("listening on ").strip(), api_key=KEY)
        assert [model.id for model in client.models.list()] == ["documents"]  # the reader by itself is no model
        assert "October" in ask(client).choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and KEY not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
