"""Checkpoints in FP8 (E4M3, Micikevicius et al. 2022), which are dequantized while they are read.

Eight bits hold a number from -448 to 448 with three bits after its leading one. A scale beside them restores the size
of the weights: one for a whole matrix, for each row, or for each block of 128 x 128 (`weight_block_size`).

    W[i, j] = codes[i, j] * scale[i // rows, j // columns]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanoft import UserError

FORM = "F8_E4M3"  # in safetensors' names
SCALE = "_scale_inv"  # after the name of a weight; in spite of that name a factor
UNUSED = ("activation_scale", "input_scale")  # how other programs round what they multiply with the weights
Block = tuple[int, int]  # rows and columns of a weight that share a scale


def read_block(quantization: Mapping[str, Any]) -> Block:
    """weight_block_size of a quantization_config."""
    block = quantization.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise UserError(f"quantization_config: weight_block_size: {block!r:.60} is not two sizes such as [128, 128]")
    return block[0], block[1]


def shared_by(shape: tuple[int, ...], scale: tuple[int, ...], block: Block) -> Block:
    """Rows and columns of an (out, in) weight that share a scale, by the shape of its scales."""
    if math.prod(scale) == 1:
        return shape[0], shape[1]
    return (1, shape[1]) if scale == (shape[0], 1) else block


def grid(shape: tuple[int, ...], scale: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape that the scales of a weight must have; blocks at the ends may be smaller."""
    rows, columns = shared_by(shape, scale, block)
    return scale if math.prod(scale) == 1 else (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns))


def dequantize(codes: Tensor, scale: Tensor, shared: Block, first: int = 0) -> Tensor:
    """Rows from `first` on of a weight, (some of out, in), float32; `scale` is that of the whole weight."""
    scale = scale.float().reshape(scale.shape if scale.dim() == 2 else (1, 1))
    i, j = (first + torch.arange(codes.shape[0])) // shared[0], torch.arange(codes.shape[1]) // shared[1]
    return codes.float() * scale[i][:, j]
