"""A decoder whose weight matrices stay on disk.

A 7B model in float32 takes 28 GB, but merging an adapter into it and verifying the result need only a few rows of one
matrix at a time. A linear layer here reads its weight in slabs of rows in every call, multiplies, and drops them:

    y[:, rows] = x W[rows]^T

Each pass reads the whole model, so a pass should have many tokens. `Weights` says what is read: a model's files; or
these quantized and dequantized, as in training; or either with an adapter merged in and rounded, as in merged files.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import UserError
from nanoft.attention import soft_cap
from nanoft.blocks.trained import Adapter
from nanoft.io.tensor_files import release_pages
from nanoft.model import Decoder, DecoderConfig
from nanoft.models.model_files import ModelFiles, Quantization, is_block_linear
from nanoft.models.weights import WeightFiles, is_finite, open_weights
from nanoft.nf4 import quantize

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
SLAB = 1 << 22  # elements of a weight in memory at a time: 16 MB in float32


class Rows:
    """Weights that a `StreamedDecoder` can read, wherever they are stored."""

    config: DecoderConfig
    shapes: Mapping[str, tuple[int, ...]]  # of every weight, in the files' order

    def read(self, name: str, rows: slice) -> Tensor:
        raise NotImplementedError

    def rows(self, name: str) -> Iterator[Tensor]:
        """A weight in slabs from the top, (some rows, ...)."""
        total, *inner = self.shapes[name]
        step = max(1, SLAB // math.prod(inner))
        for start in range(0, total, step):
            yield self.read(name, slice(start, min(start + step, total)))
        release_pages()  # of the adapter

    def whole(self, name: str) -> Tensor:
        """A complete weight, in float32."""
        return torch.cat([slab.float() for slab in self.rows(name)])


@dataclass(frozen=True)
class Weights(Rows):
    """A model's weights, some rows at a time: quantized, merged and rounded as requested."""

    config: DecoderConfig
    files: WeightFiles
    quantization: Quantization | None = None  # quantize the linears of the blocks in this form, and dequantize
    unpacked: torch.dtype = torch.float32  # dtype of a dequantized weight
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # merged in
    dtype: torch.dtype = torch.float32  # of the rows: computed in float32, rounded once
    dequantized: dict[str, Tensor] = field(default_factory=dict, init=False)  # the matrix that is being read

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        """As stored, plus a separate head and new tokens if `config` has them and the files do not."""
        shapes = dict(self.files.shapes)
        for name in EMBEDDINGS[: 1 if self.config.tied else 2]:
            shapes[name] = (self.config.vocab_size, *shapes.get(name, shapes[EMBEDDINGS[0]])[1:])
        if self.config.has_score:  # replaces the head
            shapes.pop(EMBEDDINGS[1], None)
            shapes["score.weight"] = (1, self.config.hidden_size)
        return shapes

    def read(self, name: str, rows: slice) -> Tensor:
        place, _, part = name.rpartition(".")
        adapter = self.adapters.get(place)
        if adapter is not None and part == "bias" and adapter.bias is not None:
            return adapter.bias.detach()[rows].to(self.dtype)
        slab = self.read_base(name, rows)
        if adapter is not None and part == "weight":
            slab = adapter.merged(slab.float(), rows)
        slab = slab.to(self.dtype)
        if self.dtype == torch.float16 and not is_finite(slab):
            raise UserError(f"--dtype: f16: values of {name} overflow float16: use bf16 or f32")
        return slab

    def read_base(self, name: str, rows: slice) -> Tensor:
        """Some rows of W; rows of new tokens are the mean of the others, as in `grow_vocabulary`."""
        name = name if name in self.files.shapes else EMBEDDINGS[0]  # a head that was untied; a new one
        stored = self.files.shapes[name][0]
        if rows.stop > stored:
            new = self.files.read(name).float().mean(0, keepdim=True).expand(rows.stop - max(rows.start, stored), -1)
            return new if rows.start >= stored else torch.cat((self.read_base(name, slice(rows.start, stored)), new))
        is_packed = self.files.is_packed(name)
        if not is_packed and not (self.quantization and not self.files.stored and is_block_linear(name)):
            return self.files.read(name, rows)
        if name not in self.dequantized:
            self.dequantized.clear()
            if is_packed:
                linear = self.files.read_packed(name, self.unpacked, torch.device("cpu"))
            else:
                linear = quantize(self.files.read(name), self.quantization, self.unpacked)  # type: ignore[arg-type]
            self.dequantized[name] = linear.dequantize()  # (out, in)
        return self.dequantized[name][rows]


