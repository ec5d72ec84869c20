"""A LoRA adapter on the disk: what it was trained on top of, and its merging into those weights.

LoRA (Hu et al., 2021) adds B A to frozen matrices W. The product has W's own shape, so it is added
once at loading, W + (alpha / r) B A, and the model runs as fast as before; peft, which trained and
wrote the adapter, is not needed for that. An adapter belongs to the very weights it was trained on
(`RECORD` says which) and is refused on top of any others.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.confidence import Calibration
from rag.errors import GeneratorError

if TYPE_CHECKING:
    import torch

RECORD = "trained_on.json"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SAMPLE = 4096  # bytes read of a tensor in each of three places


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """What stands in `RECORD`. `confidence` is fitted anew, as that of the base holds for the
    base's own weights; None where the base is taken at its word, and so is the adapted model."""

    base: str
    base_fingerprint: str
    confidence: dict[str, float] | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> AdapterRecord:
    """Raises GeneratorError where the folder is no adapter of `python -m rag.finetune`."""
    if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
        raise GeneratorError(
            f"{folder} holds no LoRA adapter ({_CONFIG}, {_WEIGHTS}). Make one: python -m rag.finetune "
            "QUESTIONS.jsonl --kb DIR --out DIR"
        )
    if not (folder / RECORD).is_file():
        raise GeneratorError(
            f"{folder} has no {RECORD}, which says what weights it belongs to: it was not made by "
            "python -m rag.finetune. Merge it into its base with peft (merge_and_unload, "
            "save_pretrained) and name that folder as the generator."
        )
    try:
        fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return AdapterRecord(**fields)
    except (ValueError, TypeError) as error:
        raise GeneratorError(f"{folder / RECORD} can't be read: {error}. Train the adapter again.") from error


def read_calibration(folder: Path) -> Calibration | None:
    """How far the adapted model can be trusted; None where it is taken at its word."""
    fit = read_record(folder).confidence
    if fit is None:
        return None
    try:
        return Calibration(*(float(fit[name]) for name in ("bias", "logprob", "support", "threshold")))
    except (KeyError, TypeError, ValueError) as error:
        raise GeneratorError(
            f"{folder / RECORD} holds no readable confidence: {error!r}. Train the adapter again."
        ) from error


def weights_fingerprint(files: list[Path]) -> str:
    """16 hex digits for the tensors in safetensors files, however they are spread over these.

    Of every tensor count name, dtype, shape, and 4 KB each of its beginning, middle and end: other
    training changes nearly every number, and gigabytes are not read for it.
    """
    parts: dict[str, bytes] = {}
    for file in files:
        parts.update(_samples(file))
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(parts[name])
    return digest.hexdigest()[:16]


def _samples(file: Path) -> Iterator[tuple[str, bytes]]:
    """(name, digest of a tensor) for those in a file. The format: 8 bytes of length, JSON, data."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in tensor["data_offsets"])
            digest = hashlib.sha256(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
            for place in (start, max(start, (start + end - _SAMPLE) // 2), max(start, end - _SAMPLE)):
                stream.seek(place)
                digest.update(stream.read(min(_SAMPLE, end - place)))
            yield name, digest.digest()


def check_base(folder: Path, name: str, files: list[Path]) -> None:
    """Raise GeneratorError where the adapter in `folder` was not trained on these weights."""
    record = read_record(folder)
    found = weights_fingerprint(files)
    if found != record.base_fingerprint:
        raise GeneratorError(
            f"the adapter {folder} was trained on {record.base!r} (weights {record.base_fingerprint}), "
            f"but the generator is {name!r} (weights {found}). Set generator to {record.base!r} as it "
            "was then, or train an adapter for this one: python -m rag.finetune"
        )


def merge_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Add an adapter's products to the weights of its base, in place and in float32 arithmetic."""
    import torch
    from safetensors.torch import load_file

    scale = _read_scale(folder)
    tensors = load_file(folder / _WEIGHTS)
    places = {key.rsplit(".lora_", 1)[0] for key in tensors}
    used = 0
    with torch.no_grad():
        for place in sorted(places):
            a = tensors.get(f"{place}.lora_A.weight")  # (r, in)
            b = tensors.get(f"{place}.lora_B.weight")  # (out, r)
            if a is None or b is None or not place.startswith(_PREFIX):
                raise GeneratorError(f"{folder / _WEIGHTS}: {place} is no plain LoRA pair. Train it again.")
            try:
                weight = model.get_parameter(place.removeprefix(_PREFIX) + ".weight")  # (out, in)
            except AttributeError as error:
                raise GeneratorError(
                    f"the adapter {folder} changes {place.removeprefix(_PREFIX)}, which the model lacks."
                ) from error
            delta = scale * (b.float() @ a.float())
            if delta.shape != weight.shape:
                raise GeneratorError(
                    f"the adapter {folder} changes {place.removeprefix(_PREFIX)} by a matrix of "
                    f"{tuple(delta.shape)}, but the model's has {tuple(weight.shape)}."
                )
            weight.copy_(weight.float() + delta.to(weight.device))
            used += 2
    if used != len(tensors):
        raise GeneratorError(
            f"{folder / _WEIGHTS} holds {len(tensors)} tensors, {used} of them LoRA pairs; others can't be merged."
        )


def _read_scale(folder: Path) -> float:
    """alpha / r. Raises GeneratorError for variants of LoRA that are not merged so."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise GeneratorError(f"{folder / _CONFIG} can't be read: {error!r}. Train the adapter again.") from error
    names = ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
    others = [name for name in names if config.get(name)]
    if config.get("peft_type") != "LORA" or others:
        raise GeneratorError(
            f"{folder / _CONFIG} describes {config.get('peft_type')} {' '.join(others)}; only plain LoRA is merged."
        )
    return alpha / rank
