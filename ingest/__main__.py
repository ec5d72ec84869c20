"""`python -m ingest [PATH ...]`: bring the knowledge base in step with folders and files."""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from rag.errors import InputError, RagError, SettingsError
from rag.settings import Settings

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_FAILED_FILES = 0, 1, 2, 3
_WATCH_SECONDS = 1.0  # between two looks at the folders
EXIT_INTERRUPTED = 130  # as shells report Ctrl-C

_EPILOG = """\
paths in the base: a file of the first folder is known by its path relative to that folder, a file
of any further folder has that folder's name in front. Files that are gone are deleted from the base
only where they lay in a PATH that was given. Hidden and temporary files are left out, and what a
.ragignore file (written like .gitignore) names.

exit status: 0 all files are stored; 3 some failed, the rest is stored; 2 wrong usage; 1 another
error; 130 stopped by Ctrl-C (what was stored stays, the next run goes on).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path must not end the run
    parser = _make_parser()
    options = parser.parse_args(arguments)
    try:
        settings = Settings.load(
            kb=options.kb, embedder=options.embedder, chunk_tokens=options.chunk_tokens
        )
        from rag.knowledge import explained_database_errors

        with explained_database_errors(settings.kb):
            if options.copy_to_milvus:
                return _copy_to_milvus(options, settings)
            if options.report:
                return _print_health(settings, as_json=options.json)
            return _run(options, settings)
    except (SettingsError, InputError) as error:
        parser.error(str(error))
    except RagError as error:
        print(f"ingest: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(
            "ingest: stopped. What was stored stays; run the command again to go on.",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _make_parser() -> argparse.ArgumentParser:
    from ingest.parsers import Limits

    limits, settings = Limits(), Settings()
    parser = argparse.ArgumentParser(
        prog="python -m ingest", description="Bring a knowledge base in step with folders and files.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", default=["knowledge"],
        help="folder or file to ingest (default: knowledge)")
    add("--kb", metavar="DIR", help=f"folder of the knowledge base (default: {settings.kb})")
    add("--json", action="store_true", help="print one JSON object as the last line of stdout")
    add("--dry-run", action="store_true", help="say what would be done and change nothing")
    add("--reembed", action="store_true",
        help="embed what is stored with the embedder now set; no file that is unchanged is read")
    add("--prune", action="store_true",
        help="also delete from the base what came from folders that are gone")
    add("--watch", action="store_true", help="go on, and ingest again whenever a file changes")
    add("--report", action="store_true", help="show the health of every file in the base, and end")
    add("--copy-to-milvus", metavar="URI",
        help="copy the knowledge base in --kb to Milvus, nothing embedded again, and end; URI is a file "
        "NAME.db or http://host:19530, with #BASE for one of several")
    add("--include", action="append", default=[], metavar="GLOB",
        help="ingest only files that match; what the base holds of others stays as it is, unless it is "
        "gone from the disk (may be given several times; default: all)")
    add("--exclude", action="append", default=[], metavar="GLOB",
        help="leave out files that match, in the same way (may be given several times; default: none)")
    add("--embedder", metavar="NAME",
        help=f"bundled, a folder, or a Hugging Face name (default: {settings.embedder})")
    add("--chunk-tokens", type=int, metavar="N",
        help=f"largest chunk, in the embedder's tokens (default: {settings.chunk_tokens})")
    add("--scheduler", metavar="ADDRESS",
        help="parse and embed on the workers of a Dask scheduler, tcp://host:8786 (default: on this machine)")
    add("--timeout", type=float, default=limits.seconds, metavar="SECONDS",
        help=f"longest time to parse one file (default: {limits.seconds:g})")
    add("--max-memory-mb", type=int, default=limits.memory_mb, metavar="MB",
        help=f"memory a file's parser may use (default: {limits.memory_mb})")
    add("--max-file-mb", type=int, default=limits.file_mb, metavar="MB",
        help=f"largest file to read (default: {limits.file_mb})")
    add("--verbose", action="store_true", help="list every file (default: at most 40 changes)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _run(options: argparse.Namespace, settings: Settings) -> int:
    from ingest.parsers import Limits
    from ingest.scan import take_signature
    from ingest.synchronizer import sync

    try:
        limits = Limits(options.timeout, options.max_memory_mb, options.max_file_mb)
    except ValueError as error:
        raise InputError(str(error)) from error
    signal.signal(signal.SIGTERM, _interrupt)
    while True:
        # Taken before, so that what changes during the run is seen.
        before = take_signature(options.paths) if options.watch else 0
        with _ProgressBar(is_shown=not options.quiet) as bar:
            report = sync(
                options.paths, settings=settings, limits=limits, progress=bar.show,
                include=options.include, exclude=options.exclude,
                reembed=options.reembed, prune=options.prune, dry_run=options.dry_run,
                scheduler=options.scheduler,
            )
        print(report.describe(max_changes=None if options.verbose else 40))
        if options.json:
            print(_to_json(report.to_dict()))
        if not options.watch:
            return EXIT_FAILED_FILES if report.failed else EXIT_OK
        print(f"watching {', '.join(options.paths)}; Ctrl-C ends it.", flush=True)
        _wait_for_change(options.paths, before)


def _wait_for_change(paths: Sequence[str], before: int) -> None:
    """Return once files below the paths changed and have been still for one look."""
    from ingest.scan import take_signature

    last = before
    while True:
        time.sleep(_WATCH_SECONDS)
        now = take_signature(paths)
        if now != before and now == last:
            return
        last = now


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _to_json(value: dict[str, Any]) -> str:
    """One line; escaped where the terminal's encoding could not show it."""
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not is_unicode)


class _ProgressBar:
    """A bar on stderr, made at the first event: a run without changes shows none."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._bar: object | None = None

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        close = getattr(self._bar, "close", None)
        if close is not None:
            close()

    def show(self, progress: object) -> None:
        from ingest.report import show
        from ingest.synchronizer import Progress

        assert isinstance(progress, Progress)
        if not self._is_shown:
            return
        from tqdm import tqdm

        if not isinstance(self._bar, tqdm) or self._bar.total != progress.total:
            self.__exit__()
            self._bar = tqdm(total=progress.total, unit="file", file=sys.stderr, mininterval=0.2)
        assert isinstance(self._bar, tqdm)
        self._bar.set_postfix_str(show(progress.path[-40:]), refresh=False)
        self._bar.update(progress.done - self._bar.n)


def _copy_to_milvus(options: argparse.Namespace, settings: Settings) -> int:
    from ingest.mover import move_to_milvus
    from ingest.synchronizer import Progress
    from rag.knowledge import KnowledgeBase

    source = KnowledgeBase.open(settings.kb)
    with _ProgressBar(is_shown=not options.quiet) as bar:
        report = move_to_milvus(
            source, options.copy_to_milvus,
            progress=lambda done, total, path: bar.show(Progress(done, total, path)),
        )
    print(report.describe())
    print(f"Use it: RAG_STORE=milvus RAG_MILVUS_URI={options.copy_to_milvus} python -m rag ask ...")
    return EXIT_OK


def _print_health(settings: Settings, *, as_json: bool) -> int:
    from dataclasses import asdict

    from ingest.report import format_health
    from rag.store import open_store

    records = list(open_store(settings).files().values())
    print(format_health(records))
    if as_json:
        print(_to_json({"files": [asdict(record) for record in records]}))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
