"""Reads the training files: JSON lines, xz-compressed, UTF-8. Knows names and keys, nothing of models."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from rag.errors import InputError

_SENTENCE_END = re.compile(r"(?<=[。！？；])|(?<=[.!?])\s+|\n+")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of one `.jsonl.xz` file, in order. Raises InputError where the file is missing."""
    if not path.is_file():
        raise InputError(f"{path} is missing. --data must name the folder that holds the .jsonl.xz files.")
    with lzma.open(path, "rt", encoding="utf8") as lines:
        for line in lines:
            yield json.loads(line)


def held_out(passage: str, language: str) -> bool:
    """Whether questions about this passage are kept from training, to fit what comes after it.

    Weights fitted on questions that the embedder has learnt by heart would trust it too much.
    One English passage in 20, one Chinese in 5, as there are fewer of them.
    """
    digest = hashlib.blake2b(passage.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % (20 if language == "en" else 5) == 0


def question_hash(question: str) -> str:
    """12 hex digits that case, width, punctuation and blanks do not change."""
    plain = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", question).lower())
    return hashlib.blake2b(plain.encode(), digest_size=6).hexdigest()


@lru_cache(maxsize=1)
def measuring_questions() -> frozenset[str]:
    """Hashes of the questions that quality is measured on; nothing may be trained on them."""
    file = Path(__file__).parent / "measuring_questions.txt"
    return frozenset(file.read_text(encoding="ascii").split())


def is_measured(question: str) -> bool:
    """Whether a training question is one of those kept for measuring."""
    return question_hash(question) in measuring_questions()


def text_files(data: Path) -> list[Path]:
    """The plain-text collections, `text.LANGUAGE.SOURCE.jsonl.xz`, in a stable order."""
    files = sorted(data.glob("text.*.jsonl.xz"))
    if not files:
        raise InputError(f"{data} holds no text.*.jsonl.xz file. --data must name the training folder.")
    return files


def choose_rows(total: int, size: int, rng: random.Random, *, run: int) -> list[int]:
    """`size` of so many rows: half at random, half from runs of that many neighbours.

    Neighbouring rows come from the same article; being told apart is what they teach.
    """
    if total <= size:
        return list(range(total))
    rows = set(rng.sample(range(total), size // 2))
    while len(rows) < size:
        begin = rng.randrange(total)
        rows.update(range(begin, min(begin + run, total)))
    return sorted(rows) if len(rows) == size else rng.sample(sorted(rows), size)


def sentences(text: str) -> list[str]:
    """Sentences of a plain text, Chinese or English, without surrounding blanks."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and part.strip()]


def windows(
    text: str, *, rng: random.Random, count: int, characters: int
) -> Iterator[list[str]]:
    """Up to `count` runs of neighbouring sentences of about `characters` characters each.

    Only runs of at least two sentences come out, as inverse cloze needs one to ask with.
    """
    parts = sentences(text)
    if len(parts) < 2:
        return
    for _ in range(min(count, 1 + len(text) // (2 * characters))):
        at = rng.randrange(len(parts) - 1)
        window: list[str] = []
        length = 0
        while at < len(parts) and length < characters:
            window.append(parts[at])
            length += len(parts[at])
            at += 1
        if len(window) >= 2:
            yield window
