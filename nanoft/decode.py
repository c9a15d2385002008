"""One more token for every row, as fast as a small model allows.

The prompts go through the decoder as in training, packed into one row, and each layer's keys and values are kept. After
that a step is one position a row: its products are small, and what costs is to read the weights and, in a small model,
Python itself. So a step is spelled out here with bare functions: the equations of nanoft/model.py, for one position.

    k, v of the new position go into the cache;  y = softmax(q K^T / sqrt(d)) V  over what is there

Prompts end in the same slot, so that the next token has the same slot in every row; the slots before a shorter prompt
are empty, and masked. Within a row slots differ by as much as positions do, so a window of positions is one of slots.

Notation in comments: b rows, h query heads, g key/value heads, d head size, n hidden size, k positions kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import parallel
from nanoft.attention import Documents
from nanoft.lora import LoRALinear
from nanoft.model import Block, Decoder

Product = Callable[[Tensor], Tensor]  # (b, in) -> (b, out)


class Decoding:
    """Rows of text that grow together: their keys and values, in buffers of their final size, and the step."""

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], more: int):
        """
        Args:
            prompts: token ids, none empty.
            more: tokens that may follow each.
        """
        self.model, self.config, self.device = model, model.config, model.head.device
        self.prompts, self.longest = prompts, max(map(len, prompts))
        self.length = self.longest  # slots in use
        self.slots = self.longest + more
        self.empty = [self.longest - len(prompt) for prompt in prompts]  # slots before each prompt
        self.keys: list[Tensor] = []  # of each layer, (b, g, slots, d)
        self.values: list[Tensor] = []
        self.blocks = [block for block in model.model.layers if isinstance(block, Block)]

    @functools.cached_property
    def layers(self) -> list[Layer]:
        return [Layer(block) for block in self.blocks]

    def read(self) -> Tensor:
        """Take in the prompts; the last hidden state of each, (b, n). None is padded, and none sees another."""
        lengths = [len(prompt) for prompt in self.prompts]
        ids = torch.tensor([token for prompt in self.prompts for token in prompt], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        ends = torch.tensor(lengths).cumsum(0)
        documents = None
        if len(lengths) > 1:
            documents = Documents(tuple(lengths), F.pad(ends, (1, 0)).to(self.device, torch.int32))
        rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self.device)
        slots = positions + torch.tensor(self.empty, device=self.device)[rows]

        def keep_pair(_: int, k: Tensor, v: Tensor) -> None:
            shape = (len(lengths), k.shape[2], self.slots, k.shape[3])
            for part, kept in ((k, self.keys), (v, self.values)):
                kept.append(torch.zeros(shape, dtype=v.dtype, device=self.device))
                kept[-1][rows, :, slots] = part[0]

        last = (ends - 1).to(self.device)
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled again for every length
            hidden = self.model(ids[None], positions[None], documents, rows=last, keep_pair=keep_pair)[0]
        self._prepare_slots()
        return hidden

    def _prepare_slots(self) -> None:
        """For every slot of every row: its rotation, (b, slots, d), and whether it is empty, (b, 1, 1, slots)."""
        slots, empty = torch.arange(self.slots), torch.tensor(self.empty)[:, None]
        cos, sin = self.model.rotation((slots - empty).clamp(min=0).to(self.device), self.values[0].dtype)
        self.cos = torch.cat((cos, cos), dim=-1)[:, :, 0]
        self.sin = torch.cat((-sin, sin), dim=-1)[:, :, 0]
        before = slots < empty
        mask = torch.zeros(before.shape, dtype=self.values[0].dtype).masked_fill(before, -torch.inf)
        self.mask = mask[:, None, None].to(self.device)

    def step(self, newest: Tensor) -> Tensor:
        """Take in one more token a row, (b,); the hidden state of each, (b, n)."""
        trunk, here = self.model.model, self.length
        self.length += 1
        cos, sin = self.cos[:, here, None], self.sin[:, here, None]  # (b, 1, d)
        x = trunk.embed_tokens(newest)
        for number, layer in enumerate(parallel.one_by_one(self.blocks, Layer) or self.layers):
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
        chosen = torch.tensor(rows, device=self.device)
        cut = min(self.empty[row] for row in rows)
        for parts in (self.keys, self.values):
            for number, part in enumerate(parts):
                parts[number] = part[chosen, :, cut:]
        self.empty = [self.empty[row] - cut for row in rows]
        self.cos, self.sin, self.mask = self.cos[chosen, cut:], self.sin[chosen, cut:], self.mask[chosen, ..., cut:]
        self.length, self.slots = self.length - cut, self.slots - cut


class Layer:
    """A block for one position a row: the functions of its linears, and what stands between them."""

    def __init__(self, block: Block):
        attention, mlp = block.self_attn, block.mlp
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.q_norm, self.k_norm, self.head_dim = attention.q_norm, attention.k_norm, attention.head_dim
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            as_function(linear)
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
        both = torch.cat((q, k), dim=1).to(v.dtype)  # (b, h + g, d)
        swapped = both.view(*both.shape[:2], 2, size // 2).flip(2).view(both.shape)  # the pair's other half
        both = torch.addcmul(both * cos, swapped, sin)
        return both[:, : q.shape[1]], both[:, q.shape[1] :], v

    def rest(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows the attention y, (b, h d), as `Block` has it: (b, n)."""
        x = x + self.o(y)
        norm = self.norms[1]
        y = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        return x + self.down(F.silu(self.gate(y)).mul_(self.up(y)))


def as_function(linear: nn.Module) -> Product:
    """A linear without the module around it: the plain product, with its adapter if that is switched on."""
    if isinstance(linear, LoRALinear):
        return adapted(linear) if linear.enabled else as_function(linear.base)
    if type(linear) is nn.Linear:  # not one whose weight lies elsewhere
        return lambda x, weight=linear.weight, bias=linear.bias: F.linear(x, weight, bias)  # type: ignore[misc]
    return linear


def adapted(linear: LoRALinear) -> Product:
    """y = W x + s B A x + b, as in nanoft/lora.py; A and B are rounded to the model's number format once."""
    base, (a, b), scaling = as_function(linear.base), linear.factors(), linear.scaling
    rounded: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def product(x: Tensor) -> Tensor:
        y = base(x)
        if y.dtype not in rounded:
            rounded[y.dtype] = a.to(y.dtype).T, b.to(y.dtype).T
        a_t, b_t = rounded[y.dtype]
        return linear.finish(y.addmm_(x.to(y.dtype) @ a_t, b_t, alpha=scaling))

    return product
