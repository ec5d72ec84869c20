"""Train the bundled extractor: `torchrun --nproc-per-node 2 -m rag.bundled.train_extractor --data DIR`.

One process a core: small LSTMs gain little from more threads. Each row of a batch is one question
with its own passage, sometimes beside one or two that look like it, or (one time in four) only one of
the latter, where the null option is right. An average of the weights over time is what is written
(Polyak and Juditsky, 1992).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from rag.bundled.extractor_data import (
    LONGEST_PASSAGE,
    Asked,
    Ids,
    Reading,
    read_heldout,
    read_heldout_asked,
    read_training,
    whole_tokenizer,
)
from rag.bundled.extractor_model import ExtractorModel, ExtractorShape
from rag.bundled.token_usage import token_usage
from rag.extractor import BUNDLED
from rag.soft_match import bundled_table

# How often a question of each source is seen in one pass: few and good ones more often.
SHARES = {"squad1.1-train": 1.0, "medquad": 0.15, "made": 0.35, "patterns": 0.7, "translated": 0.8,
          "drcd-dev-s2t": 3.0, "cmrc2018-trial": 3.0, "lecoqa-train": 2.0, "asked": 4.0}
_OTHERS = (0, 0, 0, 1, 2)  # passages beside its own
_POOL = 32  # batches sorted by length together
_AVERAGE = 0.999

# A question, its passages, and where it is answered: passage, first token, last token. None: null is right.
Row = tuple[Ids, list[Ids], list[tuple[int, int, int]]]


def make_row(
    item: Asked, reading: Reading, negatives: Sequence[int], rng: random.Random, others: Sequence[int] = _OTHERS
) -> Row:
    """One question with its own passage, or (one time in four) with another in its place."""
    with_own = not item.answered or rng.random() < 0.75
    order: list[int | None] = [*rng.sample(list(negatives), rng.choice(others) if with_own else 1)]
    if with_own:
        order.append(None)
    rng.shuffle(order)
    parts: list[Ids] = []
    spans: list[tuple[int, int, int]] = []
    for at, number in enumerate(order):
        ids = reading.passages[item.passage if number is None else number]
        low = _window(len(ids), item.spans if number is None else (), rng)
        part = ids[low : low + LONGEST_PASSAGE]
        if number is None and item.answered:
            inside = item.spans or [(n, n) for n in range(low, low + len(part))]
            spans += [(at, a - low, b - low) for a, b in inside if a >= low and b < low + len(part)]
        parts.append(part)
    return item.question, parts, spans


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


def batches(reading: Reading, size: int, rng: random.Random, process: int, processes: int) -> Iterator[list[Row]]:
    """Endless batches of rows of about one length. Each process has its own rows, and at the same
    step batches of about the same length, if `rng` is the same in all."""
    own = random.Random(process)
    while True:
        order = one_pass(reading, rng)
        order = order[process : len(order) // processes * processes : processes]
        for begin in range(0, len(order), size * _POOL):
            rows = [
                make_row(reading.questions[at], reading, reading.negatives[at].tolist(), own)
                for at in order[begin : begin + size * _POOL]
            ]
            rows.sort(key=lambda row: (max(len(part) for part in row[1]), len(row[1])))
            parts = [rows[at : at + size] for at in range(0, len(rows), size)]
            rng.shuffle(parts)
            yield from parts


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as the network takes them."""

    question: Tensor  # (B, Q) token ids, -1 behind the last
    passages: Tensor  # (N, T) token ids of all rows' passages
    rows: Tensor  # (N,) whose passage each is
    places: Tensor  # (N,) its place among B x `most`
    most: int  # passages of a row, at most
    right: Tensor  # (B, most x T + 1, 2) bool: starts and ends; the last is null

    def all_logits(self, logits: Tensor, null: Tensor) -> Tensor:
        """What the network returns, as (B, most x T + 1, 2)."""
        every = logits.new_full((len(null) * self.most, *logits.shape[1:]), -1e4)
        every = every.index_copy(0, self.places, logits).view(len(null), -1, 2)
        return torch.cat([every, null[:, None]], dim=1)


