"""python -m rag ask | batch | retrieve | eval | doctor"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.errors import InputError, RagError
from rag.settings import Settings

if TYPE_CHECKING:
    from rag.answer import Answer
    from rag.pipeline import Rag


_RETRIEVED = 10  # hits a question that `retrieve` writes where --top-k isn't given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for an error with its message, 2 for usage."""
    options = _parser().parse_args(arguments)
    # The progress bars and advice of the libraries below would stand between question and answer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        settings = Settings.load(**_overrides(options))
        return int(options.run(options, settings))
    except RagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (`| head`); nothing is wrong with what was written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    names = {field.name for field in fields(Settings)}
    return {name: value for name, value in vars(options).items() if name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rag", description="Ask your own documents, on your own machine.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer one question and show its sources")
    ask.add_argument("question")
    ask.add_argument("--json", action="store_true", help="print one JSON object instead")
    ask.set_defaults(run=_ask)

    retrieve = commands.add_parser("retrieve", help=f"passages for each line of a .jsonl file ({_RETRIEVED} without --top-k)")
    retrieve.add_argument("source", metavar="IN.jsonl", type=Path)
    retrieve.add_argument("target", metavar="OUT.jsonl", type=Path)
    retrieve.set_defaults(run=_retrieve)

    batch = commands.add_parser("batch", help="an answer for each line of a .jsonl file; resumes")
    batch.add_argument("source", metavar="IN.jsonl", type=Path)
    batch.add_argument("target", metavar="OUT.jsonl", type=Path)
    batch.set_defaults(run=_batch)

    evaluate = commands.add_parser("eval", help="measure on questions with known answers")
    evaluate.add_argument("source", metavar="IN.jsonl", type=Path)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    evaluate.add_argument("--details", type=Path, metavar="OUT.jsonl", help="write every answer there")
    evaluate.set_defaults(run=_evaluate)

    doctor = commands.add_parser("doctor", help="check settings, knowledge base and models; repair")
    doctor.set_defaults(run=_doctor)

    for command in (ask, retrieve, batch, evaluate, doctor):
        _add_settings(command)
    return parser


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Every setting as an option; their defaults may come from environment and rag.toml."""
    group = command.add_argument_group("settings (defaults from RAG_... variables and rag.toml)")
    for field in fields(Settings):
        group.add_argument(
            "--" + field.name.replace("_", "-"), dest=field.name, default=None,
            type={"str": str, "int": int, "float": float}[str(field.type)],
            metavar=str(field.type).upper(), help=f"built-in default: {field.default}",
        )


# commands


def _ask(options: argparse.Namespace, settings: Settings) -> int:
    from rag.answer import Answer
    from rag.pipeline import Rag

    rag = Rag.open(settings=settings)
    if options.json:
        print(json.dumps(rag.ask(options.question).to_dict(), ensure_ascii=False))
        return 0
    answer = None
    shown = ""
    for piece in rag.stream(options.question):
        if isinstance(piece, Answer):
            answer = piece
        else:
            shown += piece
            print(piece, end="", flush=True)
    print()
    assert answer is not None, "a stream ends with the Answer"
    if answer.text.strip() != shown.strip():
        print(f"\nwith checked citations:\n{answer.text}")
    _print_sources(answer)
    return 0


def _print_sources(answer: Answer) -> None:
    if answer.kind == "quoted":
        print("(quoted from the source: the model was not sure enough of its own words)")
    for sentence in answer.unsupported:
        print(f"(not supported by the sources: {sentence})")
    if answer.citations:
        print("\nSources")
    for citation in answer.citations:
        page = f", page {citation.page}" if citation.page is not None else ""
        place = f"  [{citation.marker}] {citation.path}{page}, characters {citation.start}-{citation.end}"
        # A quotation has just been shown; beside the model's own words the source's are needed.
        print(place if answer.kind == "quoted" else f"{place}: {' '.join(citation.quote.split())}")
    if answer.refused and answer.hits:
        print("\nNearest passages")
        for hit in answer.hits:
            page = f", page {hit.page}" if hit.page is not None else ""
            print(f"  {hit.chunk.path}{page}: {' '.join(hit.chunk.text.split())[:120]}")
    stats = answer.stats
    cost = f"retrieval {stats.seconds_retrieval * 1000:.0f} ms"
    if stats.generator:
        cost += (
            f"; {stats.generator} on {stats.device} ({stats.dtype}): {stats.prompt_tokens} prompt tokens "
            f"({stats.reused_tokens} reused), first token {stats.seconds_to_first_token:.2f} s, "
            f"{stats.new_tokens} new at {stats.tokens_per_second:.0f} a second"
        )
    print(f"\n{cost}", file=sys.stderr)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl file. Raises InputError naming the line that is none."""
    if not path.is_file():
        raise InputError(f"{path} is not a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is not a JSON object.")
        yield number, row


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Objects with `id` and `question`; a missing id becomes the line number."""
    rows = []
    seen: set[str] = set()
    for number, row in read_lines(path):
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise InputError(f"{path}, line {number} has no question.")
        row.setdefault("id", number)
        key = json.dumps(row["id"])
        if key in seen:
            raise InputError(f"{path}, line {number}: the id {row['id']!r} stands twice.")
        seen.add(key)
        rows.append(row)
    return rows


def _retrieve(options: argparse.Namespace, settings: Settings) -> int:
    from rag.pipeline import Rag

    rows = read_questions(options.source)
    rag = Rag.open(settings=settings)
    count = options.top_k or max(_RETRIEVED, settings.top_k)
    fresh = options.target.with_name(options.target.name + ".new")
    with _writable(fresh) as out:
        for begin in range(0, len(rows), 256):
            part = rows[begin : begin + 256]
            found = rag.retriever.retrieve_batch([row["question"] for row in part], count)
            for row, hits in zip(part, found, strict=True):
                line = {"id": row["id"], "hits": [hit.to_dict() for hit in hits]}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    fresh.replace(options.target)
    print(f"{len(rows)} questions, hits in {options.target}", file=sys.stderr)
    return 0


def _writable(path: Path) -> Any:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} can't be written: {error}") from error


def _batch(options: argparse.Namespace, settings: Settings) -> int:
    from tqdm import tqdm

    from rag.pipeline import Rag

    rows = read_questions(options.source)
    done = _answered_already(options.target, rows)
    rag = Rag.open(settings=settings)
    failed = 0
    with options.target.open("a", encoding="utf-8") as out, tqdm(
        total=len(rows), initial=len(done), unit="question", file=sys.stderr
    ) as bar:
        rest = rows[len(done) :]
        for begin in range(0, len(rest), 16):
            part = rest[begin : begin + 16]
            for row, answer in zip(part, _answers(rag, part), strict=True):
                failed += "error" in answer
                out.write(json.dumps({"id": row["id"], **answer}, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
            bar.update(len(part))
    print(f"{len(rows)} questions, {len(done)} of them answered before, {failed} failed; "
          f"answers in {options.target}", file=sys.stderr)
    return 1 if failed else 0


def _answers(rag: Rag, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers to a part of the questions; one that fails is recorded and stops no other."""
    try:
        return [answer.to_dict() for answer in rag.batch([row["question"] for row in rows])]
    except RagError:
        results: list[dict[str, Any]] = []
        for row in rows:
            try:
                results.append(rag.ask(row["question"]).to_dict())
            except RagError as error:
                results.append({"question": row["question"], "error": str(error)})
        return results


def _answered_already(target: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole lines of an earlier run, in the order of the questions.

    A line cut off by a crash is dropped. Raises InputError where the file belongs to other questions.
    """
    if not target.exists():
        try:
            target.touch()
        except OSError as error:
            raise InputError(f"{target} can't be written: {error}") from error
        return []
    data = target.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with target.open("r+b") as out:
            out.truncate(len(whole))
    done = [row for _, row in read_lines(target)]
    for answer, row in zip(done, rows, strict=False):
        if answer.get("id") != row["id"] or answer.get("question") != row["question"]:
            raise InputError(
                f"{target} holds answers to other questions (id {answer.get('id')!r} where "
                f"{row['id']!r} was expected). Name another output file, or delete it."
            )
    if len(done) > len(rows):
        raise InputError(f"{target} holds {len(done)} answers, the input only {len(rows)} questions.")
    return done


def _evaluate(options: argparse.Namespace, settings: Settings) -> int:
    from tqdm import tqdm

    from rag.evaluation import EvalQuestion, by_language, evaluate, summarise
    from rag.pipeline import Rag

    questions = [EvalQuestion.parse(row, number) for number, row in read_lines(options.source)]
    if not questions:
        raise InputError(f"{options.source} holds no questions.")
    rag = Rag.open(settings=settings)
    with tqdm(total=len(questions), unit="question", file=sys.stderr) as bar:
        results = evaluate(rag, questions, lambda done, total: bar.update(1))
    if options.details:
        with _writable(options.details) as out:
            for result in results:
                line = {"id": result.question.id, "rank": result.rank, "gold": asdict(result.question),
                        **result.answer.to_dict()}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    figures = summarise(results)
    parts = by_language(results)
    for name in figures:
        row = [figures[name], *(part[name] for part in parts.values())]
        print(f"{name:22}" + "".join(f"{'-' if value is None else value:>12}" for value in row))
    print(f"{'':22}" + "".join(f"{name:>12}" for name in ("all", *parts)))
    if options.json:
        print(json.dumps({**figures, "by_language": parts}, ensure_ascii=False))
    return 0


def _doctor(options: argparse.Namespace, settings: Settings) -> int:
    from rag.embedder import load_embedder
    from rag.knowledge import KnowledgeBase

    print("settings")
    for name, value in asdict(settings).items():
        print(f"  {name:20} {value}")
    base = KnowledgeBase.open(settings.kb)
    files = base.files()
    failed = [record for record in files.values() if record.status == "failed"]
    print(f"knowledge base {settings.kb}: {len(files)} files, {base.count_chunks()} chunks, "
          f"{len(failed)} failed files, embedder {base.embedder_name}")
    for record in failed:
        print(f"  failed: {record.path}: {record.error}")
    problems = base.check()
    for problem in problems:
        print(f"  problem: {problem}")
    state = base.index_state()
    print(f"  FAISS file: {state}")
    if state != "current":
        with base.writing():
            base.publish()
        print(f"  FAISS file: written again from SQLite, now {base.index_state()}")
    base.check_embedder(load_embedder(settings.embedder, device=settings.device))
    print(f"embedder {settings.embedder}: loads, and is the one that built the knowledge base")
    from rag.generator import load_generator

    print(f"generator {load_generator(settings).describe()}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
