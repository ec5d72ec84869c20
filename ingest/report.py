"""What an ingest did, file by file, and how it is shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rag.knowledge import FileRecord

Status = Literal["added", "changed", "moved", "deleted", "unchanged", "failed", "skipped"]
STATUSES: tuple[Status, ...] = (
    "added", "changed", "moved", "deleted", "unchanged", "failed", "skipped",
)
_ORDERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # the last turn the reading direction
_MARKS = {"added": "+", "changed": "~", "moved": ">", "deleted": "-", "failed": "!", "skipped": "."}


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file. `error` says why it failed or was skipped; `moved_from` is its path before."""

    path: str
    status: Status
    pages: int = 0
    chunks: int = 0
    warnings: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0
    moved_from: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `--json` writes it."""
        entry: dict[str, Any] = {
            "path": self.path, "status": self.status, "pages": self.pages, "chunks": self.chunks,
            "warnings": list(self.warnings), "error": self.error,
        }
        if self.moved_from is not None:
            entry["moved_from"] = self.moved_from
        return entry

    def describe(self) -> str:
        """One line for people."""
        line = f"{_MARKS.get(self.status, ' ')} {show(self.path)}"
        if self.status in ("failed", "skipped"):
            return f"{line}: {self.status}, {show(self.error or '')}"
        if self.status == "moved":
            line += f" (was {show(self.moved_from or '')})"
        elif self.status in ("added", "changed"):
            pages = f"{self.pages:,} page{'s' * (self.pages != 1)}, " if self.pages else ""
            line += f" ({pages}{self.chunks:,} chunk{'s' * (self.chunks != 1)})"
        return line + "".join(f"\n    note: {show(warning)}" for warning in self.warnings)


@dataclass(frozen=True, slots=True)
class SyncReport:
    """The whole run. `files` is in path order; `chunks` is what the base holds afterwards."""

    files: tuple[FileResult, ...]
    kb: str
    chunks: int
    embedded: int  # chunks
    seconds: float
    is_dry_run: bool = False
    notes: tuple[str, ...] = ()  # on the base as a whole

    def count(self, status: Status) -> int:
        return sum(file.status == status for file in self.files)

    @property
    def counts(self) -> dict[str, int]:
        return {status: self.count(status) for status in STATUSES}

    @property
    def failed(self) -> list[FileResult]:
        return [file for file in self.files if file.status == "failed"]

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints on the last line."""
        return {
            **self.counts,
            "embedded": self.embedded,
            "total_chunks": self.chunks,
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
            "kb": self.kb,
            "notes": list(self.notes),
            "files": [file.to_dict() for file in self.files],
        }

    def describe(self, *, max_changes: int | None = 40) -> str:
        """For people: what changed, what was left out and why, and one line that sums up."""
        shown = [f for f in self.files if f.status in ("added", "changed", "moved", "deleted")]
        lines: list[str] = []
        if max_changes is not None and len(shown) > max_changes:
            lines += [file.describe() for file in shown if file.warnings]
            lines.append(f"({len(shown):,} files changed; --verbose lists every one)")
        else:
            lines += [file.describe() for file in shown]
        rest = [f for f in self.files if f.status in ("failed", "skipped")]
        rest += [f for f in self.files if f.status == "unchanged" and f.warnings and max_changes is None]
        lines += [file.describe() for file in rest]
        lines += [f"note: {note}" for note in self.notes]
        said = [f"{count:,} {status}" for status, count in self.counts.items() if count]
        summary = ", ".join(said) or "no files found"
        if self.is_dry_run:
            lines.append(f"would do: {summary}. Nothing was changed.")
        else:
            lines.append(
                f"{summary}. {self.kb} holds {self.chunks:,} chunks; "
                f"{self.embedded:,} embedded in {self.seconds:.1f} s."
            )
        return "\n".join(lines)


def format_health(records: Sequence[FileRecord]) -> str:
    """The table of `--report`: every file with its size, chunks, time and notes."""
    twins = find_twins(records)
    rows: list[tuple[str, ...]] = [("file", "status", "pages", "chunks", "characters", "seconds")]
    notes: list[list[str]] = [[]]
    for record in records:
        rows.append(
            (
                show(record.path), record.status, str(record.pages or "-"), f"{record.chunks:,}",
                f"{record.characters:,}", f"{record.seconds:.2f}",
            )
        )
        said = list(record.warnings)
        if record.path in twins:
            said.append(f"same content as {twins[record.path]}")
        if record.error:
            said.append(record.error)
        notes.append(said)
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row, said in zip(rows, notes, strict=True):
        cells = [
            cell + " " * (width - _width(cell)) if column < 2 else " " * (width - _width(cell)) + cell
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        lines += [f"    {show(note)}" for note in said]
    failed = sum(record.status == "failed" for record in records)
    lines.append(
        f"{len(records):,} files, {failed:,} failed, {sum(r.chunks for r in records):,} chunks, "
        f"{sum(r.characters for r in records):,} characters."
    )
    return "\n".join(lines)


def find_twins(records: Sequence[FileRecord]) -> dict[str, str]:
    """Of files with one content, every one but the first, with the first one's path."""
    first: dict[str, str] = {}
    twins: dict[str, str] = {}
    for record in records:
        if record.sha256 in first and record.size:
            twins[record.path] = first[record.sha256]
        elif record.sha256:  # "" is that of a file that could not be opened
            first.setdefault(record.sha256, record.path)
    return twins


def show(text: str) -> str:
    """Text out of files and their names, on one line and without orders to the terminal."""
    return _ORDERS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _width(text: str) -> int:
    """Columns in a terminal, where a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
