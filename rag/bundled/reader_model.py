"""The bundled reader as it is trained: Qwen3's network, the loss at answer tokens, a pointer loss.

The parameters carry the names of `transformers.Qwen3ForCausalLM`, so an exported folder loads
there. Queries and keys are normalised (Dehghani et al., 2023), positions rotate (Su et al., 2021),
input and output embeddings are one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rag.bundled.reader_data import IGNORED, Example

EPS = 1e-6
TRAINING_ONLY = (
    "sentence_head.weight", "no_sentence", "match_head.weight", "coverage_head.weight", "head_bias"
)
PLAIN_ATTENTION = 1024  # longest row that goes through the plain product on a processor


@dataclass(frozen=True, slots=True)
class ReaderConfig:
    """Sizes of the network, by the names transformers uses."""

    vocab_size: int = 24_576
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 1_000_000.0

    def to_transformers(self) -> dict[str, object]:
        """The content of config.json."""
        sizes = asdict(self)
        theta = sizes.pop("rope_theta")
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **sizes,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "rms_norm_eps": EPS,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": 4,
            "pad_token_id": 5,
            "dtype": "bfloat16",
        }


PRESETS = {
    # a laptop's processor: 10 million parameters, 6 of them embeddings
    "small": ReaderConfig(),
    # one data-centre GPU: 46 million parameters
    "gpu": ReaderConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "tiny": ReaderConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    ),
}


class Norm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)


class Attention(nn.Module):
    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        dim, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(dim, self.heads * head, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * head, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * head, bias=False)
        self.o_proj = nn.Linear(self.heads * head, dim, bias=False)
        self.q_norm = Norm(head)
        self.k_norm = Norm(head)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output (B, T, C) and the first head's queries and keys, each (B, T, D)."""
        B, T, _ = x.shape
        D = self.head_dim
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        qkv = F.linear(x, weight)
        qk, v = torch.split(qkv, [(self.heads + self.kv_heads) * D, self.kv_heads * D], dim=-1)
        qk = qk.view(B, T, self.heads + self.kv_heads, D)
        scale = torch.cat(
            [
                self.q_norm.weight.expand(self.heads, D),
                self.k_norm.weight.expand(self.kv_heads, D),
            ]
        )
        qk = rotate(F.rms_norm(qk, (D,), None, EPS) * scale, rotation).transpose(1, 2)
        q, k = torch.split(qk, [self.heads, self.kv_heads], dim=1)
        v = v.view(B, T, self.kv_heads, D).transpose(1, 2)  # (B, H, T, D)
        if self.heads != self.kv_heads:
            times = self.heads // self.kv_heads
            wide_k, wide_v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        else:
            wide_k, wide_v = k, v
        out = attend(q, wide_k, wide_v, mask)
        out = self.o_proj(out.transpose(1, 2).reshape(B, T, self.heads * D))
        return out, q[:, 0], k[:, 0]


    def answer(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, but only for the positions `columns` (B, A) of each row: out (B, A, C),
        the first head's queries (B, A, D) and keys (B, T, D)."""
        B, T, C = x.shape
        A, D = columns.shape[1], self.head_dim
        asking = x.gather(1, columns[..., None].expand(B, A, C))
        k, v = F.linear(x, torch.cat([self.k_proj.weight, self.v_proj.weight])).chunk(2, -1)
        k = rotate(self.k_norm(k.view(B, T, self.kv_heads, D)), rotation).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, D).transpose(1, 2)
        at = columns[..., None, None].expand(B, A, 1, D)
        turned = tuple(part.expand(B, T, 1, D).gather(1, at) for part in rotation)
        q = self.q_norm(self.q_proj(asking).view(B, A, self.heads, D))
        q = rotate(q, (turned[0], turned[1])).transpose(1, 2)  # (B, H, A, D)
        times = self.heads // self.kv_heads
        wide_k, wide_v = (
            (k, v) if times == 1 else (k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))
        )
        allowed = torch.arange(T, device=x.device) <= columns[..., None]  # (B, A, T)
        if mask is not None:
            allowed = allowed & mask[:, 0].gather(1, columns[..., None].expand(B, A, T))
        scores = (q * D**-0.5) @ wide_k.transpose(2, 3)
        out = scores.masked_fill(~allowed[:, None], -1e4).softmax(-1) @ wide_v
        out = self.o_proj(out.transpose(1, 2).reshape(B, A, self.heads * D))
        return out, q[:, 0], k[:, 0]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, causal where there is no mask. All (B, H, T, D).

    On a processor the plain product is three times as fast as the fused one for rows this short
    (bfloat16, forward and backward, 124 tokens).
    """
    T = q.shape[2]
    if q.is_cuda or T > PLAIN_ATTENTION:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3))
    return torch.matmul(scores.masked_fill(~mask, -1e4).softmax(-1), v)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight])).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


class Layer(nn.Module):
    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = Norm(config.hidden_size)
        self.post_attention_layernorm = Norm(config.hidden_size)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, q, k = self.self_attn(self.input_layernorm(x), rotation, mask)
        x = x + attended
        mixed: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, q, k

    def answer(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward` at the positions `columns` (B, A) only; nothing after the last layer needs
        the others, which saves an eighth of the work."""
        attended, q, k = self.self_attn.answer(self.input_layernorm(x), rotation, mask, columns)
        B, T, C = x.shape
        x = x.gather(1, columns[..., None].expand(*columns.shape, C)) + attended
        mixed: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + mixed, q, k


