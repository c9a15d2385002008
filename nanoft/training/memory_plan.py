"""Predict the memory of a run before anything is loaded, from the model's shape and the settings.

Most of a step's memory can be counted: weights, gradients, the optimizer's moments, one chunk of logits, and the
activations kept for backward. With LoRA a block keeps

    2 hidden + 2 q + 2 k + 2 intermediate + the u of each adapter        numbers per token

(residual stream twice, queries, keys, values and the attention's output, gate and up), for Mistral-7B in bfloat16
92 KiB; a block that is recomputed keeps `hidden`, 8 KiB. What cannot be counted (memory of kernels, fragmentation of
the allocator) is a constant and a share, measured with `bench/plan.py`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoft import TrainingFailed, UserError
from nanoft.batches import Batches
from nanoft.config import Config
from nanoft.config.functions import RUN
from nanoft.config.loading import load_file
from nanoft.data.filters import prompt_lengths
from nanoft.kernels.attention import CHUNK
from nanoft.kernels.decode import MEMORY_SHARE
from nanoft.kernels.experts import MULTIPLE
from nanoft.lora import LoRALinear, inject_lora, linears_of
from nanoft.loss import CORE_CACHES, chunk_rows
from nanoft.model import NORMS, Decoder, DecoderConfig
from nanoft.models.adapter_files import vocabulary_of
from nanoft.models.expert_files import check_stacks
from nanoft.models.families import FAMILIES
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import find_adapter, is_run, read_trained_adapter, with_added_tokens
from nanoft.models.weights import add_score, choose_dequantize, grow_vocabulary
from nanoft.objectives import OBJECTIVES, trains_score
from nanoft.optim import OPTIMIZERS, check_optimizer
from nanoft.recompute import ActivationPolicy, keep_by_policy
from nanoft.runtime.device import Machine
from nanoft.runtime.memory import OutOfMemory, available_host_bytes, held_bytes, is_out_of_memory
from nanoft.training.validation import validate_config

MiB = 2**20
# What cannot be counted: bytes of kernels, caches and threads; and the number of temporary tensors of
# (tokens, intermediate) and (tokens, hidden): in backward of an MLP silu, the product, three gradients and two sums.
KERNELS, TRANSIENT = 64 * MiB, (7, 0)
# On a CPU, by the bytes of a number: larger, because the allocator cannot reuse everything that was freed.
KERNELS_CPU, TRANSIENT_CPU = {2: 110 * MiB, 4: 140 * MiB}, {2: (14, 32), 4: (10, 14)}
EXPERT_ROWS = 10  # tensors of (tokens, chosen, hidden) at once
BITSANDBYTES = 70 * MiB  # of the library itself, needed for a 4-bit base; counted on a CPU
FIRST_STEP = 40 * MiB  # of what PyTorch imports in the first backward pass of a block that is recomputed, on a CPU
ROWS = ("training.micro_batch_size", "training.gradient_accumulation_steps")


@dataclass(frozen=True)
class Plan:
    """Bytes by part, in the order of allocation, and what each block keeps for backward."""

    parts: dict[str, float]
    keep: list[ActivationPolicy]

    @property
    def peak(self) -> float:
        """The sum of the parts, except that the loss and backward through a block never exist at the same time."""
        return sum(self.parts.values()) - min(self.parts["backward"], self.parts["loss"])

    @property
    def recomputed(self) -> str:
        again = sum(one != "all" for one in self.keep)
        return f"activations of {again} of {len(self.keep)} blocks recomputed" if again else "all activations kept"


@dataclass(frozen=True)
class Counts:
    """Parameters of the model, without storage: linears of the blocks, the other weights, and what is trained."""

    linears: int
    scales: float  # bytes of the scales of packed linears
    others: int
    trained: int
    adapters: int  # numbers of the adapters: trained ones, and those that a variant keeps in addition
    ranks: float  # sum over the adapters of a block; of experts, over those that a token chooses
    active: float  # the part of `linears` that a token is multiplied by: of experts, those that it chooses
    trains_head: bool = False
    rank_warnings: tuple[str, ...] = ()  # about adapters with a higher rank than their matrix can have


def count_parameters(decoder: DecoderConfig, config: Config) -> Counts:
    """Build the model and its adapters on the `meta` device, and count their parameters."""
    with torch.device("meta"):
        model = Decoder(decoder)
    if trains_score(config):
        add_score(model)
    named = linears_of(model)
    sizes = {name: int(linear.in_features * linear.out_features) for name, linear in named.items()}
    weights, active = sum(sizes.values()), sum(size * met(decoder, name) for name, size in sizes.items())
    others = sum(p.numel() for p in model.parameters()) - weights
    block_scales = 1 + 4 / 256 if config.quantization.double else 4  # bytes
    scales = {4: weights / 64 * block_scales, 8: 4.0 * sum(int(linear.out_features) for linear in named.values())}
    if config.training.method == "full":
        return Counts(weights, 0.0, others, weights + others, 0, 0, active, not trains_score(config))
    more = range(decoder.vocab_size, decoder.vocab_size + len(config.model.add_tokens))
    lora = with_added_tokens(config.lora, more, decoder.tied)
    grow_vocabulary(model, max(decoder.vocab_size + len(more), vocabulary_of(lora, {})))
    adapters = inject_lora(model, lora, 0)
    if decoder.routing and FAMILIES[decoder.family].stacked:
        check_stacks(adapters, decoder.routing.experts)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = sum(t.numel() for adapter in adapters.values() for t in adapter.buffers(recurse=False))
    inside = {name: a for name, a in adapters.items() if isinstance(a, LoRALinear) and ".layers." in name}
    ranks = sum(len(a.factors()[0]) * met(decoder, name) for name, a in inside.items()) / decoder.num_layers
    packed, trains_head = scales.get(config.quantization.bits, 0.0), model.head.requires_grad
    return Counts(weights, packed, others, trained, trained + kept, ranks, active, trains_head, warn_of_ranks(adapters))


def met(decoder: DecoderConfig, name: str) -> float:
    """The share of tokens that a linear computes: all, or of an expert those that choose it, on average."""
    return decoder.routing.chosen / decoder.routing.experts if decoder.routing and ".experts." in name else 1.0


def mlp_widths(decoder: DecoderConfig, chosen: float = 0.0) -> list[tuple[int, float]]:
    """Of the MLP of each layer: its width, and how many such rows a token takes, of experts `chosen`."""
    r, sizes = decoder.routing, [own.intermediate_size for own in decoder.by_layer]
    return [(r.width, chosen) if r and r.layers[layer] else (size, 1.0) for layer, size in enumerate(sizes)]


def warn_of_ranks(adapters: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Warn of adapters whose rank is above that of B A (out, in), which is at most min(out, in)."""
    shapes = {name: (len(a.lora_B), *a.lora_A.shape) for name, a in adapters.items() if isinstance(a, LoRALinear)}
    above = [(name, shape) for name, shape in shapes.items() if shape[1] > min(shape)]
    if not above:
        return ()
    name, (out, rank, inputs) = above[0]
    found = f"{rank} is more than {min(out, inputs)}, the full rank of {name} ({out} x {inputs})"
    return (f"lora.rank: {found}, as for {len(above)} of {len(shapes)} adapters: lower it",)


