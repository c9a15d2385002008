"""A layer of experts: many MLPs, of which each token uses a few, chosen by a router (Shazeer et al. 2017).

    l = R x (+ b),   the experts of x are those with the k largest of l
    y = sum over them of w_e expert_e(x),   w = softmax(l) over all experts, or over those k alone

So a token costs k experts, and memory holds all of them. The router computes in float32: two experts whose logits are
near would be confused in bfloat16. Each expert is an MLP of ordinary linears, so that adapters, four bits and merging
treat it as any other: nothing of an expert is skipped, whatever its files look like (nanoft/models/expert_files.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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


class Router(nn.Linear):
    """R x + b in the number format of x, whatever that of R: (n, hidden) -> (n, experts)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Experts(nn.Module):
    """sum_e w_e expert_e(x), over the k experts of each token."""

    def __init__(self, routing: Routing, hidden_size: int, experts: Iterable[nn.Module], bias: bool):
        super().__init__()
        self.chosen, self.over_chosen = routing.chosen, routing.over_chosen
        self.router = Router(hidden_size, routing.experts, bias=bias)
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

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        tokens = x.flatten(0, -2)  # (n, hidden)
        weights, chosen = self.route(tokens)
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
