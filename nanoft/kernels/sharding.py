"""Fully sharded training (FSDP2; Zhao et al. 2023): each rank holds a part of every parameter, gradient and moment.

A block's parameters are gathered only while the block is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def clip_grad_norm(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients to a norm of at most `limit` (0: leave them), and return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
    return full_tensor(norm).item()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor of which each rank has a part."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def gather_full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of them whole, one after the other, in rank 0's main memory; as they are if they are not split."""
    if not is_sharded():
        return tensors
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        found[name] = full.cpu() if distributed.process_rank() == 0 else full.new_empty(0)
    return found


def distribute_like(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of whole tensors, this rank's parts, wherever those of the same name in `like` are split."""

    if not is_sharded():
        return tensors
    from torch.distributed.tensor import distribute_tensor

    def part(tensor: Tensor, own: Any) -> Tensor:
        if not _is_dtensor(own):
            return tensor
        return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)

    return {name: part(tensor, like.get(name)) for name, tensor in tensors.items()}


def _is_dtensor(tensor: Any) -> bool:
    if not is_sharded():
        return False
    from torch.distributed.tensor import DTensor  # half a second that other runs need not wait

    return isinstance(tensor, DTensor)
