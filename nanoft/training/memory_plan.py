"""Memory and time of a run before anything is loaded: by arithmetic from the model's shape and the settings.

Most of what a step takes can be counted: the frozen weights; adapters with their gradients and the optimizer's moments;
the activations that backward waits for, so many numbers a token and layer; one chunk of logits. With LoRA a block keeps

    2 hidden + 2 q + 2 k + 2 intermediate + the u of each adapter        numbers a token

(residual stream twice, queries, keys, values and the attention's output, gate and up), for Mistral-7B in bfloat16
92 KiB; a block that is computed again keeps `hidden`, 8 KiB. What cannot be counted, the memory of kernels and what an
allocator cannot use again, is a constant and a share, measured with `bench/plan.py`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanoft import TrainingFailed, UserError
from nanoft.config import Config
from nanoft.kernels.attention import CHUNK
from nanoft.lora import inject_lora, linears_of
from nanoft.loss import chunk_rows
from nanoft.model import Decoder, DecoderConfig
from nanoft.models.dequantize import choose_dequantize
from nanoft.models.families import find_shape
from nanoft.optim import OPTIMIZERS, check_optimizer
from nanoft.recompute import ActivationPolicy, keep_by_policy
from nanoft.runtime.device import DTYPES, choose_device, choose_dtype
from nanoft.runtime.memory import held_bytes, memory_limit_bytes
from nanoft.training.validation import validate_config

MiB = 2**20
# Beside what is counted: bytes that kernels, caches and threads bring, and how many tensors of (tokens, intermediate)
# backward through an MLP has at once: silu, the product, three gradients and two sums of them.
KERNELS, TRANSIENT = 64 * MiB, 7
# On a CPU, by the bytes of a number: the allocator cannot use everything again that was freed, as if there were more of
# them; measured with bench/plan.py.
KERNELS_CPU, TRANSIENT_CPU = {2: 140 * MiB, 4: 60 * MiB}, {2: 28.5, 4: 23}
BITSANDBYTES = 70 * MiB  # of the library itself, which a 4-bit base brings; counted on a CPU
MARGIN = 0.9  # of the memory that this process may have: what a plan may fill
EFFICIENCY = {"cpu": 0.5}  # of what bare matrix products reach, measured (bench/step.md); others: not measured
ROWS = ("training.micro_batch_size", "training.gradient_accumulation_steps")
ROWS_TRIED = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]


@dataclass(frozen=True)
class Plan:
    """Bytes by part, in the order in which they come, and what is at its peak when."""

    parts: dict[str, float]
    device_type: str
    rows: int
    length: int
    keep: list[ActivationPolicy]

    @property
    def peak(self) -> float:
        """Everything at once, but the loss and the backward pass through the last block come one after the other."""
        return sum(self.parts.values()) - min(self.parts["backward"], self.parts["loss"])


@dataclass(frozen=True)
class Counts:
    """Parameters of the model, without storage: linears of the blocks, the other weights, and what is trained."""

    linears: int
    scales: float  # bytes beside the codes of packed linears
    others: int
    trained: int
    ranks: int  # of all adapters of a block together


def count_parameters(decoder: DecoderConfig, config: Config) -> Counts:
    """Build the model on the `meta` device, adapters and all, and count what it has."""
    with torch.device("meta"):
        model = Decoder(decoder)
    linears = list(linears_of(model).values())
    weights = sum(int(linear.in_features * linear.out_features) for linear in linears)
    others = sum(p.numel() for p in model.parameters()) - weights
    block_scales = 1 + 4 / 256 if config.quantization.double else 4  # bytes
    scales = {4: weights / 64 * block_scales, 8: 4.0 * sum(int(linear.out_features) for linear in linears)}
    if config.training.method == "full":
        return Counts(weights, 0.0, others, weights + others, 0)
    adapters = inject_lora(model, replace(config.lora, init="default", dora=False), 0).values()
    trained = sum(p.numel() for adapter in adapters for p in adapter.parameters() if p.requires_grad)
    magnitudes = sum(adapter.base.out_features for adapter in adapters) * config.lora.dora
    ranks = sum(len(adapter.lora_A) for adapter in adapters) // decoder.num_layers
    return Counts(weights, scales.get(config.quantization.bits, 0.0), others, trained + magnitudes, ranks)


def estimate_memory(
    decoder: DecoderConfig,
    counts: Counts,
    config: Config,
    device_type: str,
    dtype: torch.dtype,
    rows: int,
    length: int,
    keep: Sequence[ActivationPolicy],
    baseline: float,
    target_share: float = 1.0,
) -> Plan:
    """What one micro-batch of rows x length tokens takes in training.

    Args:
        dtype: that the model computes in.
        keep: of each block's activations, as in Decoder.activation_policy.
        baseline: bytes of the process before anything is loaded, on a CPU.
        target_share: of the tokens that are targets.
    """
    full, e = config.training.method == "full", dtype.itemsize
    stored = 4 if full else e
    tokens = rows * length
    bits = 16 if full or config.quantization.dequantize == "cached" else config.quantization.bits
    moments = OPTIMIZERS[config.training.optimizer].bytes_per_parameter(config.training)
    block = kept_by_block(decoder, counts, config, e) * tokens
    waiting = {"all": block, "input": tokens * decoder.hidden_size * e, "offloaded": 0.0}
    cpu = device_type == "cpu"
    transient, kernels = (TRANSIENT_CPU[e], KERNELS_CPU[e]) if cpu else (TRANSIENT, KERNELS)
    again = max((block for one in keep if one != "all"), default=0.0)  # one of these at a time
    targets = tokens * target_share
    split = config.training.sharding == "full"
    part = 1 / config.system.ranks if split else 1.0  # of weights, gradients and moments, on each rank
    gathered = stored * (2 * counts.linears / decoder.num_layers + counts.others)  # this block, the next, and the rest
    parts = {
        "process": baseline + kernels + BITSANDBYTES * (cpu and bits == 4),
        "linears": part * counts.linears * (stored if bits == 16 else bits / 8) + counts.scales * (bits < 16),
        "head, embedding": part * counts.others * stored,
        "gathered": gathered * split * (2 if full else 1),  # with their gradients
        "adapters": 0.0 if full else part * 4.0 * counts.trained,
        "cast weights": part * counts.linears * e if full and e < 4 else 0.0,  # for the products, by autocast
        "gradients": part * 4.0 * counts.trained,
        "optimizer": part * moments * counts.trained,
        "activations": sum(waiting[one] for one in keep),
        "backward": again
        + transient * tokens * decoder.intermediate_size * e
        + _unpacked(decoder, bits, e)
        + (4.0 * rows * decoder.num_heads * CHUNK * length * e if device_type == "mps" else 0.0),  # S, P, dP and dS
        "loss": loss_bytes(decoder, device_type, e, targets) + 8.0 * tokens * decoder.hidden_size,
    }
    return Plan(parts, device_type, rows, length, list(keep))


def kept_by_block(c: DecoderConfig, counts: Counts, config: Config, e: int) -> float:
    """Bytes a token that a block keeps for backward; e is those of a number."""
    q, k = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    kept = 2 * c.hidden_size + 2 * q + 2 * k + 2 * c.intermediate_size + counts.ranks
    if config.training.method == "full":  # normed inputs, silu(gate) and the product, too; norms keep float32
        kept += 2 * c.hidden_size + 2 * c.intermediate_size + 4 * c.hidden_size * 4 // e
    if c.qk_norm:
        kept += (q + k) * (1 + 8 // e)
    if config.lora.dora and config.training.method == "lora":  # each output, for the gradient of its magnitude
        kept += 2 * q + 2 * k + 2 * c.intermediate_size + c.hidden_size
    return float(kept * e)


def _unpacked(c: DecoderConfig, bits: int, e: int) -> float:
    """The largest weight, unpacked for its product."""
    return float(c.hidden_size * c.intermediate_size * e) if bits < 16 else 0.0


def loss_bytes(c: DecoderConfig, device_type: str, e: int, targets: float) -> float:
    """A chunk of logits, their softmax and gradient; hidden states of the targets, and the gradient of these."""
    chunk = min(chunk_rows(c.vocab_size, torch.device(device_type)), max(1, math.ceil(targets)))
    return chunk * c.vocab_size * (2 * e + 4) + 2.0 * targets * c.hidden_size * e


# ---- Decisions


def choose_recompute(
    peak_of: Callable[[list[ActivationPolicy]], float], layers: int, room: float
) -> list[ActivationPolicy]:
    """Everything if it fits into `room` bytes; else as few blocks computed again as make it fit; at most all."""
    for again in range(layers + 1):
        keep: list[ActivationPolicy] = [*["input"] * again, *["all"] * (layers - again)]  # type: ignore[list-item]
        if peak_of(keep) <= room:
            break
    return keep


def choose_rows(peak_of: Callable[[int], float], step_rows: int, room: float) -> int:
    """The largest divisor of a step's rows that fits into `room` bytes as a micro-batch.

    Raises:
        UserError: not even one row fits.
    """
    fitting = [rows for rows in range(1, step_rows + 1) if step_rows % rows == 0 and peak_of(rows) <= room]
    if not fitting:
        raise UserError(
            f"model.max_seq_length: one row takes {peak_of(1) / 1e9:.2f} GB and {room / 1e9:.2f} GB are free: "
            "lower it, or set quantization.bits=4"
        )
    return fitting[-1]


# ---- Time


def gflop_per_token(decoder: DecoderConfig, counts: Counts, config: Config, length: int, again: float) -> float:
    """Floating-point operations of a token in training, in 10^9, if half of the tokens are targets.

    A product with n weights costs 2 n forward, 2 n for the gradient of its input, 2 n for its own if it is trained.
    Causal attention: 2 q (length + 1) forward, 2.5 times that backward.

    Args:
        again: the share of the blocks that are computed twice.
    """
    attention = 2 * decoder.num_layers * decoder.num_heads * decoder.head_dim * (length + 1)
    frozen = counts.linears * (2 + 2 + 2 * again) + attention * (3.5 + again)
    head = 0.5 * decoder.vocab_size * decoder.hidden_size
    if config.training.method == "full":
        return (frozen + 2 * counts.linears + 6 * head) / 1e9
    return (frozen + 6 * counts.trained + 4 * head) / 1e9


def matmul_gflop_s(device: torch.device, dtype: torch.dtype, inner: int, outer: int, seconds: float = 0.5) -> float:
    """What bare products x W^T reach here, x (2048, inner), W (outer, inner), in 10^9 operations a second."""
    x = torch.randn(2048, inner, device=device).to(dtype)
    weight = torch.randn(outer, inner, device=device).to(dtype)
    flop, done, started = 2 * x.numel() * len(weight), 0, 0.0
    while done < 3 or time.perf_counter() - started < seconds:
        if done == 2:  # the first ones warm up
            started = time.perf_counter()
        (x @ weight.T)[0, 0].item()  # waits for the device
        done += 1
    return (done - 2) * flop / 1e9 / (time.perf_counter() - started)


# ---- For train.py


@dataclass(frozen=True)
class Machine:
    """What a plan is for."""

    device: torch.device
    dtype: torch.dtype
    room: float  # bytes that a plan may fill
    here: bool  # or only described, by system.device and system.memory_gb


def find_machine(config: Config) -> Machine:
    """This machine, or the one that the config describes if its device is not here.

    Raises:
        UserError: the device is not here, and nothing says how much memory it has.
    """
    wanted, memory_gb = config.system.device, config.system.memory_gb
    try:
        device = choose_device(wanted)
    except UserError as error:
        if memory_gb is None:
            raise UserError(f"{error}, or give its system.memory_gb to --plan for it") from None
        dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
        return Machine(torch.device(wanted), dtype, MARGIN * memory_gb * 1e9, here=False)
    dtype = choose_dtype(config.model.dtype, device)
    return Machine(device, dtype, MARGIN * memory_limit_bytes(device), here=True)


def make_planner(config: Config) -> Callable[[int, int, list[ActivationPolicy]], Plan]:
    """From rows, their length, and what each block keeps, to the memory of a step."""
    machine, decoder = find_machine(config), find_shape(config.model.name)
    device, dtype, counts = machine.device, machine.dtype, count_parameters(decoder, config)
    settled, baseline = decide_dequantize(config, counts, machine), held_bytes(device) if device.type == "cpu" else 0.0

    def plan(rows: int, length: int, keep: list[ActivationPolicy]) -> Plan:
        return estimate_memory(decoder, counts, settled, device.type, dtype, rows, length, keep, baseline)

    return plan


def decide_dequantize(config: Config, counts: Counts, machine: Machine) -> Config:
    """Say for quantization.dequantize=auto whether the base will be unpacked once: what loading it will find."""
    e = machine.dtype.itemsize
    packed = counts.linears * config.quantization.bits / 8 + counts.scales
    left = machine.room / MARGIN - packed - counts.others * e
    extra = counts.linears * e - packed
    chosen = choose_dequantize(config.quantization.dequantize, machine.device.type, int(extra), int(left))
    return config.override({"quantization.dequantize": chosen})


def resolve_micro_batch_size(config: Config, recorded: dict[str, Any] | None) -> Config:
    """Put numbers in the place of training.micro_batch_size=auto: those of the run's first session, or what fits now.

    Args:
        recorded: the config.json of the run directory, if there is one.
    Raises:
        UserError: the ranks cannot share a step's rows evenly.
    """
    t = config.training
    if t.micro_batch_size != "auto":
        return config
    rows_a_rank, left = divmod(t.gradient_accumulation_steps, config.system.ranks)
    if left:
        raise UserError(
            f"training.gradient_accumulation_steps: {t.gradient_accumulation_steps} rows a step cannot be split evenly "
            f"over {config.system.ranks} processes: set it to {config.system.ranks * max(rows_a_rank, 1)}"
        )
    if recorded is not None and recorded["system"].get("ranks", 1) == config.system.ranks:
        return config.override({name: recorded["training"][name.partition(".")[2]] for name in ROWS})
    plan, length = make_planner(config), config.model.max_seq_length
    layers = find_shape(config.model.name).num_layers
    keep = keep_by_policy("full" if t.checkpointing == "auto" else t.checkpointing, t.checkpoint_every, layers)
    rows = choose_rows(lambda n: plan(n, length, keep).peak, rows_a_rank, find_machine(config).room)
    return config.override(dict(zip(ROWS, (rows, rows_a_rank // rows), strict=True)))


def choose_activations(config: Config, rows: int, length: int) -> tuple[list[ActivationPolicy], Plan]:
    """What each block keeps for backward, by the policy or, if that is auto, by what fits; and the plan of it."""
    t, plan = config.training, make_planner(config)
    layers = find_shape(config.model.name).num_layers
    if t.checkpointing == "auto":
        room = find_machine(config).room
        keep = choose_recompute(lambda keep: plan(rows, length, keep).peak, layers, room)
    else:
        keep = keep_by_policy(t.checkpointing, t.checkpoint_every, layers)
    return keep, plan(rows, length, keep)


def describe_recompute(plan: Plan) -> str:
    """What backward waits for, in words."""
    again = sum(one != "all" for one in plan.keep)
    return f"activations of {again} of {len(plan.keep)} blocks computed again" if again else "all activations kept"


def minimum_plan(config: Config, length: int) -> Plan:
    """One row of so many tokens, computed again in every block unless the policy forbids it: what halving leads to."""
    t, layers = config.training, find_shape(config.model.name).num_layers
    policy = "full" if t.checkpointing == "auto" else t.checkpointing
    return make_planner(config)(1, length, keep_by_policy(policy, t.checkpoint_every, layers))


def out_of_memory_error(config: Config, rows: int) -> TrainingFailed:
    """Out of memory with micro-batches of so many rows: the error to raise."""
    helps = suggest_savings(config, rows, config.model.max_seq_length)
    return TrainingFailed(f"out of memory with micro-batches of {rows} rows: try {helps}")


def suggest_savings(config: Config, rows: int, length: int) -> str:
    """The three changes that would lower the peak most; what each would save is the plan's word."""
    t = config.training
    changes = {
        "model.max_seq_length": length // 2,
        "training.micro_batch_size": rows // 2,
        "training.checkpointing": "full",
        "quantization.bits": 4,
        "training.method": "lora",
        "training.optimizer": "adamw_8bit",
        "lora.rank": config.lora.rank // 2,
        "lora.target_modules": "attention",
    }
    if t.method == "full":
        del changes["quantization.bits"], changes["lora.rank"], changes["lora.target_modules"]
    (keep, before), device = choose_activations(config, rows, length), find_machine(config).device
    full, saved = keep_by_policy("full", 1, len(keep)), {}
    for name, value in changes.items():
        with contextlib.suppress(UserError):  # out of range: a row cannot be halved; or not on this device
            changed = config.override({name: value})
            validate_config(changed)
            check_optimizer(changed.training.optimizer, device)
            size = min(rows, changed.micro_batch_rows()), min(length, changed.model.max_seq_length)
            # what is freed is not spent on keeping more activations
            after = make_planner(changed)(*size, full if name == "training.checkpointing" else keep)
            saved[f"{name}={value}"] = before.peak - after.peak
    best = sorted((name for name in saved if saved[name] > 0), key=lambda name: -saved[name])[:3]
    said = (f"{name} (saves about {saved[name] / 1e9:.3g} GB)" for name in best)
    return ", or ".join(said) or "model.name to a smaller model"


