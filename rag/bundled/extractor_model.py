"""The extractor as it is trained, in torch; `rag.extractor` runs the same weights in NumPy.

A question-aware tagger of passage tokens over the bundled embedder's frozen token table. Its inputs
follow FastQA (Weissenborn et al., 2017: exact and weighted word-in-question features) and DrQA (Chen
et al., 2017: aligned question embedding), its layers are gated convolutions (Dauphin et al., 2017)
that the pooled question conditions. One softmax runs over all passages of a question and a null
option (Clark and Gardner, 2018), so that scores compare between passages and "not here" is learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rag.extractor import QUESTION_DILATIONS


@dataclass(frozen=True, slots=True)
class ExtractorShape:
    """Sizes of the network."""

    embedding: int = 256
    width: int = 128
    align: int = 64
    dilations: tuple[int, ...] = (1, 2, 4, 8, 1)


def shifted(x: Tensor, by: int) -> Tensor:
    """[x(t - by), x(t), x(t + by)] with zeros outside: (B, T, d) -> (B, T, 3d)."""
    padded = nn.functional.pad(x, (0, 0, by, by))
    length = x.shape[1]
    return torch.cat([padded[:, :length], x, padded[:, 2 * by : 2 * by + length]], dim=2)


class GatedConvolution(nn.Module):
    """Width 3, dilated, conditioned on a vector, residual: (B, T, d) -> (B, T, d)."""

    def __init__(self, width: int, dilation: int, *, conditioned: bool) -> None:
        super().__init__()
        self.dilation = dilation
        self.mix = nn.Linear(3 * width, 2 * width)
        self.condition = nn.Linear(width, 2 * width, bias=False) if conditioned else None
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor, question: Tensor | None = None) -> Tensor:
        mixed = self.mix(shifted(x, self.dilation))
        if self.condition is not None and question is not None:
            mixed = mixed + self.condition(question)[:, None]
        normed: Tensor = self.norm(x + nn.functional.glu(mixed, dim=2))
        return normed * mask


class ExtractorModel(nn.Module):
    """Question and passage tokens -> start and end logits with a null option at the end.

    It computes in the table's dtype as far as autocast lets it: a table in bfloat16 halves the time.
    """

    table: Tensor
    unit: Tensor
    weight: Tensor

    def __init__(self, shape: ExtractorShape, table: Tensor) -> None:
        super().__init__()
        width = shape.width
        self.register_buffer("table", table, persistent=False)  # (V, embedding)
        norms = table.float().norm(dim=1)
        unit = (table.float() / norms.clamp(min=1e-12)[:, None]).to(table.dtype)
        self.register_buffer("unit", unit, persistent=False)  # (V, embedding)
        self.register_buffer("weight", (norms / norms.mean()).to(table.dtype), persistent=False)  # (V,)
        self.project = nn.Linear(shape.embedding, width)
        self.project_norm = nn.LayerNorm(width)
        self.align = nn.Linear(shape.embedding, shape.align, bias=False)
        self.question_layers = nn.ModuleList(
            GatedConvolution(width, by, conditioned=False) for by in QUESTION_DILATIONS
        )
        self.pool = nn.Linear(width, 1)
        self.join = nn.Linear(3 * width + 4, width)
        self.join_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            GatedConvolution(width, by, conditioned=True) for by in shape.dilations
        )
        self.start, self.end = nn.Linear(width, 1), nn.Linear(width, 1)
        self.start_question, self.end_question = nn.Linear(width, width), nn.Linear(width, width)
        self.null = nn.Linear(width, 2)

    def forward(self, question: Tensor, passages: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, Q) and (B, T), -1 where there is none, between passages too.

        Returns start and end logits, both (B, T + 1), the last column null; -1e4 where no token is.
        """
        asked, said = question >= 0, passages >= 0
        asked_ids, said_ids = question.clamp(min=0), passages.clamp(min=0)
        e_q, e_p = self.table[asked_ids], self.table[said_ids]  # (B, Q, e), (B, T, e)
        mask_q, mask_p = asked[..., None].to(e_q.dtype), said[..., None].to(e_q.dtype)
        # the question
        x_q = first_q = self.project_norm(self.project(e_q)) * mask_q
        for layer in self.question_layers:
            x_q = layer(x_q, mask_q)
        shares = self.pool(x_q).masked_fill(~asked[..., None], -1e4).softmax(dim=1)
        pooled = (shares * x_q).sum(dim=1)  # (B, d)
        # how each passage token meets it
        cosines = (self.unit[said_ids] @ self.unit[asked_ids].transpose(1, 2)).clamp(min=0)  # (B, T, Q)
        cosines = cosines * mask_q.transpose(1, 2)
        weights = (self.weight[asked_ids] * asked)[:, None]  # (B, 1, Q)
        same = ((said_ids[:, :, None] == asked_ids[:, None]) & asked[:, None]).to(e_q.dtype)
        features = torch.stack([
            same.amax(dim=2), (same * weights).amax(dim=2),
            cosines.amax(dim=2), (cosines * weights).amax(dim=2),
        ], dim=2) * mask_p
        attention = self.align(e_p) @ self.align(e_q).transpose(1, 2)
        attention = attention.masked_fill(~asked[:, None], -1e4).softmax(dim=2)
        aligned = attention @ first_q  # (B, T, d)
        # the passages
        x = self.project_norm(self.project(e_p))
        x = self.join_norm(self.join(torch.cat([x, aligned, x * aligned, features], dim=2))) * mask_p
        for layer in self.layers:
            x = layer(x, mask_p, pooled)
        null = self.null(pooled)  # (B, 2)
        logits = []
        for head, by_question, empty in (
            (self.start, self.start_question, null[:, :1]), (self.end, self.end_question, null[:, 1:]),
        ):
            scored = head(x)[..., 0] + (x @ by_question(pooled)[..., None])[..., 0] / x.shape[2] ** 0.5
            logits.append(torch.cat([scored.masked_fill(~said, -1e4), empty], dim=1))
        return logits[0], logits[1]
