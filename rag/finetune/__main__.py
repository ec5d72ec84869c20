"""`python -m rag.finetune QUESTIONS.jsonl --kb DIR --out DIR`: a LoRA adapter of one's own questions."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rag.adapter import AdapterRecord, weights_fingerprint
from rag.confidence import Calibration
from rag.errors import GeneratorError, InputError, RagError
from rag.finetune.examples import Examples, Part, make_examples, part_of
from rag.finetune.measuring import Written, fit_confidence, write_answers
from rag.finetune.training import Look, LoraTraining, TrainingOptions
from rag.quality.evaluation import EvalQuestion
from rag.quality.run import Run, compare, run_of
from rag.question_file import parse_lines
from rag.settings import Settings

FEWEST: dict[Part, int] = {"train": 20, "stop": 3, "measure": 3}
_PURPOSE: dict[Part, str] = {"train": "train on", "stop": "stop by", "measure": "measure"}
_FIGURES = ("em", "f1", "answer_in_text", "refusal_accuracy")
_CUT = "cut off"
_OFTEN_CUT = 0.2
_SETTINGS = (
    "kb", "generator", "embedder", "store", "milvus_uri", "device", "dtype", "top_k",
    "max_prompt_tokens", "max_new_tokens", "seed",
)  # fmt: skip

_EPILOG = """\
a line of QUESTIONS.jsonl: {"question": ..., "answer": ...} and, where known, "path", "page", "quote"
of the place that answers, as `python -m rag eval` takes them; or "unanswerable": true. Seven in ten
are trained on, one says when to stop, two are measured before and after; a hash of the question's
words decides which. Use the adapter with --adapter DIR or RAG_ADAPTER=DIR, beside the same generator.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 1 for an error with its message, 2 for usage."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.load(**{name: getattr(options, name) for name in _SETTINGS})
        training = TrainingOptions(
            **{field.name: getattr(options, field.name) for field in fields(TrainingOptions)}
        )
        finetune(options.source, options.out, settings, training)
        return 0
    except RagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; {options.out} was not written.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rag.finetune", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a LoRA adapter for the generator on your own questions.",
    )
    defaults = TrainingOptions()
    add = parser.add_argument
    add("source", metavar="QUESTIONS.jsonl", type=Path)
    add("--out", metavar="DIR", type=Path, required=True, help="folder for the adapter; must not exist")
    helps = {
        "epochs": "times that every question is seen, at most", "rank": "of the two matrices",
        "alpha": "the matrices' product counts alpha / rank", "dropout": "of what the matrices read",
        "rate": "learning rate", "batch": "questions a step", "minutes": "end training after so many; 0 does not",
        "patience": "end after so many looks (two an epoch) without a lower loss",
    }  # fmt: skip
    for field in fields(TrainingOptions):
        default = getattr(defaults, field.name)
        add("--" + field.name, type=type(default), default=default, metavar=type(default).__name__.upper(),
            help=f"{helps[field.name]} (default: {default:g})")
    group = parser.add_argument_group("settings (defaults from RAG_... variables and rag.toml)")
    for setting in fields(Settings):
        if setting.name in _SETTINGS:
            kind = {"str": str, "int": int, "float": float}[str(setting.type)]
            group.add_argument("--" + setting.name.replace("_", "-"), dest=setting.name, default=None, type=kind,
                               metavar=kind.__name__.upper(), help=f"built-in default: {setting.default}")
    return parser


