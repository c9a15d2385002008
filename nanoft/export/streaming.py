"""A decoder whose matrices stay on the disk.

A 7B model in float32 takes 28 GB; to merge an adapter into it, to prove the result and to ask it a question, no more
than a few rows of one matrix are needed at a time. So a linear here reads its weight, some rows at a time, whenever it
is asked, multiplies, and forgets it:

    y[:, rows] = x W[rows]^T

The decoder around it is the ordinary one, adapters attach to it as to any other, and its answers are the same; only
each pass reads the whole model again, so that many tokens should go through in one pass.

`Weights` says what is read: a model's files; or those with their linears quantized and unpacked again, as an adapter
was trained on them; or either with an adapter merged in and rounded. Merging writes the rows of the last kind to files,
and to try a merge without writing it, a decoder can be put on them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft.lora import LoRALinear
from nanoft.model import Decoder, DecoderConfig
from nanoft.models.families import read_shape
from nanoft.models.weights import WeightFiles, is_block_linear, open_weights
from nanoft.nf4 import quantize

SLAB = 1 << 22  # numbers of a weight that are held at a time: 16 MB in float32


class Rows(Protocol):
    """Weights that a decoder can be put on, wherever they lie."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str) -> Iterator[Tensor]: ...

    def row(self, name: str, number: int) -> Tensor: ...

    def whole(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Weights:
    """A model's weights, as they are to be used, some rows at a time."""

    config: DecoderConfig
    files: WeightFiles
    quantization: tuple[str, bool] | None = None  # pack plain linears of the blocks in this form, and unpack them
    unpacked: torch.dtype = torch.float32  # what an unpacked weight is rounded to
    adapters: Mapping[str, LoRALinear] = field(default_factory=dict)  # merged in
    dtype: torch.dtype = torch.float32  # of the rows: the arithmetic is done in float32, and rounded to this once

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, in the files' order."""
        return self.files.shapes

    def rows(self, name: str) -> Iterator[Tensor]:
        """A weight from the top, (some rows, ...) in `dtype`."""
        place, _, part = name.rpartition(".")
        adapter = self.adapters.get(place)
        if adapter is not None and part == "bias" and adapter.bias is not None:
            yield adapter.bias.detach().to(self.dtype)
            return
        shape, whole = self.shapes[name], self._through_packing(name)
        step = max(1, SLAB // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            slab = self.files.headers[name].read(name, rows) if whole is None else whole[rows]
            if adapter is not None and part == "weight":
                slab = adapter.merged(slab.float(), rows)
            yield slab.to(self.dtype)

    def _through_packing(self, name: str) -> Tensor | None:
        """What a packed weight stands for, (out, in); None for one that is used as its file has it."""
        if self.files.is_packed(name):
            return self.files.read_packed(name, self.unpacked, torch.device("cpu")).dequantize()
        if self.quantization and not self.files.stored and is_block_linear(name):
            return quantize(self.files.read(name), self.quantization, self.unpacked).dequantize()
        return None

    def row(self, name: str, number: int) -> Tensor:
        """One row of an embedding, (1, hidden): copied, for a view keeps what the kernel read around it in memory."""
        return self.files.headers[name].read(name, slice(number, number + 1)).to(self.dtype, copy=True)

    def whole(self, name: str) -> Tensor:
        """All of a weight, in float32."""
        return torch.cat([part.float() for part in self.rows(name)])


def open_rows(
    directory: Path, quantization: tuple[str, bool] | None = None, unpacked: torch.dtype = torch.float32
) -> Weights:
    """The weights of a Hugging Face directory.

    Raises:
        UserError: missing, unexpected or mis-shaped tensors, all of them listed; damaged files; unknown architecture.
    """
    config = read_shape(directory)
    with torch.device("meta"):
        blank = Decoder(config)
    return Weights(config, open_weights(directory, blank), quantization, unpacked)


def give_back_freed_memory() -> None:
    """Have the C library return a large block to the system when it is freed, rather than keep it for later (glibc)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, which otherwise grows to 32 MB


class StreamedLinear(nn.Linear):
    """y = x W^T + b with a W that is read anew each time."""

    def __init__(self, weights: Rows, name: str):
        nn.Module.__init__(self)  # not nn.Linear's, which would make room for W
        self.weights, self.name = weights, f"{name}.weight"
        self.out_features, self.in_features = weights.shapes[self.name]
        has_bias = f"{name}.bias" in weights.shapes
        self.bias = nn.Parameter(weights.whole(f"{name}.bias")) if has_bias else None  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W whole, (out, in) float32: for DoRA, which needs the lengths of its rows."""
        return self.weights.whole(self.name)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.out_features)
        start = 0
        for slab in self.weights.rows(self.name):  # (some of out, in)
            y[..., start : start + len(slab)] = x @ slab.float().T
            start += len(slab)
        return y if self.bias is None else y + self.bias


class StreamedEmbedding(nn.Module):
    """The rows of the embedding that are asked for."""

    def __init__(self, weights: Rows, name: str):
        super().__init__()
        self.weights, self.name = weights, f"{name}.weight"

    def forward(self, ids: Tensor) -> Tensor:
        wanted, places = ids.unique(return_inverse=True)
        rows = torch.cat([self.weights.row(self.name, row) for row in wanted.tolist()])
        return F.embedding(places, rows.float())


class StreamedDecoder(Decoder):
    """A decoder in float32 on the CPU that reads its matrices from files; norms and biases are in memory."""

    def __init__(self, weights: Rows):
        with torch.device("meta"):
            super().__init__(weights.config)
        self.weights = weights
        for name, module in list(self.named_modules()):
            parent, _, last = name.rpartition(".")
            if isinstance(module, nn.Linear):
                setattr(self.get_submodule(parent), last, StreamedLinear(weights, name))
            elif isinstance(module, nn.Embedding):
                setattr(self.get_submodule(parent), last, StreamedEmbedding(weights, name))
            elif isinstance(getattr(module, "weight", None), nn.Parameter):  # a norm
                module.weight = nn.Parameter(weights.whole(f"{name}.weight"))
        self.requires_grad_(False)
        self.eval()

    @property
    def head(self) -> Tensor:
        """The shape, dtype and device of the output embedding; NaN all over, for who would multiply by it."""
        return torch.tensor(math.nan).expand(self.config.vocab_size, self.config.hidden_size)

    def logits(self, hidden: Tensor) -> Tensor:
        name = "model.embed_tokens.weight" if self.lm_head is None else "lm_head.weight"
        return torch.cat([F.linear(hidden, slab.float()) for slab in self.weights.rows(name)], dim=-1)
