"""Train the bundled embedder: a bilingual static embedding, `python -m rag.bundled.train_embedder`.

A text's vector is the mean of its tokens' vectors (sentence-transformers' `StaticEmbedding`), so
embedding costs a table look-up. Trained by contrast with in-batch negatives (InfoNCE, van den Oord
et al., 2018) at the full and at a quarter of the width (Matryoshka representation learning,
Kusupati et al., 2022) on: question -> passage pairs, title -> text, sentence pairs in two languages
both ways, the inverse cloze task (Lee et al., 2019), in which a stretch of one sentence asks for the
rest of its window, and questions as people ask, in the passage's language and in the other. Between
these, steps of `sentence_matching` train the same vectors for matching token by token.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional

from rag.bundled.asked_questions import asked_questions
from rag.bundled.sentence_matching import Matching, matching_loss, read_matching
from rag.bundled.training_data import (
    choose_rows,
    held_out,
    is_measured,
    read_rows,
    text_files,
    windows,
)
from rag.language import detect_language

WIDTH = 256
VOCABULARY = 30_000  # 30,000 x 256 float16 are 15.4 MB
MAX_TOKENS = 512  # of a training text; at use there is no limit
MATCHING_BATCH = 64  # questions; each stands against the sentences of all
_NEIGHBOURS = 64  # rows of one run in a batch
_ASKED_STEPS = {"asked-en": 105, "asked-zh": 200, "asked-across-en": 75, "asked-across-zh": 75}
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"


@dataclass(slots=True)
class Source:
    """Pairs (query, positive) of one origin, as token ids; rows keep the file's order."""

    name: str
    steps: int
    both_ways: bool
    queries: list[np.ndarray]
    positives: list[np.ndarray]
    groups: np.ndarray  # (n,) equal where the positive is the same text: not each other's negatives


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair encoding over lower-cased NFKC text; words, Han runs, numbers and signs apart."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(f"[{HAN}]+|[0-9]+|[^\\W\\d_{HAN}]+|[^\\w\\s]|_"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["[UNK]", "[PAD]"],
        limit_alphabet=9_000,
        min_frequency=3,
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _cloze(window: list[str], rng: random.Random, language: str) -> tuple[str, str]:
    """A stretch of one sentence, and the window mostly without that sentence."""
    at = rng.randrange(len(window))
    sentence = window[at]
    joiner = "" if language == "zh" else " "
    if language == "zh":
        length = rng.randint(6, 24)
        begin = rng.randrange(max(1, len(sentence) - length + 1))
        query = sentence[begin : begin + length]
    else:
        words = sentence.split()
        length = rng.randint(4, 14)
        begin = rng.randrange(max(1, len(words) - length + 1))
        query = " ".join(words[begin : begin + length])
    rest = window if rng.random() < 0.15 else window[:at] + window[at + 1 :]
    return query, joiner.join(rest)


