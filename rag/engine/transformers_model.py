"""Any causal LM whose attention transformers lets us replace: its own forward, our pool of slots.

The tokens of all rows go through `model.forward` as one flat row; the attention that is plugged in
stores their keys and values in the pool and reads what each row may see. Whether that gives what
the model gives by itself is not assumed: it is tried on random tokens before it is used.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rag.engine.attention import Chunk, Plan, attend, plan_attention
from rag.engine.flash import has_flash
from rag.engine.int8_pool import Int8KVPool
from rag.engine.kvcache import Extent, KVPool
from rag.engine.model import flat_positions, new_slots, wanted_rows

ATTENTION = "rag_pool"
_UNDERSTOOD = {
    "scaling", "sliding_window", "softcap", "dropout", "is_causal", "position_ids", "use_cache",
    "output_attentions", "output_hidden_states", "cache_position", "return_dict",
}  # fmt: skip


@dataclass(slots=True)
class _Step:
    """What the plugged-in attention needs to know about the forward that is running."""

    plans: dict[torch.device, Plan]  # the same for each device that holds layers
    pool: KVPool
    slots: dict[torch.device, torch.Tensor | Extent]


@dataclass(slots=True)
class _Probe:
    """What the layers of a model ask of attention, taken down instead of computed."""

    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # heads, kv heads, dim
    windows: dict[int, int | None] = field(default_factory=dict)
    bends: bool = False  # whether a layer has a softcap
    devices: dict[int, torch.device] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


_RUNNING = threading.local()  # .step: the _Step or _Probe of this thread's forward


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, D), key and value (1, kv heads, T, D) -> (1, T, heads, D)."""
    step: _Step | _Probe = _RUNNING.step
    layer = getattr(module, "layer_idx", None)
    if isinstance(step, _Probe):
        _take_down(step, layer, query, key, value, arguments)
        return query.transpose(1, 2), None
    assert isinstance(layer, int)
    kv_heads, length, dim = key.shape[1:]
    step.pool.write(layer, step.slots[key.device], key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = dim**-0.5 if scaling is None else scaling
    # (heads, T, D) -> (kv heads, T, heads of a group, D)
    grouped = (query[0] * scale).unflatten(0, (kv_heads, -1)).transpose(1, 2)
    groups = step.plans[key.device].groups[arguments.get("sliding_window")]
    mixed = attend(grouped, step.pool, layer, groups, softcap=arguments.get("softcap"))
    return mixed.view(1, length, -1, dim), None


def _take_down(
    probe: _Probe,
    layer: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    arguments: dict[str, Any],
) -> None:
    if layer is None or layer in probe.shapes:
        probe.problems.append("its attention layers are not numbered")
        return
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        probe.problems.append("keys and values differ in shape")
    for name, argument in arguments.items():
        told = argument is not None and argument is not False
        if name not in _UNDERSTOOD and told and not callable(argument):
            probe.problems.append(f"its attention takes {name}")
    probe.shapes[layer] = (query.shape[1], key.shape[1], key.shape[3])
    probe.windows[layer] = arguments.get("sliding_window")
    probe.bends = probe.bends or arguments.get("softcap") is not None
    probe.devices[layer] = key.device


def _no_mask(*_: Any, **__: Any) -> None:
    """The plan of a step says what each token sees; a mask would only be thrown away."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class Unsupported(Exception):
    """Why a model can't run on the pool; the engine then takes the slot-by-slot way."""


class TransformersModel:
    """A transformers model over a pool. Same calls as DecoderModel. The model belongs to the engine
    from then on: called by itself it would miss its attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises Unsupported, with the model as it was."""
        self._model = model
        config = model.config.get_text_config(decoder=True)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.dtype_name = str(model.dtype).removeprefix("torch.")
        self.vocab_size: int = config.vocab_size
        count = len({parameter.device for parameter in model.parameters()})
        spread = f", spread over {count} devices" if count > 1 else ""
        self.description = f"transformers forward of {type(model).__name__} over the pool{spread}"
        parameters = inspect.signature(model.forward).parameters
        self._selects = "logits_to_keep" in parameters
        self._query_block = 128 if self.device.type == "cpu" else 1024
        if "position_ids" not in parameters:
            raise Unsupported("its forward takes no positions")
        rope = getattr(config, "rope_parameters", None) or {}
        if "dynamic" in str(rope) or "longrope" in str(rope):
            raise Unsupported("its RoPE changes with the length")
        plain = model.config._attn_implementation
        if plain == ATTENTION:  # a second engine over one model
            plain = "eager"
        try:
            model.set_attn_implementation(ATTENTION)
            self._read_layers(config)
            self._compare(plain)
        except Unsupported:
            model.set_attn_implementation(plain)
            raise
        except Exception as error:  # whatever a forward of unknown make may raise
            model.set_attn_implementation(plain)
            raise Unsupported(f"its attention can't be replaced ({error})") from error

    @property
    def has_windows(self) -> bool:
        """Whether some layer looks back over a part of the context only."""
        return any(window is not None for window in self._windows)

    def new_pool(self, capacity: int, *, int8: bool = False) -> KVPool:
        """A pool that fits this model; with `int8` it stores keys and values in 8 bits."""
        return (Int8KVPool if int8 else KVPool)(
            num_layers=self._num_layers,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self._devices,
        )

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], pool: KVPool) -> torch.Tensor:
        """As DecoderModel.forward: logits (sum of num_logits, vocabulary), float32."""
        plans = {
            device: plan_attention(
                chunks,
                windows=self._windows,
                query_block=self._query_block,
                device=device,
                flash=self._flash,
            )
            for device in dict.fromkeys(self._devices)
        }
        plan = plans[self._devices[0]]  # they differ only in where they lie
        ordered = [chunks[index] for index in plan.order]
        tokens = [token for chunk in ordered for token in chunk.tokens]
        rows = wanted_rows(ordered, plan.order)
        slots = {device: new_slots(ordered, device) for device in plans}
        _RUNNING.step = _Step(plans, pool, slots)
        try:
            logits = self._run(tokens, flat_positions(ordered), rows or [0])
        finally:
            del _RUNNING.step
        return logits[: len(rows)]

    def _run(self, tokens: list[int], positions: list[int], rows: list[int]) -> torch.Tensor:
        at = torch.tensor(rows)  # on the CPU, from where it may index what lies on any device
        output = self._model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            **({"logits_to_keep": at} if self._selects else {}),
        )
        logits: torch.Tensor = output.logits[0]
        return (logits if self._selects else logits[at]).float().to(self.device)

    def _read_layers(self, config: Any) -> None:
        probe = _Probe()
        _RUNNING.step = probe
        try:
            with torch.inference_mode():
                self._run([1, 2, 3], [0, 1, 2], [2])
        finally:
            del _RUNNING.step
        if probe.problems:
            raise Unsupported(probe.problems[0])
        if sorted(probe.shapes) != list(range(config.num_hidden_layers)):
            raise Unsupported(f"{len(probe.shapes)} of {config.num_hidden_layers} layers attend")
        if len(set(probe.shapes.values())) > 1:
            raise Unsupported("its layers differ in their heads")
        _, self._num_kv_heads, self._head_dim = probe.shapes[0]
        self._num_layers = len(probe.shapes)
        self._devices = [probe.devices[layer] for layer in range(self._num_layers)]
        self._windows = [probe.windows[layer] for layer in range(self._num_layers)]
        on_cpu = all(device.type == "cpu" for device in self._devices)
        self._flash = on_cpu and not probe.bends and has_flash(self.dtype)
        self._check_windows(config)

    def _check_windows(self, config: Any) -> None:
        """What the config says on windows must be what attention was told: a window that only the
        mask knows of would be lost, and no short trial would show it."""
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if types is None:
            types = ["full_attention" if window is None else "sliding_attention"] * self._num_layers
            if getattr(config, "attention_chunk_size", None):
                raise Unsupported("its attention is cut into chunks")
        for kind, told in zip(types, self._windows, strict=True):
            if kind not in ("full_attention", "sliding_attention"):
                raise Unsupported(f"it has {kind} layers")
            if (window if kind == "sliding_attention" else None) != told:
                raise Unsupported("its sliding windows are in the mask only")

    def _compare(self, plain: str) -> None:
        """The trial: two prompts as rows of one step, one of them in two chunks."""
        generator = torch.Generator().manual_seed(0)
        first, second = (
            torch.randint(0, self.vocab_size, (length,), generator=generator).tolist()
            for length in (40, 23)
        )
        pool = self.new_pool(80)
        self.forward([Chunk(first[:30], 0, [(10, 40)], 0)], pool)
        found = self.forward(
            [
                Chunk(first[30:], 30, [(10, 40), (60, 70)], 10),
                Chunk(second, 0, [(40, 60), (70, 73)], 1),
            ],
            pool,
        )
        self._model.set_attn_implementation(plain)
        with torch.inference_mode():
            expected = [
                self._model(torch.tensor([ids], device=self.device), use_cache=False).logits[0]
                for ids in (first, second)
            ]
        self._model.set_attn_implementation(ATTENTION)
        wanted = torch.cat([expected[0][30:], expected[1][-1:]]).float().to(found.device)
        # Rounding differs with the order of sums; a wrong mask or scale is off by far more.
        allowed = 0.002 if self.dtype == torch.float32 else 0.05
        if not bool((found - wanted).abs().max() <= allowed * wanted.abs().max()):
            raise Unsupported("replaced attention does not give what its own gives")
