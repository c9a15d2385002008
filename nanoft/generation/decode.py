"""One more token for every row, as fast as a small model allows.

The prompts are read as training reads them, packed into one row, and each layer's keys and values are kept. After that
a step is one position a row: its products are small, and what costs is to read the weights and, in a small model,
Python itself. So the equations of nanoft/model.py are spelled out here with bare functions, and on a CPU the weights
are laid out, once, in the order in which they are read.

    k, v of the new position go into the cache;  y = softmax(q K^T / sqrt(d)) V  over what is there

Rows end in the same slot, so that the next token has the same slot in every row; the slots before a shorter row are
empty, and masked. Within a row slots differ by as much as positions do, so a window of positions is one of slots. Rows
whose answer has ended leave, and new prompts take their places.

Notation in comments: b rows, h query heads, g key/value heads, d head size, n hidden size, k positions kept.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft.attention import Documents, attend
from nanoft.kernels import sharding
from nanoft.lora import LoRALinear, linears_of, weight_of
from nanoft.model import Block, Decoder
from nanoft.nf4 import Linear4bit, Linear8bit
from nanoft.runtime import distributed
from nanoft.runtime.memory import available_host_bytes

Product = Callable[[Tensor], Tensor]  # (b, in) -> (b, out)
SHARE = 0.5  # of the free memory that another copy of the weights may take
CACHED = 16e6  # bytes in float32 that a processor's caches hold: read from there, their order is all the same


class Decoding:
    """Rows of text that grow together: their keys and values, in buffers of their final size, and the step."""

    def __init__(self, model: Decoder):
        self.model, self.config, self.device = model, model.config, model.head.device
        self.length = self.slots = 0  # slots in use, and there
        self.empty: list[int] = []  # slots before each row's prompt
        self.keys: list[Tensor] = []  # of each layer, (b, g, slots, d)
        self.values: list[Tensor] = []
        self.blocks = [block for block in model.model.layers if isinstance(block, Block)]
        self.lay_out = should_be_laid_out(model)
        self.head = laid_out(model.head, None) if self.lay_out else None

    @functools.cached_property
    def _layers(self) -> list[Layer]:
        return [Layer(block, self.lay_out) for block in self.blocks]

    def layers(self) -> Iterable[Layer]:
        """The blocks as functions; of a model that is split, one after another, while its weights are together."""
        return sharding.unsharded(self.blocks, lambda block: Layer(block, lay_out=False)) or self._layers

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ head^T in float32, (b, vocab)."""
        return self.model.logits(hidden) if self.head is None else self.head(hidden).float()

    def join(self, prompts: Sequence[Sequence[int]], more: int) -> Tensor:
        """Take in prompts, behind the rows that are there, whose newest slot and theirs become the same.

        Args:
            prompts: token ids, none empty.
            more: tokens that may follow each, and at most follow the rows that are there.

        Returns:
            The last hidden state of each prompt, (prompts, n).
        """
        longest = max(map(len, prompts))
        length = max(self.length, longest)
        before = length - self.length  # slots that the others move

        def beside(old: Tensor, new: Tensor) -> Tensor:
            both = new.new_zeros(len(old) + len(new), new.shape[1], length + more, new.shape[3])
            both[: len(old), :, before:length] = old[:, :, : self.length]
            both[len(old) :, :, length - longest : length] = new
            return both

        hidden, keys, values = self._read(prompts)
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[:] = [beside(*pair) for pair in zip(kept or [part[:0] for part in new], new, strict=True)]
        self.empty = [empty + before for empty in self.empty] + [length - len(prompt) for prompt in prompts]
        self.length, self.slots = length, length + more
        self._prepare_slots()
        return hidden

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The prompts' last hidden states, (b, n), and each layer's keys and values, (b, g, longest, d), which end
        in the same slot. The layers see them packed, t tokens: none is padded, and none sees another."""
        lengths = [len(prompt) for prompt in prompts]
        longest, ends = max(lengths), torch.tensor(lengths).cumsum(0)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        documents = None
        if len(lengths) > 1:
            documents = Documents(tuple(lengths), F.pad(ends, (1, 0)).to(self.device, torch.int32))
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self.device)
        slots = positions + (longest - torch.tensor(lengths, device=self.device))[rows]
        last = (ends - 1).to(self.device)

        trunk, keys, values = self.model.model, list[Tensor](), list[Tensor]()
        x = trunk.embed_tokens(ids)  # (t, n)
        cos, sin = (part[0, :, None] for part in self._rotation(positions[None], x.dtype))  # (t, 1, d)
        for number, (layer, window) in enumerate(zip(self.layers(), self.config.windows, strict=True), start=1):
            q, k, v = layer.queries_keys_values(x, cos, sin)
            for part, kept in ((k, keys), (v, values)):
                kept.append(part.new_zeros(len(lengths), part.shape[1], longest, part.shape[2]))
                kept[-1][rows, :, slots] = part
            y = attend(q[None], k[None], v[None], window, documents)[0].flatten(1)
            if number == len(self.blocks):  # the other rows lead nowhere
                x, y = x[last], y[last]
            x = layer.rest(x, y)
        return F.rms_norm(x, trunk.norm.weight.shape, trunk.norm.weight, trunk.norm.eps), keys, values

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a pair's own half and its other half are multiplied by, (b, q, d) each."""
        cos, sin = self.model.rotation(positions, dtype)  # (b, q, 1, d / 2)
        return torch.cat((cos, cos), dim=-1)[:, :, 0], torch.cat((-sin, sin), dim=-1)[:, :, 0]

    def _prepare_slots(self) -> None:
        """For every slot of every row: its rotation, (b, slots, d), and whether it is empty, (b, 1, 1, slots)."""
        slots, empty = torch.arange(self.slots), torch.tensor(self.empty)[:, None]
        positions = (slots - empty).clamp(min=0).to(self.device)
        self.cos, self.sin = self._rotation(positions, self.values[0].dtype)
        before = slots < empty
        mask = torch.zeros(before.shape, dtype=self.values[0].dtype).masked_fill(before, -torch.inf)
        self.mask = mask[:, None, None].to(self.device)

    def step(self, newest: Tensor) -> Tensor:
        """Take in one more token a row, (b,); the hidden state of each, (b, n)."""
        trunk, here = self.model.model, self.length
        self.length += 1
        cos, sin = self.cos[:, here, None], self.sin[:, here, None]  # (b, 1, d)
        x = trunk.embed_tokens(newest)
        for number, layer in enumerate(self.layers()):
            q, k, v = layer.queries_keys_values(x, cos, sin)
            keys, values, window = self.keys[number], self.values[number], self.config.windows[number]
            keys[:, :, here], values[:, :, here] = k, v
            first = 0 if window is None else max(0, self.length - window)
            mask = self.mask[..., first : self.length] if first < max(self.empty) else None
            # the h / g query heads of a key head stand as so many queries of it, so that nothing is repeated
            y = F.scaled_dot_product_attention(
                q.reshape(len(q), keys.shape[1], -1, q.shape[-1]),
                keys[:, :, first : self.length],
                values[:, :, first : self.length],
                attn_mask=mask,
            )
            x = layer.rest(x, y.reshape(len(x), -1))
        return F.rms_norm(x, trunk.norm.weight.shape, trunk.norm.weight, trunk.norm.eps)

    def keep(self, rows: Sequence[int]) -> None:
        """Leave the other rows behind, and the slots that are empty in all that stay."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        cut = min((self.empty[row] for row in rows), default=self.length)
        for parts in (self.keys, self.values):
            for number, part in enumerate(parts):
                parts[number] = part[chosen, :, cut:]
        self.empty = [self.empty[row] - cut for row in rows]
        self.cos, self.sin, self.mask = self.cos[chosen, cut:], self.sin[chosen, cut:], self.mask[chosen, ..., cut:]
        self.length, self.slots = self.length - cut, self.slots - cut


class Layer:
    """A block without modules: the functions of its linears, and what stands between them."""

    def __init__(self, block: Block, lay_out: bool):
        attention, mlp = block.self_attn, block.mlp
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.q_norm, self.k_norm, self.head_dim = attention.q_norm, attention.k_norm, attention.head_dim
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            as_function(linear, lay_out)
            for linear in (
                *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
                *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            )
        )

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, h, d), (b, g, d) and (b, g, d) of the residual stream x, (b, n)."""
        size, norm = self.head_dim, self.norms[0]
        x = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        q, k, v = (project(x).view(len(x), -1, size) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        both = torch.cat((q, k), dim=1)  # (b, h + g, d)
        swapped = both.view(*both.shape[:2], 2, size // 2).flip(2).view(both.shape)  # the pair's other half
        both = torch.addcmul(both * cos, swapped, sin).to(v.dtype)
        return both[:, : q.shape[1]], both[:, q.shape[1] :], v

    def rest(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows the attention y, (b, h d), as `Block` has it: (b, n)."""
        x = x + self.o(y)
        norm = self.norms[1]
        y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        return x + self.down(F.silu(self.gate(y)).mul_(self.up(y)))


def as_function(linear: nn.Module, lay_out: bool) -> Product:
    """A linear without the module around it: the plain product, with its adapter if that is switched on."""
    if isinstance(linear, LoRALinear):
        return adapted(linear, lay_out) if linear.enabled else as_function(linear.base, lay_out)
    if lay_out and isinstance(linear, (nn.Linear, Linear4bit, Linear8bit)):
        return laid_out(weight_of(linear), linear.bias)
    if type(linear) is nn.Linear:  # not one whose weight lies elsewhere
        return lambda x, weight=linear.weight, bias=linear.bias: F.linear(x, weight, bias)  # type: ignore[misc]
    return linear


def adapted(linear: LoRALinear, lay_out: bool) -> Product:
    """y = W x + s B A x + b, as in nanoft/lora.py; A and B are rounded to the model's number format once."""
    base, (a, b), scaling = as_function(linear.base, lay_out), linear.factors(), linear.scaling
    rounded: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def product(x: Tensor) -> Tensor:
        y = base(x)
        if y.dtype not in rounded:
            rounded[y.dtype] = a.to(y.dtype).T, b.to(y.dtype).T
        a_t, b_t = rounded[y.dtype]
        return linear.finish(y.addmm_(x.to(y.dtype) @ a_t, b_t, alpha=scaling))

    return product


# ---- Weights in the order in which a CPU reads them


def laid_out(weight: Tensor, bias: Tensor | None) -> Product:
    """x W^T + b from a copy of W, (out, in), in the blocks of oneDNN's kernels, which torch's compiler uses as well.

    As a matrix lies in memory, row by row, a product with few rows reads it at half the memory's speed: with the copy
    a token takes half the time, in float32 and in bfloat16 (bench/generate.md).
    """
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    kernel: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: kernel(x, blocks, bias, "none", [], "")


def should_be_laid_out(model: Decoder) -> bool:
    """Whether there are such kernels for the model, all of whose weights are in memory; whether it gains, and has room.

    Under autocast a product casts what it is given, which these kernels do not.
    """
    dtype = model.head.dtype
    here = (
        model.head.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not distributed.is_sharded()
    )
    if not here or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    linears = linears_of(model).values()
    if not {type(linear) for linear in linears} <= {nn.Linear, Linear4bit, Linear8bit}:  # their weights lie elsewhere
        return False
    dtypes = {linear.weight.dtype if isinstance(linear, nn.Linear) else linear.dtype for linear in linears}
    numbers = sum(linear.out_features * linear.in_features for linear in linears) + model.head.numel()
    least = CACHED if dtype == torch.float32 else 0  # PyTorch's own product in bfloat16 takes these kernels, too
    return dtypes == {dtype} and least < numbers * dtype.itemsize <= SHARE * available_host_bytes()
