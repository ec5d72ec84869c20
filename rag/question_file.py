"""A .jsonl file of questions -> its lines, checked as a whole before any work is done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rag.errors import InputError

_SHOWN = 10  # problems told of one file; more are counted
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
Parsed = TypeVar("Parsed")


def half_character(text: str) -> str | None:
    """What is wrong with a text that holds half of a character, which no model and no file takes.

    Such a text comes from an emoji cut in two ("\\ud83d" in JSON), or from bytes that a terminal can't decode.
    """
    found = _HALF_CHARACTER.search(text)
    return None if found is None else f"half a character (U+{ord(found.group()):04X}, character {found.start() + 1})"


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl file. Raises InputError naming the line that is none."""
    for number, line in _lines(path):
        yield number, _object(path, number, line)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Objects with `id` and `question`; a missing id becomes the line number.

    Raises InputError that names every line that is malformed, without a question, or of an id that
    stands twice.
    """
    first: dict[str, int] = {}

    def parse(number: int, row: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise InputError(f"{path}, line {number} has no question.")
        row.setdefault("id", number)
        key = json.dumps(row["id"], sort_keys=True)
        if key in first:
            raise InputError(f"{path}, line {number}: the id {row['id']!r} stands twice, first in line {first[key]}.")
        first[key] = number
        return row

    return parse_lines(path, parse)


def parse_lines(path: Path, parse: Callable[[int, dict[str, Any]], Parsed]) -> list[Parsed]:
    """`parse(line number, object)` of every line. Raises one InputError for all lines that are wrong."""
    rows: list[Parsed] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            rows.append(parse(number, _object(path, number, line)))
        except InputError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - _SHOWN
        shown = problems[:_SHOWN] + ([f"… and {more} more lines like these."] if more > 0 else [])
        raise InputError("\n".join(shown))
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise InputError(f"{path} is not a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error}") from error
    # Not splitlines: U+2028 may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{path}, line {number} is not a JSON object.")
    if _HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False)):
        raise InputError(f"{path}, line {number} holds half a character, as \\ud83d without what follows it.")
    return row
