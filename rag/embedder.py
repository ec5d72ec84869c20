"""Text -> vectors: float32 rows of unit length, so that a dot product is a cosine.

A model whose only layer is a table of token vectors (sentence-transformers' `StaticEmbedding`, the
bundled one among them) is read without torch and gives the same vectors, which keeps the start of
a command under a second. Every other sentence-transformers model runs in that library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from rag.errors import EmbedderError
from rag.simplified import simplify

Vectors = npt.NDArray[np.float32]

BUNDLED = Path(__file__).parent / "bundled" / "embedder"
_BATCH = 64  # texts a forward in sentence-transformers
_STATIC_BATCH = 1_024  # texts a look-up in a static table
_MAX_PIECES = 150_000  # whose tokens are remembered: some 50 MB
_WORD_LENGTH = 16  # of a piece that will come back; a Chinese sentence is longer and seldom does
# What text falls into before it is cut into tokens: words of ASCII, unless an accent follows that
# belongs to their last letter, and Chinese sentences.
_PIECE = re.compile(
    r"[A-Za-z]++(?![^\x00-\x7f])|[0-9]++(?![^\x00-\x7f])|[!-/:-@\[-`{-~](?![^\x00-\x7f])"
    r"|[^\s。！？；]+|[。！？；]"
)
_SEPARATOR_CODES = "\x1c\x1d\x1e\x1f"  # white space to Python and not to the tokenizer


class Embedder(Protocol):
    """What turns texts into vectors.

    `fingerprint` changes whenever the vectors would: two embedders with one fingerprint agree.
    `max_tokens` is the longest text the model reads, None where there is no limit.
    """

    name: str
    fingerprint: str
    dim: int
    max_tokens: int | None

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """float32 (n, dim), rows of unit length (zero for a text without any token)."""
        ...

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        """Like `embed_passages`, with the model's own prompt for queries where it has one."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the model reads for each text, special tokens not counted."""
        ...


def load_embedder(name: str, *, device: str = "auto") -> Embedder:
    """Load "bundled", a folder, or a Hugging Face name.

    Raises EmbedderError where it isn't there or is no sentence-transformers model.
    """
    folder = BUNDLED if name == "bundled" else Path(name)
    if name == "bundled" and not (folder / "modules.json").is_file():
        raise EmbedderError(
            f"the bundled embedder is missing from {folder}. Install the program again, or train it: "
            "python -m rag.bundled.train_embedder --data DIR"
        )
    if folder.is_dir():
        if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
            raise EmbedderError(
                f"{folder} holds no sentence-transformers model (no modules.json or config.json)."
            )
        static = _static_layer(folder)
        if static is not None:
            return StaticEmbedder(name, static, simplifies=_simplifies(folder))
    elif os.sep in name and name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise EmbedderError(f"the embedder folder {name} does not exist.")
    return TransformerEmbedder(name, device=device)


def _static_layer(folder: Path) -> Path | None:
    """The folder of the StaticEmbedding layer, where the model is that and nothing that needs torch."""
    modules_file = folder / "modules.json"
    if not modules_file.is_file():
        return None
    try:
        modules = json.loads(modules_file.read_text(encoding="utf-8"))
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        config_file = folder / "config_sentence_transformers.json"
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EmbedderError(f"{modules_file} can't be read as a model description: {error}") from error
    if kinds not in (["StaticEmbedding"], ["StaticEmbedding", "Normalize"]):
        return None
    if any(config.get("prompts", {}).values()) or config.get("truncate_dim"):
        return None  # left to sentence-transformers, which knows these options
    return folder / str(modules[0]["path"])


def _simplifies(folder: Path) -> bool:
    """Whether the model was trained on simplified Chinese only and says so in its configuration."""
    config_file = folder / "config_sentence_transformers.json"
    return config_file.is_file() and bool(
        json.loads(config_file.read_text(encoding="utf-8")).get("simplifies_chinese", False)
    )


