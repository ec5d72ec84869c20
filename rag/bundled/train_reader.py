"""Train the bundled reader: python -m rag.bundled.train_reader --data DIR --out DIR --minutes N

Stages, each going on from the one before: copying (a stretch said twice), reading short windows,
then more and longer passages, then part of the prompts in the second layout. It keeps to its
minutes, saves its state as it goes, and `--resume` goes on from there, draw for draw.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from rag.bundled.reader_data import (
    Collection,
    Example,
    ExampleMaker,
    Paragraph,
    Stage,
    copying_example,
    hold_out,
    load_collection,
    load_plain,
)
from rag.bundled.reader_eval import ReaderModel, calibrate
from rag.bundled.reader_export import draw_curve, export_tokenizer, export_weights, write_json
from rag.bundled.reader_model import (
    PRESETS,
    TRAINING_ONLY,
    Batch,
    Layer,
    Losses,
    Reader,
    collate,
)
from rag.bundled.reader_tokenizer import load_tokenizer, train_tokenizer
from rag.bundled.reader_vectors import count_neighbours, factorise, spread
from rag.bundled.training_data import read_rows
from rag.language import Language
from rag.prompt import READER_TOKENS

# what the examples of each stage look like
STAGES: tuple[Stage, ...] = (
    Stage((1, 1), (1, 3), 0.10, (0.50, 0.20, 0.08, 0.22)),
    Stage((1, 2), (2, 4), 0.12, (0.55, 0.22, 0.05, 0.18)),
    Stage((2, 4), (2, 5), 0.15, (0.60, 0.22, 0.03, 0.15), blocks=0.1),
    Stage((4, 4), (3, 12), 0.17, (0.62, 0.23, 0.02, 0.13), blocks=0.15),
)
# by size, the share of the budget at which each stage ends: short examples say more a second,
# which is what a processor is short of; a GPU spends most of its time on prompts as they are used
ENDS: dict[str, tuple[float, ...]] = {
    "tiny": (0.45, 0.65, 0.85, 1.0),
    "small": (0.45, 0.65, 0.88, 1.0),
    "gpu": (0.15, 0.30, 0.60, 1.0),
}
COPY_TOKENS = 48  # length of the stretch that is said twice
COPY_LIMIT = 0.15  # most of the budget that copying may take
AVERAGE_EVERY = 16  # steps between two updates of the weights' moving average
MICRO_TOKENS = 1024  # of one micro-batch on a processor
COPIED = 0.92  # share of tokens copied right at which reading begins


@dataclass(frozen=True, slots=True)
class Options:
    """What one call of the program was asked for."""

    data: Path
    out: Path
    work: Path
    minutes: float
    size: str
    device: str
    threads: int
    tokens_per_step: int
    muon_rate: float
    adam_rate: float
    seed: int
    steps: int | None
    megabytes: float
    from_progress: float
    limit: int | None
    calibration_questions: int
    export_only: bool
    compile: bool
    draw_processes: int
    start_from: Path | None


# --- optimiser ----------------------------------------------------------------------------------


def orthogonalise(matrices: Tensor, *, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, about: Newton-Schulz (Jordan et al., 2024, Muon).

    matrices: (n, rows, columns). Returns the same shape, singular values between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.transpose(1, 2) if tall else x
    return found


class Optimiser:
    """Muon for the layers' matrices, Adam for embeddings and vectors, masters in float32.

    `average` is the exponential moving average of the weights, which is what gets exported.
    """

    def __init__(self, reader: Reader, *, muon_rate: float, adam_rate: float) -> None:
        self.names = [name for name, _ in reader.named_parameters()]
        self.parameters = [p for _, p in reader.named_parameters()]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.average = [m.clone() for m in self.masters]
        self.first = [torch.zeros_like(m) for m in self.masters]
        self.second = [
            torch.zeros(()) if self._by_muon(n) else torch.zeros_like(self.masters[n])
            for n in range(len(self.names))
        ]
        self.rates = (muon_rate, adam_rate)
        self.updates = 0
        self.by_muon = [n for n in range(len(self.names)) if self._by_muon(n)]
        self.rows_at = next(n for n, name in enumerate(self.names) if "embed_tokens" in name)
        self.by_adam = [
            n for n in range(len(self.names)) if n != self.rows_at and not self._by_muon(n)
        ]

    def _by_muon(self, n: int) -> bool:
        return self.parameters[n].ndim == 2 and ".layers." in self.names[n]

    @torch.no_grad()
    def update(
        self, gradients: Sequence[Tensor], rows: tuple[Tensor, Tensor], *, scale: float
    ) -> float:
        """One step with both rates times `scale`. `gradients` are those of all parameters but
        the embeddings, `rows` those of some of their rows. Returns the norm before clipping."""
        self.updates += 1
        norm = float(torch.stack([g.norm() for g in (*gradients, rows[1])]).norm())
        clip = min(1.0, 1.0 / (norm + 1e-6))
        every = [*gradients]
        every.insert(self.rows_at, rows[1])
        # the two halves touch different tensors, so a second core takes one of them
        other = threading.Thread(target=self._update_by_muon, args=(every, scale))
        other.start()
        rate = self.rates[1] * scale
        for n in self.by_adam:
            # vectors (norms, the heads of training) move faster than the embeddings
            self._adam(self.masters[n], self.first[n], self.second[n], every[n] * clip, 4 * rate)
        at, gradient = rows
        held = [tensors[self.rows_at][at] for tensors in (self.masters, self.first, self.second)]
        self._adam(held[0], held[1], held[2], gradient * clip, rate)
        for tensors, new in zip((self.masters, self.first, self.second), held):
            tensors[self.rows_at][at] = new
        self.parameters[self.rows_at][at] = held[0].to(self.parameters[self.rows_at].dtype)
        other.join()
        for n in (*self.by_adam, *self.by_muon):
            self.parameters[n].copy_(self.masters[n])
        if self.updates % AVERAGE_EVERY == 0:
            decay = min(0.998, (1 + self.updates) / (10 + self.updates)) ** AVERAGE_EVERY
            for master, average in zip(self.masters, self.average):
                average.lerp_(master, 1 - decay)
        return norm

    def _adam(
        self, master: Tensor, first: Tensor, second: Tensor, gradient: Tensor, rate: float
    ) -> None:
        """Adam (Kingma and Ba, 2015) in place; for rows, only where they occur."""
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.02)
        size = (second / (1 - 0.98**self.updates)).sqrt_().add_(1e-8)
        master.addcdiv_(first, size, value=-rate / (1 - 0.9**self.updates))

    @torch.no_grad()
    def _update_by_muon(self, gradients: Sequence[Tensor], scale: float) -> None:
        rate = self.rates[0] * scale
        beta = min(0.95, 0.85 + self.updates / 3000)
        groups: dict[tuple[int, ...], list[int]] = {}
        for n in self.by_muon:
            self.first[n].lerp_(gradients[n], 1 - beta)
            groups.setdefault(tuple(gradients[n].shape), []).append(n)
        for (rows, columns), members in groups.items():
            stacked = torch.stack([gradients[n].lerp(self.first[n], beta) for n in members])
            step = orthogonalise(stacked.bfloat16()).float()
            for n, change in zip(members, step):
                self.masters[n].mul_(1 - 0.02 * rate)
                self.masters[n].add_(change, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def state(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "masters": self.masters,
            "average": self.average,
            "first": self.first,
            "second": self.second,
            "updates": self.updates,
        }

    @torch.no_grad()
    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of an exported reader; averages begin with them, moments at zero."""
        for name, master, average in zip(self.names, self.masters, self.average):
            if name in weights or name not in TRAINING_ONLY:
                master.copy_(weights[name])
                average.copy_(weights[name])
        for parameter, master in zip(self.parameters, self.masters):
            parameter.copy_(master)

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        saved_at = {name: n for n, name in enumerate(state["names"])}
        for key in ("masters", "average", "first", "second"):
            for name, mine in zip(self.names, getattr(self, key)):
                # heads that only training has may be newer than the checkpoint
                if name in saved_at or name not in TRAINING_ONLY:
                    mine.copy_(state[key][saved_at[name]])
        self.updates = state["updates"]
        for parameter, master in zip(self.parameters, self.masters):
            parameter.copy_(master)


