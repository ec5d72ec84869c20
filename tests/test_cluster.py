"""Ingest on a Dask cluster: two real worker processes, one of them killed, and what goes wrong."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import WordEmbedder
from test_embedder import prompted  # noqa: F401
from test_ingest import contents, write

from ingest import Limits, Progress, sync
from ingest.__main__ import main
from ingest.parsers import ParserPool, ProcessWorkers, Splitting
from ingest.scan import SourceFile
from ingest.splitter import split_document
from rag.embedder import BUNDLED, TransformerEmbedder, load_embedder
from rag.errors import ClusterError, InputError
from rag.settings import Settings

pytest.importorskip("distributed", reason="needs the package distributed: pip install 'local-rag[dask]'")

from distributed import KilledWorker, LocalCluster  # noqa: E402

import ingest.cluster as cluster  # noqa: E402
from ingest.cluster import ClusterWorkers, answer_task, describe_program, find_difference  # noqa: E402


@pytest.fixture(scope="module")
def two_workers() -> Any:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", scheduler_port=0
    ) as started:
        yield started


def make_docs(folder: Path, count: int) -> Path:
    for number in range(count):
        body = f"<h1>Part {number}</h1><p>第{number}段。" + f"Sentence {number} of many. " * 40
        write(folder / f"{number:02}.html", body)
        write(folder / f"{number:02}.md", f"# Note {number}\n\n" + f"注{number}。" * 30)
    write(folder / "empty.html", "")
    return folder


def test_a_base_from_two_workers_one_of_them_killed_half_way_equals_that_of_one_process(
    tmp_path: Path, two_workers: Any
) -> None:
    docs = make_docs(tmp_path / "docs", 24)
    (tmp_path / "docs" / "bad.txt").write_bytes(b"\x00\x01\x02" * 500)
    plain = sync([docs], settings=Settings(kb=str(tmp_path / "plain")))
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        if progress.done >= 6 and not killed:
            killed.append(next(iter(two_workers.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    report = sync(
        [docs], settings=Settings(kb=str(tmp_path / "shared")), progress=kill_one,
        scheduler=two_workers.scheduler_address,
    )
    assert killed
    assert report.counts == plain.counts and report.count("added") == 49
    assert [file.error for file in report.failed] == [file.error for file in plain.failed]
    assert contents(tmp_path / "shared") == contents(tmp_path / "plain")
    again = sync(
        [docs], settings=Settings(kb=str(tmp_path / "shared")), scheduler=two_workers.scheduler_address
    )
    assert again.count("unchanged") == 49 and again.embedded == 0


def test_a_worker_that_holds_an_older_embedder_is_named_before_anything_is_written(
    tmp_path: Path, two_workers: Any
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(BUNDLED, tmp_path / "embedder")
    settings = Settings(kb=str(tmp_path / "kb"), embedder=str(folder))
    with cluster.Cluster(two_workers.scheduler_address, settings):
        pass  # the workers know it now
    weights = next(folder.rglob("model.safetensors"))
    save_file({name: (tensor * np.float16(0.5)).astype(tensor.dtype) for name, tensor in load_file(weights).items()}, weights)
    describe_program.cache_clear()
    write(tmp_path / "docs" / "a.md", "Some words.")
    with pytest.raises(ClusterError, match=r"tcp://127.*another program than this one: embedder \w+ \(here \w+\)"):
        sync([tmp_path / "docs"], settings=settings, scheduler=two_workers.scheduler_address)
    assert not (tmp_path / "kb").exists()


def test_what_differs_on_a_worker_is_told_with_both_values() -> None:
    here = {"program": "aa", "embedder": "bb", "lxml": "6.1"}
    assert find_difference(here, dict(here)) is None
    assert find_difference(here, {"program": "aa", "lxml": "5.0"}) == (
        "embedder missing (here bb), lxml 5.0 (here 6.1)"
    )


def test_without_a_scheduler_there_the_command_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.3)
    write(tmp_path / "docs" / "a.md", "Some words.")
    code = main([str(tmp_path / "docs"), "--kb", str(tmp_path / "kb"), "--scheduler", "tcp://127.0.0.1:9"])
    assert code == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err
    assert not (tmp_path / "kb").exists()


def test_a_scheduler_without_workers_is_an_error_and_no_endless_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_FIRST_WORKER_SECONDS", 0.2)
    write(tmp_path / "docs" / "a.md", "Some words.")
    with LocalCluster(n_workers=0, processes=False, dashboard_address=":0", scheduler_port=0) as empty, \
            pytest.raises(ClusterError, match="no worker after 0.2 s.*dask worker "):
        sync([tmp_path / "docs"], settings=Settings(kb=str(tmp_path / "kb")), scheduler=empty.scheduler_address)


def test_what_a_scheduler_can_not_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "docs" / "a.md", "Some words.")
    settings = Settings(kb=str(tmp_path / "kb"))
    with pytest.raises(InputError, match="'udp://here' is no scheduler's address"):
        sync([tmp_path], settings=settings, scheduler="udp://here")
    with pytest.raises(InputError, match="Leave --scheduler out"):
        sync([tmp_path], settings=settings, scheduler="tcp://here:1", reembed=True)
    with pytest.raises(InputError, match="by its name"):
        sync([tmp_path], settings=settings, scheduler="tcp://here:1", embedder=WordEmbedder())
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'local-rag\[dask\]'"):
        sync([tmp_path], settings=settings, scheduler="tcp://here:1")


def test_a_model_that_is_no_table_splits_and_embeds_on_the_worker_too(tmp_path: Path, prompted: Path) -> None:  # noqa: F811
    folder = str(prompted)
    embedder = load_embedder(folder, device="cpu")
    assert isinstance(embedder, TransformerEmbedder)
    with ThreadPoolExecutor(max_workers=1) as here:
        workers = ClusterWorkers(
            here.submit, Limits(), facts=describe_program(folder), splitting=Splitting(folder, 12),
            is_static=False, num_at_once=1, count_workers=lambda: 1,
        )
        file = write(tmp_path / "a.html", "<h1>a</h1>" + "<p>a b c d e f. b c d e f g.</p>" * 20)
        with ParserPool(Limits(), workers=workers) as pool:
            (parsed,) = pool.parse([SourceFile("a.html", file, file.stat().st_size, 0.0)])
    cluster.end_idle_processes()
    assert parsed.document is not None and parsed.chunks is not None and parsed.vectors is not None
    assert parsed.chunks == split_document(parsed.document, embedder.count_tokens, chunk_tokens=12)
    assert len(parsed.chunks) > 2
    np.testing.assert_allclose(
        parsed.vectors, embedder.embed_passages([chunk.indexed_text for chunk in parsed.chunks]), atol=1e-6
    )


# workers that are lost over a file, played by an executor -----------------------------------------


class LosingExecutor(Executor):
    """Answers in this process; over a task with the file `fatal` all its workers are lost."""

    def __init__(self, fatal: str) -> None:
        self.fatal = fatal
        self.asked: list[list[str]] = []

    def submit(self, call: Any, /, files: Any, *arguments: Any, **_: Any) -> Future[Any]:
        assert call is answer_task
        self.asked.append([path for path, _ in files])
        future: Future[Any] = Future()
        if self.fatal in self.asked[-1]:
            future.set_exception(KilledWorker(task="t", last_worker=None, allowed_failures=3))
        else:
            future.set_result([{"error": f"read {path}", "seconds": 0.0} for path, _ in files])
        return future


class SilentExecutor(Executor):
    """Never answers."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        return Future()


