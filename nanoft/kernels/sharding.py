"""Fully sharded training (FSDP2; Zhao et al. 2023): each rank holds a part of every parameter, gradient and moment.

A block's parameters are gathered only while the block is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nanoft.model import Decoder
from nanoft.runtime import distributed
from nanoft.runtime.distributed import T, is_sharded, world_size


def shard_model(model: Decoder, device: torch.device) -> None:
    """Split the parameters of each block, and those outside of the blocks, over the ranks and their devices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for parameter in model.parameters():  # PiSSA's A is a transposed matrix
        parameter.data = parameter.data.contiguous()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    distributed.mark_sharded()


def reshard(model: Any) -> None:
    """After a forward pass, FSDP keeps what lies outside of the blocks together: split it again."""
    if is_sharded() and hasattr(model, "reshard"):
        model.reshard()


def unsharded(blocks: Sequence[nn.Module], use: Callable[[Any], T]) -> Iterator[T] | None:
    """use(block) of blocks that are split, the weights of each together for that long; None if they are not."""

    def together() -> Iterator[T]:
        for block in blocks:
            block.unshard()  # type: ignore[operator]
            yield use(block)
            block.reshard()  # type: ignore[operator]

    return together() if is_sharded() else None
