"""A layer of experts: many MLPs, of which each token uses a few, chosen by a router (Shazeer et al. 2017).

    l = R x (+ b),   the experts of x are those with the k largest of l
    y = sum over them of w_e expert_e(x),   w = softmax(l) over all experts, or over those k alone

So a token costs k experts, and memory holds all of them. The router computes in float32: two experts whose logits are
near would be confused in bfloat16. Each expert is an MLP of ordinary linears, so that adapters, four bits and merging
treat it as any other: nothing of an expert is skipped, whatever its files look like (nanoft/models/expert_files.py).

Gemma 4 has experts beside an MLP that computes every token, and a factor f_e for each expert:

    y = N_1(mlp(N(x))) + N_2(sum over the k of w_e f_e expert_e(N_3(x))),   l = R (scale * x / rms(x)) / sqrt(hidden)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Which layers have experts, how many, and how a token's are weighted."""

    layers: tuple[bool, ...]  # per layer; without experts it has one MLP
    experts: int  # in each of these layers
    chosen: int  # k, of each token
    width: int  # inner size of an expert
    over_chosen: bool  # the softmax is over the k chosen experts alone
    beside_mlp: bool = False  # layers with experts have an MLP, too


class Router(nn.Linear):
    """R x + b in the number format of x, whatever that of R: (n, hidden) -> (n, experts)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class ScaledRouter(nn.Module):
    """R (scale * x / rms(x)) / sqrt(hidden), and the factors of the experts (Gemma 4)."""

    def __init__(self, hidden_size: int, experts: int, eps: float):
        super().__init__()
        self.eps, self.proj = eps, Router(hidden_size, experts, bias=False)
        self.scale, self.per_expert_scale = nn.Parameter(torch.ones(hidden_size)), nn.Parameter(torch.ones(experts))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype) * len(self.scale) ** -0.5
        logits: Tensor = self.proj(F.rms_norm(x, scale.shape, scale, self.eps))
        return logits


class Experts(nn.Module):
    """sum_e w_e expert_e(x), over the k experts of each token."""

    def __init__(self, routing: Routing, hidden_size: int, experts: Iterable[nn.Module], bias: bool, eps: float = 0.0):
        super().__init__()
        self.chosen, self.over_chosen, self.scaled = routing.chosen, routing.over_chosen, routing.beside_mlp
        sizes = hidden_size, routing.experts
        self.router: Any = ScaledRouter(*sizes, eps) if self.scaled else Router(*sizes, bias=bias)
        self.experts = nn.ModuleList(experts)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of the experts of each token: from (n, hidden), (n, k) each."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.router(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))  # (n, experts)
        chosen = self.choose(logits)
        if self.over_chosen:
            return logits.gather(-1, chosen).softmax(-1), chosen
        return logits.softmax(-1).gather(-1, chosen), chosen

    def choose(self, logits: Tensor) -> Tensor:
        """The experts with the k largest logits, (n, k)."""
        return logits.topk(self.chosen, dim=-1).indices

    def forward(self, x: Tensor, routed: Tensor | None = None) -> Tensor:
        """(..., hidden) -> (..., hidden); `routed`: what the router reads, (..., hidden); None: x."""
        tokens = x.flatten(0, -2)  # (n, hidden)
        weights, chosen = self.route(tokens if routed is None else routed.flatten(0, -2))
        weights = weights * self.router.per_expert_scale[chosen] if self.scaled else weights
        outputs = self.outputs(tokens, chosen)
        return (outputs * weights[..., None].to(outputs.dtype)).sum(1).to(x.dtype).view_as(x)

    def outputs(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """expert_e(x) for the experts of each token, (n, k, hidden): each computes its tokens, gathered, at once.

        In training, an expert without tokens computes none, so that its parameters have a gradient, zero.
        """
        token, place, counts = self.rows_by_expert(chosen, tokens.dtype)
        inputs = tokens.index_select(0, token).split(counts)
        used = [e for e, count in enumerate(counts) if count or self.training] or [0]
        outputs = torch.cat([self.experts[e](inputs[e]) for e in used])
        return outputs.index_select(0, place).unflatten(0, chosen.shape)

    def rows_by_expert(self, chosen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
        """A row for each of the n k pairs of token and expert, by expert; `dtype` is that of the tokens.

        The token of each row, (rows,); the row of each pair, (n k,); how many rows each expert has.
        """
        order = chosen.flatten().argsort(stable=True)
        counts: list[int] = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        return order // self.chosen, order.argsort(), counts


class MLPAndExperts(nn.Module):
    """N_1(mlp(N(x))) + N_2(experts(N_3(x))), of which the router reads x itself; norms are named as in files."""

    def __init__(self, dense: nn.Module, sparse: Experts, make_norm: Callable[[], nn.Module]):
        super().__init__()
        self.dense, self.sparse = dense, sparse
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm_1 = make_norm(), make_norm()
        self.pre_feedforward_layernorm_2, self.post_feedforward_layernorm_2 = make_norm(), make_norm()

    def forward(self, x: Tensor) -> Tensor:
        dense = self.post_feedforward_layernorm_1(self.dense(self.pre_feedforward_layernorm(x)))
        sparse: Tensor = self.post_feedforward_layernorm_2(self.sparse(self.pre_feedforward_layernorm_2(x), x))
        return dense + sparse


def feed_forward(mlp: Callable[..., nn.Module], config: Any, layer: int) -> nn.Module:
    """The second half of a block: an MLP, experts, each of which is one, or both; `mlp` makes one of a width."""
    routing: Routing | None = config.routing
    if routing is None or not routing.layers[layer]:
        return mlp(config)
    experts = (mlp(config, routing.width) for _ in range(routing.experts))
    sparse = Experts(routing, config.hidden_size, experts, config.mlp_bias, config.norm_eps)
    if not routing.beside_mlp:
        return sparse
    return MLPAndExperts(mlp(replace(config, mlp="gated")), sparse, partial(config.make_norm, config.hidden_size))
