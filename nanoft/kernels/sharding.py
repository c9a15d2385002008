"""Fully sharded training (FSDP2; Zhao et al. 2023): each rank holds a part of every parameter, gradient and moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanoft.model import Decoder
from nanoft.runtime import distributed
from nanoft.runtime.distributed import T, is_sharded, world_size


def shard_model(model: Decoder, device: torch.device) -> None:
    """Split the parameters over the ranks and their devices; those of a block are gathered while it is computed."""
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


def unsharded(blocks: Iterable[Any], use: Callable[[Any], T]) -> Iterator[T]:
    """use(block) of blocks that are split, the weights of each together for that long."""
    for block in blocks:
        block.unshard()
        yield use(block)
        block.reshard()


def clip_grad_norm(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients to a norm of at most `limit` (0: leave them), and return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
    return full_tensor(norm).item()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor of which each rank has a part (a DTensor), or the tensor itself if it is not split."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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
    from torch.distributed.tensor import DTensor, distribute_tensor  # half a second that other runs need not wait

    parts = dict(tensors)
    for name, own in like.items():
        if name in parts and isinstance(own, DTensor):
            parts[name] = distribute_tensor(parts[name], own.device_mesh, own.placements, src_data_rank=None)
    return parts
