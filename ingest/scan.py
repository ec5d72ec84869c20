"""Finds the files to ingest: what is there, what is left out and why."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ingest.loaders import find_loader, why_skipped
from ingest.roots import RootTable, Scope
from rag.errors import InputError

IGNORE_FILE = ".ragignore"
_UNREADABLE = "can't be read"
_TEMPORARY = re.compile(
    r"~\$|\.~|#.*#$|.*~$|.*\.(?:tmp|temp|swp|swo|part|partial|crdownload|download|bak|lock)$"
    r"|(?:Thumbs\.db|desktop\.ini)$",
    re.IGNORECASE,
)
_SKIPPED_FOLDERS = frozenset("__pycache__ node_modules __MACOSX site-packages".split())


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file on disk and its path in the base. `modified` is in seconds since 1970."""

    path: str
    file: Path
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that is left out, with the reason in one line."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class ScanResult:
    """`unreadable` are files and folders of which nothing can be said: not that they are gone.

    `unwanted` are files that are there and were not asked for in this run.
    """

    sources: dict[str, SourceFile]
    skipped: list[SkippedFile]
    unreadable: tuple[str, ...] = ()
    unwanted: frozenset[str] = frozenset()

    def hides(self, path: str) -> bool:
        """Whether this path may be there although it was not found."""
        return any(path == place or path.startswith(place + "/") for place in self.unreadable)