class Workers:
    """Forward and backward of several micro-batches at once, one processor core each.

    Two threads that each work through a batch of their own don't wait for one another at every
    operation, which on a machine that others use too is most of the time. The copies of the
    network share their weights; gradients are summed.
    """

    def __init__(self, reader: Reader, count: int, *, compiled: bool) -> None:
        self.readers = [reader]
        for _ in range(count - 1):
            twin = Reader(reader.config).to(next(reader.parameters()))
            for mine, shared in zip(twin.parameters(), reader.parameters()):
                mine.data = shared.data
            self.readers.append(twin)
        self.warm = not compiled
        if compiled:
            run_layer = torch.compile(Layer.forward, dynamic=True)
            for each in self.readers:
                each.run_layer = run_layer

    def gradients(
        self,
        batches: Sequence[Batch],
        *,
        pointer_weight: float,
        sentence_weight: float,
        match_weight: float,
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor], list[Losses]]:
        """Mean gradients over `batches`, float32, for all but the embeddings; for those, the
        rows that occurred, (K,), and their gradients, (K, C); and the losses of each batch."""
        queue = list(enumerate(batches))
        done: list[Losses | None] = [None] * len(batches)
        touched: list[tuple[Tensor, Tensor]] = []
        failures: list[BaseException] = []
        lock = threading.Lock()

        def work(reader: Reader) -> None:
            try:
                while True:
                    with lock:
                        if not queue:
                            return
                        n, batch = queue.pop()
                    weight = reader.model.embed_tokens.weight
                    rows = weight[batch.candidates].detach().requires_grad_()
                    losses = reader.losses(
                        batch,
                        rows,
                        pointer_weight=pointer_weight,
                        sentence_weight=sentence_weight,
                        match_weight=match_weight,
                    )
                    torch.autograd.backward(losses.total / len(batches))
                    done[n] = replace(losses, total=losses.total.detach())
                    assert rows.grad is not None, "every batch reads its embeddings"
                    touched.append((batch.candidates, rows.grad))
            except BaseException as error:  # handed on to the caller below
                failures.append(error)

        for reader in self.readers:
            reader.zero_grad(set_to_none=True)
        # the first batches compile the layer; that is left to one thread
        threads = [threading.Thread(target=work, args=(r,)) for r in self.readers[1:] if self.warm]
        self.warm = True
        for thread in threads:
            thread.start()
        work(self.readers[0])
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        gradients = []
        for copies in zip(*(trained_densely(r) for r in self.readers)):
            parts = [p.grad for p in copies if p.grad is not None]
            gradient = torch.zeros_like(copies[0], dtype=torch.float32)
            for part in parts:
                gradient += part
            gradients.append(gradient)
        occurred = torch.cat([ids for ids, _ in touched])
        rows, places = torch.unique(occurred, return_inverse=True)
        row_gradients = torch.zeros(len(rows), touched[0][1].shape[1], device=rows.device)
        row_gradients.index_add_(0, places, torch.cat([g.float() for _, g in touched]))
        return gradients, (rows, row_gradients), [losses for losses in done if losses is not None]


