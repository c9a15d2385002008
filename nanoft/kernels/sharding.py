"""Fully sharded training (FSDP2; Zhao et al. 2023): each rank holds a shard of every parameter, gradient and moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanoft.model import Decoder
from nanoft.runtime import distributed
from nanoft.runtime.distributed import T, is_sharded, world_size


def shard_model(model: Decoder, device: torch.device) -> None:
    """Shard the parameters over the ranks; those of a block are gathered while it is computed.

    A frozen head, which nearly all of a step needs, stays whole: gathered, it would be held beside its shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in model.model.layers:
        distributed.gather_shards(block)  # one block at a time
        for parameter in block.parameters():  # PiSSA's A is transposed
            parameter.data = parameter.data.contiguous()
        fully_shard(block, mesh=mesh)
    head = model.head
    whole = {head} if isinstance(head, nn.Parameter) and not head.requires_grad and model.score is None else None
    if model.score is not None or not model.config.tied:
        fully_shard(model.model.embed_tokens, mesh=mesh)  # by itself: it is needed for a moment only
    fully_shard(model, mesh=mesh, ignored_params=whole)
    distributed.mark_sharded()


def reshard(model: Any) -> None:
    """Reshard the parameters outside the blocks, which FSDP keeps gathered after a forward pass."""
    if is_sharded() and hasattr(model, "reshard"):
        model.reshard()


def gather_outside(model: Any) -> None:
    """Gather the parameters outside the blocks, as FSDP does before a forward pass."""
    if is_sharded():
        model.unshard()


def in_turn(blocks: Iterable[Any], use: Callable[[Any], T]) -> Iterator[T]:
    """use(block) for each block that is sharded or streamed, while its weights are there."""
    for block in blocks:
        block.unshard()
        yield use(block)
        block.reshard()


def clip_grad_norm(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients to a norm of at most `limit` (0: unchanged); return their norm before that."""
    norm = nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
    return full_tensor(norm).item()


def full_tensor(tensor: Tensor) -> Tensor:
    """The complete tensor: gathered if it is sharded (a DTensor), otherwise the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The complete tensors, gathered one at a time into rank 0's main memory; unchanged without sharding."""
    if not is_sharded():
        return tensors
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        found[name] = full.cpu() if distributed.process_rank() == 0 else full.new_empty(0)
    return found


def distribute_like(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shards of complete tensors, if the tensors of the same name in `like` are sharded."""
    if not is_sharded():
        return tensors
    from torch.distributed.tensor import DTensor, distribute_tensor  # takes half a second, so only here

    parts = dict(tensors)
    for name, own in like.items():
        if name in parts and isinstance(own, DTensor):
            parts[name] = distribute_tensor(parts[name], own.device_mesh, own.placements, src_data_rank=None)
    return parts