def workers_of(executor: Executor, *, count: int = 1) -> ClusterWorkers:
    return ClusterWorkers(
        executor.submit, Limits(), facts={}, splitting=Splitting("bundled", 320), is_static=True, num_at_once=2,
        count_workers=lambda: count,
    )


def sources(folder: Path, *names: str) -> list[SourceFile]:
    files = [write(folder / name, f"Text of {name}.") for name in names]
    return [SourceFile(file.name, file, file.stat().st_size, 0.0) for file in files]


def test_a_file_over_which_workers_are_lost_again_and_again_fails_and_the_others_do_not(tmp_path: Path) -> None:
    executor = LosingExecutor("b.md")
    with ParserPool(Limits(), workers=workers_of(executor)) as pool:
        found = {parsed.source.path: str(parsed.error) for parsed in pool.parse(sources(tmp_path, "a.md", "b.md", "c.md"))}
    assert found["a.md"] == "read a.md" and found["c.md"] == "read c.md"
    assert "every worker that read it was lost" in found["b.md"]
    # all three together, then each by itself, and the suspect once more
    assert executor.asked == [["a.md", "b.md", "c.md"], ["a.md"], ["b.md"], ["b.md"], ["c.md"]]


def test_a_run_whose_last_worker_is_gone_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(cluster, "_NO_WORKER_SECONDS", 0.05)
    with ParserPool(Limits(), workers=workers_of(SilentExecutor(), count=0)) as pool, \
            pytest.raises(ClusterError, match="no worker for 0.05 s"):
        list(pool.parse(sources(tmp_path, "a.md")))


def test_a_file_is_not_blamed_for_a_process_that_ended_before_it_came(tmp_path: Path) -> None:
    pool = ProcessWorkers(Limits(), num_at_once=1)
    file = write(tmp_path / "a.md", "# A\n\nWords.")
    for _ in range(2):
        answers = pool.ask_for([(str(file), "a.md")], None)
        assert isinstance(answers, list) and answers[0]["document"]["title"] == "A"
        (worker,) = pool._workers
        worker._process.kill()
        worker._process.wait()
    pool.stop()


def test_only_so_many_bytes_are_on_their_way_and_a_larger_file_goes_alone() -> None:
    budget = cluster._ByteBudget(10)
    with budget.taken(6), budget.taken(4):
        assert budget._taken == 10
    with budget.taken(99):
        assert budget._taken == 10
    assert budget._taken == 0
