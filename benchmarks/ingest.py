"""How fast a folder becomes a knowledge base, measured on text made on the spot.

    python benchmarks/ingest.py [--megabytes 20] [--folder DIR] [--peer MODEL]

Prints files, megabytes and chunks, seconds of the first and of a second run (each a process of its
own, start-up included), their processor seconds, and the peak memory of all processes together
(Linux; elsewhere of the largest one). With --peer the same files are also read, split into
1,000 characters with 200 of overlap by langchain-text-splitters, embedded by that
sentence-transformers model and put into a FAISS index: what many tutorials do. The peer gets as
many files as it finishes in --peer-seconds, and its rate is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent
_WORDS = (
    "cache token layer model vector passage question answer index query score memory device head "
    "matrix weight sampling batch prompt window chunk page table figure method result value key the "
    "a of to and in is that with for each when after before over under"
).split()
_HAN = "模型词元缓存向量检索段落问题答案索引查询分数显存设备注意力矩阵权重采样批次提示窗口页面表格方法结果数值的是在和与对每当把被由"


def make_folder(folder: Path, megabytes: float) -> None:
    """Files of about 12 KB, three in English to one in Chinese, with headings and paragraphs."""
    chance = random.Random(7)
    written, number = 0, 0
    while written < megabytes * 1e6:
        is_chinese = number % 4 == 3
        parts = [f"# Document {number}"]
        for section in range(6):
            parts.append(f"## Section {section}")
            for _ in range(4):
                parts.append(" ".join(_sentence(chance, is_chinese) for _ in range(5)))
        text = "\n\n".join(parts)
        file = folder / f"part{number // 500}" / f"{number}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        written += len(text.encode())
        number += 1


def _sentence(chance: random.Random, is_chinese: bool) -> str:
    if is_chinese:
        return "".join(chance.choices(_HAN, k=chance.randint(15, 40))) + "。"
    words = chance.choices(_WORDS, k=chance.randint(8, 22)) + [str(chance.randint(1, 9999))]
    return " ".join(words).capitalize() + "."


def run_ingest(folder: Path, kb: Path) -> dict[str, float]:
    """One run of the command: its report, with wall-clock seconds and peak megabytes."""
    began = time.perf_counter()
    output = kb.with_suffix(".out")
    command = [sys.executable, "-m", "ingest", str(folder), "--kb", str(kb), "--json", "--quiet"]
    with output.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, cwd=PROJECT)
    peak = 0.0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, sum(map(_resident_megabytes, _family(process.pid))))
        time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):  # 3: a file of the folder can't be read
        raise SystemExit(f"ingest ended with {process.returncode}")
    report = json.loads(output.read_text(encoding="utf-8").splitlines()[-1])
    return {
        "seconds": time.perf_counter() - began, "chunks": report["total_chunks"],
        "embedded": report["embedded"], "megabytes_peak": peak or usage.ru_maxrss / 1024,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
    }


def _family(pid: int) -> list[int]:
    """The process and those it has started; only itself where there is no /proc."""
    found = [pid]
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [member for child in file.read_text().split() for member in _family(int(child))]
        except OSError:
            continue  # ended meanwhile
    return found


def _resident_megabytes(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def run_peer(files: list[Path], model_name: str, limit: float) -> tuple[int, int, float]:
    """(bytes, chunks, seconds) of as many files as fit the limit; loading the model not counted."""
    import faiss
    from langchain_text_splitters import RecursiveCharacterTextSplitter
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_name)
    splitter = RecursiveCharacterTextSplitter(chunk_size=1000, chunk_overlap=200)
    index = faiss.IndexFlatL2(model.encode(["one"]).shape[1])
    size = 0
    began = time.perf_counter()
    for file in files:
        if time.perf_counter() - began > limit:
            break
        chunks = splitter.split_text(file.read_text(encoding="utf-8"))
        index.add(model.encode(chunks, show_progress_bar=False))
        size += file.stat().st_size
    return size, index.ntotal, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=20.0, help="text to make (default: 20)")
    parser.add_argument("--folder", type=Path, help="ingest this folder and make no text")
    parser.add_argument("--peer", metavar="MODEL", help="name or folder of the peer's model")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="(default: 60)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "docs"
        if options.folder is None:
            make_folder(folder, options.megabytes)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        size = sum(file.stat().st_size for file in files)
        kb = Path(temporary) / "kb"
        first, second = run_ingest(folder, kb), run_ingest(folder, kb)
        print(f"{len(files):,} files, {size / 1e6:.1f} MB, {first['chunks']:,} chunks, "
              f"{os.cpu_count()} cores")
        print(f"first run   {first['seconds']:7.2f} s  {size / 1e6 / first['seconds']:6.2f} MB/s  "
              f"{first['chunks'] / first['seconds']:7.0f} chunks/s  peak {first['megabytes_peak']:.0f} MB  "
              f"{first['processor_seconds']:.1f} s of processor time")
        print(f"second run  {second['seconds']:7.2f} s  ({second['embedded']:.0f} embedded)")
        if options.peer:
            bytes_done, chunks, seconds = run_peer(files, options.peer, options.peer_seconds)
            rate = bytes_done / 1e6 / seconds
            print(f"peer        {seconds:7.2f} s  {rate:6.2f} MB/s  {chunks / seconds:7.0f} chunks/s  "
                  f"({bytes_done / 1e6:.1f} MB of it)")
            print(f"ratio of MB/s: {size / 1e6 / first['seconds'] / rate:.0f}")


if __name__ == "__main__":
    main()