# dimensions of the residual stream that embeddings leave free, and what the first of them say
RESERVED = 16
CONSTANT, QUESTION, PASSAGE, ANSWER, BEGUN, MATCHED = range(6)

LayerFunction = Callable[
    [Layer, Tensor, tuple[Tensor, Tensor], Tensor | None], tuple[Tensor, Tensor, Tensor]
]


class Body(nn.Module):
    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size)

    @property
    def stack(self) -> list[Layer]:
        """The layers from the first to the last."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions. x: (B, T, H, D); the two parts of `rotation`: (B or 1, T, 1, D)."""
    cos, sin = rotation
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded to one length. Flat indices count over B * T."""

    ids: Tensor  # (B, T)
    positions: Tensor | None  # (B, T); None: 0, 1, 2, ... in every row
    mask: Tensor | None  # (B, 1, T, T) true where attention is allowed; None: causal
    target_rows: Tensor  # (N,) row of each answer token
    target_columns: Tensor  # (N,) position it is said behind
    target_slots: Tensor  # (N,) which of the row's answer tokens it is
    target_ids: Tensor  # (N,)
    answer_columns: Tensor  # (B, A) the positions of each row's answer, the last one repeated
    candidate_ids: Tensor  # (B, T) `ids` as places in `candidates`
    candidates: Tensor  # (K,) the tokens the softmax runs over: all of the batch, some others
    target_candidates: Tensor  # (N,) where in `candidates` the answer tokens are
    sources: Tensor  # (N,) position copied from, or IGNORED
    first: Tensor  # (N,) true where it is the first token of an answer
    sentence_ends: Tensor  # (B, S) positions, padded with 0
    sentence_kept: Tensor  # (B, S) true where a sentence is
    gold_sentence: Tensor  # (B,) index among the sentences; S where none answers
    match_weight: Tensor  # (B, T) how much a passage token's match counts, 0 elsewhere
    matches: Tensor  # (B, T) 1 where the passage token is one of the question's
    coverage: Tensor  # (B, T) share of the question's tokens said in the sentence up to here
    tokens: int  # without padding


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean losses in nats; `total` is what is minimised. `exact` is the share of answer tokens
    (teacher forced) said right, `exact_first` that of the first ones."""

    total: Tensor
    answer: Tensor
    pointer: Tensor
    sentence: Tensor
    match: Tensor
    coverage: Tensor
    exact: Tensor
    exact_first: Tensor


