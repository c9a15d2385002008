"""Frozen blocks in host memory, copied to the device one by one: a base of 14 GB on a GPU of 8 GB.

    host     the frozen weights of every block, in one buffer each; pinned, so that kernels run while it is copied
    device   those of the block that computes and of the next one; embedding, head and adapters

Before block i computes, block i + 1 is requested, on a separate stream. Every block but the last is recomputed
(recompute.py), so backward calls them once more, from the last to the first, and requests block i - 1. The blocks do
not know about it: a hook before each call makes the module's parameters views of the buffer on the device.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from nanoft.blocks.trained import Adapter
from nanoft.model import Decoder

ALIGNED = 256  # bytes: where a tensor may begin in a buffer


def keep_on_host(module: nn.Module) -> None:
    """Move the loaded tensors of a module to host memory."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if not tensor.is_meta:
            tensor.data = tensor.data.cpu()


def stream_blocks(model: Decoder, device: torch.device) -> None:
    """Keep the frozen weights of the blocks in host memory, and everything else on the device."""
    blocks: list[Any] = list(model.model.layers)
    stream = BlockStream([_HostBlock(block, device) for block in blocks], device)
    for index, block in enumerate(blocks):
        block.unshard, block.reshard = functools.partial(stream.before, index, block), lambda: None  # as of FSDP
        block.register_forward_pre_hook(lambda module, _: module.unshard())


class _HostBlock:
    """The frozen tensors of a block, in one buffer of bytes."""

    def __init__(self, block: nn.Module, device: torch.device):
        self.places: list[tuple[dict[str, Any], str]] = []  # where modules look their tensors up
        for module in block.modules():
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in stores:
                for name, tensor in held.items():
                    if tensor is not None and not (tensor.requires_grad or isinstance(module, Adapter)):
                        self.places.append((held, name))
                    elif tensor is not None:
                        tensor.data = tensor.data.to(device)
        tensors: list[Tensor] = [held[name] for held, name in self.places]
        ends = [-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors]
        self.buffer = torch.empty(sum(ends), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.shapes = [
            (tensor.dtype, tensor.shape, tensor.nbytes, end) for tensor, end in zip(tensors, ends, strict=True)
        ]
        self.look_up(self.buffer)
        for (held, name), tensor in zip(self.places, tensors, strict=True):
            held[name].copy_(tensor)

    def look_up(self, buffer: Tensor) -> None:
        """Let the modules' tensors be views of a buffer, of this block's bytes."""
        start = 0
        for (held, name), (dtype, shape, size, end) in zip(self.places, self.shapes, strict=True):
            view = buffer[start : start + size].view(dtype).view(shape)
            held[name] = nn.Parameter(view, requires_grad=False) if isinstance(held[name], nn.Parameter) else view
            start += end


class BlockStream:
    """Which blocks are on the device, at most two at a time, and which one is requested next."""

    def __init__(self, blocks: list[_HostBlock], device: torch.device):
        self.blocks, self.device = blocks, device
        self.arrivals: dict[int, Any] = {}  # of the blocks on the device, when their copy is complete
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def before(self, index: int, block: nn.Module) -> None:
        """Before block `index` computes: drop others, request it and the next one, and wait for its own weights."""
        following = self.following(index, block.training)
        for other in self.arrivals.keys() - {index, following}:
            self.blocks[other].look_up(self.blocks[other].buffer)
            del self.arrivals[other]
        for wanted in (index, following):
            if wanted not in self.arrivals:
                self.request(wanted)
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrivals[index])

    def following(self, index: int, training: bool) -> int:
        """The block that is called next: backward, which alone tracks gradients, begins where forward ends."""
        step, last = (-1 if torch.is_grad_enabled() else 1), len(self.blocks) - 1
        if 0 <= index + step <= last:
            return index + step
        return min(max(index - step, 0), last) if training else 0

    def request(self, index: int) -> None:
        """Copy a block to the device, on a stream of its own.

        It waits for what was computed so far: by then, the memory of the blocks that were dropped is free.
        """
        with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
            if self.side is not None:
                self.side.wait_stream(torch.cuda.current_stream(self.device))
                stack.enter_context(torch.cuda.stream(self.side))
            buffer = self.blocks[index].buffer.to(self.device, non_blocking=True, copy=True)
            self.arrivals[index] = None if self.side is None else self.side.record_event()
            self.blocks[index].look_up(buffer)
