"""The extractor as it is trained, in torch; `rag.extractor` runs the same weights in NumPy.

A reader of the question and each passage over two frozen token tables: the bundled embedder's, which
says what a token means, and `token_usage`'s, which says how it is used (a name, a year, a verb). To
both the most frequent tokens add vectors of their own. What a passage token is given of the question
follows FastQA (Weissenborn et al., 2017: exact and weighted word-in-question features) and DrQA (Chen
et al., 2017: aligned question embedding); contextual LSTMs, attention both ways and modelling LSTMs
follow BiDAF (Seo et al., 2017). How much of the question a whole passage covers (compare and
aggregate, Parikh et al., 2016) counts for all its tokens. One softmax runs over all passages of a
question and a null option (Clark and Gardner, 2018), so that scores compare between passages and "not
here" is learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ExtractorShape:
    """Sizes of the network."""

    meaning: int = 256
    usage: int = 96
    width: int = 128
    frequent: int = 4000


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """x (B, T, d) with a share of its columns zeroed, the same along T (Gal and Ghahramani, 2016)."""
    if not training or not share:
        return x
    return x * torch.empty(len(x), 1, x.shape[2], dtype=x.dtype).bernoulli_(1 - share).div_(1 - share)


class BothWays(nn.Module):
    """Layers of LSTMs that read from both ends: (B, T, inputs) -> each layer's (B, T, 2 hidden).

    The one that reads backwards begins at each row's own last token, so padding is never read.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, drop: float) -> None:
        super().__init__()
        sizes = [inputs, *[2 * hidden] * (layers - 1)]
        self.ahead = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.back = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.drop = drop
        for layer in (*self.ahead, *self.back):
            for name, value in layer.named_parameters():
                if "bias" in name:  # two of them add up to 1 for the forget gate
                    nn.init.zeros_(value)
                    value.data[hidden : 2 * hidden] = 0.5

    def forward(self, x: Tensor, present: Tensor) -> list[Tensor]:
        places = torch.arange(x.shape[1])[None]
        lengths = present.sum(1, keepdim=True)
        turned = torch.where(places < lengths, lengths - 1 - places, places)[..., None]  # (B, T, 1)
        outputs: list[Tensor] = []
        for ahead, back in zip(self.ahead, self.back, strict=True):
            x = dropped(x * present[..., None], self.drop, self.training)
            read = back(x.gather(1, turned.expand_as(x)))[0]
            x = torch.cat([ahead(x)[0], read.gather(1, turned.expand_as(read))], dim=2)
            outputs.append(x)
        return outputs