def scan(
    scopes: Sequence[Scope], roots: RootTable, *, kb: Path, include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> ScanResult:
    """Every file in the scopes that has a loader, by its path in the base, in path order.

    Hidden files, editors' temporary files and the base's own folder are left out without a word;
    what else is left out is listed. `include` and `exclude` are globs on the path below the root.
    """
    sources: dict[str, SourceFile] = {}
    skipped: dict[str, SkippedFile] = {}
    unreadable: list[str] = []
    unwanted: set[str] = set()
    own = Path(os.path.realpath(kb))
    for scope in scopes:
        start = scope.root.folder / scope.inner if scope.inner else scope.root.folder
        for file, inner, reason in _walk(start, scope, own):
            path = scope.root.prefix + inner
            if not _is_wanted(inner, include, exclude):
                if reason.startswith(_UNREADABLE):
                    unreadable.append(path)
                unwanted.add(path)
                continue
            if not reason and not _is_utf8(path):
                path = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                reason = "its name is not valid UTF-8; rename it"
            owner = roots.owner(path)
            if not reason and owner is not None and owner != scope.root:
                reason = f"in the base {owner.prefix} stands for {owner.folder}; rename this folder"
            if not reason and find_loader(path) is None:
                reason = why_skipped(path)
            if reason:
                skipped[path] = SkippedFile(path, reason)
                if reason.startswith(_UNREADABLE):
                    unreadable.append(path)
                continue
            try:
                facts = file.stat()
                sources[path] = SourceFile(path, file, facts.st_size, facts.st_mtime)
            except OSError as error:
                skipped[path] = SkippedFile(path, f"{_UNREADABLE}: {error.strerror}")
                unreadable.append(path)
    return ScanResult(
        {path: sources[path] for path in sorted(sources)},
        [skipped[path] for path in sorted(skipped)],
        tuple(unreadable),
        frozenset(unwanted),
    )


def _walk(start: Path, scope: Scope, own: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, path below the root, why it is skipped or "")."""
    root = scope.root.folder
    if start.is_file():
        yield start, scope.inner, ""
        return
    rules: dict[Path, list[_Rule]] = {}
    for parent in [p for p in (*reversed(start.parents), start) if p.is_relative_to(root)]:
        _read_rules(parent, root, rules)
    pending = [start]
    while pending:
        folder = pending.pop()
        _read_rules(folder, root, rules)
        above = "" if folder == root else folder.relative_to(root).as_posix() + "/"
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == start:
                raise InputError(f"{folder} {_UNREADABLE}: {error.strerror}.") from error
            yield folder, folder.relative_to(root).as_posix(), f"{_UNREADABLE}: {error.strerror}"
            continue
        for entry in entries:
            name = entry.name
            if name.startswith(".") or _TEMPORARY.match(name):
                continue
            file = folder / name
            inner = above + name
            if entry.is_symlink():
                reason = _judge_link(file, root, own)
                if reason or file.is_dir():
                    yield file, inner, reason or "a link to a folder"
                    continue
            is_folder = entry.is_dir()
            if rules[folder] and _is_ignored(inner, is_folder, rules[folder]):
                continue
            if is_folder:
                if name not in _SKIPPED_FOLDERS and file != own:
                    pending.append(file)
            elif entry.is_file():
                yield file, inner, ""
            else:
                yield file, inner, "not a regular file"


def _judge_link(file: Path, root: Path, own: Path) -> str:
    """Why a link isn't followed: what it names lies outside, or is read under its own name.

    Stores of large files (git-annex, DVC, a model hub's cache) keep them where nothing is looked
    for, and links in the places where people look.
    """
    target = Path(os.path.realpath(file))
    if not target.exists():
        return "a link to nothing"
    if not target.is_relative_to(root):
        return "a link out of the folder"
    if target.is_relative_to(own) and not root.is_relative_to(own):
        return "a link into the knowledge base"
    if _is_read_itself(target, root):
        return "a link to a file that is read under its own name"
    return ""


def _is_read_itself(target: Path, root: Path) -> bool:
    """Whether a file below the root is read where it lies: not hidden, ignored or of no known type."""
    if target.is_file() and find_loader(target.name) is None:
        return False
    rules: dict[Path, list[_Rule]] = {}
    folder, inner = root, ""
    for name in target.relative_to(root).parts:
        _read_rules(folder, root, rules)
        file, inner = folder / name, f"{inner}/{name}".lstrip("/")
        is_folder = file.is_dir()
        if name.startswith(".") or _TEMPORARY.match(name) or is_folder and name in _SKIPPED_FOLDERS:
            return False
        if _is_ignored(inner, is_folder, rules[folder]):
            return False
        folder = file
    return True


def _is_utf8(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_wanted(inner: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(_matches(inner, pattern) for pattern in include):
        return False
    return not any(_matches(inner, pattern) for pattern in exclude)


def _matches(inner: str, pattern: str) -> bool:
    """Whether the path, one of its parents, or its bare name matches the glob."""
    rule = _compile_rule(pattern)
    return rule is not None and rule.matches(inner)


# .ragignore -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rule:
    """One line of a .ragignore, as in .gitignore: `!` takes back, a final slash means folders."""

    expression: re.Pattern[str]
    is_negative: bool
    only_folders: bool
    base: str = ""  # the folder its file lies in, below the root, with a final slash

    def matches(self, inner: str, is_folder: bool = False) -> bool:
        if not inner.startswith(self.base):
            return False
        parts = inner[len(self.base) :].split("/")
        for end in range(1, len(parts) + 1):
            is_whole = end == len(parts)
            if is_whole and self.only_folders and not is_folder:
                continue
            if self.expression.fullmatch("/".join(parts[:end])):
                return True
        return False


@lru_cache(maxsize=1024)
def _compile_rule(line: str, base: str = "") -> _Rule | None:
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    is_negative = line.startswith("!")
    line = line.removeprefix("!").removeprefix("./")
    only_folders = line.endswith("/")
    line = line.rstrip("/")
    is_anchored = "/" in line
    line = line.removeprefix("/")
    expression = "" if is_anchored else "(?:.*/)?"
    for part in re.split(r"(\*\*/|/\*\*$|\*\*|\*|\?|\[[^\]]*\])", line):
        if part in ("**/",):
            expression += "(?:.*/)?"
        elif part in ("/**", "**"):
            expression += ".*"
        elif part == "*":
            expression += "[^/]*"
        elif part == "?":
            expression += "[^/]"
        elif part.startswith("[") and part.endswith("]"):
            expression += fnmatch.translate(part).removesuffix("\\z").removesuffix("\\Z")
        else:
            expression += re.escape(part)
    return _Rule(re.compile(expression, re.DOTALL), is_negative, only_folders, base)


def _read_rules(folder: Path, root: Path, rules: dict[Path, list[_Rule]]) -> None:
    if folder in rules:
        return
    found = list(rules.get(folder.parent, []))
    file = folder / IGNORE_FILE
    if file.is_file():
        inner = folder.relative_to(root).as_posix()
        base = "" if inner == "." else inner + "/"
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if (rule := _compile_rule(line, base)) is not None:
                found.append(rule)
    rules[folder] = found


def _is_ignored(inner: str, is_folder: bool, rules: Sequence[_Rule]) -> bool:
    ignored = False
    for rule in rules:
        if rule.matches(inner, is_folder):
            ignored = not rule.is_negative
    return ignored


def take_signature(paths: Sequence[str | Path]) -> int:
    """A number that changes when a file below the paths comes, goes, or is written to."""
    entries: list[tuple[str, int, int]] = []
    pending = [str(path) for path in paths]
    while pending:
        place = pending.pop()
        try:
            if os.path.isdir(place):
                for entry in os.scandir(place):
                    if entry.name.startswith(".") and entry.name != IGNORE_FILE:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif os.path.isfile(entry.path):  # or a link to one, which may be followed
                        state = entry.stat()
                        entries.append((entry.path, state.st_size, state.st_mtime_ns))
            else:
                state = os.stat(place)
                entries.append((place, state.st_size, state.st_mtime_ns))
        except OSError:
            continue  # gone between two looks, which the next one sees
    return hash(tuple(sorted(entries)))


# hashes -----------------------------------------------------------------------------------------


def hash_files(sources: Sequence[SourceFile], *, max_bytes: int) -> dict[str, str]:
    """sha256 of each file's content by path; "" where it can't be read, or is too large to be.

    Size and time of change are not trusted in its place: a restored backup keeps both.
    """
    readable = [source for source in sources if source.size <= max_bytes]
    batches = [readable[start : start + 64] for start in range(0, len(readable), 64)]
    digests = {source.path: "" for source in sources}
    with ThreadPoolExecutor(max_workers=4) as pool:
        for batch in pool.map(_hash_batch, batches):
            digests.update(batch)
    return digests


def _hash_batch(sources: Sequence[SourceFile]) -> dict[str, str]:
    return {source.path: _hash_file(source.file) for source in sources}


def _hash_file(file: Path) -> str:
    try:
        with file.open("rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""
