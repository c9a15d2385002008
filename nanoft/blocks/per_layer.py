"""Per-layer embeddings (Gemma 3n and 4): every block reads the token itself once more, through a gate.

For layer l, token t and the first residual stream x_0 = scale * embedding[t], with e numbers for each layer:

    p_l = (norm(P x_0 / sqrt(hidden))_l + sqrt(e) * E[t]_l) / sqrt(2)        from the token and its embedding
    x   = (x + norm(W (gelu(G x) * p_l))) * scalar_l                         at the end of block l
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft.attention import SequenceContext


def extend_trunk(trunk: nn.Module, config: Any) -> None:
    """Give the trunk E, (vocab, layers * e), P, (layers * e, hidden), and the norm over e."""
    if size := config.per_layer_size:
        trunk.embed_tokens_per_layer = nn.Embedding(config.vocab_size, config.num_layers * size)
        trunk.per_layer_model_projection = nn.Linear(config.hidden_size, config.num_layers * size, bias=False)
        trunk.per_layer_projection_norm = config.make_norm(size)


def embeddings(trunk: Any, ids: Tensor, x: Tensor) -> dict[tuple[str, int], Tensor]:
    """p_l of every layer, (b, q, e) each, for the context; ids are (b, q) and x is x_0, (b, q, hidden)."""
    if not hasattr(trunk, "embed_tokens_per_layer"):
        return {}
    layers = len(trunk.layers)
    projected = (trunk.per_layer_model_projection(x) * x.shape[-1] ** -0.5).unflatten(-1, (layers, -1))
    stored = trunk.embed_tokens_per_layer(ids).unflatten(-1, (layers, -1))
    scale = torch.full((), math.sqrt(stored.shape[-1]), dtype=stored.dtype, device=stored.device)
    both = (trunk.per_layer_projection_norm(projected) + stored * scale) * 2**-0.5
    return {("embedding", layer): both[:, :, layer] for layer in range(layers)}


def extend_block(block: Any, config: Any, layer: int) -> None:
    """Give a block G, (e, hidden), W, (hidden, e), the norm of what it adds, and its scalar, which is not trained."""
    hidden, size = config.hidden_size, config.per_layer_size
    block.per_layer = [("embedding", layer)] if size else []
    block.takes = [*block.takes, *block.per_layer]
    if size:
        block.per_layer_input_gate = nn.Linear(hidden, size, bias=False)
        block.per_layer_projection = nn.Linear(size, hidden, bias=False)
        block.post_per_layer_input_norm = config.make_norm(hidden)
    scalar = nn.Parameter(torch.ones(1), requires_grad=False) if config.layer_scalar else None
    block.register_parameter("layer_scalar", scalar)


def finish(block: Any, x: Tensor, context: SequenceContext, target_positions: Tensor | None) -> Tensor:
    """The end of a block, (b, q, hidden), or at n positions only (1, n, hidden); of most families x itself."""
    for name in block.per_layer:
        p = context.tensors[name]  # (b, q, e)
        p = p if target_positions is None else p.flatten(0, 1)[target_positions][None]
        gate = F.gelu(block.per_layer_input_gate(x), approximate="tanh")
        x = x + block.post_per_layer_input_norm(block.per_layer_projection(gate * p))
    return x if block.layer_scalar is None else x * block.layer_scalar