def finetune(source: Path, out: Path, settings: Settings, options: TrainingOptions) -> None:
    """Train on the questions in `source` and write the adapter to `out`, with the figures of before
    and after. Raises a RagError where that can't be done, before anything is written."""
    from rag.pipeline import Rag

    _check(out, settings)
    questions = parse_lines(source, lambda number, row: EvalQuestion.parse(row, number))
    parts: dict[Part, list[EvalQuestion]] = {"train": [], "stop": [], "measure": []}
    for question in questions:
        if question.answers or question.unanswerable:
            parts[part_of(question.question)].append(question)
    unanswered = len(questions) - sum(map(len, parts.values()))
    _check_counts(source, {part: len(found) for part, found in parts.items()}, unanswered)
    training = LoraTraining(settings, options)  # now, so that what is missing shows at once

    rag = Rag.open(settings=settings)
    examples = {part: _prepare(rag, part, parts[part]) for part in parts}
    _describe(questions, parts, examples, unanswered)
    _check_counts(source, {part: len(examples[part].examples) for part in ("train", "stop")}, 0)
    before = _measure(rag, parts["measure"], "before")
    measured = examples["measure"].examples
    loss_before = training.loss(measured) if measured else None
    del rag  # its memory is wanted
    gc.collect()

    print(f"training {training.num_trained:,} weights of {settings.generator} on {training.device}", file=sys.stderr)
    first, best = training.run(examples["train"].examples, examples["stop"].examples, _show)
    if best.step == 0:
        raise GeneratorError(
            f"training did not lower the loss on the {len(examples['stop'].examples)} questions to stop by "
            f"({first.loss:.3f} before it), so no adapter was written. Give more questions, or a lower --rate."
        )
    loss_after = training.loss(measured) if measured else None

    fresh = out.with_name(out.name + ".new")
    fresh.mkdir(parents=True, exist_ok=False)
    training.save(fresh)
    del training
    gc.collect()
    facts: dict[str, Any] = {
        "options": asdict(options), "questions": {part: len(found) for part, found in parts.items()},
        "trained_on": len(examples["train"].examples), "steps": best.step, "seconds": round(best.seconds, 1),
        "loss_to_stop_by": [first.loss, best.loss], "loss_measured": [loss_before, loss_after],
    }
    record = AdapterRecord(settings.generator, _fingerprint(settings), None, facts)
    record.write(fresh)

    adapted = Rag.open(settings=replace(settings, adapter=str(fresh)))
    after = _measure(adapted, parts["measure"], "after")
    confidence = None
    if Calibration.read(settings.generator) is not None:
        confidence = fit_confidence(_write(adapted, parts["stop"], "confidence"))
    runs = [
        run_of([one.result for one in written], source=str(source), settings=asdict(settings))
        for written in (before, after)
    ]
    facts["figures"] = {name: [run.summary[name] for run in runs] for name in _FIGURES}
    facts["figures"][_CUT] = cut = [_share_cut(written) for written in (before, after)]
    replace(record, confidence=confidence, training=facts).write(fresh)
    for name, run in zip(("before.json", "after.json"), runs, strict=True):
        run.write(fresh / name)
    fresh.rename(out)
    _print_figures(runs, (loss_before, loss_after), cut)
    _print_end(out, settings, confidence)


def _check(out: Path, settings: Settings) -> None:
    """Raise InputError where the adapter could not be written, or not be trained here."""
    if settings.generator.startswith("openai:"):
        raise InputError(
            f"the generator {settings.generator!r} runs on a server; only weights on this machine can be "
            "trained. Name a folder, a Hugging Face name, or 'bundled'."
        )
    if settings.adapter:
        raise InputError(
            f"setting adapter is {settings.adapter!r}; adapters are trained on the generator itself. "
            "Unset it (RAG_ADAPTER, rag.toml)."
        )
    for folder in (out, out.with_name(out.name + ".new")):
        if folder.exists():
            raise InputError(f"{folder} exists already. Name another --out, or delete it first.")


def _check_counts(source: Path, counts: dict[Part, int], unanswered: int) -> None:
    lacking = [part for part, count in counts.items() if count < FEWEST[part]]
    if lacking:
        found = ", ".join(f"{counts[part]} to {_PURPOSE[part]} (at least {FEWEST[part]})" for part in counts)
        without = f" {unanswered} lines have no answer." if unanswered else ""
        raise InputError(
            f"{source} holds too few usable questions: {found}.{without} Some 100 with an answer are a good "
            "beginning, and they must be about the documents in the knowledge base."
        )