def trained_densely(reader: Reader) -> list[torch.nn.Parameter]:
    """All parameters but the embeddings, of which a step touches some rows only."""
    return [p for name, p in reader.named_parameters() if "embed_tokens" not in name]


# --- what a run needs ---------------------------------------------------------------------------


def tokenizer_texts(data: Path) -> Iterator[str]:
    """The texts that tokenizer and word vectors are made from."""
    for language in ("en", "zh"):
        seen: set[str] = set()
        for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz"):
            if isinstance(row["answer"], str):
                yield f"{row['question']} {row['answer']}"
            if language == "zh" and row["context"] not in seen:
                seen.add(row["context"])
                yield row["context"]
    # (source, million characters, most characters of one document)
    for name, megabytes, cap in (
        ("en.squad_train_articles", 20.0, 10**9),
        ("en.lctt", 10.0, 20_000),
        ("en.medquad", 5.0, 20_000),
        ("en.python_docs", 1.5, 20_000),
        ("en.classic_books", 6.0, 40_000),
        ("zh.crud_news", 10.0, 20_000),
        ("zh.laws", 3.0, 20_000),
        ("zh.lctt", 4.0, 20_000),
        ("zh.classical_modern", 3.0, 20_000),
        ("zh.python_docs", 1.0, 20_000),
    ):
        path, held = data / f"text.{name}.jsonl.xz", 0
        for row in read_rows(path) if path.exists() else ():
            yield row["text"][:cap]
            held += min(cap, len(row["text"]))
            if held > megabytes * 1e6:
                break


