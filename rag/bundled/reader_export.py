"""Write a trained reader as a folder any causal LM is loaded from, with its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rag.bundled.reader_model import TRAINING_ONLY, ReaderConfig
from rag.bundled.reader_tokenizer import wrap_tokenizer

SHARD_BYTES = 15_000_000  # a file above 16 MB is refused by some hosts of source code


def export_weights(tensors: dict[str, Tensor], config: ReaderConfig, out: Path) -> None:
    """config.json, generation_config.json and bfloat16 safetensors shards with their index.

    The embedding matrix is the output matrix too and is written once.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    kept = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in tensors.items()
        if name not in TRAINING_ONLY
    }
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in kept.items():
        size = tensor.numel() * 2
        if held + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(t.numel() * 2 for t in kept.values())
    write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": index},
    )
    write_json(out / "config.json", config.to_transformers())
    write_json(
        out / "generation_config.json",
        {"do_sample": False, "eos_token_id": 4, "pad_token_id": 5, "max_new_tokens": 64},
    )


def export_tokenizer(tokenizer: Any, out: Path) -> None:
    """tokenizer.json and its configuration with the chat template in it."""
    wrap_tokenizer(tokenizer).save_pretrained(str(out))
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # the template inside the configuration is what every version of transformers reads
    template = out / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf8")
        template.unlink()
    write_json(path, settings)


def write_json(path: Path, content: object) -> None:
    """`content` as readable JSON that ends with a line break."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf8")


def draw_curve(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x_label: str
) -> str:
    """A line chart as SVG text; `series` maps a name to its points. The y axis starts at 0."""
    width, height, left, top, right, bottom = 760, 360, 50, 40, 150, 40
    points = [point for line in series.values() for point in line]
    most_x = max((x for x, _ in points), default=1.0) or 1.0
    most_y = max((y for _, y in points), default=1.0) or 1.0
    wide, high = width - left - right, height - top - bottom

    def at(x: float, y: float) -> tuple[float, float]:
        return left + wide * x / most_x, top + high * (1 - y / most_y)

    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">{title}</text>',
        f'<text x="{left + wide / 2:.0f}" y="{height - 8}" text-anchor="middle">{x_label}</text>',
    ]
    for tick in range(5):
        x, y = at(most_x * tick / 4, most_y * tick / 4)
        base = top + high
        parts += [
            f'<line x1="{left}" y1="{y:.1f}" x2="{left + wide}" y2="{y:.1f}" stroke="#ddd"/>',
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most_y * tick / 4:.1f}</text>',
            f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{most_x * tick / 4:.0f}</text>',
        ]
    for number, (name, line) in enumerate(series.items()):
        colour = colours[number % len(colours)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{left + wide + 10}" y="{top + 16 + 18 * number}" fill="{colour}">{name}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"
