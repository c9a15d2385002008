"""Experts in files: as linears of their own, as in the decoder, or stacked to one tensor for all experts of a layer.

    Qwen3-MoE    experts.3.gate_proj.weight, (out, in); transformers 5 also has experts.gate_up_proj, (experts, out, in)
    gpt-oss      experts.gate_up_proj, (experts, in, out), and experts.gate_up_proj_bias, (experts, out)
    Gemma 4      experts.gate_up_proj, (experts, out, in), beside the layer's mlp and not in it

PEFT adapts a stack, W_e + s B_e A_e, in two matrices for all experts: the A_e below each other, (experts r, in), and in
B, (out, r experts), column r' of expert e at r' experts + e. Its name of them is that of the module of the stacks, with
`base_layer` for the inner one of two: gate_up_proj.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanoft import UserError
from nanoft.io.tensor_files import TensorHeader, one_by_one
from nanoft.lora import by_pattern

GATE_UP, DOWN = "gate_up_proj", "down_proj"
ADAPTED = re.compile(r"(.*\.experts)(\.base_layer)?\.lora_([AB])(?:\.\w+)?$")  # a stack's adapter, in PEFT's files
STACK = re.compile(rf"(.*\.experts)\.({GATE_UP}|{DOWN})(|_bias|_blocks|_scales)$")
# MXFP4 (OCP Microscaling Formats 1.0): numbers of 4 bits, which are sign, exponent, exponent and mantissa; the first of
# a byte is in its low bits; 32 of them share a power of two, the byte of scales less 127.
MXFP4, MXFP4_SCALE, GROUP = "MXFP4", "_scales", 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def expert_headers(found: Mapping[str, TensorHeader], apart: bool) -> dict[str, TensorHeader]:
    """Headers with one for each linear of an expert in the place of stacks; `apart`: gate and up are linears of their
    own, one after the other in a stack of both."""
    headers = dict[str, TensorHeader]()
    for name, header in found.items():
        stack = STACK.match(name)
        if stack is None or len(header.shape) < 2:
            headers[name] = header
            continue
        place, part, kind = stack.groups()
        shape, suffix = header.shape[1:], {"_bias": ".bias", "_scales": f".weight{MXFP4_SCALE}"}.get(kind, ".weight")
        if kind == "_blocks" and shape[2:] == (GROUP // 2,):  # (out, groups, 16) bytes
            header, shape = replace(header, form=MXFP4), (shape[0], GROUP * shape[1])
        parts = ("gate_proj", "up_proj") if apart and part == GATE_UP else (part,)
        shape = (shape[0] // len(parts), *shape[1:])
        for expert in range(header.shape[0]):
            for number, own in enumerate(parts):
                one = replace(header, shape=shape, expert=expert, first=number * shape[0])
                headers[f"{place}.{expert}.{own}{suffix}"] = one
    return headers


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Some rows of a weight, (out, in) float32, from blocks, (out, groups, 16), and scales, (out, groups), of bytes."""
    values = torch.tensor((*E2M1, *(-value for value in E2M1)))
    numbers = values[torch.stack((blocks & 15, blocks >> 4), dim=-1).int()].flatten(2)  # (out, groups, 32)
    return torch.ldexp(numbers, scales.int()[..., None] - 127).flatten(1)


def stack_name(name: str) -> str:
    """The stack that holds a parameter of an expert; of any other parameter its own name."""
    stacked = re.sub(r"(\.experts)\.\d+\.(\w+)\.bias$", r"\1.\2_bias", name)
    return re.sub(r"(\.experts)\.\d+\.(\w+)\.weight$", r"\1.\2", stacked)