class Reader(nn.Module):
    """The network with the heads that only training has (TRAINING_ONLY)."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.sentence_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.no_sentence = nn.Parameter(torch.zeros(1))
        self.match_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.coverage_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(2))
        # one function for all layers, so that compiling it compiles once
        self.run_layer: LayerFunction = Layer.forward
        self.reset()

    def reset(self, vectors: NDArray[np.float32] | None = None) -> None:
        """Fresh weights. `vectors` (vocab_size, hidden_size), unit rows, start the embeddings.

        The keys of half the heads start as the queries, so that a token attends to its like from
        the first step on (after Trockman and Kolter, 2023); outputs of blocks start small.
        """
        config = self.config
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight", "_head.weight")):
                    parameter.mul_(0.03)
            for layer in self.model.stack:
                attention = layer.self_attn
                rows_kept = config.head_dim * max(1, config.num_key_value_heads // 2)
                attention.k_proj.weight[:rows_kept] = attention.q_proj.weight[:rows_kept]
            self._build_matching(vectors)

    def _build_matching(self, vectors: NDArray[np.float32] | None) -> None:
        """Start with a passage token knowing whether the question holds it too.

        Found by training alone this takes longer than a processor has: it needs one head that
        tells question from passage and, above it, one that compares tokens. So the embeddings
        leave RESERVED dimensions free, the first layer's head 1 attends to the special tokens and
        writes down how many passages have begun, and the second layer's head 1 attends from every
        token to its like in the first question, or else to itself, and writes down which of the
        two it was. Both go on learning like the rest.
        """
        config = self.config
        C, D = config.hidden_size, config.head_dim
        embeddings = self.model.embed_tokens.weight
        if vectors is not None:
            embeddings.mul_(0.4).add_(torch.from_numpy(vectors))
        # vectors keep their strongest directions and leave the first dimensions free
        words = F.normalize(embeddings[:, : C - RESERVED], dim=-1)
        embeddings.zero_()
        embeddings[:, RESERVED:] = words
        embeddings[:, CONSTANT] = 0.25
        embeddings[0, QUESTION] = embeddings[1, PASSAGE] = embeddings[2, ANSWER] = 1.0

        # the pairs of dimensions that positions hardly turn; the last pair holds the flags
        slow = [*range(D // 4, D // 2 - 1), *range(D // 2 + D // 4, D - 1)]
        flag, other = D // 2 - 1, D - 1
        kv = min(1, config.num_key_value_heads - 1)
        head = kv * (config.num_attention_heads // config.num_key_value_heads)

        def parts(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Views of head 1's queries, keys, values (D, C) and outputs (C, D), set to zero."""
            attention = layer.self_attn
            views = (
                attention.q_proj.weight[head * D : (head + 1) * D],
                attention.k_proj.weight[kv * D : (kv + 1) * D],
                attention.v_proj.weight[kv * D : (kv + 1) * D],
                attention.o_proj.weight[:, head * D : (head + 1) * D],
            )
            for view in views:
                view.zero_()
            return views

        # which part of the prompt: attend to the special tokens before
        q, k, v, o = parts(self.model.stack[0])
        q[flag, CONSTANT] = 0.8
        k[flag, QUESTION] = k[flag, PASSAGE] = 1.0
        k[other, CONSTANT] = 0.5
        v[0, PASSAGE] = 1.0
        o[BEGUN, 0] = 0.05  # about 0.25 in the first passage, 0 in the first question

        # matching: the same projection of queries and keys, first-question keys preferred
        q, k, v, o = parts(self.model.stack[1])
        project = torch.empty(len(slow), C - RESERVED)
        nn.init.orthogonal_(project)
        q[slow, RESERVED:] = project
        k[slow, RESERVED:] = project
        q[flag, CONSTANT] = 0.8
        k[flag, CONSTANT] = 0.8
        k[flag, BEGUN] = -0.8
        v[0, CONSTANT] = 1.0
        v[0, BEGUN] = -1.0
        o[MATCHED, 0] = 0.1
        self.model.stack[1].self_attn.q_norm.weight.fill_(3.0)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions (B, T). Returns two tensors (B, T, 1, D)."""
        dim = self.config.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles = positions[..., None].float() * self.config.rope_theta**-exponents
        angles = torch.cat([angles, angles], -1)[:, :, None]
        dtype = self.model.embed_tokens.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def states(
        self,
        x: Tensor,
        positions: Tensor | None,
        mask: Tensor | None,
        columns: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Final states for embedded tokens x (B, T, C), or for the positions `columns` (B, A)
        alone; the input of every layer; and the first head's queries and keys of every layer."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rotation = self.rotation(positions)
        inputs, heads = [], []
        last = len(self.model.stack) - 1
        for number, layer in enumerate(self.model.stack):
            inputs.append(x)
            if number == last and columns is not None:
                x, q, k = layer.answer(x, rotation, mask, columns)
            else:
                x, q, k = self.run_layer(layer, x, rotation, mask)
            heads.append((q, k))
        final: Tensor = self.model.norm(x)
        return final, inputs, heads

    def hidden(
        self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """`states` for token ids (B, T), at every position."""
        return self.states(self.model.embed_tokens(ids), positions, mask)

    def logits(
        self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, vocab_size), as Qwen3ForCausalLM gives them."""
        return F.linear(self.hidden(ids, positions, mask)[0], self.model.embed_tokens.weight)

    def losses(
        self,
        batch: Batch,
        rows: Tensor,
        *,
        pointer_weight: float,
        sentence_weight: float,
        match_weight: float = 0.0,
    ) -> Losses:
        """The answer's cross-entropy; how far the pointer heads look from where it is copied
        from; which sentence answers, told from the sentences' last tokens; which passage tokens
        the question holds too, told before the third layer from the top, and how much of the
        question the sentence has said so far, told before the second.

        `rows` are the embeddings of the batch's candidates, (K, C), so that a step works on those
        few rows of the matrix and not on all of it.

        The last two say at every token what matching a question with a passage is made of; the
        answer's own loss takes far longer to come upon it.

        The pointer loss trains the first head of the last two layers to attend, from each answer
        position, to the token that comes next (the attention of pointer networks, Vinyals et al.,
        2015, but inside an ordinary causal model).
        """
        x, inputs, heads = self.states(
            F.embedding(batch.candidate_ids, rows),
            batch.positions,
            batch.mask,
            batch.answer_columns,
        )
        logits = F.linear(x[batch.target_rows, batch.target_slots], rows).float()
        each = F.cross_entropy(logits, batch.target_candidates, reduction="none")
        # the first token decides which answer it is; the rest follows by copying
        weight = 1.0 + batch.first.float()
        answer = (each * weight).sum() / weight.sum()
        right = (logits.argmax(-1) == batch.target_candidates).float()

        # pointer heads
        copied = batch.sources != IGNORED
        lines, columns = batch.target_rows[copied], batch.target_columns[copied]
        pointer = answer.new_zeros(())
        if len(lines) and pointer_weight:
            T = batch.ids.shape[1]
            ahead = torch.arange(T, device=lines.device)[None] > columns[:, None]
            weight = weight[copied]
            # the last layer has queries at answer positions only
            for (q, k), at in zip(heads[-2:], (columns, batch.target_slots[copied])):
                q_said = q[lines, at].float() * self.config.head_dim**-0.5  # (N, D)
                scores = torch.einsum("nd,ntd->nt", q_said, k.float()[lines])
                if batch.mask is not None:
                    scores = scores.masked_fill(~batch.mask[lines, 0, columns], -1e9)
                scores = scores.masked_fill(ahead, -1e9)
                missed = F.cross_entropy(scores, batch.sources[copied], reduction="none")
                pointer = pointer + (missed * weight).sum() / weight.sum() / 2

        # which sentence
        sentence = answer.new_zeros(())
        if batch.sentence_ends.shape[1]:
            deep = max(0, self.config.num_hidden_layers - 2)
            each_row = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
            ends = F.rms_norm(inputs[deep][each_row, batch.sentence_ends], (x.shape[-1],))
            scores = self.sentence_head(ends)[..., 0].float()  # (B, S)
            scores = scores.masked_fill(~batch.sentence_kept, -1e9)
            none = self.no_sentence.float().expand(len(scores), 1)
            sentence = F.cross_entropy(torch.cat([scores, none], 1), batch.gold_sentence)
        # what the question and the passages share
        match, coverage = answer.new_zeros(()), answer.new_zeros(())
        if match_weight:
            weight = batch.match_weight / batch.match_weight.sum().clamp(min=1.0)
            deep = max(1, self.config.num_hidden_layers - 2)
            told = F.rms_norm(inputs[deep - 1], (x.shape[-1],))
            scores = self.match_head(told)[..., 0].float() + self.head_bias[0].float()
            match = (
                F.binary_cross_entropy_with_logits(scores, batch.matches, reduction="none") * weight
            ).sum()
            told = F.rms_norm(inputs[deep], (x.shape[-1],))
            scores = self.coverage_head(told)[..., 0].float() + self.head_bias[1].float()
            coverage = (
                F.binary_cross_entropy_with_logits(scores, batch.coverage, reduction="none") * weight
            ).sum()
        total = (
            answer
            + pointer_weight * pointer
            + sentence_weight * sentence
            + match_weight * (match + coverage)
        )
        return Losses(
            total,
            answer.detach(),
            pointer.detach(),
            sentence.detach(),
            match.detach(),
            coverage.detach(),
            right.mean().detach(),
            right[batch.first].mean().detach(),
        )