def prepare_tokenizer(data: Path, work: Path, *, vocab_size: int) -> Tokenizer:
    """The tokenizer in `work`, trained first where there is none."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(tokenizer_texts(data), vocab_size=vocab_size).save_pretrained(str(folder))
    return load_tokenizer(folder).backend_tokenizer


def prepare_vectors(
    data: Path, work: Path, tokenizer: Tokenizer, *, dim: int, seed: int
) -> NDArray[np.float32]:
    """Word vectors (vocab_size, dim) for the embeddings to start from, made where there are none."""
    path = work / f"vectors{dim}.npy"
    if not path.exists():

        def documents() -> Iterator[NDArray[np.int32]]:
            for text in tokenizer_texts(data):
                yield np.array(tokenizer.encode(text).ids, np.int32)

        size = tokenizer.get_vocab_size()
        vectors = factorise(count_neighbours(documents(), vocab_size=size), dim=dim, seed=seed)
        scripts = [any("\u3400" <= c <= "\u9fff" for c in tokenizer.decode([n])) for n in range(size)]
        np.save(path, spread(vectors, np.array(scripts, np.int64)))
    return np.asarray(np.load(path), np.float32)


def prepare_collections(
    data: Path, work: Path, *, limit: int | None
) -> dict[Language, tuple[Collection, Collection]]:
    """By language, the questions to train on and those held back, kept in `work`."""
    path = work / "collections.pickle"
    if not path.exists():
        languages: tuple[Language, ...] = ("en", "zh")
        loaded = {name: hold_out(load_collection(data, name, limit=limit)) for name in languages}
        path.write_bytes(pickle.dumps(loaded))
    made: dict[Language, tuple[Collection, Collection]] = pickle.loads(path.read_bytes())
    return made


def prepare_plain(
    data: Path, work: Path, *, megabytes: float
) -> dict[Language, list[list[Paragraph]]]:
    """By language, the plain text that questions are made from, kept in `work`."""
    path = work / f"plain{megabytes:g}.pickle"
    if not path.exists():
        languages: tuple[Language, ...] = ("en", "zh")
        loaded = {name: load_plain(data, name, megabytes=megabytes, seed=1) for name in languages}
        path.write_bytes(pickle.dumps(loaded))
    made: dict[Language, list[list[Paragraph]]] = pickle.loads(path.read_bytes())
    return made


# --- the run ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Progress:
    """Where a run stands; saved with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, over all sittings
    copied: bool = False
    pool: int = -1  # number of the pool in use; its examples follow from it and the seed
    pool_stage: int = -1
    pool_used: int = 0  # micro-batches of it
    history: tuple[tuple[float, ...], ...] = ()