def _is_local(tokenizer: Any) -> bool:
    """Whether a text's tokens are those of its pieces (`_PIECE`), one after the other.

    So it is where text is cut at white space and at every mark first, and each character is
    normalised by itself or with the accents behind it.
    """
    if tokenizer.normalizer is None or tokenizer.pre_tokenizer is None:
        return False
    # As in tokenizer.json, without reading its megabyte of words.
    normalizer = json.loads(tokenizer.normalizer.__getstate__())
    cutter = json.loads(tokenizer.pre_tokenizer.__getstate__())
    kinds = {part.get("type") for part in normalizer.get("normalizers", [normalizer])}
    first, *rest = cutter.get("pretokenizers", [cutter])
    return (
        kinds <= {"NFKC", "Lowercase", "StripAccents"} and first.get("type") == "WhitespaceSplit"
        and len(rest) == 1 and rest[0].get("type") == "Split"
        and rest[0].get("behavior") == "Isolated" and not rest[0].get("invert")
        and r"|[^\w\s]|" in rest[0]["pattern"].get("Regex", "")
    )


class StaticEmbedder:
    """The mean of a text's token vectors, of unit length.

    Equal to sentence-transformers' StaticEmbedding with Normalize (tested), without importing torch.
    `simplifies`: it was trained on simplified Chinese characters and reads traditional ones as such.
    """

    def __init__(self, name: str, layer: Path, *, simplifies: bool = False) -> None:
        from safetensors.numpy import load_file

        weights_file, tokenizer_file = layer / "model.safetensors", layer / "tokenizer.json"
        for file in (weights_file, tokenizer_file):
            if not file.is_file():
                raise EmbedderError(f"{file} is missing, so the embedder {name!r} can't be loaded.")
        try:
            tensors = load_file(weights_file)
            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # both libraries raise bare exceptions of their own
            raise EmbedderError(f"the embedder in {layer} can't be read: {error}") from error
        table = tensors.get("embedding.weight", tensors.get("embeddings"))
        if table is None:
            raise EmbedderError(f"{weights_file} has no tensor named embedding.weight.")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokens_of: dict[str, tuple[int, ...]] | None = {} if _is_local(self._tokenizer) else None
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        self._odd = (*_SEPARATOR_CODES, *special)
        self._table: Vectors = np.ascontiguousarray(table, dtype=np.float32)  # (V, dim)
        self._simplifies = simplifies
        self.name = name
        self.dim = int(self._table.shape[1])
        self.max_tokens: int | None = None
        digest = hashlib.sha256(weights_file.read_bytes())
        digest.update(tokenizer_file.read_bytes())
        if simplifies:
            digest.update(b"simplified")
        self.fingerprint = digest.hexdigest()[:16]

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for begin in range(0, len(texts), _STATIC_BATCH):
            self._embed_into(rows[begin : begin + _STATIC_BATCH], texts[begin : begin + _STATIC_BATCH])
        return rows

    def _embed_into(self, rows: Vectors, texts: Sequence[str]) -> None:
        for row, ids in zip(rows, self.token_ids(texts), strict=True):
            if ids:
                self._table.take(ids, axis=0).mean(axis=0, out=row)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        np.divide(rows, norms, out=rows, where=norms > 0)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self.embed_passages(texts)

    @property
    def table(self) -> Vectors:
        """The token vectors, float32 (vocabulary, dim)."""
        return self._table

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """For each text the rows of the table that its vector is the mean of."""
        pieces = self._cut(texts)
        if pieces is None:
            return self._encode(texts)
        tokens_of = self._know(pieces).__getitem__
        return [list(chain.from_iterable(map(tokens_of, text))) for text in pieces]

    def token_spans(
        self, texts: Sequence[str]
    ) -> list[tuple[list[int], npt.NDArray[np.int64]]]:
        """`token_ids` of each text with the tokens' [start, end) characters, int64 (tokens, 2)."""
        encoded = self._tokenizer.encode_batch(self._as_read(texts), add_special_tokens=False)
        return [(item.ids, np.array(item.offsets, dtype=np.int64).reshape(-1, 2)) for item in encoded]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        counts: list[int] = []
        for begin in range(0, len(texts), _STATIC_BATCH):
            batch = texts[begin : begin + _STATIC_BATCH]
            pieces = self._cut(batch)
            if pieces is None:
                counts += map(len, self._encode(batch))
            else:
                tokens_of = self._know(pieces).__getitem__
                counts += [sum(map(len, map(tokens_of, text))) for text in pieces]
        return counts

    def _cut(self, texts: Sequence[str]) -> list[list[str]] | None:
        """The pieces of each text; None where the tokens of a text are not those of its pieces."""
        if self._tokens_of is None or any(odd in text for odd in self._odd for text in texts):
            return None
        return list(map(_PIECE.findall, texts))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(self._as_read(texts), add_special_tokens=False)
        return [item.ids for item in encoded]

    def _as_read(self, texts: Sequence[str]) -> list[str]:
        return list(map(simplify, texts)) if self._simplifies else list(texts)

    def _know(self, texts: Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
        """The tokens of every piece of the texts, and of others.

        A passage is counted by paragraph, by sentence and as a chunk, and words come back: what
        was cut into tokens once is remembered.
        """
        known = self._tokens_of
        if known is None or len(known) > _MAX_PIECES:
            # Another one: a thread that is reading the old one keeps it.
            words = {piece: ids for piece, ids in (known or {}).items() if len(piece) <= _WORD_LENGTH}
            known = self._tokens_of = words if len(words) <= _MAX_PIECES // 2 else {}
        new = list(set().union(*texts).difference(known))
        for begin in range(0, len(new), 4 * _STATIC_BATCH):
            batch = new[begin : begin + 4 * _STATIC_BATCH]
            known.update(zip(batch, map(tuple, self._encode(batch)), strict=True))
        return known


class TransformerEmbedder:
    """Any sentence-transformers model, with its own prompts for queries and passages."""

    def __init__(self, name: str, *, device: str = "auto") -> None:
        from sentence_transformers import SentenceTransformer

        chosen = None if device in ("auto", "auto-map") else device
        try:
            model: Any = _load_sentence_transformer(SentenceTransformer, name, chosen)
        except Exception as error:  # the library raises OSError, ValueError, hub errors, ...
            raise EmbedderError(
                f"the embedder {name!r} can't be loaded: {error}\n"
                "It must be a folder with a sentence-transformers model, or a Hugging Face name that "
                "is on this disk or can be downloaded."
            ) from error
        self._model = model
        self.name = name
        self.dim = int(model.encode(["dimension"]).shape[1])
        self.max_tokens: int | None = _positive_or_none(model.get_max_seq_length())
        prompts = {kind: text for kind, text in (model.prompts or {}).items() if text}
        self._query_prompt = prompts.get("query", "")
        self._passage_prompt = next(
            (prompts[kind] for kind in ("document", "passage", "corpus") if kind in prompts), ""
        )
        self.fingerprint = self._measure_fingerprint()

    def _measure_fingerprint(self) -> str:
        """What the model answers to fixed texts: the same weights anywhere give the same."""
        probes = ["fingerprint", "知识库", "The quick brown fox jumps over 13 lazy dogs."]
        vectors = np.concatenate([self.embed_passages(probes), self.embed_questions(probes)])
        rounded = np.round(vectors, 2) + 0.0  # devices differ in the last bits; -0.0 becomes 0.0
        key = f"{self.dim} {self.max_tokens} ".encode() + rounded.astype("<f4").tobytes()
        return hashlib.sha256(key).hexdigest()[:16]

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, self._passage_prompt)

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self._embed(texts, self._query_prompt)

    def _embed(self, texts: Sequence[str], prompt: str) -> Vectors:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        rows = self._model.encode(
            list(texts), prompt=prompt or None, batch_size=_BATCH, normalize_embeddings=True,
            convert_to_numpy=True, show_progress_bar=False,
        )
        return np.asarray(rows, dtype=np.float32)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        tokenizer = self._model.tokenizer
        if isinstance(tokenizer, Tokenizer):  # a static model's, as it comes from the tokenizers library
            return [len(item.ids) for item in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        encoded = tokenizer(
            list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
        return [len(ids) for ids in encoded["input_ids"]]


def _load_sentence_transformer(kind: Any, name: str, device: str | None) -> Any:
    """From this disk where it is there, so that nothing is asked of the network; else from the hub."""
    try:
        return kind(name, device=device, local_files_only=True)
    except Exception:
        if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE") == "1":
            raise
        return kind(name, device=device)


def _positive_or_none(number: Any) -> int | None:
    return int(number) if number and 0 < number < 1_000_000 else None  # libraries say inf or 10**30
