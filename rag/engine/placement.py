"""Where a model goes and whether it fits: device, dtype, bytes of weights, bytes of cache."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rag.engine.int8_pool import scale_dtype
from rag.engine.linear import INT4_GROUP, Bits
from rag.errors import GeneratorError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}  # computed in the dtype of "auto"

# What a forward needs beside weights and cache: activations, logits, the allocator's slack.
WORKSPACE_BYTES = 256 * 2**20


AUTO_MAP = "auto-map"  # the layers spread over all CUDA devices


def choose_device(name: str) -> torch.device:
    """The device for a setting: "auto", "auto-map" (its first), "cpu", "cuda", "cuda:1", "mps".

    Raises GeneratorError where a device is named that this machine does not offer.
    """
    if name in ("auto", AUTO_MAP):
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise GeneratorError(
            f"device {name!r} is not known. Use auto, auto-map, cpu, cuda, cuda:N or mps."
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = 0 if device.index is None else device.index
        if index >= count:
            raise GeneratorError(
                f"device {name!r} was asked for, but PyTorch {torch.__version__} sees {count} CUDA "
                "devices. Set device to auto or cpu, or install a CUDA build of PyTorch."
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise GeneratorError(
            "device 'mps' was asked for, but this machine has none. Use auto or cpu."
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype for a setting. "auto", "int8" and "int4": CUDA bfloat16 (float16 before
    Ampere), MPS float16, CPU bfloat16 where the processor multiplies it natively, else float32."""
    if name not in ("auto", *WEIGHT_BITS):
        if name not in DTYPES:
            known = ", ".join(("auto", *WEIGHT_BITS, *DTYPES))
            raise GeneratorError(f"dtype {name!r} is not one of {known}.")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.bfloat16 if cpu_has_fast_bfloat16() else torch.float32


def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products (AVX512-BF16 or AMX)."""
    # torch.cpu.get_capabilities is recent; without it the answer is the slower, safer float32.
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return False
    found = capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def free_bytes(device: torch.device) -> int:
    """Memory that a new model can take on `device`, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return _free_host_bytes()


def mapped_devices(name: str, device: torch.device) -> list[torch.device]:
    """The devices that a setting spreads the layers over: the chosen one, or with "auto-map" all of
    CUDA's. Raises GeneratorError where the package that spreads them is missing."""
    if name != AUTO_MAP or device.type != "cuda":
        return [device]
    if importlib.util.find_spec("accelerate") is None:
        raise GeneratorError(
            "device 'auto-map' needs the package accelerate. Run: pip install 'local-rag[multi-gpu]'"
        )
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def memory_shares(free: Sequence[int], cache_bytes: int) -> dict[int, int]:
    """The bytes of weights that each CUDA device may take, so that its layers' share of the cache
    and its workspace stay free."""
    share = -(-cache_bytes // len(free))
    return {index: max(0, size - share - WORKSPACE_BYTES) for index, size in enumerate(free)}


def check_map(device_map: Mapping[str, Any], name: str) -> None:
    """Raise GeneratorError where layers went to the disk or, beside GPUs, to the host's memory:
    they would be carried to a GPU again for every token."""
    places = {str(place) for place in device_map.values()}
    if "disk" in places or (len(places) > 1 and "cpu" in places):
        outside = sum(str(place) in ("disk", "cpu") for place in device_map.values())
        raise GeneratorError(
            f"{name} does not fit on the GPUs: {outside} of {len(device_map)} parts would lie "
            "outside of them. Choose a smaller model, or a smaller max_prompt_tokens."
        )


def _free_host_bytes() -> int:
    limits: list[int] = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    # A container's own limit does not show in /proc/meminfo.
    cgroup = Path("/sys/fs/cgroup")
    try:
        maximum = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        if maximum != "max":
            used = int((cgroup / "memory.current").read_text(encoding="ascii"))
            limits.append(max(0, int(maximum) - used))
    except OSError:  # no cgroup v2 here: the machine's own figure stands
        pass
    if limits:
        return min(limits)
    if platform.system() == "Windows":
        return _free_windows_bytes()
    # macOS: pages are given back under pressure, so the installed memory is the honest bound.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_windows_bytes() -> int:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page_total", "page_free", "v_total", "v_free", "v_extra")
        ]

    status = MemoryStatus()
    status.length = ctypes.sizeof(status)
    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009  (absent from other systems' stubs)
    kernel.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.free)