class PoolMaker:
    """Draws the examples of several steps at once, cut into micro-batches of like length.

    A pool follows from the seed and its number alone: drawn by another process, or again after
    an interruption, it is the same.
    """

    def __init__(
        self, maker: ExampleMaker, *, seed: int, tokens: int, micro_tokens: int, vocab_size: int
    ) -> None:
        self.maker = maker
        self.seed = seed
        self.tokens, self.micro_tokens = tokens, micro_tokens
        self.vocab_size = vocab_size

    def draw(self, number: int, stage: int) -> list[list[Example]]:
        """The micro-batches of pool `number`; stage -1 is copying, others are those of STAGES."""
        rng = self.maker.rng = random.Random(f"{self.seed} {number}")
        examples: list[Example] = []
        held = 0
        while held < self.tokens:
            example = self._copying(rng) if stage < 0 else self.maker.draw(STAGES[stage])
            examples.append(example)
            held += len(example.ids)
        examples.sort(key=lambda e: len(e.ids))
        batches: list[list[Example]] = [[]]
        for example in examples:
            if (len(batches[-1]) + 1) * len(example.ids) > self.micro_tokens and batches[-1]:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        return batches

    def _copying(self, rng: random.Random) -> Example:
        language: Language = "zh" if rng.random() < 0.4 else "en"
        paragraph = rng.choice(rng.choice(self.maker.plain[language]))
        ids = np.array(self.maker.tokenizer.encode(paragraph.text).ids, np.int32)
        length = rng.randint(COPY_TOKENS // 3, COPY_TOKENS)
        return copying_example(rng, ids, vocab_size=self.vocab_size, length=length)


_kept_maker: PoolMaker | None = None  # of a drawing process


def _keep_maker(maker: PoolMaker) -> None:
    global _kept_maker
    _kept_maker = maker


def _draw_pool(number: int, stage: int) -> list[list[Example]]:
    assert _kept_maker is not None, "the process was started without its maker"
    return _kept_maker.draw(number, stage)


class PoolQueue:
    """Pools in order, `processes` of them drawn ahead; with 0, each when it is asked for."""

    def __init__(self, maker: PoolMaker, processes: int) -> None:
        self.maker = maker
        self.processes = processes
        self.drawing: dict[tuple[int, int], Future[list[list[Example]]]] = {}
        self.executor: ProcessPoolExecutor | None = None
        if processes:
            # forked, so that the texts in memory are shared and not sent
            self.executor = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("fork"),
                initializer=_keep_maker,
                initargs=(maker,),
            )

    def take(self, number: int, stage: int) -> list[list[Example]]:
        """Pool `number` for `stage`."""
        if self.executor is None:
            return self.maker.draw(number, stage)
        for ahead in range(number, number + 2 * self.processes):
            if (ahead, stage) not in self.drawing:
                future = self.executor.submit(_draw_pool, ahead, stage)
                self.drawing[ahead, stage] = future
        for key in [key for key in self.drawing if key[0] < number]:
            self.drawing.pop(key).cancel()
        return self.drawing.pop((number, stage)).result()


