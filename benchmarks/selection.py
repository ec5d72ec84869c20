"""Which tokens of a moved passage are worth computing again: python -m benchmarks.selection

Approximate passage reuse computes 15% of a passage's tokens anew. Compared are, on the bundled
reader in float32 and with the same number of tokens, the first ones (EPIC, arXiv 2410.15332: what
the engine does), those whose keys and values in the second layer differ most from the stored ones
(CacheBlend, arXiv 2405.16444; the first layer is then computed for all tokens), half of either, a
random choice and none. Each question of the handbook follows the one before over passages in
another order; answers are compared with those of the exact prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.engine import around, asked_of_handbook
from rag.answer import Hit
from rag.document import Chunk
from rag.engine.passage_store import SHORTEST, num_recomputed
from rag.generator import BUNDLED_READER, load_generator, load_model
from rag.prompt import Prompt, build_prompt
from rag.quality.evaluation import token_f1
from rag.settings import Settings

CHOICES = ("none", "random", "first", "deviation", "half first, half deviation")
KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # a layer: keys not turned yet, values (T, H, D)


class SelectiveModel:
    """A transformers model of the Qwen3 family that computes the tokens it is told to."""

    def __init__(self, model: Any) -> None:
        self._model = model.model
        self._head = model.lm_head

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        found: torch.Tensor = self._model.embed_tokens(torch.tensor(ids))
        return found

    def keys_values(self, layer: int, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block = self._model.layers[layer]
        x, attention = block.input_layernorm(h), block.self_attn
        shape = (len(h), -1, attention.head_dim)
        return attention.k_norm(attention.k_proj(x).view(shape)), attention.v_proj(x).view(shape)

    def layer(
        self, layer: int, h: torch.Tensor, at: torch.Tensor, stored: KeyValues
    ) -> torch.Tensor:
        """Hidden states h (n, hidden) of the tokens `at` behind the layer; their keys and values
        replace the stored ones, which are of all tokens."""
        block = self._model.layers[layer]
        attention = block.self_attn
        keys, values = stored[layer]
        keys[at], values[at] = self.keys_values(layer, h)
        x = block.input_layernorm(h)
        queries = attention.q_norm(attention.q_proj(x).view(len(h), -1, attention.head_dim))
        places = torch.arange(len(keys))
        turned = self._turned(keys, places).transpose(0, 1)
        asked = self._turned(queries, at).transpose(0, 1)
        hidden = places[None] > at[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            asked[None], turned[None], values.transpose(0, 1)[None], attn_mask=~hidden,
            scale=attention.scaling, enable_gqa=True,
        )[0]  # fmt: skip
        h = h + attention.o_proj(mixed.transpose(0, 1).reshape(len(h), -1))
        after: torch.Tensor = h + block.mlp(block.post_attention_layernorm(h))
        return after

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._head(self._model.norm(h[-1]))
        return found

    @property
    def num_layers(self) -> int:
        return len(self._model.layers)

    def _turned(self, heads: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        cos, sin = (table[0][:, None] for table in self._model.rotary_emb(heads, places[None]))
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin


def nothing_stored(model: SelectiveModel, length: int) -> KeyValues:
    keys, values = model.keys_values(0, model.embed([0]))
    return [
        (keys.new_full((length, *keys.shape[1:]), float("nan")),
         values.new_full((length, *values.shape[1:]), float("nan")))
        for _ in range(model.num_layers)
    ]  # fmt: skip


def compute(
    model: SelectiveModel, ids: Sequence[int], at: torch.Tensor, stored: KeyValues
) -> torch.Tensor:
    """Logits behind the last of the tokens `at`, which alone are computed."""
    h = model.embed([ids[index] for index in at.tolist()])
    for layer in range(model.num_layers):
        h = model.layer(layer, h, at, stored)
    return model.logits(h)


def deviations(model: SelectiveModel, ids: Sequence[int], stored: KeyValues) -> torch.Tensor:
    """(T,): how far each token's stored keys and values are, in the second layer, from those that
    it has in this prompt."""
    everything = torch.arange(len(ids))
    first = [tuple(part.clone() for part in stored[0])]
    h = model.layer(0, model.embed(ids), everything, first)  # type: ignore[arg-type]
    keys, values = model.keys_values(1, h)
    off: torch.Tensor = (keys - stored[1][0]).square().sum((1, 2)) + (
        values - stored[1][1]
    ).square().sum((1, 2))
    return off


def chosen(
    choice: str, spans: Sequence[tuple[int, int]], off: torch.Tensor, number: int
) -> set[int]:
    """Tokens of the spans to compute: as many as the engine does, whatever the choice."""
    inside = [index for start, end in spans for index in range(start, end)]
    firsts = [i for start, end in spans for i in range(start, start + num_recomputed(end - start))]
    by_deviation = sorted(inside, key=lambda index: -float(off[index]))
    if choice == "none":
        return set()
    if choice == "random":
        return set(random.Random(number).sample(inside, len(firsts)))
    if choice == "first":
        return set(firsts)
    if choice == "deviation":
        return set(by_deviation[: len(firsts)])
    halves = {
        index
        for start, end in spans
        for index in range(start, start + num_recomputed(end - start) // 2)
    }
    rest = [index for index in by_deviation if index not in halves]
    return halves | set(rest[: len(firsts) - len(halves)])


def answer(
    model: SelectiveModel, ids: Sequence[int], at: torch.Tensor, stored: KeyValues,
    stop_ids: Sequence[int], new: int,
) -> list[int]:  # fmt: skip
    """The greedy answer where the tokens `at` of the prompt are computed, the others stored."""
    logits = compute(model, ids, at, stored)
    text = list(ids)
    while len(text) < len(ids) + new and (token := int(logits.argmax())) not in stop_ids:
        text.append(token)
        for layer, parts in enumerate(stored):
            keys, values = (torch.cat((part, part[:1])) for part in parts)
            stored[layer] = (keys, values)
        logits = compute(model, text, torch.tensor([len(text) - 1]), stored)
    return text[len(ids) :]


@torch.inference_mode()
def measure(questions: int, new: int) -> dict[str, dict[str, float]]:
    settings = Settings(dtype="float32", passage_reuse="approximate")
    generator: Any = load_generator(settings)
    model = SelectiveModel(load_model(BUNDLED_READER, "bundled", torch.float32))
    asked = asked_of_handbook()[:questions]
    answers: dict[str, list[str]] = {name: [] for name in ("exact", *CHOICES)}
    shares: list[float] = []

    def written(words: str, hits: list[Hit]) -> tuple[Prompt, list[int], list[tuple[int, int]]]:
        prompt = build_prompt(
            words, hits, layout="reader", budget=3500, count_tokens=generator.count_tokens
        )
        spans = [span for span in generator._format.passages(prompt) if span[1] - span[0] >= SHORTEST]
        return prompt, list(generator.encode(prompt)), spans

    for number, (question, _) in enumerate(asked):
        hits = [Hit(Chunk("a.md", text, 0, len(text)), 1.0) for text in around(asked, number)]
        _, ids, spans = written(asked[number - 1][0], hits)
        stored = nothing_stored(model, len(ids))
        compute(model, ids, torch.arange(len(ids)), stored)
        kept = {tuple(ids[start:end]): start for start, end in spans}
        _, moved, spans = written(question, [hits[2], hits[0], hits[1]])
        spans = [span for span in spans if tuple(moved[slice(*span)]) in kept]
        laid = nothing_stored(model, len(moved))
        for start, end in spans:
            before = kept[tuple(moved[start:end])]
            for mine, theirs in zip(laid, stored, strict=True):
                for part, source in zip(mine, theirs, strict=True):
                    part[start:end] = source[before : before + end - start]
        off = deviations(model, moved, laid)
        inside = {index for start, end in spans for index in range(start, end)}
        shares.append(len(inside) / len(moved))
        for name in answers:
            again = inside if name == "exact" else chosen(name, spans, off, number)
            at = [index for index in range(len(moved)) if index not in inside or index in again]
            copy = [(keys.clone(), values.clone()) for keys, values in laid]
            tokens = answer(model, moved, torch.tensor(at), copy, generator.stop_ids, new)
            answers[name].append(generator._tokenizer.decode(tokens))
    exact = answers["exact"]
    return {
        name: {
            "answers": len(exact),
            "same": statistics.mean(map(str.__eq__, answers[name], exact)),
            "f1": statistics.mean(
                token_f1(ours, [theirs]) for ours, theirs in zip(answers[name], exact, strict=True)
            ),
            "share_in_passages": statistics.mean(shares),
        }
        for name in CHOICES
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=48, help="default 48")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (default 64)")
    options = parser.parse_args()
    found = measure(options.questions, options.new)
    for name, row in found.items():
        print(f"{name:28} same answer {row['same']:.1%}, F1 to the exact {row['f1']:.3f}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