def block_positions(
    length: int, passage_starts: Sequence[int], question_start: int
) -> NDArray[np.int64]:
    """Positions in the second layout: every passage counts on from the shared opening token, the
    question behind the longest passage. Returns (length,)."""
    opening = passage_starts[0]
    positions = np.arange(length)
    borders = [*passage_starts, question_start]
    longest = max(end - start for start, end in zip(borders, borders[1:]))
    for start, end in zip(borders, borders[1:]):
        positions[start:end] = opening + np.arange(end - start)
    positions[question_start:] = opening + longest + np.arange(length - question_start)
    return positions


def block_mask(
    length: int, passage_starts: Sequence[int], question_start: int
) -> NDArray[np.bool_]:
    """Attention in the second layout: a passage sees the opening and itself, the question and the
    answer see everything before them. Returns (length, length), true where allowed."""
    owner = np.zeros(length, np.int64)
    for number, start in enumerate(passage_starts, 1):
        owner[start:] = number
    owner[question_start:] = len(passage_starts) + 1
    causal = np.tril(np.ones((length, length), bool))
    same = owner[:, None] == owner[None]
    asks = owner[:, None] > len(passage_starts)
    allowed: NDArray[np.bool_] = causal & (same | asks | (owner[None] == 0))
    return allowed


