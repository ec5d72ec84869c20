"""A server in this process, and a model that says what it is told, for the tests of both ends."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
from fakes import ScriptedGenerator, WordEmbedder, base_of

from rag.embedder import Embedder
from rag.pipeline import Rag
from rag.serve import ServeOptions
from rag.serve.keys import Keys
from rag.serve.server import Server
from rag.settings import Settings

KEY, OTHER_KEY = "k" * 32, "o" * 32
TEXT = "The boiler in the cellar is serviced every October. Its pressure must stay above 1.2 bar."
QUESTION = "When is the boiler in the cellar serviced?"
WRITTEN = "The boiler is serviced every October."


class EndlessGenerator(ScriptedGenerator):
    """Always says the same, as slowly as it is told, and stops where it is told to."""

    def __init__(self, text: str = WRITTEN, *, seconds: float = 0.0) -> None:
        super().__init__()
        self.text, self.seconds = text, seconds
        self.running = self.most = self.cancelled = 0
        self._lock = threading.Lock()

    def stream(self, prompt, *, max_new_tokens, sampling=None, stop_strings=(), stop=None):
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.prompts[:] = [prompt]
        written = []
        try:
            for at, word in enumerate(self.text.split(" ")):
                time.sleep(self.seconds)
                if stop is not None and stop.is_set:
                    self.cancelled += 1
                    return replace(self._result(prompt, " ".join(written)), finish_reason="cancelled")
                written.append(word)
                yield word if at == 0 else f" {word}"
            return self._result(prompt, self.text)
        finally:
            with self._lock:
                self.running -= 1


def make_rag(folder: Path, generator: object, embedder: Embedder | None = None, **settings: object) -> Rag:
    embedder = embedder or WordEmbedder()
    base = base_of(folder, {"boiler.txt": TEXT}, embedder)
    rag = Rag(base, embedder, Settings(kb=str(folder), **settings))
    rag.use_generator(generator)
    return rag


class Running:
    """A server in a thread of this process."""

    def __init__(self, rag: Rag, keys: Keys = Keys(), **options: object) -> None:  # noqa: B008
        self.server = Server(rag, ServeOptions(port=0, **{"rate": 0, **options}), keys)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def client(self, key: str = KEY, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def figure(self, name: str) -> float:
        text = httpx2.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def until(condition, seconds: float = 20.0) -> None:
    began = time.perf_counter()
    while not condition():
        assert time.perf_counter() - began < seconds
        time.sleep(0.005)


def ask(client: openai.OpenAI, **more):
    given = {"model": "documents", "messages": [{"role": "user", "content": QUESTION}], **more}
    return client.chat.completions.create(**given)
