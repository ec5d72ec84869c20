"""python -m rag ask | batch | retrieve | eval | questions | calibrate | serve | doctor"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.errors import InputError, RagError
from rag.filter import Filter
from rag.question_file import parse_lines, read_questions
from rag.sentences import one_line
from rag.settings import Settings

if TYPE_CHECKING:
    from rag.answer import Answer
    from rag.quality.evaluation import EvalQuestion, EvalResult
    from rag.quality.run import Comparison
    from rag.store import Store


_RETRIEVED = 10  # hits a question that `retrieve` writes where --top-k isn't given
_SHOWN = 10  # names and lines of one kind that a message holds; more are counted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for an error with its message, 2 for usage."""
    options = _parser().parse_args(arguments)
    # The progress bars and advice of the libraries below would stand between question and answer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        settings = Settings.load(**_overrides(options))
        from rag.knowledge import explained_database_errors

        with explained_database_errors(settings.kb):
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
    batch.add_argument("--retry-failed", action="store_true", help="ask again what failed in an earlier run")
    batch.set_defaults(run=_batch)

    evaluate = commands.add_parser("eval", help="measure on questions with known answers")
    evaluate.add_argument("source", metavar="IN.jsonl", type=Path, nargs="?")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    evaluate.add_argument("--save", type=Path, metavar="RUN.json", help="keep the run, to compare it later")
    evaluate.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"),
                          help="compare two saved runs instead of measuring")
    evaluate.add_argument("--html", type=Path, metavar="REPORT.html", help="write a report with plots and worst cases")
    evaluate.add_argument("--details", type=Path, metavar="OUT.jsonl", help="write every answer there")
    evaluate.set_defaults(run=_evaluate)

    questions = commands.add_parser("questions", help="make questions of your documents, to measure with `eval`")
    questions.add_argument("target", metavar="OUT.jsonl", type=Path)
    questions.add_argument("--count", type=int, default=200, help="at most so many (default: 200)")
    questions.add_argument("--unanswerable", type=float, default=0.25, metavar="SHARE",
                           help="share of them that the documents don't answer (default: 0.25)")
    questions.add_argument("--force", action="store_true", help="write over a file that is there already")
    questions.set_defaults(run=_questions)

    calibrate = commands.add_parser("calibrate", help="fit on your documents when a question is refused")
    calibrate.add_argument("--questions", type=Path, metavar="FILE.jsonl",
                           help="questions of your own, as for `eval` (default: made of the documents)")
    calibrate.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    calibrate.set_defaults(run=_calibrate)

    serve = commands.add_parser("serve", help="answer other programs over HTTP, as OpenAI's clients ask")
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; elsewhere only with keys (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="who may ask: `NAME KEY` in each line (or the variable RAG_SERVE_KEYS)")
    serve.add_argument("--rate", type=int, default=60, help="requests a minute for each key; 0: any number (default: 60)")
    serve.add_argument("--running", type=int, default=8, help="answers written at once (default: 8)")
    serve.add_argument("--waiting", type=int, default=32, help="requests that wait; more get 429 (default: 32)")
    serve.add_argument("--max-body-bytes", type=int, default=1_000_000, help="largest request (default: 1000000)")
    serve.add_argument("--grace-seconds", type=float, default=30.0, help="for what runs at the end (default: 30)")
    serve.set_defaults(run=_serve)

    doctor = commands.add_parser("doctor", help="check settings, knowledge base and models; repair")
    doctor.set_defaults(run=_doctor)

    for command in (ask, retrieve, batch):
        _add_filter(command)
    for command in (ask, retrieve, batch, evaluate, questions, calibrate, serve, doctor):
        _add_settings(command)
    return parser


