"""How the loaded model reads and writes one prompt, step by step, for the page "Look inside".

Runs its own copy of the model through transformers, because attention weights are what a fast
engine does not keep. Nothing here takes part in answering.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rag.answer import Hit
from rag.errors import GeneratorError
from rag.generator import check_folder, find_model
from rag.prompt import Prompt, neutralise, passage_text

MAX_STEPS = 48  # new tokens looked at
MAX_PROMPT = 4096  # prompt tokens; attention over more takes too much memory
_KEPT_CANDIDATES = 200  # likeliest tokens kept of each step

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the model's config says about its size."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    rope_theta: float | None

    def cache_bytes(self, num_tokens: int, *, num_kv_heads: int | None = None, item_bytes: int = 2) -> int:
        """Keys and values of all layers: 2 x layers x KV heads x head dim x bytes, a token."""
        heads = self.num_kv_heads if num_kv_heads is None else num_kv_heads
        return 2 * self.num_layers * heads * self.head_dim * item_bytes * num_tokens

    def rope_cosines(self, positions: Sequence[int]) -> Floats:
        """cos(position x frequency), float32 (positions, head_dim / 2)."""
        pairs = self.head_dim // 2
        theta = self.rope_theta or 10_000.0
        frequencies = theta ** (-np.arange(pairs) * 2 / self.head_dim)
        return np.cos(np.outer(np.asarray(positions), frequencies)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Step:
    """One new token. `candidates` are (token id, logit), likeliest first.

    `attention` is float32 (layers, heads, parts): what the query that led to it gave to each part
    of the prompt; the shares of one head sum to 1.
    """

    token_id: int
    token: str
    candidates: tuple[tuple[int, float], ...]
    attention: Floats


@dataclass(frozen=True, slots=True)
class Inspection:
    """One prompt read and continued greedily. `part_of` names the part of each prompt token."""

    prompt_ids: tuple[int, ...]
    prompt_tokens: tuple[str, ...]
    part_of: tuple[int, ...]
    num_passages: int
    steps: tuple[Step, ...]

    @property
    def num_parts(self) -> int:
        """0 is the prompt outside of passages, 1... the passages, the last one what is written."""
        return self.num_passages + 2

    def attention(self, layer: int | None, head: int | None) -> Floats:
        """float32 (steps, parts); None averages over all layers or heads."""
        stacked = np.stack([step.attention for step in self.steps])  # (steps, L, H, parts)
        stacked = stacked.mean(axis=1) if layer is None else stacked[:, layer]
        return stacked.mean(axis=1) if head is None else stacked[:, head]


class Inspector:
    """A second copy of the language model that shows its attention. Not safe for two threads."""

    def __init__(self, name: str) -> None:
        """Raises GeneratorError as loading the generator does."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = find_model(name)
        check_folder(folder, name)
        self.name = name
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, attn_implementation="eager",
                dtype=torch.float32,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise GeneratorError(f"{name} can't be opened to look inside: {error}") from error
        self._model = model.eval()
        self._histograms: tuple[Floats, dict[str, Floats]] | None = None
        self.architecture = _architecture(self._model.config.get_text_config(decoder=True))

    def tokenize(self, text: str) -> list[tuple[int, str]]:
        """(id, the text it stands for) of every token."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [(id_, self.token_text(id_)) for id_ in ids]

    def token_text(self, token_id: int) -> str:
        """A token by itself; bytes that are no whole character show as a replacement sign."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def parameters(self) -> dict[str, int]:
        """How many numbers each kind of module holds."""
        counts: dict[str, int] = {}
        seen: set[int] = set()
        for name, parameter in self._model.named_parameters():
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            kind = _kind(name)
            counts[kind] = counts.get(kind, 0) + parameter.numel()
        return counts

    def weight_histograms(self, bins: int = 61) -> tuple[Floats, dict[str, Floats]]:
        """Middles of the bins, and for each kind of module the share of its numbers in each bin.

        At most 100,000 numbers of each tensor are counted, evenly taken. What lies outside of four
        standard deviations of all weights counts into the outer bins. Norms, which lie around 1,
        are left out.
        """
        if self._histograms is None:
            samples: dict[str, list[Any]] = {}
            for name, parameter in self._model.named_parameters():
                kind = _kind(name)
                if kind != "norms":
                    flat = parameter.detach().flatten()
                    samples.setdefault(kind, []).append(flat[:: max(1, len(flat) // 100_000)].numpy())
            values = {kind: np.concatenate(parts) for kind, parts in samples.items()}
            limit = 4 * max(float(np.concatenate(list(values.values())).std()), 1e-6)
            edges = np.linspace(-limit, limit, bins + 1)
            counts = {
                kind: np.histogram(np.clip(own, -limit, limit), edges)[0] / len(own)
                for kind, own in values.items()
            }
            self._histograms = (
                ((edges[1:] + edges[:-1]) / 2).astype(np.float32),
                {kind: count.astype(np.float32) for kind, count in counts.items()},
            )
        return self._histograms

    def inspect(
        self, prompt_ids: Sequence[int], prompt: Prompt, *, stop_ids: Sequence[int] = (),
        max_steps: int = MAX_STEPS,
    ) -> Inspection:
        """Read the prompt, write greedily, and keep what each step saw and weighed.

        Raises GeneratorError where the prompt is too long to keep its attention.
        """
        import torch

        if len(prompt_ids) > MAX_PROMPT:
            raise GeneratorError(
                f"this prompt has {len(prompt_ids)} tokens; up to {MAX_PROMPT} can be looked into. "
                "Give the model fewer passages."
            )
        part_of = self._parts(prompt_ids, prompt.hits)
        num_parts = len(prompt.hits) + 2
        steps: list[Step] = []
        ids = torch.tensor([list(prompt_ids)])
        cache: Any = None
        written = 0
        with torch.inference_mode():
            for step in range(max_steps):
                # The prompt's last token is read by itself: only its attention is wanted.
                if step == 0 and len(prompt_ids) > 1:
                    cache = self._model(ids[:, :-1], use_cache=True).past_key_values
                    ids = ids[:, -1:]
                out = self._model(ids, past_key_values=cache, use_cache=True, output_attentions=True)
                cache = out.past_key_values
                weights = torch.stack([layer[0, :, -1] for layer in out.attentions])  # (L, H, tokens)
                owners = torch.tensor(list(part_of) + [num_parts - 1] * written)
                shares = torch.zeros(*weights.shape[:2], num_parts)
                shares.index_add_(2, owners, weights.float())
                logits = out.logits[0, -1].float()
                top = torch.topk(logits, min(_KEPT_CANDIDATES, logits.numel()))
                token_id = int(top.indices[0])
                steps.append(
                    Step(
                        token_id, self.token_text(token_id),
                        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
                        shares.numpy(),
                    )
                )
                if token_id in stop_ids:
                    break
                ids = torch.tensor([[token_id]])
                written += 1
        return Inspection(
            tuple(prompt_ids), tuple(self.token_text(id_) for id_ in prompt_ids), tuple(part_of),
            len(prompt.hits), tuple(steps),
        )

    def _parts(self, prompt_ids: Sequence[int], hits: Sequence[Hit]) -> list[int]:
        """For each prompt token the number of the passage it belongs to, 0 outside of passages."""
        ends: list[int] = []  # where in the text each token ends
        text = ""
        pending: list[int] = []
        for id_ in prompt_ids:
            pending.append(id_)
            piece = str(self._tokenizer.decode(pending, skip_special_tokens=False))
            if not piece.endswith("\ufffd") or len(pending) > 8:
                text += piece
                ends += [len(text)] * len(pending)
                pending = []
        ends += [len(text)] * len(pending)
        spans: list[tuple[int, int]] = []
        position = 0
        for hit in hits:
            wanted = neutralise(passage_text(hit)).strip()
            start = text.find(wanted, position)
            if start < 0:  # a tokenizer that changes the text: its beginning has to do
                start = text.find(wanted[:24], position)
            if start < 0:
                spans.append((0, 0))
                continue
            spans.append((start, start + len(wanted)))
            position = start + len(wanted)
        return [
            next((n for n, (a, b) in enumerate(spans, 1) if a < end <= b), 0) for end in ends
        ]


def probabilities(
    candidates: Sequence[tuple[int, float]], *, temperature: float, top_k: int, top_p: float
) -> list[tuple[int, float, bool]]:
    """(token id, probability, whether it can be drawn) of the likeliest tokens.

    Temperature first, then top-k, then top-p (the smallest set whose probability reaches p); what
    is kept is scaled to 1. Probabilities are over the given candidates, which hold nearly all.
    """
    logits = np.array([logit for _, logit in candidates], dtype=np.float64)
    if temperature <= 0:
        drawn = np.zeros(len(logits))
        drawn[0] = 1.0
        return [(id_, float(p), p > 0) for (id_, _), p in zip(candidates, drawn, strict=True)]
    scaled = np.exp((logits - logits.max()) / temperature)
    scaled /= scaled.sum()
    kept = np.ones(len(scaled), dtype=bool)
    if top_k:
        kept[top_k:] = False
    if top_p < 1.0:
        within = np.where(kept, scaled, 0.0)
        within /= within.sum()
        before = np.cumsum(within) - within
        kept &= before < top_p
    final = np.where(kept, scaled, 0.0)
    final /= final.sum()
    return [
        (id_, float(p if keep else raw), bool(keep))
        for (id_, _), p, raw, keep in zip(candidates, final, scaled, kept, strict=True)
    ]


def _architecture(config: Any) -> Architecture:
    heads = int(config.num_attention_heads)
    theta = getattr(config, "rope_theta", None)
    parameters = getattr(config, "rope_parameters", None)
    if theta is None and isinstance(parameters, dict):
        theta = parameters.get("rope_theta")
    return Architecture(
        num_layers=int(config.num_hidden_layers), num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden_size=int(config.hidden_size), vocab_size=int(config.vocab_size),
        rope_theta=None if theta is None else float(theta),
    )


_KINDS = (
    ("embed", "embedding"), ("lm_head", "output"), ("q_proj", "query"), ("k_proj", "key"),
    ("v_proj", "value"), ("o_proj", "attention output"), ("qkv", "query, key, value"),
    ("gate", "feed-forward"), ("up_proj", "feed-forward"), ("down_proj", "feed-forward"),
    ("mlp", "feed-forward"), ("norm", "norms"),
)


def _kind(name: str) -> str:
    if "norm" in name:
        return "norms"
    return next((kind for part, kind in _KINDS if part in name), "other")


def weight_bytes(folder: Path) -> int:
    """Bytes of the model's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
