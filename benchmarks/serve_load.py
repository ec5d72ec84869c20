"""Many clients at once against `python -m rag serve`, some hanging up: what they meet, and its memory.

    python benchmarks/serve_load.py --kb .kb --questions tests/questions.jsonl [--clients 64] [--seconds 60]

The server runs in a process of its own. A third of the clients closes its stream after the first piece
or two, a fifth hangs up before the first byte; all others read to the end and ask again. Prints every 10
seconds the server's memory and what was met, then its own figures, and how it ends when told to.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import openai

SHOWN = ("rag_requests_total", "rag_prompt_tokens", "rag_reused_tokens", "rag_new_tokens", "rag_answers",
         "rag_waiting", "rag_running", "rag_kv_cache_bytes")


class Load:
    """Clients that ask until the time is over."""

    def __init__(self, url: str, key: str, questions: list[str], seconds: float) -> None:
        self.url, self.key, self.questions = url, key, questions
        self.end = time.monotonic() + seconds
        self.met: Counter[str] = Counter()
        self.answered: list[float] = []
        self._lock = threading.Lock()

    def note(self, what: str) -> None:
        with self._lock:
            self.met[what] += 1

    def client(self, number: int) -> None:
        turn = number
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120) as client:
            while time.monotonic() < self.end:
                turn += 7
                question = self.questions[turn % len(self.questions)]
                if number % 5 == 4:
                    self.hang_up(question, 0.05 + turn % 10 / 10)
                else:
                    self.ask(client, question, leaves_after=2 if number % 3 == 0 else None)

    def ask(self, client: openai.OpenAI, question: str, *, leaves_after: int | None) -> None:
        began = time.monotonic()
        try:
            stream = client.chat.completions.create(
                model="documents", messages=[{"role": "user", "content": question}], stream=True
            )
            for at, _ in enumerate(stream, 1):
                if at == leaves_after:
                    stream.close()
                    self.note("hung up half-way")
                    return
            self.note("answered")
            self.answered.append(time.monotonic() - began)
        except openai.RateLimitError as error:
            self.note("429 with a time to come back")
            time.sleep(min(1, int(error.response.headers["retry-after"])))
        except (openai.OpenAIError, OSError) as error:
            self.note(f"{type(error).__name__}: {error}")

    def hang_up(self, question: str, seconds: float) -> None:
        body = json.dumps({"question": question}).encode()
        head = (f"POST /v1/answers HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self.key}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n")
        with socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + body)
            time.sleep(seconds)
        self.note("hung up before the first byte")
        time.sleep(0.2)


def memory_mib(pid: int) -> float:
    """What a process has in memory now, on Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kb", required=True)
    parser.add_argument("--questions", type=Path, required=True, help='lines with a "question"')
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    options, settings = parser.parse_known_args()  # others go to the server
    questions = [json.loads(line)["question"] for line in options.questions.read_text("utf-8").splitlines()]
    key = secrets.token_urlsafe()
    command = [sys.executable, "-m", "rag", "serve", "--kb", options.kb, "--port", "0", "--rate", "0", *settings]
    process = subprocess.Popen(
        command, env={**os.environ, "RAG_SERVE_KEYS": f"load:{key}"}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = iter(process.stderr)
    url = next(line for line in lines if line.startswith("listening on ")).split()[2].removesuffix("/v1")
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(lines), daemon=True).start()
    load = Load(url, key, questions, options.seconds)
    clients = [threading.Thread(target=load.client, args=(number,)) for number in range(options.clients)]
    began = time.monotonic()
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        time.sleep(10)
        print(f"{time.monotonic() - began:5.0f} s  {memory_mib(process.pid):6.0f} MiB  {dict(load.met)}", flush=True)
    figures = httpx2.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}).text
    print(*(line for line in figures.splitlines() if line.startswith(SHOWN) and "_created" not in line), sep="\n")
    times = sorted(load.answered)
    if times:
        print(f"seconds to a whole answer: median {times[len(times) // 2]:.2f}, "
              f"95% {times[int(len(times) * 0.95)]:.2f}")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    print(f"exit code {process.wait(120)} after {time.monotonic() - began:.1f} s; {len(said)} lines in its log; "
          f"its processor time: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f} s")
    print("".join(said[:5]), end="")


if __name__ == "__main__":
    main()