def _prepare(rag: Any, part: Part, questions: Sequence[EvalQuestion]) -> Examples:
    with _bar(len(questions), f"prompts to {_PURPOSE[part]}") as bar:
        return make_examples(rag, questions, lambda: bar.update(1))


def _write(rag: Any, questions: Sequence[EvalQuestion], what: str) -> list[Written]:
    with _bar(len(questions), what) as bar:
        return write_answers(rag, questions, lambda done: bar.update(done))


def _measure(rag: Any, questions: Sequence[EvalQuestion], when: str) -> list[Written]:
    return _write(rag, questions, f"answers {when}")


def _bar(total: int, what: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit="question", file=sys.stderr)


def _describe(
    questions: Sequence[EvalQuestion], parts: dict[Part, list[EvalQuestion]],
    examples: dict[Part, Examples], unanswered: int,
) -> None:
    counts = ", ".join(f"{len(found)} to {_PURPOSE[part]}" for part, found in parts.items())
    print(f"{len(questions)} questions: {counts}" + (f"; {unanswered} without an answer" if unanswered else ""))
    for part in ("train", "stop"):
        made = examples[part]
        for reason, count in sorted(made.left_out.items()):
            print(f"  {count} of those to {_PURPOSE[part]} left out: {reason}")
    longer = examples["train"].longer_than_written
    if longer:
        print(f"  {longer} answers to train on are longer than max_new_tokens; raise it, or they end early in use")


def _show(look: Look) -> None:
    trained = f", in training {look.training_loss:.3f}" if look.step else ""
    print(
        f"  step {look.step:5} (epoch {look.epoch:.2f}, {look.seconds / 60:.1f} min): "
        f"loss to stop by {look.loss:.3f}{trained}", file=sys.stderr, flush=True,
    )


def _fingerprint(settings: Settings) -> str:
    from rag.generator import find_model, weight_files

    return weights_fingerprint(weight_files(find_model(settings.generator)))


def _share_cut(written: Sequence[Written]) -> float:
    """Of answers that ran into max_new_tokens: many are a sign of a model that repeats itself."""
    return round(sum(one.result.answer.stats.finish_reason == "length" for one in written) / len(written), 4)


def _print_figures(
    runs: Sequence[Run], losses: tuple[float | None, float | None], cut: Sequence[float]
) -> None:
    comparison = compare(runs[0], runs[1])
    print(f"{comparison.questions} questions that were not trained on, the model's own words")
    print(f"{'':20}{'before':>9}{'after':>9}{'change: 95% interval':>24}{'p':>9}")
    if losses[0] is not None and losses[1] is not None:
        print(f"{'loss of the answers':20}{losses[0]:9.3f}{losses[1]:9.3f}")
    for each in comparison.differences:
        if each.name in _FIGURES:
            between = f"{each.low:+.3f} to {each.high:+.3f}"
            print(f"{each.name:20}{each.a:9.4f}{each.b:9.4f}{between:>24}{each.p:9.4f}")
    print(f"{_CUT:20}{cut[0]:9.4f}{cut[1]:9.4f}")
    if cut[1] > max(_OFTEN_CUT, cut[0]):
        print(
            f"after training {cut[1]:.0%} of the answers are cut off at max_new_tokens: read some in after.json "
            "before using it; a model too small for such answers repeats itself"
        )


def _print_end(out: Path, settings: Settings, confidence: dict[str, float] | None) -> None:
    if confidence is not None:
        print(
            f"its confidence, fitted anew on {confidence['answers']:.0f} answers ({confidence['right']:.0%} right): "
            f"{confidence.get('shown', 0.0):.0%} of them would be shown, for the others the sources quoted"
        )
    print(f"Use it: python -m rag ask QUESTION --kb {settings.kb} --generator {settings.generator} --adapter {out}")


if __name__ == "__main__":
    sys.exit(main())