class ExtractorModel(nn.Module):
    """Question and passage tokens -> start and end logits, and those of the null option.

    It computes in the tables' dtype as far as autocast lets it: bfloat16 halves the time.
    """

    meaning: Tensor
    usage: Tensor
    unit: Tensor
    weight: Tensor
    frequent_tokens: Tensor
    places: Tensor

    def __init__(self, shape: ExtractorShape, meaning: Tensor, usage: Tensor, frequent: Tensor, drop: float = 0.0) -> None:
        super().__init__()
        width, self.drop = shape.width, drop
        self.register_buffer("meaning", meaning, persistent=False)  # (V, meaning)
        self.register_buffer("usage", usage, persistent=False)  # (V, usage)
        norms = meaning.float().norm(dim=1)
        unit = (meaning.float() / norms.clamp(min=1e-12)[:, None]).to(meaning.dtype)
        self.register_buffer("unit", unit, persistent=False)  # (V, meaning)
        self.register_buffer("weight", (norms / norms.mean()).to(meaning.dtype), persistent=False)  # (V,)
        places = torch.zeros(len(meaning), dtype=torch.long)
        places[frequent.long()] = torch.arange(1, len(frequent) + 1)
        self.register_buffer("frequent_tokens", frequent.int(), persistent=False)  # (F,)
        self.register_buffer("places", places, persistent=False)  # (V,): row of `frequent`, 0 for all others
        self.frequent = nn.Embedding(shape.frequent + 1, width, padding_idx=0)
        nn.init.normal_(self.frequent.weight, std=0.02)
        with torch.no_grad():
            self.frequent.weight[0] = 0
        self.from_meaning = nn.Linear(shape.meaning, width)
        self.from_usage = nn.Linear(shape.usage, width, bias=False)
        self.token_norm = nn.LayerNorm(width)
        self.align = nn.Linear(width, width, bias=False)
        self.question_layers = BothWays(width, width // 2, 2, drop)
        self.passage_layers = BothWays(2 * width + 4, width // 2, 1, drop)
        self.pool = nn.Linear(width, 1)
        self.passage_alone = nn.Linear(width, 1, bias=False)
        self.question_alone = nn.Linear(width, 1, bias=False)
        self.together = nn.Parameter(torch.ones(width) / width**0.5)
        self.join = nn.Linear(4 * width, width)
        self.reading_layers = BothWays(width, width, 2, drop)
        self.gather = nn.Linear(5 * width, width)
        self.by_question = nn.Linear(width, 2 * width)
        self.sides = nn.Linear(width, 2)
        self.cover_question = nn.Linear(width, width)
        self.cover_passage = nn.Linear(width, width)
        self.compare = nn.Linear(4 * width, width)
        self.covered = nn.Linear(width, 1)
        self.null = nn.Linear(width, 2)

    def tokens(self, ids: Tensor) -> Tensor:
        """Token ids -> vectors, whatever stands around them: (..., T) -> (..., T, d)."""
        x = self.from_meaning(self.meaning[ids]) + self.from_usage(self.usage[ids]) + self.frequent(self.places[ids])
        normed: Tensor = self.token_norm(x)
        return normed.to(self.meaning.dtype)

    def forward(self, question: Tensor, passages: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, Q) of questions and (N, T) of passages, -1 behind their last; `rows` (N,)
        says whose passage each is. At least one token each.

        Returns logits of start and end (N, T, 2), -1e4 where no token is, and of the null option (B, 2).
        """
        asked, said = question >= 0, passages >= 0
        asked_ids, said_ids = question.clamp(min=0), passages.clamp(min=0)
        e_q = self.tokens(asked_ids) * asked[..., None]  # (B, Q, d)
        e_p = self.tokens(said_ids) * said[..., None]  # (N, T, d)
        no_question = ~asked[rows][:, None]  # (N, 1, Q)
        no_passage = ~said[..., None]  # (N, T, 1)
        # a token that meets the question, whatever stands around it
        cosines = (self.unit[said_ids] @ self.unit[asked_ids][rows].transpose(1, 2)).clamp(min=0)
        cosines = cosines.masked_fill(no_question, 0.0)  # (N, T, Q)
        weights = self.weight[asked_ids][rows][:, None]  # (N, 1, Q)
        same = ((said_ids[:, :, None] == asked_ids[rows][:, None]) & ~no_question).to(cosines.dtype)
        features = torch.stack([
            same.amax(dim=2), (same * weights).amax(dim=2),
            cosines.amax(dim=2), (cosines * weights).amax(dim=2),
        ], dim=2) * said[..., None]
        keys, queries = torch.relu(self.align(e_q))[rows], torch.relu(self.align(e_p))
        near = (queries @ keys.transpose(1, 2)).masked_fill(no_question, -1e4).softmax(dim=2)
        aligned = near @ e_q[rows]  # (N, T, d)
        # what stands around it
        x_q = self.question_layers(e_q, asked)[-1] * asked[..., None]
        x_p = self.passage_layers(torch.cat([e_p, aligned, features], dim=2), said)[-1] * said[..., None]
        shares = self.pool(x_q).masked_fill(~asked[..., None], -1e4).softmax(dim=1)  # (B, Q, 1)
        pooled = (shares * x_q).sum(dim=1)  # (B, d)
        x_q, shares = x_q[rows], shares[rows]
        # both against each other
        scores = (x_p * self.together) @ x_q.transpose(1, 2)
        scores = scores + self.passage_alone(x_p) + self.question_alone(x_q).transpose(1, 2)  # (N, T, Q)
        to_question = scores.masked_fill(no_question, -1e4).softmax(dim=2)
        to_passage = scores.masked_fill(no_passage, -1e4).softmax(dim=1)
        a, b = to_question @ x_q, to_question @ (to_passage.transpose(1, 2) @ x_p)  # (N, T, d)
        first = torch.relu(self.join(torch.cat([x_p, a, x_p * a, x_p * b], dim=2)))
        x = torch.relu(self.gather(torch.cat([first, *self.reading_layers(first, said)], dim=2)))
        x = dropped(x, self.drop, self.training) * said[..., None]
        # how much of the question the passage covers
        scores = self.cover_question(x_q) @ self.cover_passage(x).transpose(1, 2) / x.shape[2] ** 0.5  # (N, Q, T)
        found = scores.masked_fill(~said[:, None], -1e4).softmax(dim=2) @ x  # (N, Q, d)
        compared = torch.relu(self.compare(torch.cat([x_q, found, x_q * found, (x_q - found).abs()], dim=2)))
        cover = (self.covered(compared) * shares).sum(dim=1)  # (N, 1)
        by_question = self.by_question(pooled)[rows].view(len(rows), 2, -1)
        logits = self.sides(x) + x @ by_question.transpose(1, 2) / x.shape[2] ** 0.5 + cover[:, :, None]
        return logits.float().masked_fill(no_passage, -1e4), self.null(pooled).float()