def _add_filter(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("which files to ask (all without; an option given twice means either)")
    group.add_argument("--under", action="append", default=[], metavar="DIR", help="in this folder of the base, or this file")
    group.add_argument("--file", action="append", default=[], metavar="GLOB", help="whose name, or path, matches: 'lease*', 'contracts/*.pdf'")
    group.add_argument("--type", action="append", default=[], metavar="TYPE", help="of this type: pdf, docx, md ...")
    group.add_argument("--since", metavar="DAY", help="last modified on this day or later, as in 2024-01-31")
    group.add_argument("--until", metavar="DAY", help="last modified on this day or earlier")


def _where(options: argparse.Namespace) -> Filter:
    return Filter(options.under, options.file, options.type, options.since, options.until)


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

    where = _where(options)
    rag = Rag.open(settings=settings)
    if options.json:
        print(json.dumps(rag.ask(options.question, where=where).to_dict(), ensure_ascii=False))
        return 0
    answer = None
    shown = ""
    for piece in rag.stream(options.question, where=where):
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
    if answer.doubtful:
        print("(the documents may not answer this: what comes nearest is shown)")
    for sentence in answer.unsupported:
        print(f"(not supported by the sources: {sentence})")
    if answer.citations:
        print("\nSources")
    for citation in answer.citations:
        place = f"  [{citation.marker}] {_place(citation.path, citation.page)}, characters {citation.start}-{citation.end}"
        # A quotation has just been shown; beside the model's own words the source's are needed.
        print(place if answer.kind == "quoted" else f"{place}: {one_line(citation.quote)}")
    _print_disagreements(answer)
    if answer.refused and answer.hits:
        print("\nNearest passages")
        for hit in answer.hits:
            print(f"  {_place(hit.chunk.path, hit.page)}: {one_line(hit.chunk.text)[:120]}")
    stats = answer.stats
    cost = f"retrieval {stats.seconds_retrieval * 1000:.0f} ms"
    if stats.generator:
        about = "about " if stats.counts_estimated else ""
        cost += (
            f"; {stats.generator} on {stats.device} ({stats.dtype}): {about}{stats.prompt_tokens} prompt tokens "
            f"({stats.reused_tokens} reused), first token {stats.seconds_to_first_token:.2f} s, "
            f"{about}{stats.new_tokens} new at {about}{stats.tokens_per_second:.0f} a second"
        )
    print(f"\n{cost}", file=sys.stderr)


def _place(path: str, page: int | None) -> str:
    return path if page is None else f"{path}, page {page}"


_DISAGREE = {"en": "The documents disagree", "zh": "文档说法不一"}


def _print_disagreements(answer: Answer) -> None:
    """What two places say differently, in the language of the question."""
    from rag.language import detect_language

    for each in answer.disagreements:
        print(f"\n{_DISAGREE[detect_language(answer.question)]}")
        for citation, words in ((each.first, each.first_words), (each.second, each.second_words)):
            quote = "" if each.kind == "negation" else f": {one_line(citation.quote)}"
            print(f"  [{citation.marker}] {_place(citation.path, citation.page)}: {one_line(words)}{quote}")


def _retrieve(options: argparse.Namespace, settings: Settings) -> int:
    from rag.pipeline import Rag

    rows, where = read_questions(options.source), _where(options)
    fresh = options.target.with_name(options.target.name + ".new")
    _check_outputs([options.source], [options.target, fresh])
    rag = Rag.open(settings=settings)
    count = options.top_k or max(_RETRIEVED, settings.top_k)
    with _writable(fresh) as out:
        for begin in range(0, len(rows), 256):
            part = rows[begin : begin + 256]
            found = rag.retriever.retrieve_batch([row["question"] for row in part], count, where=where)
            for row, hits in zip(part, found, strict=True):
                line = {"id": row["id"], "hits": [hit.to_dict() for hit in hits]}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    fresh.replace(options.target)
    print(f"{len(rows)} questions, hits in {options.target}", file=sys.stderr)
    return 0


def _check_outputs(read: Sequence[Path], written: Sequence[Path]) -> None:
    """Raise InputError where a file can't be written, or is read as well: now, not when all work is done."""
    for number, path in enumerate(written):
        if any(_is_same_file(path, other) for other in read):
            raise InputError(f"{path} is read, and would be written over. Name another output file.")
        if any(_is_same_file(path, other) for other in written[:number]):
            raise InputError(f"{path} is named for two outputs. Name a file for each.")
        _check_output(path)


def _is_same_file(path: Path, other: Path) -> bool:
    """Whether two names mean one file, also through links."""
    try:
        return path.samefile(other)
    except OSError:  # one is not there yet
        return path.resolve() == other.resolve()


def _check_output(path: Path) -> None:
    target = path.resolve()  # so that a link stays
    try:
        if target.is_dir():
            raise InputError(f"{path} is a folder. Name a file in it.")
        if target.exists() and not target.is_file():
            return  # a pipe, a terminal: it would wait for a reader, or hold the trial
        is_new = not target.exists()
        with target.open("ab"):  # rights alone don't tell: the disk may be mounted without
            pass
        if is_new:
            target.unlink()
    except OSError as error:
        raise InputError(f"{path} can't be written: {error}") from error


def _writable(path: Path) -> Any:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} can't be written: {error}") from error


