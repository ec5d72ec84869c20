"""Ingest as a sync: the real command on real folders, and what survives when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import WordEmbedder

from ingest import FileResult, Limits, Progress, SyncReport, sync
from ingest.__main__ import main
from ingest.ocr import find_tesseract
from ingest.scan import take_signature
from rag.errors import InputError, KnowledgeBaseError
from rag.knowledge import KnowledgeBase
from rag.settings import Settings

PROJECT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return report

    def statuses(self) -> dict[str, str]:
        return {file["path"]: file["status"] for file in self.report["files"]}


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ingest", *arguments, "--kb", str(folder / "kb")]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAG_")}
    return {**kept, "PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "utf-8"}


def ingest(folder: Path, *arguments: str) -> Outcome:
    """Run the command in `folder`, with the base in folder/kb."""
    done = subprocess.run(
        command(folder, *arguments), cwd=folder, env=environment(), capture_output=True,
        text=True, encoding="utf-8", timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def contents(kb: Path) -> dict[str, tuple[Any, ...]]:
    """What a base holds, without row numbers and times: chunk ids and vectors by path."""
    base = KnowledgeBase.open(kb)
    held: dict[str, tuple[Any, ...]] = {}
    rows, vectors = base.all_vectors()
    stored = base.stored_chunks([int(row) for row in rows]) if len(rows) else {}
    by_id = {stored[int(row)].chunk.id: vector.tobytes() for row, vector in zip(rows, vectors)}
    for path, record in base.files().items():
        ids = [chunk.id for chunk in base.chunks_of(path)] if record.status == "ok" else []
        held[path] = (record.sha256, record.status, record.error, ids, [by_id[i] for i in ids])
    base.close()
    return held


def sync_words(folder: Path, *paths: Path, **options: Any) -> SyncReport:
    """`sync` in this process with an embedder that counts words."""
    embedder = options.pop("embedder", None) or WordEmbedder()
    settings = options.pop("settings", None) or Settings(kb=str(folder / "kb"))
    return sync(paths, settings=settings, embedder=embedder, **options)


def statuses(report: SyncReport) -> dict[str, str]:
    return {file.path: file.status for file in report.files}


# the command ------------------------------------------------------------------------------------


def test_edit_move_delete_and_ingest_again(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(docs / "中文 目录" / "缓存.md", "# 缓存\n\n键和值留在显存里。")
    write(docs / "a.txt", "The first text.")
    write(docs / "b.txt", "The second text.")
    write(docs / "c.html", "<p>The third text.</p>")

    first = ingest(tmp_path, "docs", "--json")
    assert first.code == 0, first.err
    assert first.report["added"] == 4
    assert first.report["embedded"] == 4
    (entry,) = [file for file in first.report["files"] if file["path"] == "a.txt"]
    assert entry == {"path": "a.txt", "status": "added", "pages": 0, "chunks": 1, "warnings": [],
                     "error": None}

    second = ingest(tmp_path, "docs", "--json")
    assert (second.code, second.report["unchanged"], second.report["embedded"]) == (0, 4, 0)

    write(docs / "a.txt", "The first text, edited.")
    (docs / "b.txt").rename(docs / "sub.txt")
    (docs / "c.html").unlink()
    third = ingest(tmp_path, "docs", "--json")
    assert third.statuses() == {
        "a.txt": "changed", "c.html": "deleted", "sub.txt": "moved", "中文 目录/缓存.md": "unchanged",
    }
    assert third.report["embedded"] == 1
    base = KnowledgeBase.open(tmp_path / "kb")
    assert set(base.files()) == {"a.txt", "sub.txt", "中文 目录/缓存.md"}
    assert [chunk.text for chunk in base.chunks_of("a.txt")] == ["The first text, edited."]
    assert [chunk.path for chunk in base.chunks_of("sub.txt")] == ["sub.txt"]
    assert base.index_state() == "current"


def test_a_failed_file_leaves_the_rest_and_is_told_by_the_exit_status(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(docs / "good.md", "# Good\n\nText.")
    write(docs / "broken.pdf", "%PDF-1.4 broken")
    write(docs / "picture.jpg", "not read")
    outcome = ingest(tmp_path, "docs", "--json")
    assert outcome.code == 3
    assert outcome.statuses() == {
        "good.md": "added", "broken.pdf": "failed", "picture.jpg": "skipped",
    }
    assert "! broken.pdf: failed, this is not a PDF, or it is damaged" in outcome.out
    assert ". picture.jpg: skipped, .jpg is a picture" in outcome.out
    again = ingest(tmp_path, "docs", "--json")
    assert (again.code, again.report["failed"], again.report["unchanged"]) == (3, 1, 1)
    (docs / "broken.pdf").unlink()
    assert ingest(tmp_path, "docs", "--json").code == 0


def test_wrong_usage_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["missing"], ["--no-such-option"], ["--chunk-tokens", "1"], ["--timeout", "0"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--kb", "kb"])
        assert ended.value.code == 2, arguments
        assert not (tmp_path / "kb").exists()
    assert "limit seconds is 0.0" in capsys.readouterr().err
    outcome = ingest(tmp_path)  # "knowledge", which isn't there
    assert outcome.code == 2
    assert "knowledge does not exist. Give a file or a folder" in outcome.err


def test_report_dry_run_and_help(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "a.md", "# A\n\nText.")
    planned = ingest(tmp_path, "docs", "--dry-run", "--json")
    assert planned.report["added"] == 1
    assert planned.report["dry_run"] is True
    assert not (tmp_path / "kb").exists()
    assert ingest(tmp_path, "docs").code == 0
    health = ingest(tmp_path, "--report")
    assert "a.md" in health.out
    assert "1 files, 0 failed, 1 chunks" in health.out
    assert "default: knowledge" in ingest(tmp_path, "--help").out


def make_corpus(docs: Path, num_files: int) -> None:
    for number in range(num_files):
        paragraphs = [
            f"Paragraph {k} of file {number} says that value {k * number} belongs to key {k}. " * 6
            for k in range(12)
        ]
        write(docs / f"part{number % 7}" / f"file{number}.md", f"# File {number}\n\n" + "\n\n".join(paragraphs))


def test_killed_in_the_middle_the_next_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    make_corpus(tmp_path / "docs", 150)
    undisturbed = tmp_path / "undisturbed"
    assert ingest(undisturbed_folder(undisturbed), str(tmp_path / "docs")).code == 0
    expected = contents(undisturbed / "kb")
    assert len(expected) == 150
    states = set()
    for wait in (0.0, 0.15, 0.3):
        process = subprocess.Popen(
            command(tmp_path, "docs"), cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        process.stderr.read(1)  # the progress bar: files are being stored
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        held = contents(tmp_path / "kb")
        states.add(len(held))
        for path, state in held.items():
            assert state == expected[path], "what is stored is whole"
    assert ingest(tmp_path, "docs").code == 0
    assert contents(tmp_path / "kb") == expected
    assert min(states) < 150, "at least one run was stopped before its end"


def undisturbed_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_ctrl_c_keeps_what_was_stored(tmp_path: Path) -> None:
    make_corpus(tmp_path / "docs", 200)
    process = subprocess.Popen(
        command(tmp_path, "docs"), cwd=tmp_path, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    assert process.stderr is not None
    process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    assert "run the command again" in rest
    assert "Traceback" not in rest
    assert KnowledgeBase.open(tmp_path / "kb").index_state() == "current"
    assert ingest(tmp_path, "docs", "--json").report["failed"] == 0


def test_watch_ingests_what_changes(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(docs / "a.txt", "one")
    process = subprocess.Popen(
        command(tmp_path, "docs", "--watch", "--quiet"), cwd=tmp_path, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )
    assert process.stdout is not None and process.stderr is not None
    watchdog = threading.Timer(60, process.kill)  # rather fail than wait for a line for ever
    watchdog.start()
    try:
        lines = iter(process.stdout.readline, "")
        assert next(lines) == "+ a.txt (1 chunk)\n"
        assert next(lines).startswith("1 added")
        assert next(lines).startswith("watching docs")
        write(docs / "b.txt", "two")
        assert next(lines) == "+ b.txt (1 chunk)\n"
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        process.stdout.close()
        process.stderr.close()


# paths ------------------------------------------------------------------------------------------


def test_several_folders_keep_apart_and_each_keeps_its_paths(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "docs", tmp_path / "two" / "docs"
    write(one / "a.txt", "From the first folder.")
    write(two / "a.txt", "From the second folder.")
    assert statuses(sync_words(tmp_path, one)) == {"a.txt": "added"}
    # The first keeps its paths, the second gets its name; nothing of the first is deleted.
    assert statuses(sync_words(tmp_path, two)) == {"docs/a.txt": "added"}
    both = statuses(sync_words(tmp_path, two, one))
    assert both == {"a.txt": "unchanged", "docs/a.txt": "unchanged"}
    (two / "a.txt").unlink()
    assert statuses(sync_words(tmp_path, one)) == {"a.txt": "unchanged"}
    assert statuses(sync_words(tmp_path, two)) == {"docs/a.txt": "deleted"}


def test_a_subfolder_that_is_called_like_another_root_is_told(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.txt", "one")
    write(tmp_path / "docs" / "a.txt", "two")
    sync_words(tmp_path, tmp_path / "one")
    sync_words(tmp_path, tmp_path / "docs")
    write(tmp_path / "one" / "docs" / "a.txt", "three")
    report = sync_words(tmp_path, tmp_path / "one")
    assert statuses(report) == {"a.txt": "unchanged", "docs/a.txt": "skipped"}
    assert KnowledgeBase.open(tmp_path / "kb").document("docs/a.txt").text == "two"


def test_two_new_folders_of_one_name_get_different_prefixes(tmp_path: Path) -> None:
    one, two = tmp_path / "one" / "docs", tmp_path / "two" / "docs"
    write(one / "a.txt", "one")
    write(two / "a.txt", "two")
    assert set(statuses(sync_words(tmp_path, one, two))) == {"docs/a.txt", "docs-2/a.txt"}


def test_a_file_or_a_folder_of_a_known_root_is_known_by_its_path_there(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(docs / "zh" / "a.txt", "one")
    write(docs / "zh" / "b.txt", "two")
    write(docs / "c.txt", "three")
    sync_words(tmp_path, docs)
    write(docs / "c.txt", "edited")
    (docs / "zh" / "b.txt").unlink()
    assert statuses(sync_words(tmp_path, docs / "zh" / "a.txt")) == {"zh/a.txt": "unchanged"}
    assert statuses(sync_words(tmp_path, docs / "zh")) == {"zh/a.txt": "unchanged", "zh/b.txt": "deleted"}
    assert statuses(sync_words(tmp_path, docs / "c.txt")) == {"c.txt": "changed"}


def test_a_folder_around_a_known_one_takes_it_over_without_embedding(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "zh" / "a.txt", "one")
    sync_words(tmp_path, tmp_path / "docs" / "zh")
    embedder = WordEmbedder()
    report = sync_words(tmp_path, tmp_path / "docs", embedder=embedder)
    assert statuses(report) == {"zh/a.txt": "moved"}
    assert embedder.calls == 0


def test_the_date_of_a_file_is_kept_and_follows_it(tmp_path: Path) -> None:
    """A base of an earlier version gets the dates of files that haven't changed; nothing is read again."""
    docs = tmp_path / "docs"
    for name in ("a.txt", "b.txt"):
        write(docs / name, f"text of {name}")
        os.utime(docs / name, (0, 1_700_000_000))
    sync_words(tmp_path, docs)
    base = KnowledgeBase.open(tmp_path / "kb")
    assert {record.modified for record in base.files().values()} == {1_700_000_000}
    base._connection.execute("ALTER TABLE files DROP COLUMN modified")
    os.utime(docs / "a.txt", (0, 1_600_000_000))
    (docs / "b.txt").rename(docs / "c.txt")
    report = sync_words(tmp_path, docs)
    assert statuses(report) == {"a.txt": "unchanged", "c.txt": "moved"} and report.embedded == 0
    dates = {path: record.modified for path, record in base.files().items()}
    assert dates == {"a.txt": 1_600_000_000, "c.txt": 1_700_000_000}
    generation = base.generation
    sync_words(tmp_path, docs)
    assert base.generation == generation  # nothing to write


