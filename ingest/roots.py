"""Which folder each path in the knowledge base is relative to.

One folder: a file's path is relative to it, "zh/02.md". Every further folder gets its own name in
front, "reports/2024.pdf" ("reports-2/..." where that is taken). Which folder got which prefix is
kept with the base, so that a path means the same file at every later run, whatever is given
together. A file given by itself belongs to the folder it lies in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag.errors import InputError

META_KEY = "roots"


@dataclass(frozen=True, slots=True)
class Root:
    """A folder whose files stand in the base under `prefix` ("" or "name/")."""

    folder: Path
    prefix: str


@dataclass(frozen=True, slots=True)
class Scope:
    """What one ingest looks at: all of a root (`inner` is ""), a folder in it, or one file of it."""

    root: Root
    inner: str

    def covers(self, path: str) -> bool:
        """Whether this path in the base lies in the scope; the root must own it."""
        whole = self.root.prefix + self.inner
        return not self.inner or path == whole or path.startswith(whole + "/")


@dataclass(frozen=True, slots=True)
class RootTable:
    """All roots of one base."""

    roots: tuple[Root, ...] = ()

    @classmethod
    def from_json(cls, text: str | None, kb: Path) -> RootTable:
        """As kept in the base: folders relative to the base's, so that both can move together."""
        base = Path(os.path.realpath(kb))
        return cls(
            tuple(
                Root(Path(os.path.normpath(base / folder)), prefix)
                for folder, prefix in json.loads(text or "[]")
            )
        )

    def to_json(self, kb: Path) -> str:
        base = os.path.realpath(kb)
        entries = []
        for root in self.roots:
            try:
                folder = os.path.relpath(root.folder, base)
            except ValueError:  # another drive
                folder = str(root.folder)
            entries.append((Path(folder).as_posix(), root.prefix))
        return json.dumps(entries)

    def owner(self, path: str) -> Root | None:
        """The root a path in the base belongs to."""
        named = [root for root in self.roots if root.prefix and path.startswith(root.prefix)]
        if named:
            return max(named, key=lambda root: len(root.prefix))
        return next((root for root in self.roots if not root.prefix), None)

    def follow_renamed(self, paths: Sequence[Path], known: Sequence[str]) -> RootTable:
        """A root whose folder is gone is where most of its files are now, if that is among `paths`.

        So a folder that was renamed or moved keeps its prefix, and its files their vectors.
        """
        roots = list(self.roots)
        for number, root in enumerate(roots):
            if root.folder.exists():
                continue
            inner = [path.removeprefix(root.prefix) for path in known if self.owner(path) == root]
            for path in paths:
                folder = Path(os.path.realpath(path))
                if not folder.is_dir() or any(other.folder == folder for other in roots):
                    continue
                if 2 * sum((folder / name).is_file() for name in inner) > len(inner):
                    roots[number] = Root(folder, root.prefix)
                    break
        return RootTable(tuple(roots))

    def vanished(self, known: Iterable[str]) -> dict[Root, list[str]]:
        """The roots whose folder is not there, each with its paths in the base."""
        gone: dict[Root, list[str]] = {
            root: [] for root in self.roots if not root.folder.exists()
        }
        for path in known if gone else ():
            if (owner := self.owner(path)) in gone and owner is not None:
                gone[owner].append(path)
        return {root: paths for root, paths in gone.items() if paths}

    def without(self, roots: Iterable[Root]) -> RootTable:
        dropped = set(roots)
        return RootTable(tuple(root for root in self.roots if root not in dropped))

    def add(
        self, paths: Sequence[Path], taken: Iterable[str], *, kb: Path
    ) -> tuple[RootTable, list[Scope]]:
        """The table with what is needed for `paths`, and the scopes they name.

        `taken` are the paths in the base, whose first folders no new prefix may repeat. The base's
        own folder `kb` is never scanned as part of a folder around it, so a root in it (where a
        page keeps what was uploaded) stays one. Raises InputError for a path that doesn't exist.
        """
        own = Path(os.path.realpath(kb))

        def holds(outer: Path, inner: Path) -> bool:
            is_own = inner.is_relative_to(own) and not outer.is_relative_to(own)
            return inner.is_relative_to(outer) and not is_own

        real: list[Path] = []
        for path in paths:
            if not path.exists():
                raise InputError(f"{path} does not exist. Give a file or a folder to ingest.")
            real.append(Path(os.path.realpath(path)))
        folders = sorted(
            {path if path.is_dir() else path.parent for path in real}, key=lambda f: len(f.parts)
        )
        roots = list(self.roots)
        fresh = [f for f in folders if not any(holds(root.folder, f) for root in roots)]
        outer: list[Path] = []
        for folder in fresh:
            if not any(holds(other, folder) for other in outer):
                outer.append(folder)
        # A folder around a known one takes its place: the same files must not stand there twice.
        roots = [root for root in roots if not any(holds(f, root.folder) for f in outer)]
        used = {path.split("/", 1)[0] for path in taken} | {root.prefix.rstrip("/") for root in roots}
        for folder in outer:
            if not roots and len(outer) == 1:
                roots.append(Root(folder, ""))
                continue
            name = prefix = folder.name or "root"
            number = 1
            while prefix in used:
                number += 1
                prefix = f"{name}-{number}"
            used.add(prefix)
            roots.append(Root(folder, prefix + "/"))
        table = RootTable(tuple(roots))
        return table, [table._scope(path) for path in dict.fromkeys(real)]

    def _scope(self, path: Path) -> Scope:
        owners = [root for root in self.roots if path.is_relative_to(root.folder)]
        root = max(owners, key=lambda root: len(root.folder.parts))
        inner = path.relative_to(root.folder).as_posix()
        return Scope(root, "" if inner == "." else inner)