def open_rows(
    directory: Path, quantization: Quantization | None = None, unpacked: torch.dtype = torch.float32,
    vocabulary: int = 0,
) -> Weights:  # fmt: skip
    """The weights of a Hugging Face directory, with at least `vocabulary` tokens; raises what `open_weights` does."""
    base = ModelFiles.read(directory)
    with torch.device("meta"):
        blank = Decoder(base.decoder)
    config = replace(base.decoder, vocab_size=max(base.decoder.vocab_size, vocabulary))
    return Weights(config, open_weights(base, blank), quantization, unpacked)


def return_freed_memory() -> None:
    """Make glibc return large freed blocks to the system instead of keeping them."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, which by default grows to 32 MB


class StreamedLinear(nn.Linear):
    """y = x W^T + b, where W is read from disk in each call."""

    def __init__(self, weights: Rows, name: str):
        nn.Module.__init__(self)  # nn.Linear's would allocate W
        self.weights, self.name = weights, f"{name}.weight"
        self.out_features, self.in_features = weights.shapes[self.name]
        has_bias = f"{name}.bias" in weights.shapes
        self.bias = nn.Parameter(weights.whole(f"{name}.bias")) if has_bias else None  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The complete W, (out, in) float32: DoRA needs the norms of its rows."""
        return self.weights.whole(self.name)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(*x.shape[:-1], self.out_features)
        start = 0
        for slab in self.weights.rows(self.name):  # (some of out, in)
            y[..., start : start + len(slab)] = x @ slab.float().T
            start += len(slab)
        return y if self.bias is None else y + self.bias


class StreamedEmbedding(nn.Embedding):
    def __init__(self, weights: Rows, name: str):
        nn.Module.__init__(self)
        self.weights, self.name = weights, f"{name}.weight"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.weights.whole(self.name)

    def forward(self, ids: Tensor) -> Tensor:
        wanted, places = ids.unique(return_inverse=True)
        # Copies, because a view keeps its mapped pages in memory.
        rows = [self.weights.read(self.name, slice(row, row + 1)).clone() for row in wanted.tolist()]
        return F.embedding(places, torch.cat(rows).float())


class StreamedDecoder(Decoder):
    """A decoder in float32 on the CPU that reads its matrices from files; norms and biases are in memory."""

    def __init__(self, weights: Rows):
        with torch.device("meta"):
            super().__init__(weights.config)
        self.weights = weights
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Linear):
                self.set_submodule(name, StreamedLinear(weights, name))
            elif isinstance(module, nn.Embedding):
                self.set_submodule(name, StreamedEmbedding(weights, name))
            else:  # a norm, sinks, scalars, and what a layer without attention has of its own
                for part in dict(module.named_parameters(recurse=False)):
                    setattr(module, part, nn.Parameter(weights.whole(f"{name}.{part}")))
        self.requires_grad_(False)
        self.eval()

    device, dtype = torch.device("cpu"), torch.float32

    def untie(self) -> None:
        if self.lm_head is None:
            self.config = replace(self.config, tied=False)
            self.lm_head = StreamedLinear(self.weights, EMBEDDINGS[0].removesuffix(".weight"))

    def finish(self, x: Tensor) -> Tensor:
        return self.model.norm(x) * self.config.logit_scale

    @property
    def head(self) -> Tensor:
        """A tensor with the shape of the output embedding; all NaN, so that any use of its values shows."""
        return torch.tensor(math.nan).expand(self.config.vocab_size, self.config.hidden_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ head^T, capped, with a few rows of the head at a time, (..., vocab)."""
        name, start, found = EMBEDDINGS[self.lm_head is not None], 0, list[Tensor]()
        for slab in self.weights.rows(name if name in self.weights.shapes else EMBEDDINGS[0]):
            slab = slab.float()
            if isinstance(self.output, Adapter) and self.output.enabled:
                slab = self.output.merged(slab, slice(start, start + len(slab)))
            start += len(slab)
            found.append(F.linear(hidden, slab))
        return soft_cap(torch.cat(found, dim=-1), self.config.logit_cap)