def test_base_and_folder_can_be_moved_together(tmp_path: Path) -> None:
    old = tmp_path / "old"
    write(old / "docs" / "a.txt", "one")
    sync_words(old, old / "docs")
    new = old.rename(tmp_path / "new")
    assert statuses(sync_words(new, new / "docs")) == {"a.txt": "unchanged"}


def test_a_renamed_folder_keeps_its_paths_and_vectors(tmp_path: Path) -> None:
    for folder, name in (("first", "x.txt"), ("docs", "a.txt"), ("docs", "b.txt")):
        write(tmp_path / folder / name, f"text of {name}")
    sync_words(tmp_path, tmp_path / "first")
    sync_words(tmp_path, tmp_path / "docs")
    (tmp_path / "docs").rename(tmp_path / "papers")
    embedder = WordEmbedder()
    report = sync_words(tmp_path, tmp_path / "papers", embedder=embedder)
    assert statuses(report) == {"docs/a.txt": "unchanged", "docs/b.txt": "unchanged"}
    assert embedder.calls == 0


def test_files_of_a_folder_that_is_gone_are_told_and_pruned_on_demand(tmp_path: Path) -> None:
    write(tmp_path / "old" / "a.txt", "one")
    write(tmp_path / "new" / "b.txt", "two")
    sync_words(tmp_path, tmp_path / "old")
    (tmp_path / "old" / "a.txt").unlink()
    (tmp_path / "old").rmdir()
    report = sync_words(tmp_path, tmp_path / "new")
    assert statuses(report) == {"new/b.txt": "added"}
    assert "still holds 1 files" in report.notes[0]
    report = sync_words(tmp_path, tmp_path / "new", prune=True)
    assert statuses(report) == {"a.txt": "deleted", "new/b.txt": "unchanged"}
    assert report.notes == ()


