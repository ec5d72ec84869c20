"""The dense index at growing sizes: building, disk, memory, latency and recall@10, exact search beside it.

    python -m benchmarks.index --data DIR [--sizes 10000 100000 1000000] [--rivals]

DIR holds text.*.jsonl.xz (objects with `text`) and retrieval_pairs.*.jsonl.xz (objects with
`query`). Every vector is a sentence of those texts, embedded by the bundled embedder; where there
are too few, some are repeated with a little noise, and the output says how many. Real questions
search them: recall@10 is the share of the true ten nearest (float32, exact) among the ten found.
The vectors lie in a real knowledge base, and every search opens it and scores candidates again as
the program does. Memory is what a fresh process holds more after 200 searches than before it
opened the base: its own, and mapped from the file, which the system can take back. With --rivals,
an inverted file and a graph (HNSW), both with 8-bit scalar quantization, are measured too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from rag.embedder import load_embedder
from rag.knowledge import DATABASE, KnowledgeBase
from rag.sentences import sentence_spans

SEARCHES, DEPTH, CANDIDATES = 200, 10, 48
_NOISE = 0.1  # length of the noise added to a repeated vector, whose own length is 1


def sentences(data: Path, count: int) -> Iterator[list[str]]:
    """Different sentences, an equal part of each text file as far as it goes, in batches."""
    files = sorted(data.glob("text.*.jsonl.xz"))
    seen: set[int] = set()
    for number, file in enumerate(files):
        enough = len(seen) + (count - len(seen)) // (len(files) - number)
        batch: list[str] = []
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                for start, end in sentence_spans(text):
                    key = hash(text[start:end])
                    if end - start >= 15 and key not in seen and len(seen) < enough:
                        seen.add(key)
                        batch.append(text[start:end])
                if len(seen) >= enough:
                    break
                if len(batch) >= 20_000:
                    yield batch
                    batch = []
        yield batch


def embed_sentences(data: Path, count: int) -> tuple[np.ndarray, int]:
    """float16 (count, dim) in random order, and how many of them are real."""
    embedder = load_embedder("bundled")
    parts = [embedder.embed_passages(batch).astype(np.float16) for batch in sentences(data, count) if batch]
    real = np.concatenate(parts)
    chance = np.random.default_rng(0)
    if len(real) < count:
        more = real[chance.integers(len(real), size=count - len(real))].astype(np.float32)
        more += chance.normal(size=more.shape, scale=_NOISE / np.sqrt(more.shape[1]))
        more /= np.linalg.norm(more, axis=1, keepdims=True)
        return chance.permutation(np.concatenate([real, more.astype(np.float16)])), len(real)
    return chance.permutation(real), len(real)


def embed_questions(data: Path) -> np.ndarray:
    files = sorted(data.glob("retrieval_pairs.*.jsonl.xz"))
    questions: list[str] = []
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            asked = sorted({json.loads(line)["query"] for line in lines})
        questions += random.Random(0).sample(asked, SEARCHES // len(files))
    return np.asarray(load_embedder("bundled").embed_questions(questions))


def fill_base(folder: Path, vectors: np.ndarray) -> KnowledgeBase:
    """A base with these vectors, each beside a passage of usual length; without its full-text index."""
    base = KnowledgeBase.create(folder)
    with base.writing():
        base.bind_embedder(load_embedder("bundled"))
    connection = sqlite3.connect(folder / DATABASE)
    text = "passage " * 75
    with connection:
        connection.execute("INSERT INTO files VALUES ('a', '', 0, 'ok', 0, ?, 0, 0, '', '[]', NULL)", (len(vectors),))
        connection.executemany(
            "INSERT INTO chunks (path, text, start_char, end_char, headings, title, vector) "
            "VALUES ('a', ?, 0, 0, '[]', '', ?)",
            ((text, vector.tobytes()) for vector in vectors),
        )
    connection.close()
    return base


def memory() -> tuple[float, float]:
    """Megabytes of this process: its own, mapped from files. (0, 0) where /proc isn't there."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0.0, 0.0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    own, mapped = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return own, mapped


def search_all(search: Callable[[np.ndarray], list[int]], questions: np.ndarray) -> dict[str, Any]:
    """Rows found for each question, and milliseconds a search, after a few to warm up."""
    for question in questions[:20]:
        search(question[None])
    seconds, found = [], []
    for question in questions:
        began = time.perf_counter()
        found.append(search(question[None])[:DEPTH])
        seconds.append(time.perf_counter() - began)
    return {
        "found": found, "median": 1000 * statistics.median(seconds),
        "p95": 1000 * float(np.percentile(seconds, 95)),
    }


def use_base(folder: str, questions: np.ndarray) -> dict[str, Any]:
    """Open the base and search it as the program does. Runs in a process of its own."""
    before = memory()
    base = KnowledgeBase.open(folder)
    result = search_all(lambda one: [row for row, _ in base.search_dense(one, CANDIDATES)[0]], questions)
    return {**result, "memory": [after - was for after, was in zip(memory(), before, strict=True)]}