def _batch(options: argparse.Namespace, settings: Settings) -> int:
    from tqdm import tqdm

    from rag.batch import answer_file
    from rag.pipeline import Rag

    rows, where = read_questions(options.source), _where(options)
    _check_outputs([options.source], [options.target])
    rag = Rag.open(settings=settings)
    rag.retriever.check_filter(where)  # one error, not one for every question
    # Now, so that a model that can't be loaded is one error and not one for every question.
    rag.generator  # noqa: B018
    with tqdm(total=len(rows), unit="question", file=sys.stderr, disable=False) as bar:

        def show(answered: int, total: int) -> None:
            if bar.n == 0:
                bar.initial = bar.n = answered  # so that time left is reckoned from this run alone
                bar.refresh()
            else:
                bar.update(answered - bar.n)

        counts = answer_file(rag, rows, options.target, where=where,
                             retry_failed=options.retry_failed, progress=show)
    print(f"{counts.total} questions, {counts.before} of them answered before, {counts.failed} failed; "
          f"answers in {options.target}", file=sys.stderr)
    if counts.failed:
        print('Failed ones have an "error" in their line; --retry-failed asks them again.', file=sys.stderr)
    return 1 if counts.failed else 0


def _evaluate(options: argparse.Namespace, settings: Settings) -> int:
    from rag.quality.report import check_plots, write_report
    from rag.quality.run import Run, compare, run_of

    if options.html:
        check_plots()
    if options.compare and options.source:
        raise InputError("give either questions to measure or --compare A.json B.json, not both.")
    read = options.compare or ([options.source] if options.source else [])
    _check_outputs(read, [path for path in (options.save, options.details, options.html) if path])
    if options.compare:
        earlier, run = (Run.read(path) for path in options.compare)
        comparison = compare(earlier, run)
        _print_comparison(comparison)
        if options.html:
            write_report(run, options.html, comparison)
        if options.json:
            print(json.dumps(comparison.to_dict(), ensure_ascii=False))
        return 0
    if options.source is None:
        raise InputError("there is nothing to measure. Name a file of questions, or --compare A.json B.json.")
    results = _measure(options.source, settings)
    run = run_of(results, source=str(options.source), settings=asdict(settings))
    try:
        _print_summary(run.summary)
    finally:  # also where nobody reads on (`| head`): what was measured is not lost
        if options.save:
            run.write(options.save)
        if options.details:
            _write_details(results, options.details)
        if options.html:
            write_report(run, options.html)
    if options.json:
        print(json.dumps(run.summary, ensure_ascii=False))
    return 0


def _measure(source: Path, settings: Settings) -> list[EvalResult]:
    from tqdm import tqdm

    from rag.pipeline import Rag
    from rag.quality.evaluation import EvalQuestion, evaluate

    questions = parse_lines(source, lambda number, row: EvalQuestion.parse(row, number))
    if not questions:
        raise InputError(f"{source} holds no questions.")
    rag = Rag.open(settings=settings)
    questions = _with_known_paths(questions, rag.base)
    with tqdm(total=len(questions), unit="question", file=sys.stderr) as bar:
        return evaluate(rag, questions, lambda done, total: bar.update(1))


