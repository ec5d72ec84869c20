"""Questions with the sentences that answer them, for the embedder to learn matching token by token.

At use `rag.soft_match` lets each token of the question look for its nearest one in a sentence. Vectors
that were trained for the mean of a text alone do that by chance; here the same score is trained,
against all sentences of a batch (late interaction: Khattab and Zaharia, 2020, here without context).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from rag.bundled.asked_questions import asked_questions
from rag.bundled.training_data import choose_rows, held_out, is_measured, read_rows
from rag.language import detect_language
from rag.sentences import sentence_spans

Ids = npt.NDArray[np.int64]
TEMPERATURE = 0.04
_MOST_ASKED, _MOST_SAID = 64, 120  # tokens of a question, of a sentence
_NEIGHBOURS = 12
# Share of the steps of each source; questions as people ask have the rest, by the 0.7th power of their number.
_SHARES = {"squad1.1-train": 0.28, "drcd-dev-s2t": 0.06, "cmrc2018-trial": 0.02, "lecoqa-train": 0.04}


@dataclass(frozen=True, slots=True)
class MatchingQuestion:
    """Token ids, the number of its passage, and which sentences of that answer."""

    question: Ids
    passage: int
    sentences: tuple[int, ...]


@dataclass(slots=True)
class Matching:
    """Passages as sentences of token ids, and the questions about them; those of one source are each
    other's wrong answers, neighbours being of the same document."""

    passages: list[list[Ids]] = field(default_factory=list)
    sources: dict[str, list[MatchingQuestion]] = field(default_factory=dict)

    def batch(self, size: int, rng: random.Random) -> list[MatchingQuestion]:
        """Questions of one source, half at random, half in runs of neighbours."""
        shares = _shares({name: len(questions) for name, questions in self.sources.items()})
        questions = self.sources[rng.choices(list(shares), weights=list(shares.values()))[0]]
        return [questions[row] for row in choose_rows(len(questions), size, rng, run=_NEIGHBOURS)]


def _shares(counts: dict[str, int]) -> dict[str, float]:
    known = {name: share for name, share in _SHARES.items() if name in counts}
    others = {name: count**0.7 for name, count in counts.items() if name not in known}
    scale = (1 - sum(known.values())) / max(sum(others.values()), 1e-9)
    return {name: known[name] if name in known else others[name] * scale for name in counts}


def read_matching(data: Path, tokenizer: Tokenizer) -> Matching:
    """All training questions with their sentences, none of them held out or measured."""
    matching, places = Matching(), dict[str, tuple[int, list[tuple[int, int]]]]()
    for source, question, text, answers in _questions(data):
        if text not in places:
            spans = sentence_spans(text)
            places[text] = len(matching.passages), spans
            encoded = tokenizer.encode_batch([text[start:end] for start, end in spans], add_special_tokens=False)
            matching.passages.append([np.array(one.ids[:_MOST_SAID] or [0]) for one in encoded])
        passage, spans = places[text]
        right = tuple(at for at, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in answers))
        ids = tokenizer.encode(question, add_special_tokens=False).ids[:_MOST_ASKED]
        if right and ids:
            matching.sources.setdefault(source, []).append(MatchingQuestion(np.array(ids), passage, right))
    return matching


def _questions(data: Path) -> Iterator[tuple[str, str, str, list[tuple[int, int]]]]:
    """Source, question, text and the [start, end) of what answers."""
    for language in ("en", "zh"):
        for row in read_rows(data / f"reading_comprehension.{language}.jsonl.xz"):
            text, answer = row["context"], str(row["answer"])
            begin = text.find(answer)
            if begin >= 0 and not held_out(text, language) and not is_measured(row["question"]):
                yield row["src"], row["question"], text, [(begin, begin + len(answer))]
        for row in read_rows(data / f"retrieval_pairs.{language}.jsonl.xz"):
            text = row["positive"]
            if row["src"] == "lecoqa-train" and not held_out(text, language) and not is_measured(row["query"]):
                yield row["src"], row["query"], text, [(0, len(text))]
    for item in asked_questions(data):
        if item.sentences and not item.held_out:
            kind = "across" if item.kind == "across" else item.collection
            yield f"{kind}-{detect_language(item.question)}", item.question, item.text, list(item.sentences)


def matching_loss(asked: Sequence[MatchingQuestion], passages: Sequence[Sequence[Ids]], table: Tensor) -> Tensor:
    """Minus the log of the share of what answers among all sentences of all passages asked of; the mean."""
    firsts: dict[int, int] = {}
    sentences: list[Ids] = []
    for item in asked:
        if item.passage not in firsts:
            firsts[item.passage] = len(sentences)
            sentences += passages[item.passage]
    logits = sentence_scores([item.question for item in asked], sentences, table).T / TEMPERATURE  # (B, S)
    right = torch.zeros(logits.shape, dtype=torch.bool)
    for row, item in enumerate(asked):
        right[row, [firsts[item.passage] + at for at in item.sentences]] = True
    return (logits.logsumexp(1) - logits.masked_fill(~right, -1e9).logsumexp(1)).mean()


def sentence_scores(questions: Sequence[Ids], sentences: Sequence[Ids], table: Tensor) -> Tensor:
    """`SoftMatch.coverages` of every sentence for every question, (S, B), from the table (V, d)."""
    asked, place = torch.unique(torch.from_numpy(np.concatenate(questions)), return_inverse=True)  # (Q,), all tokens
    said, where = torch.unique(torch.from_numpy(np.concatenate(sentences)), return_inverse=True)  # (U,), (T,)
    asked_vectors, said_vectors = table[asked], table[said]
    lengths = asked_vectors.norm(dim=1).clamp_min(1e-6)
    unit = said_vectors / said_vectors.norm(dim=1, keepdim=True).clamp_min(1e-6)
    cosines = (unit @ (asked_vectors / lengths[:, None]).T).clamp_min(0)  # (U, Q)
    sizes = torch.tensor([len(one) for one in sentences])
    nearest = torch.segment_reduce(cosines[where], "max", lengths=sizes)  # (S, Q)
    owner = torch.repeat_interleave(torch.tensor([len(one) for one in questions]))
    total = torch.zeros(len(questions)).index_add(0, owner, lengths[place])
    shares = torch.zeros(len(asked), len(questions)).index_put(
        (place, owner), lengths[place] / total[owner], accumulate=True)  # (Q, B)
    return nearest @ shares