def estimate_memory(
    decoder: DecoderConfig, counts: Counts, config: Config, device_type: str, dtype: torch.dtype,
    rows: int, length: int, keep: Sequence[ActivationPolicy], baseline: float, target_share: float = 1.0,
) -> Plan:  # fmt: skip
    """The memory that one micro-batch of rows x length tokens takes in training.

    Args:
        keep: what each block keeps, as in Decoder.activation_policy.
        baseline: bytes of the process before anything is loaded, on a CPU.
        target_share: share of the tokens that are targets.
    """
    full, e = config.training.method == "full", dtype.itemsize
    copied = bool(config.lora.start_from) and OBJECTIVES[config.training.objective].learns != "turns"
    stored = 4 if full else e
    tokens = rows * length
    bits = 16 if full or config.quantization.dequantize == "cached" else config.quantization.bits
    moments = OPTIMIZERS[config.training.optimizer].bytes_per_parameter(config.training)
    cpu, r = device_type == "cpu", decoder.routing
    padding = MULTIPLE / 2 * (cpu and e < 4) / max(tokens, 1)  # rows of an expert that are no token's
    chosen = r.chosen + r.experts * padding if r else 0.0  # rows of experts for each token
    widths = mlp_widths(decoder, chosen)
    blocks = [kept_by_block(own, counts, config, e, i, widths[i][1]) * tokens for i, own in enumerate(decoder.by_layer)]
    if device_type == "cuda" and dtype != torch.bfloat16:
        blocks = [kept + copied_keys(decoder, i, length) * e * tokens for i, kept in enumerate(blocks)]
    waiting = {"input": tokens * decoder.hidden_size * e, "offloaded": 0.0}
    (wide, narrow), kernels = (TRANSIENT_CPU[e], KERNELS_CPU[e]) if cpu else (TRANSIENT, KERNELS)
    # half of the kernels are built for each shape of a matrix, and for how many tokens an expert has
    shapes = len({own.head_dim for own in decoder.by_layer}) + bool(decoder.per_layer_size) + bool(r)
    kernel_bytes = kernels * (1 + shapes) / 2 + FIRST_STEP * (cpu and set(keep) != {"all"})
    inner = max(width * n for width, n in widths) / (2 if decoder.mlp == "plain" else 1)  # without a gate half of it
    transient = (wide * inner + (narrow + EXPERT_ROWS * chosen) * decoder.hidden_size) * tokens * e
    activations = [waiting.get(one, block) for one, block in zip(keep, blocks, strict=True)]
    # a block is recomputed when what later ones kept is free again
    again = max(0.0, *((keep[i] != "all") * (block - sum(activations[i + 1 :])) for i, block in enumerate(blocks)))
    targets = tokens * (1.0 if config.training.balance_loss else target_share)  # it needs the last router everywhere
    chunk = min(chunk_rows(decoder.vocab_size, torch.device(device_type)), max(1, math.ceil(targets)))
    split = config.training.sharding == "full"
    part = 1 / config.system.ranks if split else 1.0  # of weights, gradients and moments, on each rank
    linears = counts.linears * (stored if bits == 16 else bits / 8) + counts.scales * (bits < 16)
    table, scored = decoder.vocab_size * decoder.hidden_size, trains_score(config)
    head = 0 if scored or counts.trains_head else table  # whole on each rank, if it is frozen
    lookup = 0 if full or (decoder.tied and not scored) else table  # gathered for a moment only
    gathered = 2 * linears / decoder.num_layers + stored * (counts.others - head - lookup)  # this block, the next, rest
    # of all experts at once, as one matrix of gate and up where they are one
    at_once = r.experts * (1 + (decoder.mlp != "gated")) if r and device_type == "cuda" else 1
    unpacked = at_once * decoder.hidden_size * max(width for width, _ in widths) * e * (bits < 16)  # the largest weight
    capped = decoder.attention_cap is not None  # S, P, dP and dS, and the slope of a cap: where no kernel spares them
    seen = min(length, max((window or length) for window in decoder.windows) + CHUNK) if not capped else length
    # what attention in chunks, or PyTorch's kernel, takes on a CPU is in TRANSIENT_CPU, but for caps
    chunked = device_type == "mps" or capped or (not cpu and any((w or length) < length for w in decoder.windows))
    # S, tanh, their sum, P, the slope twice, dP, dC and dS: on a CPU what is freed is hardly used again
    matrices = (10 if cpu else 5) if capped else 4
    scores = matrices * rows * decoder.num_heads * CHUNK * seen * e * chunked
    # of the logits' softmax, in float32; capped logits and their slopes, in the same rows
    softmax = CORE_CACHES if cpu else chunk * decoder.vocab_size * 4.0
    softmax += softmax / 4 * 2 * e * (decoder.logit_cap is not None)
    parts = {
        "process": baseline + kernel_bytes + BITSANDBYTES * (cpu and bits == 4),
        "linears": 2 * linears / decoder.num_layers if config.model.base_device == "host" else part * linears,
        "head, embedding": (part * counts.others + (1 - part) * head) * stored,
        "gathered": gathered * split * (2 if full else 1),  # with their gradients
        "adapters": part * 4.0 * counts.adapters,
        "reference": part * 4.0 * counts.trained * copied,  # its forward pass keeps nothing, and is over by then
        "cast weights": part * counts.linears * e if full and e < 4 else 0.0,  # for the products, by autocast
        "gradients": part * 4.0 * counts.trained,
        "optimizer": part * moments * counts.trained,
        "activations": sum(activations),
        "backward": again + transient + unpacked + scores,
        # a chunk of logits, then their gradient; the softmax; hidden states of the targets, and the gradient of these
        "loss": chunk * decoder.vocab_size * e
        + softmax
        + (2.0 * targets * e + 8.0 * tokens) * decoder.hidden_size
        # the weight in place of a frozen head; of a trained head a cast, the gradient and a chunk's (widened on a CPU)
        + counts.trains_head * table * (8.0 + (2 * e if not full else 4.0 * (cpu and e < 4))),
    }
    return Plan(parts, list(keep))


