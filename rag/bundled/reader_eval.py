"""Measure a reader with the passages given: python -m rag.bundled.reader_eval --data DIR

Each question comes with four passages: the paragraph that answers it and the three others of its
collection that BM25 ranks highest. With the first one replaced by the next, refusing is right.
Also fits the confidence: mean log-probability of the answer's tokens -> chance of being right.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import string
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from rag.bundled.reader_data import (
    Collection,
    Paragraph,
    Question,
    nearest_paragraphs,
    split_sentences,
    words_of,
)
from rag.bundled.reader_model import block_mask, block_positions
from rag.language import REFUSAL, Language, detect_language
from rag.prompt import reader_prompt

BUNDLED = Path(__file__).parent / "reader"
_MARKER = re.compile(r"\s*\[(\d+)\]\s*$")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its passages. `gold` is the answering one's index, None where none does."""

    question: str
    passages: tuple[str, ...]
    gold: int | None
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """What the reader said. `confidence` is the mean log-probability of its tokens, in nats; the
    token that ends the answer isn't one of them."""

    text: str  # without the marker
    marker: int | None
    refused: bool
    confidence: float
    seconds_to_first_token: float
    seconds: float
    prompt_tokens: int


class ReaderModel:
    """A reader folder, loaded as any causal LM, decoding greedily."""

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype or "auto")
        self.model: Any = model.to(device).eval()
        self.device = device
        self.question_id, self.passage_id, self.end_id = (
            self.tokenizer.convert_tokens_to_ids(token)
            for token in ("<|question|>", "<|passage|>", "<|end|>")
        )

    @torch.inference_mode()
    def answer(
        self,
        question: str,
        passages: Sequence[str],
        *,
        blocks: bool = False,
        max_new_tokens: int = 64,
    ) -> Said:
        """Read the passages and answer. `blocks` is the layout of passages read on their own."""
        began = time.perf_counter()
        ids = self.tokenizer(reader_prompt(question, passages, blocks=blocks)).input_ids
        more: dict[str, Any] = {}
        next_position = len(ids)
        if blocks:
            starts = [n for n, token in enumerate(ids) if token == self.passage_id]
            asked = ids.index(self.question_id)
            positions = block_positions(len(ids), starts, asked)
            allowed = torch.from_numpy(block_mask(len(ids), starts, asked))[None, None]
            more = {
                "position_ids": torch.from_numpy(positions)[None].to(self.device),
                "attention_mask": torch.zeros(allowed.shape, dtype=self.model.dtype)
                .masked_fill(~allowed, torch.finfo(self.model.dtype).min)
                .to(self.device),
            }
            next_position = int(positions[-1]) + 1
        out = self.model(
            torch.tensor([ids], device=self.device), use_cache=True, logits_to_keep=1, **more
        )
        new: list[int] = []
        logprobs: list[float] = []
        first = 0.0
        while True:
            scores = out.logits[0, -1].float().log_softmax(-1)
            token = int(scores.argmax())
            first = first or time.perf_counter() - began
            if token == self.end_id or len(new) >= max_new_tokens:
                break
            new.append(token)
            logprobs.append(float(scores[token]))
            out = self.model(
                torch.tensor([[token]], device=self.device),
                past_key_values=out.past_key_values,
                use_cache=True,
                position_ids=torch.tensor([[next_position]], device=self.device),
                cache_position=torch.tensor([len(ids) + len(new) - 1], device=self.device),
            )
            next_position += 1
        text = self.tokenizer.decode(new).strip()
        marked = _MARKER.search(text)
        refused = text in REFUSAL.values()
        return Said(
            text=text[: marked.start()].strip() if marked else text,
            marker=int(marked.group(1)) if marked else None,
            refused=refused,
            confidence=sum(logprobs) / len(logprobs) if logprobs else -math.inf,
            seconds_to_first_token=first,
            seconds=time.perf_counter() - began,
            prompt_tokens=len(ids),
        )


# --- scores -------------------------------------------------------------------------------------