def _with_known_paths(questions: Sequence[EvalQuestion], base: Store) -> list[EvalQuestion]:
    """The questions with paths as the base writes them. Files that it doesn't hold are told; InputError
    where it holds none of those named."""
    from rag.quality.evaluation import placed

    readable = [path for path, record in base.files().items() if record.status == "ok"]
    found, missing = placed(questions, readable)
    if not missing:
        return found
    names = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    named = {each.path for each in found if each.path is not None and not each.unanswerable}
    if len(missing) == len(named):
        raise InputError(
            f"no file that the questions name is in this knowledge base: {names}. A path is written as `ingest` "
            "names the file, relative to the folder that was ingested."
        )
    print(f"warning: {len(missing)} of {len(named)} files that the questions name are not in this knowledge base, and "
          f"their questions count as not found: {names}", file=sys.stderr)
    return found


def _write_details(results: Sequence[EvalResult], path: Path) -> None:
    with _writable(path) as out:
        for result in results:
            line = {"id": result.question.id, "rank": result.rank, "gold": asdict(result.question),
                    **result.answer.to_dict()}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _print_summary(summary: dict[str, Any]) -> None:
    parts = summary["by_language"]
    width = max(27, *(len(name) + 2 for name in summary["by_type"]))
    for name, value in summary.items():
        if isinstance(value, (dict, list)):
            continue
        ends = summary["intervals"].get(name)
        between = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
        row = "".join(f"{_figure(part[name]):>10}" for part in parts.values())
        print(f"{name:{width}}{_figure(value):>10}{between:>18}{row}")
    print(f"{'':{width}}{'all':>10}{'95% interval':>18}" + "".join(f"{name:>10}" for name in parts) + "\n")
    columns = ("n", "hit@1", "hit@5", "mrr", "f1", "answer_in_text", "citation_precision", "refusal_accuracy")
    print(f"{'by type':{width}}" + "".join(f"{name.removesuffix('_accuracy'):>20}" for name in columns))
    for name, part in summary["by_type"].items():
        print(f"{name:{width}}" + "".join(f"{_figure(part[column]):>20}" for column in columns))


def _figure(value: float | int | None) -> str:
    return "-" if value is None else str(value)


def _print_comparison(comparison: Comparison) -> None:
    print(f"{comparison.questions} questions in both runs ({comparison.only_a} only in the first, "
          f"{comparison.only_b} only in the second)")
    print(f"{'':27}{'first':>9}{'second':>9}{'change':>9}{'95% interval':>20}{'p':>8}{'p (Holm)':>10}")
    for each in comparison.differences:
        between = f"{each.low:+.3f} to {each.high:+.3f}"
        print(f"{each.name:27}{each.a:9.4f}{each.b:9.4f}{each.b - each.a:+9.4f}{between:>20}{each.p:8.4f}"
              f"{each.p_holm:10.4f}{'  *' if each.significant else ''}")
    print("* the change is more than chance (permutation test, p below 0.05 after Holm's correction)")
    print(f"better: {len(comparison.better)} questions {' '.join(comparison.better[:20])}")
    print(f"worse:  {len(comparison.worse)} questions {' '.join(comparison.worse[:20])}")


def _questions(options: argparse.Namespace, settings: Settings) -> int:
    from rag.quality.questions import make_questions
    from rag.store import open_store

    if not options.force and options.target.is_file() and options.target.stat().st_size:
        raise InputError(f"{options.target} is there already. Name another file, or write over it with --force.")
    _check_outputs([], [options.target])
    made = make_questions(
        open_store(settings), count=options.count, unanswerable=options.unanswerable, seed=settings.seed
    )
    with _writable(options.target) as out:
        for number, each in enumerate(made, 1):
            out.write(json.dumps(each.to_dict(number), ensure_ascii=False) + "\n")
    without = sum(each.unanswerable for each in made)
    print(f"{len(made) - without} questions with and {without} without an answer from "
          f"{len({each.path for each in made})} files, in {options.target}", file=sys.stderr)
    if len(made) < options.count:
        print(f"That is less than the {options.count} asked for: no more sentences fit a pattern.", file=sys.stderr)
    print(f"Look through them, then: python -m rag eval {options.target} --kb {settings.kb}", file=sys.stderr)
    return 0