def use_file(file: str, questions: np.ndarray, settings: dict[str, int]) -> dict[str, Any]:
    """Search a plain FAISS file on one thread, whose row numbers are positions from 1."""
    before = memory()
    faiss.omp_set_num_threads(1)
    index = faiss.read_index(file)
    for name, value in settings.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)
    result = search_all(lambda one: (index.search(one, CANDIDATES)[1][0] + 1).tolist(), questions)
    return {**result, "memory": [after - was for after, was in zip(memory(), before, strict=True)]}


def in_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def make_plain(description: str, vectors: np.ndarray, file: Path) -> float:
    """Build a FAISS index by its factory string and write it. Returns seconds."""
    began = time.perf_counter()
    index = faiss.index_factory(vectors.shape[1], description, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // 160_000)])
    index.add(vectors)
    faiss.write_index(index, str(file))
    return time.perf_counter() - began


def measure(vectors: np.ndarray, questions: np.ndarray, *, with_rivals: bool) -> Iterator[dict[str, Any]]:
    """A row of the table each: exact search first, whose ten nearest are the true ones."""
    with tempfile.TemporaryDirectory(prefix="index-") as work:
        file = Path(work) / "plain.faiss"
        full = vectors.astype(np.float32)
        seconds = make_plain("Flat", full, file)
        row = in_process(use_file, str(file), questions, {})
        true = [set(found) for found in row["found"]]

        def finished(name: str, seconds: float, size: int, row: dict[str, Any]) -> dict[str, Any]:
            shares = [len(one & set(found)) / DEPTH for one, found in zip(true, row["found"], strict=True)]
            return {"name": name, "seconds": seconds, "megabytes": size / 1e6, "recall": float(np.mean(shares)), **row}

        yield finished("exact, float32", seconds, file.stat().st_size, row)
        if with_rivals:
            lists = 4096 if len(vectors) > 500_000 else 1024 if len(vectors) > 50_000 else 256
            for name, description, settings in (
                (f"IVF{lists}, SQ8, a quarter of the lists", f"IVF{lists},SQ8", {"nprobe": lists // 4}),
                ("HNSW24, SQ8, efSearch 256", "HNSW24_SQ8", {"efSearch": 256}),
            ):
                seconds = make_plain(description, full, file)
                yield finished(name, seconds, file.stat().st_size, in_process(use_file, str(file), questions, settings))
        file.unlink()
        del full
        base = fill_base(Path(work) / "kb", vectors)
        with base.writing():
            began = time.perf_counter()
            base.publish()
            seconds = time.perf_counter() - began
        facts = base.index_facts()
        assert facts is not None
        row = in_process(use_base, str(base.folder), questions)
        yield finished(f"as chosen: {facts.kind}", seconds, facts.size, row)
        yield {"facts": facts, "update": time_update(base, vectors)}


def time_update(base: KnowledgeBase, vectors: np.ndarray) -> dict[str, float]:
    """Seconds to publish, and of the first search after it, with 100 and with 2% more vectors."""
    result = {}
    for name, count in (("100 chunks", 100), ("2% of the chunks", len(vectors) // 50)):
        connection = sqlite3.connect(base.folder / DATABASE)
        with connection:
            connection.executemany(
                "INSERT INTO chunks (path, text, start_char, end_char, headings, title, vector) "
                "VALUES ('a', 'more', 0, 0, '[]', '', ?)",
                ((vector.tobytes(),) for vector in vectors[:count]),
            )
            connection.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'")
        connection.close()
        began = time.perf_counter()
        with base.writing():
            base.publish()
        result[f"publish {name}"] = time.perf_counter() - began
        began = time.perf_counter()
        base.search_dense(vectors[:1].astype(np.float32), CANDIDATES)
        result[f"first search after {name}"] = time.perf_counter() - began
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with texts and questions")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rivals", action="store_true", help="measure IVF and HNSW too")
    options = parser.parse_args()
    began = time.perf_counter()
    vectors, num_real = embed_sentences(options.data, max(options.sizes))
    questions = embed_questions(options.data)
    print(
        f"{len(vectors):,} vectors of {vectors.shape[1]} dimensions, {num_real:,} of them real sentences, the "
        f"others repeated with noise; {len(questions)} questions; embedded in {time.perf_counter() - began:.0f} s; "
        f"{os.cpu_count()} cores, one of them searches; load {os.getloadavg()[0]:.1f}\n"
    )
    print("| vectors | index | build s | MB on disk | MB own + mapped | ms median | ms p95 | recall@10 |")
    print("|---|---|---|---|---|---|---|---|")
    notes = []
    for size in sorted(options.sizes):
        for row in measure(vectors[:size], questions, with_rivals=options.rivals):
            if "facts" in row:
                notes.append(f"{size:,}: recall@10 recorded at building {row['facts'].recall:.3f}; " + "; ".join(
                    f"{name} {seconds:.2f} s" for name, seconds in row["update"].items()
                ))
                continue
            own, mapped = row["memory"]
            print(
                f"| {size:,} | {row['name']} | {row['seconds']:.1f} | {row['megabytes']:.0f} | {own:.0f} + {mapped:.0f} "
                f"| {row['median']:.2f} | {row['p95']:.2f} | {row['recall']:.3f} |", flush=True,
            )
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