class Training:
    """One run of the program: examples in, checkpoints out."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.config = PRESETS[options.size]
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        options.work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = prepare_tokenizer(
            options.data, options.work, vocab_size=self.config.vocab_size
        )
        self.config = replace(self.config, vocab_size=self.tokenizer.get_vocab_size())
        vectors = prepare_vectors(
            options.data, options.work, self.tokenizer, dim=self.config.hidden_size, seed=0
        )
        collections = prepare_collections(options.data, options.work, limit=options.limit)
        self.held = {language: pair[1] for language, pair in collections.items()}
        plain = prepare_plain(options.data, options.work, megabytes=options.megabytes)
        self.maker = ExampleMaker(
            self.tokenizer,
            {language: pair[0] for language, pair in collections.items()},
            plain,
            rng=random.Random(options.seed),
        )
        # several small ones a core, so that none waits long for a core that others use too
        self.micro_batches = (
            1
            if self.device.type == "cuda"
            else max(options.threads, options.tokens_per_step // MICRO_TOKENS)
        )
        self.pools = PoolQueue(
            PoolMaker(
                self.maker,
                seed=options.seed,
                tokens=options.tokens_per_step * 8,
                micro_tokens=options.tokens_per_step // self.micro_batches,
                vocab_size=self.config.vocab_size,
            ),
            options.draw_processes,
        )
        self.pool: list[list[Example]] = []
        self.progress = Progress()
        self.token_weights = self._token_weights()
        self.reader = Reader(self.config)
        self.reader.reset(vectors)
        self.reader.to(self.device, torch.bfloat16)
        self.optimiser = Optimiser(
            self.reader, muon_rate=options.muon_rate, adam_rate=options.adam_rate
        )
        count = options.threads if options.device == "cpu" else 1
        self.workers = Workers(self.reader, count, compiled=options.compile)
    # examples

    def _token_weights(self) -> NDArray[np.float32]:
        """How rare each token is among paragraphs, 0 to 1: (vocab_size,)."""
        seen = np.ones(self.config.vocab_size)
        drawn = 0
        for collection in self.maker.collections.values():
            for paragraph in collection.paragraphs[:: max(1, len(collection.paragraphs) // 1500)]:
                seen[np.unique(self.tokenizer.encode(" " + paragraph.text).ids)] += 1
                drawn += 1
        weights = np.log((drawn + 1) / seen) / np.log(drawn + 1)
        weights[: len(READER_TOKENS)] = 0.0
        return np.asarray(weights, np.float32)

    def _next_batches(self, stage: int) -> list[Batch]:
        progress = self.progress
        if stage != progress.pool_stage or progress.pool_used >= len(self.pool):
            progress.pool += 1
            progress.pool_stage, progress.pool_used = stage, 0
            self.pool = self.pools.take(progress.pool, stage)
        first = progress.pool_used
        taken = self.pool[first : first + self.micro_batches]
        progress.pool_used = first + len(taken)
        return [
            collate(
                examples,
                device=self.device,
                rng=np.random.default_rng([self.options.seed, progress.pool, first + n]),
                vocab_size=self.config.vocab_size,
                weights=self.token_weights,
                others=1024 if self.device.type == "cuda" else 256,
            )
            for n, examples in enumerate(taken)
        ]

    # state

    @property
    def checkpoint(self) -> Path:
        return self.options.work / "checkpoint.pt"

    def save(self) -> None:
        """Everything `--resume` needs, in one file that is replaced whole."""
        state = {
            "optimiser": self.optimiser.state(),
            "progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
            "size": self.options.size,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def start_from(self, folder: Path) -> None:
        """Go on from an exported reader of the same size, which has no optimiser's state. The
        tokenizer in `work` must be its own; `main` sees to that."""
        weights: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("model*.safetensors")):
            weights |= load_file(shard)
        self.optimiser.start_from(weights)
        self.progress.copied = True

    def resume(self) -> None:
        """Go on from the checkpoint in `work`, with the examples that were next."""
        state = torch.load(self.checkpoint, weights_only=False, map_location=self.device)
        self.optimiser.load(state["optimiser"])
        self.progress = Progress(**state["progress"])
        if self.progress.pool >= 0:
            self.pool = self.pools.take(self.progress.pool, self.progress.pool_stage)

    def export(self, *, calibration_questions: int = 150) -> None:
        """Write the averaged weights to `out` as a model folder, with its calibration and facts."""
        out, progress = self.options.out, self.progress
        weights = dict(zip(self.optimiser.names, self.optimiser.average))
        export_weights(weights, self.config, out)
        export_tokenizer(self.tokenizer, out)
        settings: dict[str, Any] = {"layout": "reader"}
        write_json(out / "reader.json", settings)
        if calibration_questions:
            settings["confidence"] = calibrate(
                ReaderModel(out, device=self.options.device),
                list(self.held.values()),
                questions=calibration_questions,
                rng=random.Random(0),
            )
            write_json(out / "reader.json", settings)
        lines = {
            name: [(row[1] / 1e6, row[column]) for row in progress.history]
            for name, column in (("answer", 4), ("pointer", 5), ("sentence", 6))
        }
        (out / "loss.svg").write_text(
            draw_curve(lines, title="Training loss (nats)", x_label="million tokens"),
            encoding="utf8",
        )
        last = progress.history[-1] if progress.history else ()
        write_json(
            out / "training.json",
            {
                "parameters": sum(v.numel() for v in weights.values()),
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
                "threads": self.options.threads,
                "minutes": round(progress.seconds / 60, 1),
                "steps": progress.step,
                "tokens": progress.tokens,
                "last_losses": dict(zip(("answer", "pointer", "sentence"), last[4:7])),
                "torch": torch.__version__,
            },
        )

    # steps

    def run(self, *, most_steps: int | None = None) -> None:
        """Train until the minutes (or steps) are used up, then save.

        `most_steps` ends this sitting early, the plan still being laid out for all of them.
        """
        options, progress = self.options, self.progress
        began, before = time.monotonic(), progress.seconds
        total = before + options.minutes * 60
        saved = shown = began
        stopping: list[int] = []
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda signum, frame: stopping.append(signum))
        recent: list[tuple[float, ...]] = []
        copied: list[float] = []
        last_step = None if most_steps is None else progress.step + most_steps
        while not stopping and progress.step != last_step:
            now = time.monotonic()
            progress.seconds = before + now - began
            if options.steps is not None:
                done = progress.step / options.steps
            else:
                # a later sitting goes on in the plan at `from_progress`
                done = options.from_progress + (1 - options.from_progress) * (
                    (now - began) / (options.minutes * 60)
                )
            if done >= 1:
                break
            if not progress.copied and done > COPY_LIMIT:
                progress.copied = True
            ends = ENDS[options.size]
            stage = next(n for n, end in enumerate(ends) if done < end) if progress.copied else -1
            # rates: up over 50 steps, level, then down to zero over the last half
            warm = min(1.0, (self.optimiser.updates + 1) / 50)
            scale = warm * min(1.0, (1 - done) / 0.5)
            batches = self._next_batches(stage)
            gradients, rows, losses = self.workers.gradients(
                batches,
                pointer_weight=0.5,
                sentence_weight=0.3,
                match_weight=0.0 if stage < 0 else 1.0 if stage == 0 else 0.3,
            )
            norm = self.optimiser.update(gradients, rows, scale=scale)
            progress.step += 1
            progress.tokens += sum(b.tokens for b in batches)
            means = [
                float(sum(float(getattr(item, name)) for item in losses) / len(losses))
                for name in ("answer", "pointer", "sentence", "exact", "exact_first", "match", "coverage")
            ]
            recent.append((*means, norm))
            if stage < 0:
                copied = [*copied[-4:], means[3]]
                progress.copied = len(copied) == 5 and min(copied) > COPIED
            if now - shown >= 15 or options.steps is not None:
                average = np.mean(recent, 0)
                progress.history += (
                    (progress.step, progress.tokens, progress.seconds, stage, *map(float, average)),
                )
                speed = progress.tokens / max(1e-6, progress.seconds)
                print(
                    f"step {progress.step} stage {stage} answer {average[0]:.3f} "
                    f"pointer {average[1]:.3f} sentence {average[2]:.3f} exact {average[3]:.3f} "
                    f"first {average[4]:.3f} match {average[5]:.3f} coverage {average[6]:.3f} "
                    f"norm {average[7]:.2f} rate {scale:.2f} "
                    f"{progress.tokens / 1e6:.2f}M tokens {speed:.0f}/s "
                    f"left {(total - progress.seconds) / 60:.1f} min",
                    flush=True,
                )
                recent, shown = [], now
            if now - saved >= 180:
                self.save()
                saved = now
        progress.seconds = before + time.monotonic() - began
        self.save()


def parse_options(arguments: Sequence[str] | None = None) -> tuple[Options, bool]:
    """The options of the command line, and whether to resume."""
    parser = argparse.ArgumentParser(
        prog="python -m rag.bundled.train_reader",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the training data")
    parser.add_argument("--out", type=Path, required=True, help="folder the reader is written to")
    parser.add_argument(
        "--work", type=Path, default=Path("build/reader"), help="folder of checkpoint and prepared data"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget of training")
    parser.add_argument("--size", choices=sorted(PRESETS), default="small", help="size of the network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores to use")
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--muon-rate", type=float, default=0.02, help="for the layers' matrices")
    parser.add_argument("--adam-rate", type=float, default=5e-4, help="for embeddings and vectors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many steps instead of minutes")
    parser.add_argument("--megabytes", type=float, default=12.0, help="plain text held, a language")
    parser.add_argument(
        "--from-progress", type=float, default=0.0, help="where in the plan this sitting begins, 0..1"
    )
    parser.add_argument("--limit", type=int, help="use so many questions of each language only")
    parser.add_argument(
        "--calibration-questions", type=int, default=150, help="of each language; 0 leaves it out"
    )
    parser.add_argument(
        "--export-only", action="store_true", help="write the checkpoint to OUT without training"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layer"
    )
    parser.add_argument(
        "--draw-processes",
        type=int,
        default=8 if torch.cuda.is_available() else 0,
        help="processes that draw examples ahead; 0 draws them in between",
    )
    parser.add_argument(
        "--start-from", type=Path, help="folder of an exported reader of this size to go on from"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    chosen = parser.parse_args(arguments)
    values = vars(chosen)
    resume = bool(values.pop("resume"))
    return Options(**values), resume


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options, resume = parse_options(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)  # each worker has one core
    if options.start_from is not None:
        load_tokenizer(options.start_from).save_pretrained(str(options.work / "tokenizer"))
    training = Training(options)
    if options.start_from is not None:
        training.start_from(options.start_from)
    if resume or options.export_only:
        training.resume()
    sizes = sum(p.numel() for p in training.reader.parameters())
    print(json.dumps({"parameters": sizes, "resumed_at": training.progress.step}), flush=True)
    if not options.export_only:
        training.run()
    training.export(calibration_questions=options.calibration_questions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