def shared_tokens(example: Example, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an example's passages share with the question, by position. Returns (3, length):
    how much the position counts (0 outside of passages, and in the second layout, where passages
    don't know the question), whether the question holds its token, and which share of the
    question's tokens, by weight, its sentence has said up to there."""
    ids = example.ids
    found = np.zeros((3, len(ids)), np.float32)
    if example.blocks or not example.passage_starts:
        return found
    first, last = example.passage_starts[0], example.question_start
    asked = np.unique(ids[1:first])
    total = float(weights[asked].sum()) or 1.0
    inside = np.isin(ids[first:last], asked)
    found[0, first:last] = 0.1 + weights[ids[first:last]]
    found[1, first:last] = inside
    start = first
    for end in [*example.sentence_ends.tolist(), last - 1]:
        said: set[int] = set()
        gained = np.zeros(max(0, end + 1 - start), np.float32)
        for offset in np.flatnonzero(inside[start - first : end + 1 - first]).tolist():
            token = int(ids[start + offset])
            if token not in said:
                said.add(token)
                gained[offset] = weights[token]
        found[2, start : end + 1] = np.cumsum(gained) / total
        start = max(start, end + 1)
    return found


def collate(
    examples: Sequence[Example],
    *,
    device: torch.device,
    rng: np.random.Generator,
    vocab_size: int,
    weights: NDArray[np.float32] | None = None,
    others: int = 1024,
    pad_id: int = 5,
) -> Batch:
    """The examples in one batch, each row padded on the right to the longest.

    An answer is copied, so the softmax runs over the tokens of the batch and `others` drawn ones:
    a tenth of the work, and rows of tokens that don't occur aren't pushed about (Jean et al., 2015).
    `weights` (vocab_size,) say how much it tells when question and passage share a token.
    """
    B = len(examples)
    length = max(len(e.ids) for e in examples)
    ids = np.full((B, length), pad_id, np.int64)
    most = max(len(e.sentence_ends) for e in examples)
    ends = np.zeros((B, most), np.int64)
    kept = np.zeros((B, most), bool)
    gold = np.full(B, most, np.int64)
    blocks = any(e.blocks for e in examples)
    positions = np.tile(np.arange(length), (B, 1)) if blocks else None
    mask = np.tile(np.tril(np.ones((length, length), bool)), (B, 1, 1, 1)) if blocks else None
    match_weight, matches, coverage = np.zeros((3, B, length), np.float32)
    for row, example in enumerate(examples):
        if weights is not None:
            columns = slice(0, len(example.ids))
            match_weight[row, columns], matches[row, columns], coverage[row, columns] = shared_tokens(
                example, weights
            )
        n = len(example.ids)
        ids[row, :n] = example.ids
        sentences = len(example.sentence_ends)
        ends[row, :sentences] = example.sentence_ends
        kept[row, :sentences] = True
        if example.gold_sentence != IGNORED:
            gold[row] = example.gold_sentence
        if example.blocks and positions is not None and mask is not None:
            positions[row, :n] = block_positions(n, example.passage_starts, example.question_start)
            mask[row, 0, :n, :n] = block_mask(n, example.passage_starts, example.question_start)

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    counts = [len(e.targets) for e in examples]
    first = np.zeros(sum(counts), bool)
    first[np.cumsum([0, *counts[:-1]])] = True
    targets = np.concatenate([e.targets for e in examples]).astype(np.int64)
    drawn = rng.integers(0, vocab_size, others)
    candidates = np.unique(np.concatenate([ids.ravel(), targets[:, 1], drawn]))
    answers = np.zeros((B, max(counts)), np.int64)
    for row, example in enumerate(examples):
        answers[row] = example.targets[-1, 0]
        answers[row, : counts[row]] = example.targets[:, 0]
    return Batch(
        ids=tensor(ids),
        positions=None if positions is None else tensor(positions),
        mask=None if mask is None else tensor(mask),
        target_rows=tensor(np.repeat(np.arange(B), counts)),
        target_columns=tensor(targets[:, 0]),
        target_slots=tensor(np.concatenate([np.arange(count) for count in counts])),
        target_ids=tensor(targets[:, 1]),
        answer_columns=tensor(answers),
        candidate_ids=tensor(np.searchsorted(candidates, ids)),
        candidates=tensor(candidates),
        target_candidates=tensor(np.searchsorted(candidates, targets[:, 1])),
        sources=tensor(np.concatenate([e.sources for e in examples]).astype(np.int64)),
        first=tensor(first),
        sentence_ends=tensor(ends),
        sentence_kept=tensor(kept),
        gold_sentence=tensor(gold),
        match_weight=tensor(match_weight),
        matches=tensor(matches),
        coverage=tensor(coverage),
        tokens=sum(len(e.ids) for e in examples),
    )