def collate(rows: Sequence[Row]) -> Batch:
    """One batch of rows."""
    most = max(len(parts) for _, parts, _ in rows)
    length = max(len(part) for _, parts, _ in rows for part in parts)
    number = sum(len(parts) for _, parts, _ in rows)
    questions = np.full((len(rows), max(len(question) for question, _, _ in rows)), -1, dtype=np.int64)
    passages = np.full((number, length), -1, dtype=np.int64)
    whose, places = np.zeros((2, number), dtype=np.int64)
    right = np.zeros((len(rows), most * length + 1, 2), dtype=bool)
    n = 0
    for at, (question, parts, spans) in enumerate(rows):
        questions[at, : len(question)] = question
        for place, part in enumerate(parts):
            passages[n, : len(part)], whose[n], places[n] = part, at, at * most + place
            n += 1
        for place, first, last in spans:
            right[at, place * length + first, 0] = right[at, place * length + last, 1] = True
        right[at, -1] = not spans
    tensor = torch.from_numpy
    return Batch(tensor(questions), tensor(passages), tensor(whose), tensor(places), most, tensor(right))


def loss_of(logits: Tensor, right: Tensor) -> Tensor:
    """Minus the log of the probability mass on what is right, mean over rows, of start and end together."""
    return (logits.logsumexp(1) - logits.masked_fill(~right, -1e9).logsumexp(1)).mean(0).sum()


def measure(model: ExtractorModel, rows: Sequence[Row]) -> dict[str, float]:
    """Start in a right span (of answered rows), and how well the null logit tells both kinds apart."""
    model.eval()
    starts: list[float] = []
    gaps: list[tuple[float, bool]] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for begin in range(0, len(rows), 32):
            batch = collate(rows[begin : begin + 32])
            logits = batch.all_logits(*model(batch.question, batch.passages, batch.rows))
            best = logits[:, :-1, 0].argmax(1)
            gap = (logits[:, :-1].logsumexp(1) - logits[:, -1]).sum(1)
            for at in range(len(best)):
                answered = not bool(batch.right[at, -1, 0])
                gaps.append((float(gap[at]), answered))
                if answered:
                    starts.append(float(batch.right[at, best[at], 0]))
    model.train()
    yes = np.array([gap for gap, answered in gaps if answered])
    no = np.array([gap for gap, answered in gaps if not answered])
    return {"start": round(float(np.mean(starts)), 4), "auc": round(float((yes[:, None] > no[None]).mean()), 4)}


