"""A block whose linears are computed in groups (nanoft/kernels/lora.py)."""

from __future__ import annotations

from torch import Tensor, nn

from nanoft.attention import SequenceContext
from nanoft.kernels.lora import grouped_linear, identity
from nanoft.lora import VARIANTS
from nanoft.model import MLP, Block, RMSNorm, SelfAttention, select
from nanoft.nf4 import Linear4bit, Linear8bit

LINEARS = {nn.Linear, Linear4bit, Linear8bit}


class FastBlock(Block):
    """A `Block`, with the same modules, that keeps less for backward. Each half is fast where its types are known.

    The last block computes `o_proj` at the target positions only. While hooks look at the halves, it is the reference.
    """

    def forward(self, x: Tensor, context: SequenceContext, target_positions: Tensor | None = None) -> Tensor:
        if has_hooks(self):
            return super().forward(x, context, target_positions)
        if supports_attention(self):
            attn, norm = self.self_attn, self.input_layernorm
            q, k, v = grouped_linear((attn.q_proj, attn.k_proj, attn.v_proj), norm.formula, x, norm.weight)
            y = context.attend(*attn.heads(q, k, v, context), attn).flatten(2)
            y = select(y, target_positions)
            x = select(x, target_positions) + grouped_linear((attn.o_proj,), identity, y)[0]
        else:
            x = select(x + self.self_attn(self.input_layernorm(x), context), target_positions)
        if not supports_mlp(self):
            return x + self.mlp(self.post_attention_layernorm(x))
        mlp, norm = self.mlp, self.post_attention_layernorm
        gate, up = grouped_linear((mlp.gate_proj, mlp.up_proj), norm.formula, x, norm.weight)
        return x + grouped_linear((mlp.down_proj,), mlp.activate, gate, up)[0]


def supports(block: nn.Module) -> bool:
    """Whether at least one half of a block is made of exactly the types that are known here.

    A subclass may compute something else, so it is not known.
    """
    return type(block) is Block and (supports_attention(block) or supports_mlp(block))


def supports_attention(block: Block) -> bool:
    attn = block.self_attn
    return (
        type(attn) is SelfAttention
        and type(block.input_layernorm) is RMSNorm
        and all(map(_is_known_linear, (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)))
    )


def supports_mlp(block: Block) -> bool:
    mlp = block.mlp
    return (
        type(mlp) is MLP
        and type(block.post_attention_layernorm) is RMSNorm
        and all(map(_is_known_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))
    )


def _is_known_linear(linear: nn.Module) -> bool:
    return type(linear) in LINEARS or (type(linear) in VARIANTS.values() and type(linear.base) in LINEARS)


def has_hooks(block: Block) -> bool:
    """Whether someone listens to the halves: a fast block never calls them."""
    return bool(block.self_attn._forward_hooks or block.mlp._forward_hooks)