def _calibrate(options: argparse.Namespace, settings: Settings) -> int:
    from tqdm import tqdm

    from rag.knowledge import KnowledgeBase
    from rag.quality.calibrate import calibrate, check_store, made_questions, own_questions
    from rag.quality.evaluation import EvalQuestion

    check_store(settings)
    base = KnowledgeBase.open(settings.kb)
    if options.questions:
        brought = parse_lines(options.questions, lambda number, row: EvalQuestion.parse(row, number))
        left_out: list[str] = []
        try:
            asked = own_questions(base, brought, tell=left_out.append)
        finally:
            if left_out:
                more = [f"... and {len(left_out) - _SHOWN} more"] if len(left_out) > _SHOWN else []
                print("\n".join([*left_out[:_SHOWN], *more]), file=sys.stderr)
    else:
        asked = made_questions(base, seed=settings.seed)
    with tqdm(total=len(asked), unit="question", file=sys.stderr) as bar:
        found, supports, path = calibrate(settings, asked, progress=lambda: bar.update(1))
    print(f"{found.answerable} questions with and {found.unanswerable} without an answer "
          f"({len(supports.hidden)} of these by hiding the passage that answers)")
    print(f"left out: {supports.lost} whose passage is not found, {supports.still_there} that something else answers\n")
    print(f"{'threshold':>10}{'coverage':>10}{'risk':>10}{'kept':>10}{'refused':>10}")
    nearest = min(found.curve, key=lambda point: abs(point.threshold - found.threshold))
    for point in found.curve:
        if point is nearest or round(point.threshold * 50) % 5 == 0:
            print(f"{point.threshold:10.2f}{point.coverage:10.3f}{point.risk:10.3f}{point.kept:10.3f}"
                  f"{point.refused:10.3f}{'  <' if point is nearest else ''}")
    print(f"\nthreshold {found.threshold:.3f} (built in: {found.built_in:.3f}); balanced accuracy "
          f"{found.balanced_accuracy:.3f} on questions it was not fitted on (built in: "
          f"{found.built_in_balanced_accuracy:.3f})\nkept in {path}; delete that file to go back")
    if not options.questions:
        print("Made questions stand in for those of people. Some 50 of your own, with --questions, fit better.")
    if options.json:
        print(json.dumps(asdict(found), ensure_ascii=False))
    return 0


def _serve(options: argparse.Namespace, settings: Settings) -> int:
    from rag.pipeline import Rag

    try:
        from rag.serve import ServeOptions, read_keys, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise InputError(f"serving needs the package {error.name}: pip install 'local-rag[serve]'") from error
    chosen = ServeOptions(**{field.name: getattr(options, field.name) for field in fields(ServeOptions)})
    keys = read_keys(chosen, os.environ)
    return serve(Rag.open(settings=settings), chosen, keys)


def _doctor(options: argparse.Namespace, settings: Settings) -> int:
    from rag.embedder import load_embedder
    from rag.store import open_store

    print("settings")
    for name, value in asdict(settings).items():
        print(f"  {name:20} {value}")
    base = open_store(settings)
    files = base.files()
    failed = [record for record in files.values() if record.status == "failed"]
    print(f"knowledge base {settings.kb}: {len(files)} files, {base.count_chunks()} chunks, "
          f"{len(failed)} failed files, embedder {base.embedder_name}")
    for record in failed:
        print(f"  failed: {record.path}: {record.error}")
    problems = base.check()
    for problem in problems:
        print(f"  problem: {problem}")
    if problems and settings.store == "embedded":
        print(f"  Restore the base from a copy, or delete {settings.kb} and ingest again.")
    state = base.index_state()
    index = "FAISS file" if settings.store == "embedded" else "counts of terms"
    print(f"  {index}: {state}")
    if state != "current":
        with base.writing():
            base.publish()
        print(f"  {index}: made again from what is stored, now {base.index_state()}")
    if facts := base.index_facts():
        print(f"  FAISS file: {facts.describe()}")
    base.check_embedder(load_embedder(settings.embedder, device=settings.device))
    print(f"embedder {settings.embedder}: loads, and is the one that built the knowledge base")
    from rag.generator import load_generator

    print(f"generator {load_generator(settings).describe()}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