def write(model: ExtractorModel, weights: dict[str, Tensor], out: Path, figures: dict[str, object]) -> None:
    """Weights in float16, the table of usage and the frequent tokens among them, and the figures
    beside them, each replaced in one rename."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: weights[name].half().contiguous() for name, _ in model.named_parameters()}
    tensors["usage"] = model.usage.half()
    tensors["frequent_tokens"] = model.frequent_tokens
    save_file(tensors, out / "model.safetensors.new")
    os.replace(out / "model.safetensors.new", out / "model.safetensors")
    config = {"embedder": bundled_table().fingerprint, "figures": figures}
    (out / "extractor.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def new_model(reading: Reading, data: Path, drop: float, seed: int) -> ExtractorModel:
    """An untrained network over the bundled embedder's table and the texts' usage of its tokens."""
    shape, table = ExtractorShape(), bundled_table()
    usage = token_usage(data, whole_tokenizer(), seed=seed)
    counts = np.zeros(len(table.table), dtype=np.int64)
    for ids in reading.passages:
        np.add.at(counts, ids, 1)
    for item in reading.questions:
        np.add.at(counts, item.question, 3)  # few, but they say what is asked
    frequent = np.sort(np.argsort(-counts, kind="stable")[: shape.frequent])
    return _model(torch.from_numpy(usage), torch.from_numpy(frequent), drop)


def trained_model(folder: Path, drop: float) -> ExtractorModel:
    """The network with the weights in a folder."""
    weights = load_file(folder / "model.safetensors")
    model = _model(weights.pop("usage"), weights.pop("frequent_tokens"), drop)
    model.load_state_dict(weights, strict=False)
    return model


def _model(usage: Tensor, frequent: Tensor, drop: float) -> ExtractorModel:
    table = torch.from_numpy(bundled_table().table).bfloat16()
    return ExtractorModel(ExtractorShape(), table, usage.bfloat16(), frequent, drop)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .jsonl.xz files")
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=32, help="rows of each process")
    parser.add_argument("--rate", type=float, default=1.8e-3, help="a third of it with --start-from")
    parser.add_argument("--drop", type=float, default=0.12)
    parser.add_argument("--made", type=int, default=60_000, help="Chinese questions made from text")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start-from", type=Path, help="go on from the weights in this folder")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    if "WORLD_SIZE" in os.environ:  # torchrun's
        distributed.init_process_group("gloo")
    reading = read_training(options.data, made=options.made, seed=options.seed)
    heldout: dict[str, Reading] = {}
    if _process() == 0:  # the one that measures and writes
        heldout = {language: read_heldout(options.data, language) for language in ("en", "zh")}
        heldout["asked"] = read_heldout_asked(options.data)
    if options.start_from:
        model = trained_model(options.start_from, options.drop)
    else:
        model = new_model(reading, options.data, options.drop, options.seed)
    train(model, reading, heldout, options)


def train(model: ExtractorModel, reading: Reading, heldout: dict[str, Reading], options: argparse.Namespace) -> None:
    """Train for options.minutes and write the averaged weights every few minutes."""
    together = distributed.is_initialized()
    process, processes = _process(), distributed.get_world_size() if together else 1
    tests = {
        language: [make_row(item, part, part.negatives[at].tolist(), random.Random(at), (1, 1, 2))
                   for at, item in list(enumerate(part.questions))[:: max(1, len(part.questions) // 600)]]
        for language, part in heldout.items()
    }
    average = {name: value.detach().clone() for name, value in model.named_parameters() if process == 0}
    matrices = [value for name, value in model.named_parameters() if value.dim() > 1 and name != "frequent.weight"]
    others = [value for name, value in model.named_parameters() if value.dim() == 1 or name == "frequent.weight"]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}],
        lr=options.rate, betas=(0.9, 0.98), fused=True,
    )
    began, step, losses, written = time.monotonic(), 0, [], time.monotonic()
    for rows in batches(reading, options.batch, random.Random(options.seed), process, processes):
        progress = (time.monotonic() - began) / (60 * options.minutes)
        rate = options.rate * min(1.0, (step + 1) / 300) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = collate(rows)
        with torch.autocast("cpu", torch.bfloat16):
            logits, null = model(batch.question, batch.passages, batch.rows)
        loss = loss_of(batch.all_logits(logits, null), batch.right)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if together:
            progress = _average_over_processes(model, progress, processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        keep = min(_AVERAGE, step / (step + 20))
        with torch.no_grad():
            for name, value in model.named_parameters() if process == 0 else ():
                average[name].lerp_(value, 1 - keep)
        losses.append(loss.item())
        done = progress >= 1
        if process == 0 and step % 100 == 0:
            print(f"step {step} {progress:.3f} loss {np.mean(losses[-100:]):.3f}", flush=True)
        if process == 0 and (done or time.monotonic() - written > 480):
            own = {name: value.detach().clone() for name, value in model.named_parameters()}
            model.load_state_dict(average, strict=False)
            figures: dict[str, object] = {language: measure(model, part) for language, part in tests.items()}
            print(step, figures, flush=True)
            write(model, average, options.out, figures | {"steps": step, "rows": step * options.batch * processes})
            model.load_state_dict(own, strict=False)
            written = time.monotonic()
        if done:
            return


def _process() -> int:
    """Which of torchrun's processes this is; 0 where there is only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _average_over_processes(model: ExtractorModel, progress: float, processes: int) -> float:
    """Average the gradients of all processes, and their clocks, which must agree on the last step."""
    parameters = [value for value in model.parameters() if value.grad is not None]
    flat = torch.cat([*(value.grad.view(-1) for value in parameters), torch.tensor([progress])])  # type: ignore[union-attr]
    distributed.all_reduce(flat)
    flat /= processes
    for value, part in zip(parameters, flat[:-1].split([value.numel() for value in parameters]), strict=True):
        value.grad.copy_(part.view_as(value))  # type: ignore[union-attr]
    return float(flat[-1])


if __name__ == "__main__":
    main()
