"""The forward of Llama, Mistral, Qwen2 and Qwen3, over a pool of slots instead of one cache a row.

Tokens of all rows of a step stand flat behind one another; only attention knows where a row ends.
Merged projections, grouped query heads without copies, per-token positions, sliding windows; the
rotary frequencies are those that transformers computed for the config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from rag.engine.attention import SHORT_CHUNK, Chunk, attend, plan_attention
from rag.engine.decode_graph import DecodeGraphs, PaddedStep, attend_padded
from rag.engine.flash import has_flash
from rag.engine.int8_pool import Int8KVPool
from rag.engine.kvcache import Extent, KVPool
from rag.engine.linear import (
    Bits,
    FusedGate,
    Gate,
    Int4Linear,
    Int8Linear,
    MergedGate,
    PackedLinear,
    Product,
    is_packed,
    make_linear,
)
from rag.engine.norm import rms_norm, rms_norm_heads
from rag.engine.rotation import Rotation, turned

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# "dynamic" and "longrope" change the frequencies with a prompt's length, and with them every
# cached key; transformers' own forward serves those.
_STEADY_ROPES = ("default", "linear", "yarn", "llama3", "proportional")

_ROW_STEP = 16


def why_unsupported(model: Any) -> str | None:
    """None where DecoderModel can run a transformers model; else the reason, for the report."""
    if type(model).__name__ not in FAMILIES:
        return f"{type(model).__name__} is not of the Llama family"
    config = model.config
    rope = model.model.rotary_emb
    if getattr(rope, "rope_type", "default") not in _STEADY_ROPES:
        return f"RoPE type {rope.rope_type} changes with the length"
    if config.hidden_act not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    attention = model.model.layers[0].self_attn
    if rope.inv_freq.numel() * 2 != attention.head_dim:
        return "RoPE turns only a part of each head"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the weights lie on several devices"
    linears = [module for module in model.modules() if "Linear" in type(module).__name__]
    if any(type(linear) is not torch.nn.Linear for linear in linears):
        return "the weights are stored quantised"
    return None


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm: torch.Tensor
    qkv: Product
    output: Product
    post_norm: torch.Tensor
    gate: Gate
    down: Product
    window: int | None


class DecoderModel:
    """Weights taken over from a transformers model, in its dtype, on its device."""

    def __init__(self, model: Any, *, release: bool = False, bits: Bits | None = None) -> None:
        """With `release` the transformers model gives up its weights layer by layer, so that they
        are never in memory twice; it can't be used afterwards. `bits` stores all but the
        embedding in so many; the output matrix never in fewer than 8, where it costs most."""
        reason = why_unsupported(model)
        assert reason is None, reason
        config, decoder = model.config, model.model
        attention = decoder.layers[0].self_attn
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.dtype_name = f"int{bits}" if bits else str(self.dtype).removeprefix("torch.")
        self.name = type(model).__name__.removesuffix("ForCausalLM")
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.vocab_size: int = config.vocab_size
        self.eps: float = config.rms_norm_eps
        self._scale: float = attention.scaling
        self._inv_freq: torch.Tensor = decoder.rotary_emb.inv_freq.detach().float()
        self._rope_scale = float(decoder.rotary_emb.attention_scaling)
        # Blocks of queries keep the scores in the processor's cache; a GPU wants them larger.
        self._query_block = 128 if self.device.type == "cpu" else 1024
        self._flash = self.device.type == "cpu" and has_flash(self.dtype)
        self._embedding: torch.Tensor = decoder.embed_tokens.weight.detach()
        self._norm: torch.Tensor = decoder.norm.weight.detach()
        head_bias = model.lm_head.bias.detach() if model.lm_head.bias is not None else None
        self._bits = bits
        head_bits: Bits | None = 8 if bits else None
        self._head = make_linear(model.lm_head.weight.detach(), head_bias, bits=head_bits)
        if release:
            model.lm_head.weight = None
        self._graphs: DecodeGraphs | None = None
        self._norms_heads = hasattr(attention, "q_norm")
        self._head_norms = self._head_weights(decoder.layers)
        self._layers: list[Layer] = []
        for layer in decoder.layers:
            self._layers.append(self._take_layer(layer, config))
            if release:
                for module in layer.modules():
                    for name in list(module._parameters):
                        module._parameters[name] = None

    @property
    def has_windows(self) -> bool:
        """Whether some layer looks back over a part of the context only."""
        return any(layer.window is not None for layer in self._layers)

    @property
    def description(self) -> str:
        storage = {
            PackedLinear: ", prepacked weights",
            Int8Linear: ", 8-bit weights",
            Int4Linear: ", 4-bit weights",
        }
        return f"own {self.name} forward" + storage.get(type(self._layers[0].qkv), "")

    def _take_layer(self, layer: Any, config: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        if type(attention).__name__.startswith("Mistral"):
            window = getattr(config, "sliding_window", None)
        else:
            window = getattr(attention, "sliding_window", None)
        return Layer(
            input_norm=layer.input_layernorm.weight.detach(),
            qkv=self._merged(attention.q_proj, attention.k_proj, attention.v_proj),
            output=self._merged(attention.o_proj),
            post_norm=layer.post_attention_layernorm.weight.detach(),
            gate=self._gate(mlp.gate_proj, mlp.up_proj),
            down=self._merged(mlp.down_proj),
            window=window,
        )

    def _head_weights(self, layers: Any) -> torch.Tensor:
        """(layers, 2, D), float32: what queries and keys are multiplied with as they are turned:
        the weights of their norms, where a model has them, and the queries' scale."""
        scale = torch.tensor([[self._scale], [1.0]], device=self.device)
        if not self._norms_heads:
            # The same for each layer.
            return scale.expand(1, 2, self.head_dim).contiguous()
        weights = [
            torch.stack((layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight))
            for layer in layers
        ]
        return torch.stack(weights).detach().float() * scale

    def _gate(self, gate: torch.nn.Linear, up: torch.nn.Linear) -> Gate:
        if self._bits is not None or not is_packed(gate.weight):
            return MergedGate(self._merged(gate, up))
        first, second = self._merged(gate), self._merged(up)
        assert isinstance(first, PackedLinear) and isinstance(second, PackedLinear)
        return FusedGate(first, second)

    def _merged(self, *linears: torch.nn.Linear) -> Product:
        """One product in place of several that take the same input."""
        weight = torch.cat([linear.weight.detach() for linear in linears])
        if all(linear.bias is None for linear in linears):
            return make_linear(weight, bits=self._bits)
        biases = [
            weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
            for linear in linears
        ]
        return make_linear(weight, torch.cat(biases), bits=self._bits)

    def new_pool(self, capacity: int, *, int8: bool = False) -> KVPool:
        """A pool that fits this model; with `int8` it stores keys and values in 8 bits."""
        return (Int8KVPool if int8 else KVPool)(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def decoding_graphs(self, pool: KVPool, *, capture: bool) -> None:
        """From now on take decoding steps over `pool`, whose last slot nobody else may use, at
        fixed sizes. Does nothing for a model with sliding windows."""
        if not self.has_windows:
            self._graphs = DecodeGraphs(self._decode_padded, pool, capture=capture)

    def _decode_padded(self, step: PaddedStep, pool: KVPool) -> torch.Tensor:
        """Logits (B, vocabulary), float32. Nothing here depends on what the tensors hold."""
        rotation = self._rotation(step.positions)
        x = self._embedding[step.ids]
        for index, layer in enumerate(self._layers):
            h = rms_norm(x, layer.input_norm, self.eps)
            queries = self._project(layer, index, h, rotation, step.written, pool)
            mixed = attend_padded(queries, pool, index, step).transpose(0, 1)
            x = self._mix(layer, x, mixed.reshape(len(x), -1))
        last = rms_norm(x, self._norm, self.eps)
        logits: torch.Tensor = self._head(last).float()
        return logits

    def turn_keys(self, keys: torch.Tensor, by: int) -> torch.Tensor:
        """Keys (..., tokens, D) as they would be `by` positions further on."""
        angles = by * torch.cat((self._inv_freq, self._inv_freq)).to(keys.device)
        numbers = keys.float()
        first, second = numbers.chunk(2, -1)
        turned = numbers * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
        return turned.to(keys.dtype)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], pool: KVPool) -> torch.Tensor:
        """Compute the chunks, store their keys and values in the pool.

        Returns the logits (sum of num_logits, vocabulary), float32, chunk by chunk in the order
        given.
        """
        if self._graphs is not None:
            logits = self._graphs.run(chunks, lambda: self._forward(chunks, pool))
            if logits is not None:
                return logits
        return self._forward(chunks, pool)

    def _forward(self, chunks: Sequence[Chunk], pool: KVPool) -> torch.Tensor:
        plan = plan_attention(
            chunks,
            windows=[layer.window for layer in self._layers],
            query_block=self._query_block,
            device=self.device,
            flash=self._flash,
        )
        ordered = [chunks[index] for index in plan.order]
        tokens = [token for chunk in ordered for token in chunk.tokens]
        positions = flat_positions(ordered)
        slots = new_slots(ordered, self.device)
        places = torch.tensor(positions, dtype=torch.float32, device=self.device)
        rotation = self._rotation(places)
        # Rows that nobody reads: see KVPool.padding. Few rows come in few numbers anyway, and a
        # kernel for many takes longer to multiply a row than to be built.
        padded = len(tokens)
        if padded > SHORT_CHUNK and pool.padding > 1:
            padded = -(-padded // _ROW_STEP) * _ROW_STEP
        ids = torch.tensor(tokens + [0] * (padded - len(tokens)), device=self.device)
        x = self._embedding[ids]  # (T padded, hidden)
        for index, layer in enumerate(self._layers):
            h = rms_norm(x, layer.input_norm, self.eps)
            queries = self._project(layer, index, h, rotation, slots, pool)
            mixed = attend(queries, pool, index, plan.groups[layer.window])  # (T, heads * D)
            if padded > len(tokens):
                mixed = F.pad(mixed, (0, 0, 0, padded - len(tokens)))
            x = self._mix(layer, x, mixed)
        return self._logits(x, ordered, plan.order)

    def _mix(self, layer: Layer, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """What comes behind attention: (T, hidden) with (T, heads * D) -> (T, hidden)."""
        x = layer.output.plus(mixed, x)
        h = rms_norm(x, layer.post_norm, self.eps)
        return layer.down.plus(layer.gate(h), x)

    def _project(
        self,
        layer: Layer,
        index: int,
        h: torch.Tensor,
        rotation: Rotation,
        slots: torch.Tensor | Extent,
        pool: KVPool,
    ) -> torch.Tensor:
        """Store keys and values; return queries (kv heads, T, heads of a group, D), scaled; they
        lie token by token."""
        count = self.num_heads + self.num_kv_heads
        length = len(rotation)
        qkv = layer.qkv(h).view(h.shape[0], -1, self.head_dim)  # (T, heads + 2 kv heads, D)
        qkv = qkv[:length]
        qk = rms_norm_heads(qkv, count, self.eps) if self._norms_heads else qkv[:, :count]
        straight, crossed = rotation.of(index)
        keys = turned(qk[:, self.num_heads :], straight[1], crossed[1])
        pool.write(index, slots, keys, qkv[:, count:])
        queries = turned(qk[:, : self.num_heads], straight[0], crossed[0])
        return queries.view(length, self.num_kv_heads, -1, self.head_dim).transpose(0, 1)

    def _rotation(self, positions: torch.Tensor) -> Rotation:
        """For positions (T,), float32."""
        angles = positions[:, None] * self._inv_freq  # (T, D / 2)
        cos, sin = angles.cos() * self._rope_scale, angles.sin() * self._rope_scale
        return Rotation(cos, sin, self._head_norms, self.dtype)

    def _logits(
        self, x: torch.Tensor, ordered: Sequence[Chunk], order: Sequence[int]
    ) -> torch.Tensor:
        rows = wanted_rows(ordered, order)
        if not rows:
            return torch.empty(0, self.vocab_size, device=self.device)
        last = x[torch.tensor(rows, device=self.device)]
        last = rms_norm(last, self._norm, self.eps)
        logits: torch.Tensor = self._head(last).float()
        return logits


def flat_positions(chunks: Sequence[Chunk]) -> list[int]:
    """The position of every token of the step, for RoPE."""
    return [chunk.position + chunk.turn + n for chunk in chunks for n in range(len(chunk.tokens))]


def new_slots(chunks: Sequence[Chunk], device: torch.device) -> torch.Tensor | Extent:
    """Where the step's keys go: an extent where they are neighbours, else every slot."""
    extents: list[Extent] = []
    for chunk in chunks:
        left = len(chunk.tokens)
        own: list[Extent] = []
        for start, end in reversed(chunk.extents):
            taken = min(left, end - start)
            own.append((end - taken, end))
            left -= taken
            if not left:
                break
        extents.extend(reversed(own))
    if len(extents) == 1:
        return extents[0]
    listed = [slot for start, end in extents for slot in range(start, end)]
    return torch.tensor(listed, device=device)


def wanted_rows(ordered: Sequence[Chunk], order: Sequence[int]) -> list[int]:
    """Rows of the step whose logits are wanted, chunk by chunk in the caller's order."""
    wanted: dict[int, range] = {}
    end = 0
    for index, chunk in zip(order, ordered, strict=True):
        end += len(chunk.tokens)
        wanted[index] = range(end - chunk.num_logits, end)
    return [row for index in sorted(wanted) for row in wanted[index]]
