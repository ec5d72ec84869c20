"""Conversations: turns of question and answer, kept in a SQLite file beside the knowledge base.

A file of its own, because a long ingest holds the knowledge base's for writing, and a question
answered meanwhile must still be kept.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
import weakref
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rag.answer import Answer, Citation, Disagreement, GenerationStats, Hit
from rag.document import Chunk
from rag.filter import EVERYTHING, Filter
from rag.sentences import one_line
from rag.stopping import Stop

State = Literal[
    "queued", "loading", "searching", "reading", "writing", "done", "stopped", "failed"
]
ENDED: frozenset[State] = frozenset({"done", "stopped", "failed"})
FILE = "conversations.sqlite"
_TITLE_CHARACTERS = 60
_SCHEMA = """
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS turns (
    id TEXT PRIMARY KEY, conversation TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    position INTEGER NOT NULL, question TEXT NOT NULL, text TEXT NOT NULL, data TEXT NOT NULL,
    feedback INTEGER
);
CREATE INDEX IF NOT EXISTS turns_by_conversation ON turns(conversation, position);
"""


@dataclass
class Turn:
    """One question and what came of it. The worker that answers writes into it, pages read it.

    `search_text` is what to search for where the user corrected it, `searched` what was searched,
    `where` the part of the knowledge base that was asked.
    `feedback` is 1 for useful, 0 for not, None where nobody said.
    """

    question: str
    search_text: str | None = None
    where: Filter = EVERYTHING
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = "queued"
    text: str = ""
    searched: str = ""
    hits: tuple[Hit, ...] = ()
    answer: Answer | None = None
    error: str = ""  # for the user
    unexpected: str = ""  # the class of an error that is none of ours
    seconds_search: float = 0.0
    feedback: int | None = None
    created: float = field(default_factory=time.time)
    stop: Stop = field(default_factory=Stop, repr=False, compare=False)

    @property
    def is_ended(self) -> bool:
        return self.state in ENDED

    def to_dict(self) -> dict[str, Any]:
        return {
            "state": self.state, "searched": self.searched, "error": self.error,
            "unexpected": self.unexpected, "seconds_search": self.seconds_search,
            "created": self.created, "where": self.where.to_dict(), "answer": asdict(self.answer) if self.answer else None,
        }

    @classmethod
    def from_row(
        cls, id: str, question: str, text: str, data: str, feedback: int | None
    ) -> Turn:
        values = json.loads(data)
        answer = _answer(values["answer"]) if values["answer"] else None
        return cls(
            question=question, where=Filter.from_dict(values.get("where", {})), id=id, state=values["state"], text=text,
            searched=values["searched"], answer=answer, hits=answer.hits if answer else (),
            error=values["error"], unexpected=values["unexpected"],
            seconds_search=values["seconds_search"], created=values["created"], feedback=feedback,
        )


@dataclass(eq=False)
class Conversation:
    """Turns in order. Shared by the sessions that have it open."""

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    title: str = ""
    created: float = field(default_factory=time.time)
    turns: list[Turn] = field(default_factory=list)

    def history(self, before: Turn) -> list[tuple[str, str]]:
        """(question, answer) of the turns before this one that have an answer, oldest first."""
        pairs: list[tuple[str, str]] = []
        for turn in self.turns:
            if turn is before:
                break
            if turn.answer is not None:
                pairs.append((turn.question, turn.answer.text))
        return pairs

    def to_markdown(self) -> str:
        """The conversation for keeping: questions, answers, and where each citation stands."""
        lines = [f"# {_plain(self.title)}", ""]
        for turn in self.turns:
            lines += [f"## {_plain(turn.question)}", ""]
            shown = turn.answer.text if turn.answer else turn.text or turn.error or turn.unexpected
            lines += [shown, ""]
            for citation in turn.answer.citations if turn.answer else ():
                page = f", p. {citation.page}" if citation.page is not None else ""
                lines.append(f"- [{citation.marker}] {_plain(citation.path)}{page}: “{_plain(citation.quote)}”")
            if turn.answer and turn.answer.citations:
                lines.append("")
        return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True, slots=True)
class ConversationEntry:
    """A line of the list of conversations."""

    id: str
    title: str
    updated: float


class ConversationStore:
    """Keeps conversations of one knowledge base. Safe to use from every thread."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._lock = threading.Lock()
        self._open: weakref.WeakValueDictionary[str, Conversation] = weakref.WeakValueDictionary()

    def _connect(self) -> closing[sqlite3.Connection]:
        connection = sqlite3.connect(self._file, timeout=30)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.executescript(_SCHEMA)
        return closing(connection)

    def start(self) -> Conversation:
        """A new conversation; it is kept from its first turn on."""
        conversation = Conversation()
        self._open[conversation.id] = conversation
        return conversation

    def get(self, id: str) -> Conversation | None:
        """The conversation, the same object for every session; None where there is none."""
        with self._lock:
            if (conversation := self._open.get(id)) is not None:
                return conversation
            if not self._file.is_file():
                return None
            with self._connect() as connection:
                row = connection.execute(
                    "SELECT title, created FROM conversations WHERE id = ?", (id,)
                ).fetchone()
                if row is None:
                    return None
                rows = connection.execute(
                    "SELECT id, question, text, data, feedback FROM turns WHERE conversation = ? "
                    "ORDER BY position", (id,),
                ).fetchall()
            conversation = Conversation(id, row[0], row[1], [Turn.from_row(*turn) for turn in rows])
            self._open[id] = conversation
            return conversation

    def keep(self, conversation: Conversation) -> None:
        """Write the conversation's ended turns and its title."""
        ended = [turn for turn in conversation.turns if turn.is_ended]
        if not conversation.title and conversation.turns:
            conversation.title = shorten(conversation.turns[0].question)
        with self._lock, self._connect() as connection, connection:
            connection.execute(
                "INSERT INTO conversations VALUES (?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET "
                "title = excluded.title, updated = excluded.updated",
                (conversation.id, conversation.title, conversation.created, time.time()),
            )
            connection.execute("DELETE FROM turns WHERE conversation = ?", (conversation.id,))
            connection.executemany(
                "INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        turn.id, conversation.id, position, turn.question,
                        turn.answer.text if turn.answer else turn.text,
                        json.dumps(turn.to_dict(), ensure_ascii=True), turn.feedback,
                    )
                    for position, turn in enumerate(ended)
                ],
            )

    def delete(self, id: str) -> None:
        with self._lock:
            self._open.pop(id, None)
            if self._file.is_file():
                with self._connect() as connection, connection:
                    connection.execute("DELETE FROM conversations WHERE id = ?", (id,))

    def entries(self, search: str = "", *, limit: int = 30) -> list[ConversationEntry]:
        """The newest conversations, those that hold `search` in title, questions or answers."""
        if not self._file.is_file():
            return []
        pattern = "%" + search.strip().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        with self._lock, self._connect() as connection:
            rows = connection.execute(
                "SELECT id, title, updated FROM conversations WHERE title LIKE ?1 ESCAPE '\\' OR id IN "
                "(SELECT conversation FROM turns WHERE question LIKE ?1 ESCAPE '\\' "
                "OR text LIKE ?1 ESCAPE '\\') ORDER BY updated DESC LIMIT ?2",
                (pattern, limit),
            ).fetchall()
        return [ConversationEntry(*row) for row in rows]


def shorten(question: str) -> str:
    """A question as a title."""
    line = one_line(question)
    return line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 1] + "…"


def _plain(text: str) -> str:
    """One line, whose signs no Markdown viewer takes for markup."""
    line = one_line(text)
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>#!|" else sign for sign in line)


def _answer(values: dict[str, Any]) -> Answer:
    """An Answer from its `asdict`."""
    hits = tuple(
        Hit(**{**hit, "chunk": Chunk(**{**hit["chunk"], "headings": tuple(hit["chunk"]["headings"])})})
        for hit in values["hits"]
    )
    return Answer(
        question=values["question"], text=values["text"], kind=values["kind"],
        citations=tuple(Citation(**citation) for citation in values["citations"]), hits=hits,
        unsupported=tuple(values["unsupported"]), confidence=values["confidence"],
        stats=GenerationStats(**values["stats"]), prompt=values.get("prompt", ""),
        doubtful=values.get("doubtful", False),
        disagreements=tuple(
            Disagreement(**{**each, "first": Citation(**each["first"]), "second": Citation(**each["second"])})
            for each in values.get("disagreements", ())
        ),
    )
