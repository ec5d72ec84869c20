"""Which files a question is asked of: by folder, name, kind and date. Knows nothing of how they are stored."""

from __future__ import annotations

import fnmatch
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rag.errors import InputError

if TYPE_CHECKING:
    from rag.knowledge import FileRecord

T = TypeVar("T")
_SHOWN = 8  # folders and kinds that an error names


@dataclass(frozen=True, slots=True)
class Filter:
    """A part of the knowledge base: files that fulfil every condition given, and of one condition any value.

    under   folders or files, as the base names them: "contracts", "contracts/2024/lease.pdf"
    file    globs on the path, where * also stands for /; one without a / is compared with the bare name
    type    endings or kinds: "pdf", "docx", "md"
    since, until   first and last day, inclusive, on which the file was last modified when it was ingested

    `Filter(under="contracts", type=["pdf", "docx"], since="2024-01-01")`: one value may stand without
    its list, a day may be a text. Raises InputError for what can't be understood.
    """

    under: Sequence[str] = ()
    file: Sequence[str] = ()
    type: Sequence[str] = ()
    since: date | str | None = None
    until: date | str | None = None

    def __post_init__(self) -> None:
        for name in ("under", "file", "type"):
            given = getattr(self, name)
            values = tuple(_value(name, each) for each in ([given] if isinstance(given, str) else given))
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        for name in ("since", "until"):
            object.__setattr__(self, name, _day(name, getattr(self, name)))
        if self._since and self._until and self._since > self._until:
            raise InputError(f"since is {self.since} and until is {self.until}: no day lies between them.")

    @property
    def is_everything(self) -> bool:
        """Whether no condition is given."""
        return not (self.under or self.file or self.type or self.since or self.until)

    def choose(self, files: Mapping[str, FileRecord]) -> list[str]:
        """The paths of the files that belong to this part, in the order given.

        Raises InputError where days are asked for and the base keeps none of some file.
        """
        readable = [record for record in files.values() if record.status == "ok"]
        if self.since or self.until:
            without = [record for record in readable if record.modified is None]
            if without:
                raise InputError(
                    f"{len(without):,} of {len(readable):,} files in this knowledge base have no date yet, among "
                    f"them {without[0].path}: an earlier version stored none. Run `python -m ingest` on their "
                    "folders, which adds the dates and reads no file again, or ask without since and until."
                )
        return [record.path for record in readable if self.matches(record)]

    def matches(self, record: FileRecord) -> bool:
        """Whether the file fulfils every condition."""
        path = _plain(record.path)
        name = path.rsplit("/", 1)[-1]
        if self.under and not any(path == place or path.startswith(f"{place}/") for place in self.under):
            return False
        if self.file and not any(
            fnmatch.fnmatchcase(path if "/" in glob else name, glob) for glob in self.file
        ):
            return False
        if self.type and _ending(name) not in self.type and record.kind not in self.type:
            return False
        if self._since is None and self._until is None:
            return True
        day = None if record.modified is None else datetime.fromtimestamp(record.modified).date()
        return day is not None and (self._since or day) <= day <= (self._until or day)

    def nothing_matches(self, files: Mapping[str, FileRecord]) -> InputError:
        """The error for a part without files; it names what is there."""
        readable = [record for record in files.values() if record.status == "ok"]
        folders = Counter(record.path.rpartition("/")[0] or "(no folder)" for record in readable)
        kinds = Counter(_ending(record.path) or record.kind for record in readable)
        days = [datetime.fromtimestamp(record.modified).date() for record in readable if record.modified is not None]
        there = [f"folders {_listed(folders)}", f"types {_listed(kinds)}"]
        if days:
            there.append(f"dates {min(days)} to {max(days)}")
        found = "; ".join(there) if readable else "nothing"
        return InputError(
            f"none of the {len(readable):,} files in this knowledge base is {self.describe()}. There is: {found}."
        )

    def describe(self) -> str:
        """The conditions in one line: "under contracts, of type pdf or docx, since 2024-01-01"."""
        parts = [
            f"{word} {' or '.join(values)}"
            for word, values in (("under", self.under), ("named", self.file), ("of type", self.type)) if values
        ]
        parts += [f"{name} {getattr(self, name)}" for name in ("since", "until") if getattr(self, name)]
        return ", ".join(parts) or "any file"

    def to_dict(self) -> dict[str, Any]:
        """The conditions given, as JSON has them; `from_dict` reads them again."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: str(value) if isinstance(value, date) else list(value) for name, value in values.items() if value
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Filter:
        """Raises InputError for a condition that there isn't."""
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"there is no condition {name!r} for files. There are: {', '.join(known)}.")
        return cls(**values)

    @property
    def _since(self) -> date | None:
        return self.since if isinstance(self.since, date) else None

    @property
    def _until(self) -> date | None:
        return self.until if isinstance(self.until, date) else None


def _value(name: str, value: Any) -> str:
    """One value of `under`, `file` or `type` as it is compared."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} is {value!r}; it must be a text that is not empty.")
    plain = _plain(value.strip())
    if name == "type":
        return plain.lower().removeprefix("*").removeprefix(".")
    plain = plain.replace("\\", "/").removeprefix("./")
    return (plain.rstrip("/") or "/") if name == "under" else plain


def _plain(path: str) -> str:
    """Some systems write é and が as one character, some as two; typed and stored must meet."""
    return unicodedata.normalize("NFC", path)


def _ending(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[1].lower() if "." in name else ""


def _day(name: str, value: date | str | None) -> date | None:
    if isinstance(value, datetime):
        return value.date()
    if value is None or isinstance(value, date):
        return value
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; it must be a day as in 2024-01-31.") from error


def _listed(counts: Counter[str]) -> str:
    """"zh (20), en (20) and 3 more"."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common(_SHOWN))
    return shown + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")


EVERYTHING = Filter()


class LastChoice(Generic[T]):
    """What a filter chose of one generation of a base, worked out once and kept until another is asked
    for. Threads may share it: at worst two work out the same."""

    def __init__(self) -> None:
        self._last: tuple[int, Filter, T] | None = None

    def get(self, generation: int, where: Filter, choose: Callable[[], T]) -> T:
        last = self._last
        if last is None or last[:2] != (generation, where):
            self._last = last = (generation, where, choose())
        return last[2]