def test_same_names_in_different_folders_coexist_and_twins_are_named(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(docs / "x" / "a.txt", "the same words")
    write(docs / "y" / "a.txt", "the same words")
    report = sync_words(tmp_path, docs)
    assert [file.warnings for file in report.files] == [(), ("same content as x/a.txt",)]


def test_swapped_names_are_two_changed_files(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    first, second = write(docs / "a.txt", "one"), write(docs / "b.txt", "two")
    sync_words(tmp_path, docs)
    first.rename(docs / "c")
    second.rename(docs / "a.txt")
    (docs / "c").rename(docs / "b.txt")
    assert statuses(sync_words(tmp_path, docs)) == {"a.txt": "changed", "b.txt": "changed"}
    base = KnowledgeBase.open(tmp_path / "kb")
    assert [chunk.text for chunk in base.chunks_of("a.txt")] == ["two"]


def test_hidden_temporary_and_ignored_files_are_left_out(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    for name in (".hidden.txt", ".git/config.txt", "~$a.docx", "a.txt~", "#a.txt#", "a.txt.swp",
                 "drafts/a.txt", "keep/old.log", "keep/new.log", "node_modules/a.txt"):
        write(docs / name, "text")
    write(docs / "good.txt", "text")
    write(docs / ".ragignore", "# comment\ndrafts/\n*.log\n!new.log\n")
    assert statuses(sync_words(tmp_path, docs)) == {"good.txt": "added", "keep/new.log": "added"}


def test_include_and_exclude_are_globs_on_the_path(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    for name in ("a.md", "a.txt", "sub/b.md", "sub/deep/c.md"):
        write(docs / name, f"text of {name}")
    report = sync_words(tmp_path, docs, include=["*.md"], exclude=["sub/deep"])
    assert set(statuses(report)) == {"a.md", "sub/b.md"}


def test_what_include_and_exclude_leave_out_stays_in_the_base(tmp_path: Path) -> None:
    """A run for the notes alone deleted everything else, which was still on the disk."""
    docs = tmp_path / "docs"
    for name in ("a.md", "b.txt", "gone.txt", "sub/c.md"):
        write(docs / name, f"text of {name}")
    sync_words(tmp_path, docs)
    (docs / "gone.txt").unlink()
    write(docs / "a.md", "edited")
    write(docs / "b.txt", "edited too")
    for dry_run in (True, False):
        report = sync_words(tmp_path, docs, include=["*.md"], exclude=["sub"], dry_run=dry_run)
        assert statuses(report) == {"a.md": "changed", "gone.txt": "deleted"}
        assert report.notes == (
            "2 files that --include or --exclude leave out stay in the base as they are. "
            "To delete them from it, name them in .ragignore.",
        )
    assert set(KnowledgeBase.open(tmp_path / "kb").files()) == {"a.md", "b.txt", "sub/c.md"}
    write(docs / ".ragignore", "b.txt")
    assert statuses(sync_words(tmp_path, docs, include=["*.md"])) == {
        "a.md": "unchanged", "b.txt": "deleted", "sub/c.md": "unchanged",
    }


def test_the_base_in_the_folder_is_not_ingested(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    sync_words(tmp_path, tmp_path)
    write(tmp_path / "kb" / "notes.txt", "not a document")
    assert statuses(sync_words(tmp_path, tmp_path)) == {"a.txt": "unchanged"}


def test_a_root_inside_of_the_base_stays_when_a_folder_around_it_is_ingested(tmp_path: Path) -> None:
    uploads = tmp_path / "kb" / "uploads"
    write(uploads / "a.txt", "uploaded")
    write(tmp_path / "b.txt", "one")
    assert statuses(sync_words(tmp_path, uploads)) == {"a.txt": "added"}
    name = f"{tmp_path.name}/b.txt"
    assert statuses(sync_words(tmp_path, tmp_path)) == {name: "added"}
    both = statuses(sync_words(tmp_path, tmp_path, uploads))
    assert both == {"a.txt": "unchanged", name: "unchanged"}


def test_a_folder_that_can_not_be_read_for_once_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs"
    write(docs / "a.txt", "one")
    write(docs / "locked" / "b.txt", "two")
    sync_words(tmp_path, docs)
    real = os.scandir

    def scandir(folder: Any) -> Any:
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr("ingest.scan.os.scandir", scandir)
    report = sync_words(tmp_path, docs)
    assert statuses(report) == {"a.txt": "unchanged", "locked": "skipped"}
    assert report.files[1].error == "can't be read: Permission denied"
    monkeypatch.undo()
    assert statuses(sync_words(tmp_path, docs)) == {"a.txt": "unchanged", "locked/b.txt": "unchanged"}


def test_a_link_to_what_nothing_else_reads_is_followed(tmp_path: Path) -> None:
    """Stores of large files keep them hidden, or under names without a suffix, behind links."""
    docs = tmp_path / "docs"
    hidden = write(docs / ".annex" / "ab" / "lease.txt", "The rent is 500 euros.")
    blob = write(docs / "blobs" / "3f2a", "# The blob\n\nText.")
    ignored = write(docs / "store" / "notes.txt", "A note.")
    write(docs / ".ragignore", "store/\n")
    for name, target in (("lease.txt", hidden), ("blob.md", blob), ("sub/notes.txt", ignored)):
        (docs / name).parent.mkdir(exist_ok=True)
        (docs / name).symlink_to(target)
    (docs / "twin.md").symlink_to(docs / "blob.md")
    (docs / "folder").symlink_to(docs / ".annex")
    (docs / "base.txt").symlink_to(write(docs / "kb" / "own.txt", "The base's own."))
    report = sync_words(docs, docs)
    assert statuses(report) == {
        "lease.txt": "added", "blob.md": "added", "sub/notes.txt": "added", "twin.md": "added",
        "blobs/3f2a": "skipped", "folder": "skipped", "base.txt": "skipped",
    }
    base = KnowledgeBase.open(docs / "kb")
    assert [chunk.text for chunk in base.chunks_of("lease.txt")] == ["The rent is 500 euros."]
    before = take_signature([docs])
    write(hidden, "The rent is 600 euros a month.")
    assert take_signature([docs]) != before, "--watch sees what a link leads to"


def test_links_are_not_followed(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(tmp_path / "outside.txt", "secret")
    write(docs / "a.txt", "one")
    (docs / "out.txt").symlink_to(tmp_path / "outside.txt")
    (docs / "in.txt").symlink_to(docs / "a.txt")
    (docs / "loop").symlink_to(docs)
    (docs / "nothing.txt").symlink_to(docs / "gone.txt")
    report = sync_words(tmp_path, docs)
    assert statuses(report) == {"a.txt": "added", "out.txt": "skipped", "in.txt": "skipped",
                                "loop": "skipped", "nothing.txt": "skipped"}


# hostile files ----------------------------------------------------------------------------------


@pytest.fixture
def slow_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program that takes the worker's place: it hangs, eats memory or dies as the file says."""
    package = tmp_path / "fake" / "ingest"
    package.mkdir(parents=True)
    write(
        package / "worker.py",
        "import json, os, sys, time\n"
        "sys.path.insert(0, os.environ['REAL_PROJECT'])\n"
        "for line in sys.stdin:\n"
        "    texts = [open(file).read() for file, path in json.loads(line)['files']]\n"
        "    if 'hang' in texts: time.sleep(60)\n"
        "    if 'die' in texts: os._exit(9)\n"
        "    answers = [{'error': 'read ' + text, 'seconds': 0.1} for text in texts]\n"
        "    print(json.dumps(answers), flush=True)\n",
    )
    write(package / "__init__.py", "")
    return tmp_path / "fake"


def test_a_parser_that_hangs_or_dies_costs_only_its_file(
    tmp_path: Path, slow_loader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ingest.parsers as parsers

    monkeypatch.setattr(parsers, "__file__", str(slow_loader / "ingest" / "parsers.py"))
    monkeypatch.setenv("REAL_PROJECT", str(PROJECT))
    docs = tmp_path / "docs"
    for name, text in (("a.html", "hang"), ("b.html", "die"), ("c.html", "well")):
        write(docs / name, text)
    write(docs / "d.md", "Text that is read in this process.")
    report = sync_words(tmp_path, docs, limits=Limits(seconds=1.0))
    errors = {file.path: file.error for file in report.files}
    assert errors["a.html"] == "parsing it took longer than 1 s (--timeout)"
    assert errors["b.html"] is not None and "the parser crashed on it (exit code 9)" in errors["b.html"]
    assert errors["c.html"] == "read well"
    assert errors["d.md"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits hold on Linux")
def test_a_file_that_needs_too_much_memory_fails_alone(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs).mkdir()
    (docs / "big.html").write_bytes(b"<p>" + b"word " * 30_000_000)
    write(docs / "small.html", "<p>Small.</p>")
    report = sync_words(tmp_path, docs, limits=Limits(memory_mb=400))
    assert statuses(report) == {"big.html": "failed", "small.html": "added"}
    assert "memory" in str(report.failed[0].error)


def test_a_file_above_the_size_limit_is_not_read(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    with (docs / "huge.txt").open("wb") as out:
        out.truncate(3 << 20)
    report = sync_words(tmp_path, docs, limits=Limits(file_mb=2))
    assert report.failed[0].error == "it has 3 MB; files of up to 2 MB are read (--max-file-mb)"
    assert KnowledgeBase.open(tmp_path / "kb").files()["huge.txt"].sha256 == "", "not even hashed"
    write(docs / "other.txt", "Stored as ever.")
    report = sync_words(tmp_path, docs, limits=Limits(file_mb=2))
    assert statuses(report) == {"huge.txt": "failed", "other.txt": "added"}


def test_many_small_files_give_the_same_base_by_workers_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ingest.parsers as parsers

    make_corpus(tmp_path / "docs", 90)
    write(tmp_path / "docs" / "page.html", "<h1>页</h1><p>" + "一句话。" * 400)
    write(tmp_path / "docs" / "broken.html", "")
    (tmp_path / "docs" / "bad.txt").write_bytes(b"\x00\x01\x02" * 500)
    held = []
    for folder, at_least in (("here", 1 << 40), ("by_workers", 0)):
        monkeypatch.setattr(parsers, "_MANY_LIGHT_BYTES", at_least)
        asked: list[int] = []
        real = parsers._Worker.ask

        def ask(worker: Any, sources: Any, splitting: Any) -> Any:
            asked.append(len(sources))  # noqa: B023
            return real(worker, sources, splitting)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(parsers._Worker, "ask", ask)
            report = sync([tmp_path / "docs"], settings=Settings(kb=str(tmp_path / folder)))
        assert [file.path for file in report.failed] == ["bad.txt"]
        assert (max(asked) > 10) == (at_least == 0), "small files go to the workers by the dozen"
        held.append(contents(tmp_path / folder))
    assert held[0] == held[1]


def test_of_many_small_files_only_the_one_that_kills_its_worker_fails(
    tmp_path: Path, slow_loader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ingest.parsers as parsers

    monkeypatch.setattr(parsers, "__file__", str(slow_loader / "ingest" / "parsers.py"))
    monkeypatch.setattr(parsers, "_MANY_LIGHT_BYTES", 0)
    monkeypatch.setenv("REAL_PROJECT", str(PROJECT))
    docs = tmp_path / "docs"
    for name in ("a.md", "b.md", "c.md"):
        write(docs / name, "die" if name == "b.md" else "well")
    report = sync([docs], settings=Settings(kb=str(tmp_path / "kb")))
    errors = {file.path: str(file.error) for file in report.files}
    assert errors["a.md"] == errors["c.md"] == "read well"
    assert "the parser crashed on it (exit code 9)" in errors["b.md"]


# embedders and settings -------------------------------------------------------------------------


def test_nothing_is_embedded_or_loaded_without_a_change(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(docs / "a.txt", "one")
    sync_words(tmp_path, docs)
    settings = Settings(kb=str(tmp_path / "kb"), embedder="words")
    report = sync([docs], settings=settings)  # no embedder is given, and "words" can't be loaded
    assert statuses(report) == {"a.txt": "unchanged"}


def test_another_embedder_is_refused_until_reembed(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    write(docs / "a.txt", "one two three")
    sync_words(tmp_path, docs)
    other = WordEmbedder("other")
    with pytest.raises(KnowledgeBaseError, match="--reembed"):
        sync_words(tmp_path, docs, embedder=other)
    report = sync_words(tmp_path, docs, embedder=other, reembed=True)
    assert (statuses(report), report.embedded) == ({"a.txt": "unchanged"}, 1)
    assert KnowledgeBase.open(tmp_path / "kb").embedder_name == "other"


def test_an_embedder_that_reads_less_gets_smaller_chunks_without_reading_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs"
    write(docs / "a.txt", "A sentence of seven words stands here. " * 20)
    sync_words(tmp_path, docs)
    before = KnowledgeBase.open(tmp_path / "kb").count_chunks()
    short = WordEmbedder("short")
    short.max_tokens = 40
    monkeypatch.setattr("ingest.parsers.parse_file", lambda *_: pytest.fail("a file was read"))
    sync_words(tmp_path, docs, embedder=short, reembed=True)
    base = KnowledgeBase.open(tmp_path / "kb")
    assert base.count_chunks() > before
    assert all(short.count_tokens([c.indexed_text])[0] <= 40 for c in base.chunks_of("a.txt"))


def test_another_chunk_size_splits_stored_text_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs"
    write(docs / "a.txt", "A sentence of seven words stands here. " * 40)
    sync_words(tmp_path, docs)
    monkeypatch.setattr("ingest.parsers.parse_file", lambda *_: pytest.fail("a file was read"))
    settings = Settings(kb=str(tmp_path / "kb"), chunk_tokens=32)
    report = sync_words(tmp_path, docs, settings=settings)
    assert statuses(report) == {"a.txt": "changed"}
    assert report.chunks > 5


def test_a_new_loader_version_reads_its_files_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingest.loaders.markdown import MarkdownLoader

    docs = tmp_path / "docs"
    write(docs / "a.md", "# A")
    write(docs / "b.txt", "b")
    sync_words(tmp_path, docs)
    monkeypatch.setattr(MarkdownLoader, "version", MarkdownLoader.version + 1)
    assert statuses(sync_words(tmp_path, docs)) == {"a.md": "changed", "b.txt": "unchanged"}


def test_scans_are_read_again_once_there_is_a_program_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image
    from reportlab.pdfgen.canvas import Canvas

    docs = tmp_path / "docs"
    docs.mkdir()
    Image.new("L", (60, 80), 200).save(tmp_path / "scan.png")
    canvas = Canvas(str(docs / "a.pdf"), pagesize=(595, 842))
    canvas.drawImage(str(tmp_path / "scan.png"), 0, 0, 595, 842)
    canvas.save()
    monkeypatch.setenv("PATH", "")
    find_tesseract.cache_clear()
    report = sync_words(tmp_path, docs)
    find_tesseract.cache_clear()
    assert report.files[0].chunks == 0
    assert "install tesseract" in report.files[0].warnings[0]
    monkeypatch.setattr("ingest.ocr.find_tesseract", lambda: None)
    assert statuses(sync_words(tmp_path, docs)) == {"a.pdf": "unchanged"}
    monkeypatch.setattr("ingest.ocr.find_tesseract", lambda: "there")
    assert statuses(sync_words(tmp_path, docs)) == {"a.pdf": "changed"}


# the base ---------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "a.txt", "one")
    base = KnowledgeBase.create(tmp_path / "kb")
    with base.writing():
        outcome = ingest(tmp_path, "docs")
    assert outcome.code == 1
    assert f"pid {os.getpid()}" in outcome.err


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_is_told_in_a_line_and_leaves_the_base_whole(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "a.md", "# A\n\nStored before the disk is full.")
    assert ingest(tmp_path, "docs").code == 0
    make_corpus(tmp_path / "docs", 30)
    # No file may grow beyond 300 KB: what a write then meets is what it meets on a full disk.
    limit = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    limit += "sys.argv[0] = 'ingest'; runpy.run_module('ingest', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", limit, *command(tmp_path, "docs")[3:]], cwd=tmp_path,
        env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "can't be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert "a.md" in KnowledgeBase.open(tmp_path / "kb").files()
    assert ingest(tmp_path, "docs", "--json").report["failed"] == 0
    assert len(KnowledgeBase.open(tmp_path / "kb").files()) == 31


def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "a.md", "# A\n\nText.")
    write(tmp_path / "docs" / "b.html", "<p>Text.</p>")
    blocked = (
        "import socket, runpy, sys\n"
        "def refuse(*_, **__): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "sys.argv[0] = 'ingest'; runpy.run_module('ingest', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked, *command(tmp_path, "docs")[3:]], cwd=tmp_path,
        env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2 added" in done.stdout


def test_a_missing_index_file_is_made_again(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "a.txt", "one")
    sync_words(tmp_path, tmp_path / "docs")
    (tmp_path / "kb" / "vectors.faiss").unlink()
    sync_words(tmp_path, tmp_path / "docs")
    assert KnowledgeBase.open(tmp_path / "kb").index_state() == "current"


def test_a_file_that_fails_later_loses_its_chunks_and_comes_back(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    file = write(docs / "a.html", "<p>Good text.</p>")
    sync_words(tmp_path, docs)
    good = file.read_bytes()
    (docs / "a.html").write_bytes(b"\x00\x01\x02" * 500)
    report = sync_words(tmp_path, docs)
    assert report.files[0].status in ("failed", "changed")
    file.write_bytes(good)
    report = sync_words(tmp_path, docs)
    assert report.files[0].chunks == 1


def test_progress_is_told_and_ends_at_the_total(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "docs" / f"{number}.txt", f"text {number}")
    told: list[Progress] = []
    sync_words(tmp_path, tmp_path / "docs", progress=told.append)
    assert [progress.done for progress in told] == [0, 1, 2, 3, 4, 5]
    assert all(progress.total == 5 for progress in told)


def test_vectors_are_those_of_the_indexed_text(tmp_path: Path) -> None:
    write(tmp_path / "docs" / "a.md", "# Cache\n\nkeys and values")
    sync_words(tmp_path, tmp_path / "docs")
    base = KnowledgeBase.open(tmp_path / "kb")
    (chunk,) = base.chunks_of("a.md")
    _, vectors = base.all_vectors()
    assert np.allclose(vectors[0], WordEmbedder().embed_passages([chunk.indexed_text])[0], atol=1e-3)


def test_a_path_that_does_not_exist_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        sync_words(tmp_path, tmp_path / "missing")
    assert not (tmp_path / "kb").exists()


def test_a_files_name_gives_the_terminal_no_orders() -> None:
    result = FileResult("a\nb\x1b[31m\u202e.txt", "failed", error="no\rtext, 中文　名 😀")
    assert result.describe() == "! a\\nb\\x1b[31m\\u202e.txt: failed, no\\rtext, 中文　名 😀"


def test_results_describe_themselves_in_one_line() -> None:
    result = FileResult("a.pdf", "added", pages=2, chunks=1)
    assert result.describe() == "+ a.pdf (2 pages, 1 chunk)"


def test_a_damaged_base_is_one_clear_line(tmp_path: Path) -> None:
    """It was a traceback of SQLite's, which said nothing of what to do."""
    for number in range(40):
        write(tmp_path / "docs" / f"{number}.txt", f"text {number} " * 50)
    assert ingest(tmp_path, "docs").code == 0
    file = tmp_path / "kb" / "knowledge.sqlite"
    whole = file.read_bytes()
    file.write_bytes(whole[:12288] + b"\x5a" * (len(whole) - 12288))
    for arguments in (("docs",), ("--report",)):
        outcome = ingest(tmp_path, *arguments)
        assert outcome.code == 1 and "Restore it from a copy" in outcome.err and "Traceback" not in outcome.err
