"""Train the bundled extractor: `python -m rag.bundled.train_extractor --data DIR --minutes 60`.

Each row of a batch is one question with one to three passages: its own and some that look like it,
or (three times in ten) only the latter, where the null option is right. An average of the weights
over time is what is written (Polyak and Juditsky, 1992).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rag.bundled.extractor_data import (
    LONGEST_PASSAGE,
    Asked,
    Ids,
    Reading,
    read_heldout,
    read_heldout_asked,
    read_training,
)
from rag.bundled.extractor_model import ExtractorModel, ExtractorShape
from rag.extractor import BUNDLED, GAP
from rag.soft_match import bundled_table

# How often a question of each source is seen in one pass: few and good ones more often.
SHARES = {"squad1.1-train": 1.0, "medquad": 0.3, "made": 0.6, "patterns": 1.0, "translated": 1.0, "drcd-dev-s2t": 4.0, "cmrc2018-trial": 4.0,
          "lecoqa-train": 3.0, "asked": 6.0}
_POOL = 32  # batches sorted by length together
_AVERAGE = 0.999


Row = tuple[Ids, Ids, list[tuple[int, int]]]  # question, passages with gaps, spans (none: null is right)


def make_row(item: Asked, reading: Reading, negatives: Sequence[int], rng: random.Random) -> Row:
    """One question with its own passage among others, or (three times in ten) without it."""
    with_own = not item.answered or rng.random() < 0.7
    others = rng.sample(list(negatives), rng.choice((1, 1, 2)) if with_own else rng.choice((1, 2)))
    order: list[int | None] = [*others, None] if with_own else list(others)
    rng.shuffle(order)
    parts: list[Ids] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for number in order:
        ids = reading.passages[item.passage if number is None else number]
        low = _window(len(ids), item.spans if number is None else (), rng)
        part = ids[low : low + LONGEST_PASSAGE]
        if number is None and item.answered:
            inside = item.spans or [(n, n) for n in range(low, low + len(part))]
            spans += [(at + a - low, at + b - low) for a, b in inside if a >= low and b < low + len(part)]
        parts += [part, np.full(GAP, -1, dtype=np.int32)]
        at += len(part) + GAP
    return item.question, np.concatenate(parts[:-1]), spans


def _window(length: int, spans: Sequence[tuple[int, int]], rng: random.Random) -> int:
    """Where to begin to read a passage that is too long, so that its first answer is inside."""
    if length <= LONGEST_PASSAGE:
        return 0
    if not spans:
        return rng.randrange(length - LONGEST_PASSAGE + 1)
    first, last = spans[0]
    low = max(0, last - LONGEST_PASSAGE + 1)
    return min(rng.randint(low, max(low, first)), length - LONGEST_PASSAGE)


def one_pass(reading: Reading, rng: random.Random) -> list[int]:
    """Numbers of the questions of one pass, in random order, by SHARES."""
    chosen = []
    for at, item in enumerate(reading.questions):
        share = SHARES[item.source]
        chosen += [at] * (int(share) + (rng.random() < share - int(share)))
    rng.shuffle(chosen)
    return chosen


def batches(reading: Reading, size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Endless batches of rows of about one length."""
    while True:
        order = one_pass(reading, rng)
        for begin in range(0, len(order), size * _POOL):
            rows = [
                make_row(reading.questions[at], reading, reading.negatives[at].tolist(), rng)
                for at in order[begin : begin + size * _POOL]
            ]
            rows.sort(key=lambda row: len(row[1]))
            parts = [rows[at : at + size] for at in range(0, len(rows), size)]
            rng.shuffle(parts)
            yield from parts