def show_speed(machine: Machine, decoder: DecoderConfig, work: float, step_tokens: int) -> None:
    """Print what this device could reach, from bare matrix products on it."""
    sizes, kind = (decoder.hidden_size, decoder.intermediate_size), machine.device.type
    reached = matmul_gflop_s(machine.device, machine.dtype, *sizes)
    share = EFFICIENCY.get(kind)
    print(f"{'products':16} {reached:9,.0f} GFLOP/s in bare matrix products here")
    if share:
        speed = share * reached / work
        print(
            f"{'speed':16} {speed:9,.0f} tokens/s if {share:.0%} of it is reached; {step_tokens / speed:,.1f} s a step"
        )
    else:
        print(f"{'speed':16} at most {reached / work:,.0f} tokens/s; what is reached on {kind}: not measured")


def show_plan(config: Config) -> int:
    """Print memory by part, and time, before anything is loaded.

    Raises:
        UserError: it does not fit.
    """
    machine = find_machine(config)
    device, free = machine.device, machine.room
    check_optimizer(config.training.optimizer, device)
    if config.system.threads:
        torch.set_num_threads(config.system.threads)
    config = resolve_micro_batch_size(config, None)
    decoder, length = find_shape(config.model.name), config.model.max_seq_length
    keep, plan = choose_activations(config, config.micro_batch_rows(), length)
    if not machine.here:
        print(f"{'device':16} {device.type} with {free / MARGIN / 1e9:.1f} GB, which is not here")
    for name, size in plan.parts.items():
        print(f"{name:16} {size / 1e9:9.3f} GB")
    print(f"{'peak':16} {plan.peak / 1e9:9.3f} GB of {free / 1e9:.1f} that it may have; {describe_recompute(plan)}")
    again = sum(one != "all" for one in keep) / len(keep)
    work = gflop_per_token(decoder, count_parameters(decoder, config), config, length, again)
    print(f"{'work':16} {work:9.3g} GFLOP a token")
    if machine.here:
        show_speed(machine, decoder, work, config.effective_batch_size() // config.system.ranks * length)
    peaks, full = make_planner(config), keep_by_policy("full", 1, decoder.num_layers)
    fitting = [rows for rows in ROWS_TRIED if peaks(rows, length, full).peak <= free]
    most = f"{fitting[-1]} and more" if fitting == ROWS_TRIED else f"at most {max(fitting, default=0)}"
    print(f"{'micro-batch':16} {most} rows of {length} tokens fit, with every block computed again")
    if plan.peak > free:
        fewer = "set training.micro_batch_size=auto, or lower model.max_seq_length"
        raise UserError(
            f"training.micro_batch_size: {plan.rows} rows of {length} tokens take {plan.peak / 1e9:.2f} GB, "
            f"and {free / 1e9:.2f} GB are there: {fewer if fitting else f'set {suggest_savings(config, 1, length)}'}"
        )
    return 0