def unstack_adapter(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter in PEFT's format with linears in the place of stacks; `config`: adapter_config.json."""
    found, stacks = dict[str, Tensor](), {name: ADAPTED.match(name.removesuffix(".weight")) for name in tensors}
    parameters, pattern = config.get("target_parameters") or [], config.get("rank_pattern") or {}
    if not isinstance(parameters, list) or not isinstance(pattern, dict):
        raise UserError(f"target_parameters, rank_pattern: {parameters!r:.60}, {pattern!r:.60}: no list, or no object")
    parameters = [str(name).rpartition(".")[2] for name in parameters]
    for name, tensor in tensors.items():
        if (stack := stacks[name]) is None:
            found[name] = tensor
            continue
        place, inner, factor = stack.groups()
        part = GATE_UP if inner or DOWN not in parameters else DOWN
        try:
            rank = by_pattern(pattern, f"{place}.{part}", config.get("r"))
        except re.error as error:
            raise UserError(f"rank_pattern: not a regular expression: {error}") from None
        if type(rank) is not int or rank < 1 or tensor.dim() != 2 or tensor.shape[factor == "B"] % rank:
            raise UserError(f"{name}: {tuple(tensor.shape)} is no stack of experts of rank {rank!r:.20}")
        own = tensor.unflatten(0, (-1, rank)) if factor == "A" else tensor.unflatten(1, (rank, -1)).permute(2, 0, 1)
        found |= {f"{place}.{e}.{part}.lora_{factor}.weight": one for e, one in enumerate(own)}
    return found


def split_gate_up(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapters of experts whose gate and up are linears of their own: each has its half of the rows of B.

    Where PEFT has put two adapters together, B is [[B_gate, 0], [0, B_up]], and each has its half of the rank, too.
    """
    pairs = {name: name.replace("lora_A", "lora_B") for name in tensors if f".{GATE_UP}.lora_A" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in {*pairs, *pairs.values()}}
    for name, a in one_by_one({name: tensors[name] for name in pairs}):
        other, b = pairs[name], tensors[pairs[name]]
        (first, last), half = b.chunk(2), len(a) // 2
        is_apart = len(a) % 2 == 0 and not first[:, half:].any() and not last[:, :half].any()
        ranks = (slice(half), slice(half, None)) if is_apart else (slice(None), slice(None))
        for part, own, rank in zip(("gate_proj", "up_proj"), (first, last), ranks, strict=True):
            rest[name.replace(GATE_UP, part)] = a[rank]
            rest[other.replace(GATE_UP, part)] = own[:, rank]
    return rest


def check_stacks(adapters: Mapping[str, Any], experts: int) -> None:
    """Refuse what PEFT's format has no place for: all `experts` of a layer have plain LoRA of one rank, or none has."""
    stacks: dict[str, list[Any]] = {}
    for name, adapter in adapters.items():
        if ".experts." in name:
            stacks.setdefault(stack_name(f"{name}.weight"), []).append(adapter)
    for name, own in stacks.items():
        if any(getattr(a, "lora_magnitude_vector", a) is not None or a.bias is not None for a in own):
            raise UserError(f"lora: {name}: stacked experts have plain LoRA only: no lora.dora, bias, modules_to_save")
        if len({len(adapter.lora_A) for adapter in own}) > 1 or len(own) < experts:
            raise UserError(f"lora.rank_pattern, lora.target_modules: {name}: one rank for all {experts} experts")


def stack_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unstack_adapter`; the experts of a layer have one rank."""
    found, stacks = dict[str, Tensor](), dict[str, list[Tensor]]()
    adapted = {m[1] for name in tensors if (m := re.search(rf"(.*\.experts)\.\d+\.{DOWN}\.lora_A", name))}
    for name, tensor in tensors.items():  # in the order of the experts
        one = re.match(r"(.*\.experts)\.\d+\.(\w+)\.lora_([AB])\.weight$", name)
        if one is None:
            found[name] = tensor
            continue
        inner = ".base_layer" * (one[2] == GATE_UP and one[1] in adapted)
        stacks.setdefault(f"{one[1]}{inner}.lora_{one[3]}.weight", []).append(tensor)
    for name, own in stacks.items():
        found[name] = torch.cat(own) if ".lora_A." in name else torch.stack(own, dim=-1).flatten(1)
    return found
