"""Questions on their way to an answer: one line for the whole process, one model.

A question is answered in a worker thread, which writes into its turn; pages look at the turn as
often as they like. So a page that is reloaded, or told to do something else, disturbs no answer,
and two sessions never see each other's text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from app.conversations import Conversation, Turn
from rag.answer import Answer
from rag.background import Background
from rag.errors import RagError
from rag.followup import search_question
from rag.pipeline import Rag

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One turn to be answered. `keep` is called at the end, whatever the end was."""

    turn: Turn
    conversation: Conversation
    open_rag: Callable[[], Rag]
    keep: Callable[[Conversation], None]

    def run(self) -> None:
        """Answer, in the worker thread. Never raises: what went wrong is kept for the page."""
        turn = self.turn
        try:
            turn.state = self._answer()
        except RagError as error:
            turn.error = str(error)
            turn.state = "failed"
        except Exception as error:  # a bug: its traceback belongs in the log, not on the page
            _log.exception("a question could not be answered")
            turn.unexpected = type(error).__name__
            turn.state = "failed"
        try:
            self.keep(self.conversation)
        except Exception:
            _log.exception("a conversation could not be kept")

    def _answer(self) -> Literal["done", "stopped"]:
        turn = self.turn
        if turn.stop.is_set:
            return "stopped"
        turn.state = "loading"
        rag = self._opened()
        if rag is None:
            return "stopped"
        try:
            # search
            turn.state = "searching"
            began = time.perf_counter()
            # Only now: the turn before this one may have been answered a moment ago.
            history = self.conversation.history(before=turn)
            turn.searched = turn.search_text or search_question(turn.question, history)
            retrieval = rag.retriever.search_batch([turn.searched], rag.settings.top_k, where=turn.where)[0]
            turn.seconds_search = time.perf_counter() - began
            turn.hits = retrieval.hits
            if turn.stop.is_set:
                return "stopped"
            # write
            turn.state = "reading"
            stream = rag.stream(
                turn.question, history=history, retrieval=retrieval, stop=turn.stop
            )
            try:
                for piece in stream:
                    if turn.stop.is_set:
                        return "stopped"
                    if isinstance(piece, Answer):
                        turn.answer = piece
                        turn.text = piece.text
                        return "done"
                    turn.text += piece
                    turn.state = "writing"
            finally:
                stream.close()
        finally:
            rag.base.release()  # this thread's connection
        raise AssertionError("a stream ends with its Answer")

    def _opened(self) -> Rag | None:
        """What `open_rag` gives; None where the turn is stopped first.

        Loading a model can't be broken off. It goes on by itself, and the next question finds the
        model loaded, or waits for it.
        """
        loading = Background(self._open, name="loading")
        self.turn.stop.then(loading.is_over.set)
        loading.is_over.wait()
        return None if self.turn.stop.is_set else loading.result()

    def _open(self) -> Rag:
        rag = self.open_rag()
        rag.base.release()  # this thread's connection
        return rag


class Desk:
    """Runs jobs one after the other, in the order they came."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="answers", daemon=True).start()

    def submit(self, job: Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    def stop(self, turn: Turn) -> None:
        """End a turn at once: the one in hand, or one that waits in the line."""
        turn.stop.set()
        with self._changed:
            job = next((job for job in self._waiting if job.turn is turn), None)
            if job is None:
                return
            self._waiting.remove(job)
        job.run()  # finds that it is stopped, says so and keeps the conversation

    def num_before(self, turn: Turn) -> int:
        """How many questions are answered before this one; 0 for the one being answered."""
        with self._changed:
            for position, job in enumerate(self._waiting):
                if job.turn is turn:
                    return position + (self._current is not None)
            return 0

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                while not self._waiting:
                    self._changed.wait()
                self._current = self._waiting.popleft()
            self._current.run()
