"""Whether the weights of a quantized base are dequantized once instead of at every use: memory for speed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from nanoft.nf4 import Linear4bit, Linear8bit, packed_bytes


def choose_dequantize(policy: str, device_type: str, extra_bytes: int, free_bytes: int) -> Literal["per_use", "cached"]:
    """auto: cached on CUDA if that takes at most a third of the free memory, because activations are worth more.

    `policy` is quantization.dequantize; `extra_bytes` is by how much the model grows if its weights are dequantized.
    """
    if policy == "auto":
        return "cached" if device_type == "cuda" and 3 * extra_bytes <= free_bytes else "per_use"
    return "cached" if policy == "cached" else "per_use"


def cache_weights(model: nn.Module, policy: str) -> Literal["per_use", "cached"]:
    """Where the policy says so, dequantize every weight: its linear becomes a frozen nn.Linear; returns the choice."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (Linear4bit, Linear8bit))]
    if not layers:
        return "per_use"
    device = layers[0][1].parts[0].device
    unpacked = sum(layer.out_features * layer.in_features * layer.dtype.itemsize for _, layer in layers)
    extra = unpacked - sum(packed_bytes(layer) for _, layer in layers)
    free = 0
    if device.type == "cuda":  # what the GPU has left, with what torch holds there and does not use
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + held
    chosen = choose_dequantize(policy, device.type, extra, free)
    while chosen == "cached" and layers:
        name, layer = layers.pop()  # the packed weight is gone before the next one is unpacked
        parent, _, last = name.rpartition(".")
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        setattr(model.get_submodule(parent), last, linear)
    return chosen