def answer_tokens(text: str, language: Language) -> list[str]:
    """What F1 counts: words without articles and punctuation, or Chinese characters."""
    text = text.lower()
    if language == "zh":
        return re.findall(r"[a-z0-9.]+|[\u4e00-\u9fff]", text)
    kept = "".join(c for c in text if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def exact_match(said: str, answers: Iterable[str], language: Language) -> float:
    """1.0 where it equals one of the reference answers (Rajpurkar et al., 2016)."""
    tokens = answer_tokens(said, language)
    return float(any(tokens == answer_tokens(answer, language) for answer in answers))


def f1(said: str, answers: Iterable[str], language: Language) -> float:
    """Overlap with the closest reference answer: words in English, characters in Chinese."""
    best = 0.0
    tokens = answer_tokens(said, language)
    for answer in answers:
        wanted = answer_tokens(answer, language)
        common = sum((Counter(tokens) & Counter(wanted)).values())
        if common:
            precision, recall = common / len(tokens), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


# --- questions ----------------------------------------------------------------------------------


def load_squad(path: Path) -> tuple[list[Paragraph], list[Question], list[tuple[str, ...]]]:
    """Paragraphs, questions and reference answers of a file in SQuAD's format."""
    paragraphs: list[Paragraph] = []
    questions: list[Question] = []
    answers: list[tuple[str, ...]] = []
    with lzma.open(path, "rt", encoding="utf8") as file:
        content = json.load(file)
    for article in content["data"]:
        title = article.get("title", "").replace("_", " ")
        for part in article["paragraphs"]:
            text = part["context"]
            for asked in part["qas"]:
                said = tuple(dict.fromkeys(a["text"].strip() for a in asked["answers"]))
                start = text.find(said[0])
                if start >= 0:
                    questions.append(
                        Question(asked["question"], len(paragraphs), start, start + len(said[0]))
                    )
                    answers.append(said)
            paragraphs.append(Paragraph(text, title, split_sentences(text)))
    return paragraphs, questions, answers


def with_passages(
    collection: Collection,
    numbers: Sequence[int],
    answers: Sequence[tuple[str, ...]],
    *,
    rng: random.Random,
    count: int = 4,
    answerable: bool = True,
) -> list[Asked]:
    """The questions with `count` passages each, in random order."""
    made = []
    for number in numbers:
        question = collection.questions[number]
        near = [collection.paragraphs[n] for n in collection.near[number]]
        gold = collection.paragraphs[question.paragraph]
        chosen = [gold, *near[: count - 1]] if answerable else near[:count]
        rng.shuffle(chosen)
        passages = tuple(f"{p.title}\n{p.text}" if p.title else p.text for p in chosen)
        made.append(
            Asked(question.text, passages, chosen.index(gold) if answerable else None, answers[number])
        )
    return made


def cut_passages(asked: Asked, *, sentences: int) -> Asked:
    """The question with each passage cut to the run of `sentences` that shares most with it.

    A shared word weighs the more, the fewer sentences of the passages hold it. What the cut
    leaves of a heading line is nothing: the sentences alone are read.
    """
    split = [[p[a:b] for a, b in split_sentences(p)] for p in asked.passages]
    holds = Counter(word for lines in split for line in lines for word in set(words_of(line)))
    wanted = set(words_of(asked.question))
    passages = []
    for lines in split:
        scores = [sum(1 / holds[w] for w in wanted & set(words_of(line))) for line in lines]
        runs = [sum(scores[n : n + sentences]) for n in range(max(1, len(lines) - sentences + 1))]
        best = int(np.argmax(runs))
        passages.append("".join(lines[best : best + sentences]).strip())
    return replace(asked, passages=tuple(passages))


def measure(
    reader: ReaderModel, asked: Sequence[Asked], *, blocks: bool = False
) -> tuple[dict[str, float], list[Said]]:
    """Scores over `asked`, and what was said. Refusing counts as wrong where there is an answer."""
    said = [reader.answer(a.question, a.passages, blocks=blocks) for a in asked]
    gold = [(a, s) for a, s in zip(asked, said) if a.gold is not None]
    none = [(a, s) for a, s in zip(asked, said) if a.gold is None]

    def mean(values: Iterable[float]) -> float:
        held = list(values)
        return round(float(np.mean(held)), 4) if held else math.nan

    language = detect_language(asked[0].question)
    right_refusals = mean(s.refused for _, s in none)
    answered = mean(not s.refused for _, s in gold)
    scores = {
        "questions": float(len(gold)),
        "em": mean(exact_match(s.text, a.answers, language) for a, s in gold),
        "f1": mean(0.0 if s.refused else f1(s.text, a.answers, language) for a, s in gold),
        "right_passage": mean(
            s.marker is not None and a.gold is not None and s.marker == a.gold + 1 for a, s in gold
        ),
        "words_of_passage": mean(
            any(s.text in p for p in a.passages) for a, s in zip(asked, said) if not s.refused
        ),
        "answered": answered,
        "refused_rightly": right_refusals,
        "refusal_accuracy": round((answered + right_refusals) / 2, 4),
        "seconds_to_first_token": mean(s.seconds_to_first_token for s in said),
        "seconds": mean(s.seconds for s in said),
        "prompt_tokens": mean(s.prompt_tokens for s in said),
    }
    return scores, said


# --- confidence ---------------------------------------------------------------------------------


def fit_confidence(
    confidences: NDArray[np.float64], right: NDArray[np.float64]
) -> tuple[float, float]:
    """Platt scaling (1999): chance of being right = 1 / (1 + exp(-(slope * confidence + offset))).

    Newton's method on the log-likelihood with a small ridge. Returns (slope, offset).
    """
    design = np.stack([confidences, np.ones_like(confidences)], 1)
    weights = np.zeros(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (right - chance) - 1e-3 * weights
        curvature = design.T @ (design * (chance * (1 - chance))[:, None]) + 1e-3 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step
        if float(np.abs(step).max()) < 1e-9:
            break
    return float(weights[0]), float(weights[1])


def calibrate(
    reader: ReaderModel, collections: Sequence[Collection], *, questions: int, rng: random.Random
) -> dict[str, float]:
    """Fit the confidence on questions kept from training, with four passages, one in five without
    an answer. Refusals are left out: they say themselves that nothing was found.

    Returns bias, logprob and support (the weight of another measure, not fitted here: 0), the
    threshold at which an answer is as likely right as wrong, and what it does on these questions.
    An answer is right where its F1 is at least 0.5.
    """
    confidences: list[float] = []
    right: list[float] = []
    for collection in collections:
        drawn = rng.sample(range(len(collection.questions)), min(questions, len(collection.questions)))
        answers = [
            (collection.paragraphs[q.paragraph].text[q.start : q.end],) for q in collection.questions
        ]
        none = drawn[: len(drawn) // 5]
        asked = with_passages(collection, drawn[len(none) :], answers, rng=rng)
        asked += with_passages(collection, none, answers, rng=rng, answerable=False)
        language = detect_language(asked[0].question)
        for a, s in zip(asked, measure(reader, asked)[1]):
            if not s.refused and math.isfinite(s.confidence):
                confidences.append(s.confidence)
                right.append(float(a.gold is not None and f1(s.text, a.answers, language) >= 0.5))
    slope, offset = fit_confidence(np.array(confidences), np.array(right))
    chance = 1 / (1 + np.exp(-(slope * np.array(confidences) + offset)))
    shown = chance >= 0.5
    return {
        "bias": offset,
        "logprob": slope,
        "support": 0.0,
        "threshold": 0.5,
        "answers": float(len(right)),
        "right": float(np.mean(right)),
        "shown": float(np.mean(shown)),
        "right_where_shown": float(np.mean(np.array(right)[shown])) if shown.any() else 0.0,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rag.bundled.reader_eval",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the measuring sets")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="folder of the reader")
    parser.add_argument("--questions", type=int, default=300, help="drawn from each set")
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument(
        "--sentences", type=int, default=0, help="cut each passage to so many sentences; 0 keeps it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", default=["whole", "blocks"], choices=["whole", "blocks"])
    parser.add_argument("--show", type=int, default=0, help="print so many answers of each set")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reader = ReaderModel(options.model, device=options.device)
    results: dict[str, dict[str, float]] = {}
    for name in ("squad_open_dev", "cmrc2018_dev"):
        paragraphs, questions, answers = load_squad(options.data / f"{name}.json.xz")
        rng = random.Random(options.seed)
        numbers = rng.sample(range(len(questions)), min(options.questions, len(questions)))
        drawn = [questions[n] for n in numbers]
        near = nearest_paragraphs(paragraphs, drawn, k=8)
        collection = Collection(tuple(paragraphs), tuple(drawn), near)
        of_drawn = [answers[n] for n in numbers]
        every = range(len(drawn))
        asked = with_passages(collection, every, of_drawn, rng=rng, count=options.passages)
        asked += with_passages(
            collection, every, of_drawn, rng=rng, count=options.passages, answerable=False
        )
        if options.sentences:
            asked = [cut_passages(a, sentences=options.sentences) for a in asked]
        for layout in options.layouts:
            scores, said = measure(reader, asked, blocks=layout == "blocks")
            results[f"{name}/{layout}"] = scores
            print(f"{name}/{layout}", json.dumps(scores), flush=True)
            for a, s in list(zip(asked, said))[: options.show]:
                print(f"  {a.question!r} -> {s.text!r} [{s.marker}] {s.confidence:.2f}; "
                      f"{a.answers[0]!r} [{(a.gold or 0) + 1}]")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