def collect_pairs(
    data: Path, rng: random.Random, *, stretches: int = 4
) -> dict[str, tuple[list[str], list[str], bool, int]]:
    """Name -> (queries, positives, both ways?, steps): every source with its share of the training.

    Of a plain text at most so many `stretches` are taken.
    """
    pairs: dict[str, tuple[list[str], list[str], bool, int]] = {}

    def add(name: str, query: str, positive: str, both_ways: bool, steps: int) -> None:
        queries, positives, _, _ = pairs.setdefault(name, ([], [], both_ways, steps))
        queries.append(query)
        positives.append(positive)

    steps_of = {"squad1.1-train": 190, "medquad": 30, "drcd-dev-s2t": 14, "cmrc2018-trial": 5,
                "lecoqa-train": 10}
    for language in ("en", "zh"):
        for row in read_rows(data / f"retrieval_pairs.{language}.jsonl.xz"):
            if not held_out(row["positive"], language) and not is_measured(row["query"]):
                add(row["src"], row["query"], row["positive"], False, steps_of[row["src"]])
    for item in asked_questions(data):
        if item.sentences and not item.held_out:
            language = detect_language(item.text)
            name = f"asked-{'across-' * (item.kind == 'across')}{language}"
            text = f"{item.title}\n{item.text}" if rng.random() < 0.5 else item.text
            add(name, item.question, text, False, _ASKED_STEPS[name])
    for row in read_rows(data / "parallel.en-zh.jsonl.xz"):
        if 12 <= len(row["en"]) <= 600:
            add("parallel-" + row["src"], row["en"], row["zh"], True,
                160 if row["src"] == "lctt_en_zh" else 40)
    for path in text_files(data):
        _, language, name = path.name.split(".")[:3]
        steps = {"squad_train_articles": 100, "classic_books": 40, "classical_modern": 30}.get(name, 80)
        if name == "python_docs":
            steps = 20
        for row in read_rows(path):
            size = 250 if language == "zh" else 700
            for window in windows(row["text"], rng=rng, count=stretches, characters=size):
                query, rest = _cloze(window, rng, language)
                add(f"cloze-{language}-{name}", query, rest, False, steps)
            title = re.sub(r"[_\s]+", " ", row["title"]).strip()
            if len(title) > 3 and name not in ("classic_books",):
                add(f"title-{language}-{name}", title, row["text"][: size * 2], False, steps // 8)
    return pairs


def build_sources(
    pairs: dict[str, tuple[list[str], list[str], bool, int]], tokenizer: Tokenizer
) -> list[Source]:
    """Pairs as token ids. Texts are cut at MAX_TOKENS, as only their topic matters here."""
    sources = []
    for name, (queries, positives, both_ways, steps) in pairs.items():
        distinct = {text: number for number, text in enumerate(dict.fromkeys(positives))}
        encoded = _encode(tokenizer, list(distinct))
        sources.append(
            Source(
                name=name,
                steps=max(1, steps),
                both_ways=both_ways,
                queries=_encode(tokenizer, queries),
                positives=[encoded[distinct[text]] for text in positives],
                groups=np.array([distinct[text] for text in positives]),
            )
        )
    return sources


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    encoded: list[np.ndarray] = []
    for begin in range(0, len(texts), 20_000):
        for item in tokenizer.encode_batch(texts[begin : begin + 20_000], add_special_tokens=False):
            encoded.append(np.asarray(item.ids[:MAX_TOKENS] or [0], dtype=np.int32))
    return encoded


def _bag(texts: list[np.ndarray], weight: torch.Tensor) -> torch.Tensor:
    offsets = np.zeros(len(texts), dtype=np.int64)
    np.cumsum([len(text) for text in texts[:-1]], out=offsets[1:])
    ids = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    return functional.embedding_bag(ids, weight, torch.from_numpy(offsets), mode="mean")  # (n, d)


def contrastive_loss(
    queries: torch.Tensor, positives: torch.Tensor, groups: torch.Tensor, *, both_ways: bool,
    temperature: float,
) -> torch.Tensor:
    """InfoNCE over the batch at full and quarter width. queries, positives: (n, d); groups: (n,)."""
    loss = queries.new_zeros(())
    same = groups[:, None] == groups[None, :]
    same.fill_diagonal_(False)
    target = torch.arange(len(queries))
    for width in (queries.shape[1], queries.shape[1] // 4):
        query = functional.normalize(queries[:, :width], dim=1)
        positive = functional.normalize(positives[:, :width], dim=1)
        logits = (query @ positive.T / temperature).masked_fill(same, -1e4)  # (n, n)
        loss = loss + functional.cross_entropy(logits, target)
        if both_ways:
            loss = loss + functional.cross_entropy(logits.T, target)
    return loss / (4 if both_ways else 2)


def train(
    sources: list[Source], *, vocabulary: int, width: int, batch: int, learning_rate: float,
    epochs_factor: float, temperature: float, seed: int, weight: torch.Tensor | None = None,
    matching: Matching | None = None, matching_steps: int = 0,
) -> torch.Tensor:
    """The table of token vectors, float32 (vocabulary, width). Prints progress and both losses.

    Goes on from `weight`, which it changes, or begins at random.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    if weight is None:
        weight = torch.randn(vocabulary, width) * 0.1
    weight = weight.requires_grad_()
    plan: list[Source | Matching] = [
        source for source in sources for _ in range(max(1, round(source.steps * epochs_factor)))
    ]
    plan += [matching] * matching_steps if matching else []
    rng.shuffle(plan)
    optimizer = torch.optim.Adam([weight], lr=learning_rate, betas=(0.9, 0.99))
    began = time.perf_counter()
    recent: list[float] = []
    recent_matching: list[float] = []
    for step, source in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - step / len(plan))
        if isinstance(source, Matching):
            loss = matching_loss(source.batch(MATCHING_BATCH, rng), source.passages, weight)
        else:
            rows = choose_rows(len(source.queries), batch, rng, run=_NEIGHBOURS)
            loss = contrastive_loss(
                _bag([source.queries[row] for row in rows], weight),
                _bag([source.positives[row] for row in rows], weight),
                torch.from_numpy(source.groups[rows]),
                both_ways=source.both_ways,
                temperature=temperature,
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        (recent_matching if isinstance(source, Matching) else recent).append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - began
            left = seconds / (step + 1) * (len(plan) - step - 1)
            losses = " ".join(f"{np.mean(part):.3f}" for part in (recent, recent_matching) if part)
            print(f"step {step + 1}/{len(plan)}  loss {losses}  {left:.0f} s left", flush=True)
            recent.clear()
            recent_matching.clear()
    return weight.detach()


def save(weight: torch.Tensor, tokenizer: Tokenizer, out: Path, card: str) -> None:
    """Write a folder that SentenceTransformer loads: modules.json, float16 table, tokenizer."""
    from safetensors.torch import save_file

    static = out / "0_StaticEmbedding"
    static.mkdir(parents=True, exist_ok=True)
    save_file({"embedding.weight": weight.to(torch.float16)}, static / "model.safetensors")
    tokenizer.save(str(static / "tokenizer.json"), pretty=False)
    modules = [
        {"idx": 0, "name": "0", "path": "0_StaticEmbedding",
         "type": "sentence_transformers.models.StaticEmbedding"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (out / "1_Normalize").mkdir(exist_ok=True)
    (out / "1_Normalize" / "config.json").write_text("{}\n")
    (out / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    (out / "config_sentence_transformers.json").write_text(
        json.dumps({"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None,
                    "similarity_fn_name": "cosine", "simplifies_chinese": True}, indent=2) + "\n"
    )
    if card:
        (out / "README.md").write_text(card, encoding="utf-8")


def load(folder: Path) -> tuple[Tokenizer, torch.Tensor]:
    """Tokenizer and table, float32 (vocabulary, width), of a folder that `save` wrote."""
    from safetensors.torch import load_file

    static = folder / "0_StaticEmbedding"
    tokenizer = Tokenizer.from_file(str(static / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, load_file(static / "model.safetensors")["embedding.weight"].float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the .jsonl.xz files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "embedder")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--length", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--stretches", type=int, default=4, help="most of one plain text")
    parser.add_argument("--matching-steps", type=int, default=900, help="for matching token by token")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start-from", type=Path, help="go on from the embedder in this folder, with its tokenizer")
    parser.add_argument("--runs", type=int, default=1, help="go on so often, each time by another seed, and write the mean")
    options = parser.parse_args()
    if options.runs > 1 and not options.start_from:
        parser.error("--runs needs --start-from: only tables that began as the same one have a mean that means something.")

    rng = random.Random(options.seed)
    began = time.perf_counter()
    pairs = collect_pairs(options.data, rng, stretches=options.stretches)
    count = sum(len(queries) for queries, *_ in pairs.values())
    print(f"{count:,} pairs from {len(pairs)} sources, {time.perf_counter() - began:.0f} s", flush=True)

    begun: torch.Tensor | None = None
    if options.start_from:
        tokenizer, begun = load(options.start_from)
    else:
        sample: list[str] = []
        for queries, positives, *_ in pairs.values():
            rows = rng.sample(range(len(positives)), min(len(positives), 6_000))
            sample += [positives[row] for row in rows] + [queries[row] for row in rows]
        tokenizer = train_tokenizer(sample, VOCABULARY)
    print(f"tokenizer of {tokenizer.get_vocab_size():,}, {time.perf_counter() - began:.0f} s", flush=True)

    sources = build_sources(pairs, tokenizer)
    del pairs
    matching = read_matching(options.data, tokenizer)
    print(f"encoded, {time.perf_counter() - began:.0f} s", flush=True)
    tables = [
        train(
            sources, vocabulary=tokenizer.get_vocab_size(), width=WIDTH, batch=options.batch,
            learning_rate=options.learning_rate, epochs_factor=options.length,
            temperature=options.temperature, seed=options.seed + run, weight=None if begun is None else begun.clone(),
            matching=matching, matching_steps=options.matching_steps,
        )
        for run in range(options.runs)
    ]
    weight = torch.stack(tables).mean(dim=0)  # better than each (Wortsman et al., 2022, model soups)
    save(weight, tokenizer, options.out, card="")
    print(f"saved to {options.out}, {time.perf_counter() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