def collate(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Question ids (B, Q), passage ids (B, T), right starts and right ends, both bool (B, T + 1)."""
    questions = np.full((len(rows), max(len(q) for q, _, _ in rows)), -1, dtype=np.int64)
    passages = np.full((len(rows), max(len(p) for _, p, _ in rows)), -1, dtype=np.int64)
    right = np.zeros((2, len(rows), passages.shape[1] + 1), dtype=bool)
    for at, (question, passage, spans) in enumerate(rows):
        questions[at, : len(question)] = question
        passages[at, : len(passage)] = passage
        for first, last in spans:
            right[0, at, first] = right[1, at, last] = True
        right[:, at, -1] = not spans
    return (*map(torch.from_numpy, (questions, passages)), *map(torch.from_numpy, right))  # type: ignore[return-value]


def loss_of(logits: Tensor, right: Tensor) -> Tensor:
    """Minus the log of the probability mass on what is right, mean over rows."""
    logits = logits.float()
    return (logits.logsumexp(1) - logits.masked_fill(~right, -1e9).logsumexp(1)).mean()


def measure(model: ExtractorModel, rows: Sequence[Row]) -> dict[str, float]:
    """Start in a right span (of answered rows), and how well the null logit tells both kinds apart."""
    model.eval()
    starts: list[float] = []
    gaps: list[tuple[float, bool]] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for begin in range(0, len(rows), 32):
            question, passages, right, _ = collate(rows[begin : begin + 32])
            start, end = (logits.float() for logits in model(question, passages))
            best = start[:, :-1].argmax(1)
            gap = start[:, :-1].logsumexp(1) - start[:, -1] + end[:, :-1].logsumexp(1) - end[:, -1]
            for at in range(len(best)):
                answered = not bool(right[at, -1])
                gaps.append((float(gap[at]), answered))
                if answered:
                    starts.append(float(right[at, best[at]]))
    model.train()
    yes = np.array([gap for gap, answered in gaps if answered])
    no = np.array([gap for gap, answered in gaps if not answered])
    return {"start": round(float(np.mean(starts)), 4), "auc": round(float((yes[:, None] > no[None]).mean()), 4)}


def write(model: ExtractorModel, weights: dict[str, Tensor], shape: ExtractorShape, out: Path,
          figures: dict[str, object]) -> None:
    """Weights in float16 and the sizes beside them, each replaced in one rename."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: weights[name].half().contiguous() for name, _ in model.named_parameters()},
              out / "model.safetensors.new")
    os.replace(out / "model.safetensors.new", out / "model.safetensors")
    config = {"shape": asdict(shape), "embedder": bundled_table().fingerprint, "figures": figures}
    (out / "extractor.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .jsonl.xz files")
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="a third of it with --start-from")
    parser.add_argument("--made", type=int, default=40_000, help="Chinese questions made from text")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start-from", type=Path, help="go on from the weights in this folder")
    options = parser.parse_args()
    reading = read_training(options.data, made=options.made, seed=options.seed)
    heldout = {language: read_heldout(options.data, language) for language in ("en", "zh")}
    heldout["asked"] = read_heldout_asked(options.data)
    train(reading, heldout, options)


def train(reading: Reading, heldout: dict[str, Reading], options: argparse.Namespace) -> None:
    """Train for options.minutes and write the averaged weights every few minutes."""
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    tests = {
        language: [make_row(item, part, part.negatives[at].tolist(), random.Random(at))
                   for at, item in list(enumerate(part.questions))[:: max(1, len(part.questions) // 600)]]
        for language, part in heldout.items()
    }
    shape = ExtractorShape(width=options.width)
    model = ExtractorModel(shape, torch.from_numpy(bundled_table().table).bfloat16())
    if options.start_from:
        model.load_state_dict(load_file(options.start_from / "model.safetensors"), strict=False)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01, betas=(0.9, 0.98))
    began, step, losses, written = time.monotonic(), 0, [], time.monotonic()
    for rows in batches(reading, options.batch, rng):
        progress = (time.monotonic() - began) / (60 * options.minutes)
        rate = options.rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        question, passages, right_start, right_end = collate(rows)
        with torch.autocast("cpu", torch.bfloat16):
            start, end = model(question, passages)
        loss = loss_of(start, right_start) + loss_of(end, right_end)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(_AVERAGE, step / (step + 20))
        with torch.no_grad():
            for name, value in model.named_parameters():
                average[name].lerp_(value, 1 - keep)
        losses.append(loss.item())
        done = progress >= 1
        if step % 100 == 0:
            print(f"step {step} {progress:.3f} loss {np.mean(losses[-100:]):.3f}", flush=True)
        if done or time.monotonic() - written > 300:
            own = {name: value.detach().clone() for name, value in model.named_parameters()}
            model.load_state_dict(average, strict=False)
            figures: dict[str, object] = {language: measure(model, part) for language, part in tests.items()}
            print(step, figures, flush=True)
            write(model, average, shape, options.out, figures | {"steps": step, "rows": step * options.batch})
            model.load_state_dict(own, strict=False)
            written = time.monotonic()
        if done:
            return


if __name__ == "__main__":
    main()
