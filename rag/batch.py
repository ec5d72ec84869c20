"""Many questions answered into a file, a line each; goes on where it was stopped, however that was.

While it works the file only grows: a line is whole or, after a crash, the last one is cut off and
dropped. What stands in it is not answered again. At the end the lines are in the questions' order.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from rag.errors import InputError, RagError
from rag.filter import EVERYTHING, Filter
from rag.question_file import half_character

if TYPE_CHECKING:
    from rag.pipeline import Rag

Row = Mapping[str, Any]  # an object with `id` and `question`
GROUP = 16  # questions given to the engine together; a crash loses the answers of one group at most
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """How a batch ended: `before` stood in the file already; `failed` are all lines with an error."""

    total: int
    before: int
    failed: int


def answer_file(
    rag: Rag, rows: Sequence[Row], target: Path, *, where: Filter = EVERYTHING,
    retry_failed: bool = False, progress: Callable[[int, int], None] | None = None,
) -> BatchCounts:
    """Answer what `target` doesn't answer yet. `progress(answered, total)` comes after each group.

    Answers from a part of the base say which in `where`, and are not mixed with others. A question that fails becomes a line with its `error`; it stays so unless `retry_failed`.
    Raises InputError where the file holds answers to other questions or another batch writes to it.
    """
    with _only_writer(target):
        done = _read_answers(target, rows, where)
        kept = {key for key, line in done.items() if not (retry_failed and "error" in line)}
        waiting = [row for row in rows if _key(row) not in kept]
        before = len(rows) - len(waiting)
        if progress is not None:
            progress(before, len(rows))
        with target.open("a", encoding="utf-8") as out:
            for begin in range(0, len(waiting), GROUP):
                group = waiting[begin : begin + GROUP]
                for row, answer in zip(group, _answers(rag, group, where), strict=True):
                    done[_key(row)] = line = {"id": row["id"], **answer, **_part(where)}
                    out.write(_dump(line))
                out.flush()
                os.fsync(out.fileno())
                if progress is not None:
                    progress(before + begin + len(group), len(rows))
        _put_in_order(target, [done[_key(row)] for row in rows])
    return BatchCounts(len(rows), before, sum("error" in line for line in done.values()))


def _dump(line: Mapping[str, Any]) -> str:
    """The line as it stands in the file. Half a character can't stand there but as an escape."""
    plain = json.dumps(line, ensure_ascii=False)
    return (json.dumps(line) if half_character(plain) else plain) + "\n"


def _key(row: Row) -> str:
    return json.dumps(row["id"], sort_keys=True)


def _part(where: Filter) -> dict[str, Any]:
    return {} if where.is_everything else {"where": where.to_dict()}


def _answers(rag: Rag, rows: Sequence[Row], where: Filter) -> list[dict[str, Any]]:
    """An answer or an error for each question. A group that fails is halved until one is to blame."""
    try:
        answers = rag.batch([row["question"] for row in rows], where=where)
        return [answer.to_dict() for answer in answers]
    except Exception as error:
        # Whatever it was, hours of other questions must not be lost to it. It stands in the
        # output, is counted, and makes the exit code 1.
        if len(rows) > 1:
            middle = len(rows) // 2
            return _answers(rag, rows[:middle], where) + _answers(rag, rows[middle:], where)
        if not isinstance(error, RagError):  # a bug: its traceback is needed
            _log.exception("question %r failed", rows[0]["id"])
        said = str(error) if isinstance(error, RagError) else f"{type(error).__name__}: {error}"
        return [{"question": rows[0]["question"], "error": said}]


@contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Two batches into one file would answer everything twice."""
    lock = filelock.FileLock(f"{target}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(
            f"another batch is writing to {target}. Wait until it has finished, or stop it."
        ) from error
    except OSError as error:
        raise InputError(f"{target} can't be written: {error}") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _read_answers(target: Path, rows: Sequence[Row], where: Filter) -> dict[str, dict[str, Any]]:
    """The answers of an earlier run by id; the last line of an id counts. Drops a line that was cut off."""
    try:
        data = target.read_bytes() if target.exists() else b""
    except OSError as error:
        raise InputError(f"{target} can't be read: {error}") from error
    questions = {_key(row): row["question"] for row in rows}
    done: dict[str, dict[str, Any]] = {}
    end = 0  # of the last line that is whole
    lines = data.split(b"\n")
    last = len(lines) - (not lines[-1].strip())
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                answer = json.loads(line)
                key = _key(answer)
            except (ValueError, KeyError, TypeError) as error:
                if number == last:  # cut off by a crash
                    break
                raise InputError(
                    f"{target}, line {number} is no answer ({error!r}). Mend it, or name another output file."
                ) from error
            if not {"answer", "error"} & answer.keys():
                raise InputError(
                    f"{target}, line {number} holds neither an answer nor an error: it is no file that a batch "
                    "has written. Name another output file."
                )
            if questions.get(key) != answer.get("question"):
                raise InputError(
                    f"{target} holds answers to other questions: line {number}, id {answer['id']!r}, is not "
                    "what the input asks under this id. Name another output file, or delete it."
                )
            if answer.get("where", {}) != where.to_dict():
                raise InputError(
                    f"{target} holds answers from {Filter.from_dict(answer.get('where', {})).describe()}, and now "
                    f"{where.describe()} is asked for. Name another output file, or delete it."
                )
            if number == len(lines):  # whole, but for its line break: answered again
                break
            done[key] = answer
        end += len(line) + 1
    if end < len(data):
        with target.open("r+b") as out:
            out.truncate(end)
    return done


def _put_in_order(target: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Rewrite the file in the questions' order where a retry has left it otherwise."""
    wanted = "".join(map(_dump, lines))
    if target.read_text(encoding="utf-8") == wanted:
        return
    fresh = target.with_name(target.name + ".new")
    fresh.write_text(wanted, encoding="utf-8")
    fresh.replace(target)
