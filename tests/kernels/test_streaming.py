"""Blocks whose frozen weights come from host memory: the same bits, and in which order they are copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoft import kernels
from nanoft.config import LoRAConfig
from nanoft.generation.decode import Decoding
from nanoft.kernels import streaming
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from nanoft.recompute import keep_by_policy
from tiny_models import make_reference

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def build(directory: Path, bits: int, fast: bool, host: bool, lora: LoRAConfig, dtype: torch.dtype) -> Decoder:
    quantization = {4: ("nf4", True), 8: ("int8", False), 16: None}[bits]
    store = streaming.keep_on_host if host else None
    model = load_model(directory, CPU, dtype, quantization, store=store)
    inject_lora(model, lora, seed=0)
    if fast:
        assert not kernels.apply(model, lora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.activation_policy = keep_by_policy("full", 1, model.config.num_layers)
    if host:
        streaming.stream_blocks(model, CPU)
    return model