def count_weights(files: Sequence[Path]) -> int:
    """Parameters in safetensors files, read from their headers alone.

    Raises GeneratorError where a file is cut off or not safetensors.
    """
    total = 0
    for path in files:
        for tensor in _read_header(path).values():
            size = 1
            for length in tensor["shape"]:
                size *= int(length)
            total += size
    return total


def _read_header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise GeneratorError(
                f"{path} is cut off or not a safetensors file ({size} bytes). Fetch it again."
            )
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise GeneratorError(
                f"{path} is not a safetensors file: {error}. Fetch it again."
            ) from error
    header.pop("__metadata__", None)
    end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    if 8 + length + end > size:
        raise GeneratorError(
            f"{path} is cut off: {size} bytes of {8 + length + end}. Fetch it again."
        )
    return header


def weight_bytes(num_weights: int, config: Any, dtype: torch.dtype, *, bits: Bits | None) -> int:
    """Bytes that the weights take once they are loaded.

    A tied embedding is stored a second time as the output matrix where it is packed or in fewer
    bits; the output matrix takes 8 bits then, and 4-bit weights two numbers more for each group.
    """
    embedding = int(config.vocab_size * config.hidden_size)
    tied = embedding if getattr(config, "tie_word_embeddings", False) else 0
    if bits is None:
        packed = tied if dtype == torch.bfloat16 else 0
        return (num_weights + packed) * dtype.itemsize
    layers = num_weights + tied - 2 * embedding
    of_group = INT4_GROUP // 2 + 2 * dtype.itemsize if bits == 4 else INT4_GROUP
    return layers * of_group // INT4_GROUP + embedding + embedding * dtype.itemsize


def kv_bytes_per_token(config: Any, dtype: torch.dtype, *, int8: bool = False) -> int:
    """Bytes of keys and values of one token over all layers, for a transformers text config.

    2 x layers x key heads x head dimension x bytes; an upper bound where layers share their cache.
    With `int8` one byte a number and a scale for each head.
    """
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_head = head_dim + scale_dtype(dtype).itemsize if int8 else head_dim * dtype.itemsize
    return int(2 * config.num_hidden_layers * kv_heads * of_head)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model needs and what there is, in bytes. `kv_tokens` is what the cache may hold."""

    weight_bytes: int
    kv_bytes_per_token: int
    free_bytes: int
    kv_tokens: int


def plan_memory(
    *,
    name: str,
    weight_bytes: int,
    loading_bytes: int,
    dtype: str,
    bytes_per_token: int,
    needed_tokens: int,
    device: torch.device | str,
    free: int,
) -> MemoryPlan:
    """How many tokens of cache fit beside the weights: at least `needed_tokens`, and up to 32 times
    as many where that takes no more than a quarter of what is left.

    `loading_bytes` are what loading takes at its height, before the cache is made. Raises
    GeneratorError with the numbers where not even the needed tokens fit.
    """
    gib = 2**30
    if loading_bytes > free:
        raise GeneratorError(
            f"{name} does not fit on {device}: loading its weights takes {loading_bytes / gib:.2f} "
            f"GiB, {free / gib:.2f} GiB are free. Choose a smaller model, or free memory."
        )
    left = free - weight_bytes - WORKSPACE_BYTES
    if left < needed_tokens * bytes_per_token:
        cache_bytes = needed_tokens * bytes_per_token
        need = weight_bytes + WORKSPACE_BYTES + cache_bytes
        raise GeneratorError(
            f"{name} does not fit on {device}: weights {weight_bytes / gib:.2f} GiB "
            f"({dtype}), cache {cache_bytes / gib:.2f} GiB for "
            f"{needed_tokens} tokens, workspace {WORKSPACE_BYTES / gib:.2f} GiB: {need / gib:.2f} GiB "
            f"needed, {free / gib:.2f} GiB free. Choose a smaller model, a smaller dtype, kv_dtype int8, a smaller "
            "max_prompt_tokens, or free memory."
        )
    comfortable = left // 4 // max(1, bytes_per_token)
    kv_tokens = max(needed_tokens, min(32 * needed_tokens, comfortable))
    return MemoryPlan(weight_bytes, bytes_per_token, free, kv_tokens)