def kept_by_block(c: DecoderConfig, counts: Counts, config: Config, e: int, layer: int, rows: float) -> float:
    """Bytes per token that a block keeps for backward; `e` is the size of a number, `rows` as in `mlp_widths`."""
    full, before, after = config.training.method == "full", NORMS[c.norms][::2], NORMS[c.norms][1::2]
    mixed, outputs, normed = kept_by_mixer(c, c.mixer(layer), full)
    r, inner = c.routing, (1 if c.mlp == "plain" else 2) * mlp_widths(c)[layer][0] * rows
    both = bool(r and r.beside_mlp)  # an MLP beside experts: its input, too, and two norms before (of x) and two after
    inner += 2 * c.intermediate_size * both
    kept = (1 if c.parallel else 2) * c.hidden_size + mixed + inner + counts.ranks + c.hidden_size * both
    normed += c.hidden_size * (sum(map(bool, after)) + (4 if full else 2) * both)
    if full:  # normed inputs, silu(gate) and the product, too
        kept += 2 * c.hidden_size + inner
        normed += c.hidden_size * sum(map(bool, before))
    k, own, p = c.num_kv_heads * c.head_dim, c.source is None, c.per_layer_size
    kept -= 0 if own else k  # keys and values of another block, but for the rotation
    normed += (k * c.v_norm if own else -k * bool(c.qk_norm)) + (c.hidden_size + p) * bool(p)
    kept += (c.hidden_size + 4 * p) * bool(p)  # gate, gelu(gate), the token's own, their product, one more residual
    kept += normed * (8 // e if full else 1)  # x; in float32, with x / rms(x), for the gradient of the norm's weight
    if r and r.layers[layer]:  # rows of experts, their outputs, the normed input, what the router says
        routed = 8 if config.training.balance_loss else 4  # bytes for each expert; the loss keeps its slope
        kept += (rows + r.chosen + (4 / e if both else 1)) * c.hidden_size + (routed * r.experts + 32 * r.chosen) / e
    if config.lora.dora and config.training.method == "lora":  # each output, for the gradient of its magnitude
        kept += outputs + inner + c.hidden_size
    return float(kept * e)


def copied_keys(c: DecoderConfig, layer: int, length: int) -> int:
    """Numbers per token of the keys and values copied for each head, where PyTorch's kernel cannot share them."""
    own, in_chunks = c.by_layer[layer], c.attention_cap is not None or c.sinks or (c.windows[layer] or length) < length
    return 0 if in_chunks or c.mixer(layer) != "attention" else 2 * (own.num_heads - own.num_kv_heads) * own.head_dim


def kept_by_mixer(c: DecoderConfig, mixer: str, full: bool) -> tuple[int, int, int]:
    """Numbers per token of what lets positions see each other: kept, outputs of its linears, inputs of its
    norms."""
    q, k = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    if mixer == "short_conv":  # three projections, and what the convolution makes; its input and the product
        return (6 if full else 4) * c.hidden_size, 4 * c.hidden_size, 0
    if mixer == "deltanet" and c.delta:
        keys, values = c.delta.key_heads * c.delta.key_dim, c.delta.value_heads * c.delta.value_dim
        # before and after silu, what the state says and its gate; the convolution's input and the gated product
        qkv, other = 2 * keys + values, 5 * c.delta.value_heads  # decays in float32
        return (3 if full else 2) * qkv + (5 if full else 2) * values + other, qkv + 2 * values, values * full
    kept = 2 * q + 2 * k + 2 * q * c.gated_attention
    if c.qkv != "separate" and c.distinct_ropes:  # q and k before rotation: v is a part of the same tensor
        kept += q + k
    return kept, 2 * q + 2 * k, (q + k) * bool(c.qk_norm)


def choose_recompute(
    peak_of: Callable[[list[ActivationPolicy]], float], layers: int, room: float
) -> list[ActivationPolicy]:
    """Keep everything if that fits into `room` bytes, otherwise recompute as few blocks as make it fit."""
    for again in range(layers):
        keep: list[ActivationPolicy] = [*["input"] * again, *["all"] * (layers - again)]  # type: ignore[list-item]
        if peak_of(keep) <= room:
            break
    return keep


def choose_rows(peak_of: Callable[[int], float], step_rows: int, room: float) -> int:
    """The largest divisor of a step's rows that fits as a micro-batch into `room` bytes; a UserError if none does."""
    fitting = [rows for rows in range(1, step_rows + 1) if step_rows % rows == 0 and peak_of(rows) <= room]
    if not fitting:
        sizes = f"one sequence takes {peak_of(1) / 1e9:.2f} GB, but only {room / 1e9:.2f} GB are free"
        raise UserError(f"model.max_seq_length: {sizes}: lower it, or set quantization.bits=4")
    return fitting[-1]


@dataclass(frozen=True)
class Planner:
    """The memory of a config on a machine, from the shape of its model."""

    config: Config
    machine: Machine
    decoder: DecoderConfig
    counts: Counts

    @classmethod
    def of(cls, config: Config, machine: Machine, decoder: DecoderConfig) -> Planner:
        OBJECTIVES[config.training.objective].check(config)
        if (alpha := config.training.balance_loss) and not decoder.routing:
            raise UserError(f"training.balance_loss: {alpha}: the model has no experts: remove it")
        return cls(config, machine, decoder, count_parameters(decoder, config))

    @property
    def unit_size(self) -> int:
        """Sequences of a unit of training: two of a preference pair."""
        return 2 if OBJECTIVES[self.config.training.objective].learns == "pairs" else 1

    def plan(self, rows: int, length: int, keep: list[ActivationPolicy]) -> Plan:
        """The memory of a step with micro-batches of rows x length tokens, and what each block keeps for backward."""
        device, settled = self.machine.device, decide_dequantize(self.config, self.counts, self.machine)
        baseline, dtype = held_bytes(device) if device.type == "cpu" else 0.0, self.machine.dtype
        sizes = self.decoder, self.counts, settled, device.type, dtype, rows, length, keep, baseline
        plan = estimate_memory(*sizes, float(not trains_score(self.config)))
        if not self.config.sampled_tokens and not self.config.distill.teacher:
            return plan
        plan = replace(plan, parts={**plan.parts, "other models": self.other_models})
        held = plan.parts["activations"] + max(plan.parts["backward"], plan.parts["loss"])  # which sampling does not
        sampling = self.sampling_bytes(length, settled, self.machine.room_bytes - plan.peak + held)
        return replace(plan, parts={**plan.parts, "sampling": max(0.0, sampling - held)})

    def sampling_bytes(self, length: int, settled: Config, room: float) -> float:
        """Keys and values of the answers of a step, in buffers of the final size, and of each prompt once (without
        copies that are too small to avoid: nanoft/generation/decode.py, WORTH_SHARING); logits.

        If there is room, also copies of the weights: unpacked, or on a CPU in another order (nanoft/kernels/decode.py).
        """
        if not self.config.sampled_tokens:
            return 0.0
        c, e, answers = self.decoder, self.machine.dtype.itemsize, self.config.effective_batch_size()
        new, group = self.config.sampled_tokens, self.config.rl.group_size if self.config.rl.reward else 1
        slots = 2.0 * sum(o.num_kv_heads * o.head_dim for o in c.by_layer if o.source is None) * e
        slots *= new + (length - new) / group  # of an answer, and its part of the prompt
        # in float32: logits, at a temperature, their softmax and its sums; with top_p also sorted
        logits = c.vocab_size * (16.0 + 16.0 * (self.config.rl.top_p < 1))
        needed = answers / self.config.system.ranks * (slots + logits)
        if self.config.model.base_device == "host":
            return needed
        is_packed = settled.quantization.bits < 16 and settled.quantization.dequantize != "cached"
        copied = self.counts.linears + (0 if is_packed else c.vocab_size * c.hidden_size)
        copies = copied * e * (is_packed or self.machine.device.type == "cpu")
        return needed + (copies if copies <= MEMORY_SHARE * room and needed + copies <= room else 0.0)

    @functools.cached_property
    def other_models(self) -> float:
        """Bytes of a teacher and of reward models; a teacher that shares the policy's base takes none."""
        d, own, total = self.config.distill, (self.config.model.reference, self.config.quantization.bits), 0.0
        runs = [name.removeprefix(RUN) for name in self.config.rl.reward if name.startswith(RUN)]
        for source in [*runs, *filter(None, [d.teacher])]:
            of_run = load_file(Path(source) / "config.json") if is_run(source) else None
            name, bits = (of_run.model.reference, of_run.quantization.bits) if of_run else (source, d.teacher_bits)
            if find_adapter(source) and not of_run:
                name, bits = read_trained_adapter(source).base_name, own[1]
            if (name, bits) == own and source == d.teacher:
                continue
            counts = count_parameters(ModelFiles.find(name).decoder, self.config.override(quantization={"bits": bits}))
            e, is_packed = self.machine.dtype.itemsize, bits < 16
            total += counts.linears * (bits / 8 if is_packed else e) + counts.scales * is_packed + counts.others * e
        return total

    def resolved(self, recorded: dict[str, Any] | None) -> Planner:
        """The planner with what model.base_device=auto and training.micro_batch_size=auto stand for."""
        placed = replace(self, config=resolve_base_device(self))
        return replace(placed, config=resolve_micro_batch_size(placed, recorded))

    def longest_shape(self, batches: Batches) -> tuple[int, int]:
        """Rows and tokens of the micro-batch that needs the most memory."""
        rows, length = batches.longest().ids.shape
        if more := self.config.sampled_tokens:
            longest, packed = int(prompt_lengths(batches.samples).max()) + more, self.config.data.packing
            return batches.micro_batch_size, self.config.model.max_seq_length if packed else longest
        return rows, length

    def keep_by(self, policy: str) -> list[ActivationPolicy]:
        """What each block keeps under a policy of training.checkpointing; for auto, under the most frugal policy."""
        policy = "full" if policy == "auto" else policy
        return keep_by_policy(policy, self.config.training.checkpoint_every, self.decoder.num_layers)

    def choose_activations(self, rows: int, length: int) -> Plan:
        """The plan under training.checkpointing; with auto, as few blocks as possible are recomputed."""
        policy = self.config.training.checkpointing
        if policy != "auto" or self.config.model.base_device == "host":
            return self.plan(rows, length, self.keep_by(policy))
        room, layers = self.machine.room_bytes, self.decoder.num_layers
        return self.plan(rows, length, choose_recompute(lambda keep: self.plan(rows, length, keep).peak, layers, room))


def decide_dequantize(config: Config, counts: Counts, machine: Machine) -> Config:
    """Replace quantization.dequantize=auto by the choice that loading the base will make."""
    e = machine.dtype.itemsize
    packed = counts.linears * config.quantization.bits / 8 + counts.scales
    left, extra = machine.memory_bytes - packed - counts.others * e, counts.linears * e - packed
    kind = "cpu" if config.model.base_device == "host" else machine.device.type  # where the weights are
    chosen = choose_dequantize(config.quantization.dequantize, kind, int(extra), int(left))
    return config.override({"quantization.dequantize": chosen})


def resolve_base_device(planner: Planner) -> Config:
    """model.base_device=auto replaced by host where a GPU has no room for the base, but the host has."""
    config, machine = planner.config, planner.machine
    if config.model.base_device == "host" and machine.device.type == "mps":
        raise UserError("model.base_device: host: an Apple GPU shares its memory with the host: remove it")
    with contextlib.suppress(UserError):  # what host excludes
        on_host = config.override({"model.base_device": "host"})
        sizes = planner.unit_size, config.model.max_seq_length, planner.keep_by("full")
        here, there = planner.plan(*sizes).peak, replace(planner, config=on_host).plan(*sizes).peak
        has_room = host_bytes(planner) <= available_host_bytes() and there <= machine.room_bytes
        return on_host if machine.device.type == "cuda" and here > machine.room_bytes and has_room else config
    return config


def block_bytes(planner: Planner) -> float:
    """Of the frozen linears of a block, as they are stored."""
    counts, q = planner.counts, planner.config.quantization
    each = planner.machine.dtype.itemsize if q.bits == 16 or q.dequantize == "cached" else q.bits / 8
    return (counts.linears * each + counts.scales) / planner.decoder.num_layers


def host_bytes(planner: Planner) -> float:
    """Of the frozen blocks with model.base_device=host: pinned memory rounds each to a power of two."""
    return planner.decoder.num_layers * 2.0 ** math.ceil(math.log2(block_bytes(planner)))


def resolve_micro_batch_size(planner: Planner, recorded: dict[str, Any] | None) -> Config:
    """Replace training.micro_batch_size=auto by the numbers recorded in config.json, or by what fits now."""
    config = planner.config
    t, ranks = config.training, config.system.ranks
    if t.micro_batch_size != "auto":
        return config
    step_rows = config.effective_batch_size() if config.rl.reward else t.gradient_accumulation_steps
    rows_a_rank, left = divmod(step_rows, ranks)
    if left and not config.rl.reward:
        split = f"a step of {step_rows} sequences cannot be split evenly over {ranks} processes"
        raise UserError(f"training.gradient_accumulation_steps: {split}: set it to {ranks * max(rows_a_rank, 1)}")
    if recorded is not None and recorded["system"].get("ranks", 1) == ranks:
        before = {name: recorded["training"][name.removeprefix("training.")] for name in ROWS}
        is_same_step = config.rl.reward or math.prod(before.values()) * ranks == step_rows
        other = (1, rows_a_rank)  # a step of another size, which check_same_run refuses
        return config.override(before if is_same_step else dict(zip(ROWS, other, strict=True)))
    length, keep, size = config.model.max_seq_length, planner.keep_by(t.checkpointing), planner.unit_size
    rows = choose_rows(lambda n: planner.plan(n * size, length, keep).peak, rows_a_rank, planner.machine.room_bytes)
    return config.override(dict(zip(ROWS[: 1 if config.rl.reward else 2], (rows, rows_a_rank // rows), strict=False)))


def describe_streaming(planner: Planner) -> str:
    """What model.base_device=host takes, and copies to the device in a step of training."""
    copies = 2 * max(0, planner.decoder.num_layers - 2) * planner.config.training.gradient_accumulation_steps
    copied = f"{copies * block_bytes(planner) / 1e9:,.1f} GB copied from there per step"
    return f"{host_bytes(planner) / 1e9:9.3f} GB of frozen blocks in host memory; {copied}"


@contextlib.contextmanager
def explained_out_of_memory(planner: Planner) -> Iterator[None]:
    """Turn out-of-memory errors that halving cannot solve, and compiler errors, into one line with a fix."""
    try:
        yield
    except (RuntimeError, MemoryError, OutOfMemory) as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(planner, planner.config.micro_batch_rows()) from None
        if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # importing it takes seconds
            reason = str(error).strip().partition("\n")[0]
            fix = "install a working compiler (CXX names it), or set training.compile=false"
            raise UserError(f"training.compile: {reason}: {fix}") from None
        raise


def out_of_memory_error(planner: Planner, rows: int) -> TrainingFailed:
    savings = suggest_savings(planner, rows, planner.config.model.max_seq_length)
    return TrainingFailed(f"out of memory with micro-batch size {rows}: try {savings}")


def suggest_savings(planner: Planner, rows: int, length: int) -> str:
    """The three changes that lower the planned peak most, and by how much."""
    config = planner.config
    changes: dict[str, Any] = {"model.max_seq_length": length // 2, "training.micro_batch_size": rows // 2}
    changes |= {"training.checkpointing": "full", "training.optimizer": "adamw_8bit"}
    smaller = {"quantization.bits": 4, "lora.rank": config.lora.rank // 2, "lora.target_modules": "attention"}
    changes |= {"training.method": "lora"} if config.training.method == "full" else smaller
    before, saved = planner.choose_activations(rows, length), {}
    for name, value in changes.items():
        with contextlib.suppress(UserError):  # out of range (half a row), or not on this device
            changed = Planner.of(config.override({name: value}), planner.machine, planner.decoder)
            validate_config(changed.config)
            check_optimizer(changed.config.training.optimizer, planner.machine.device)
            size = min(rows, changed.config.micro_batch_rows()), min(length, changed.config.model.max_seq_length)
            # the freed memory is not spent on keeping more activations
            keep = planner.keep_by("full") if name == "training.checkpointing" else before.keep
            saved[f"{name}={value}"] = before.peak - changed.plan(*size, keep).peak
    best = sorted((name for name in saved if saved[name] > 0), key=lambda name: -saved[name])[:3]
    suggestions = (f"{name} (saves about {saved[name] / 1e9:.3g} GB)" for name in best)
    return ", or ".join(suggestions) or "model.name to a smaller model"
