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

from collections.abc import Callable, Iterable, Sequence
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


class Balance:
    """A loss that keeps experts equally busy, for each document (DeepSeek-V3, arXiv 2412.19437, eq. 17-20).

    With T tokens, N experts, of which a token chooses k, the router's logits l and s_t = softmax(l_t):

        f_i = N / (k T) sum_t [i chosen by t],   P_i = 1 / T sum_t s_ti,   L = sum_i f_i P_i,
        dL/dl_t = (f - f . s_t) s_t / T          f only counts, and has no gradient

    So the probabilities of what is chosen often fall. L is 1 if all experts are equally busy, and near N / k if always
    the same are chosen. It is averaged over the layers with experts.

    A layer that is recomputed has no graph when it adds its L, so no gradient flows through `losses`. Instead, backward
    begins with setting `gradient`, and each layer takes its part from there, before the next forward pass in training.
    """

    def __init__(self, lengths: Sequence[int], layers: Sequence[Experts], device: torch.device):
        """`lengths`: tokens of the d documents of a micro-batch, n in all; padding is in documents of its own."""
        own = torch.tensor(lengths).to(device, non_blocking=device.type == "cuda")
        self.lengths, self.layers = own.clamp(min=1)[:, None], len(layers)
        self.document = torch.arange(len(own), device=device).repeat_interleave(own, output_size=sum(lengths))  # (n,)
        self.losses = self.gradient = torch.zeros(len(own), device=device)
        for layer in layers:
            layer.balance = self

    def add(self, logits: Tensor, chosen: Tensor) -> None:
        """Add the loss of a layer, and to the gradient of its logits the loss's; (n, experts) and (n, k)."""
        s, document = logits.detach().softmax(-1), self.document
        counted = torch.zeros_like(s).scatter_(1, chosen, s.shape[1] / chosen.shape[1])
        empty = s.new_zeros(len(self.lengths), s.shape[1])
        f, p = (empty.index_add(0, document, x) / self.lengths for x in (counted, s))  # (d, experts)
        self.losses = self.losses + (f * p).sum(-1) / self.layers
        if logits.requires_grad:
            slope = (f[document] - (f[document] * s).sum(-1, keepdim=True)) * s / self.lengths[document] / self.layers
            logits.register_hook(lambda gradient: gradient + self.gradient[document, None] * slope)


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
        self.balance: Balance | None = None  # of the micro-batch in training

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of the experts of each token: from (n, hidden), (n, k) each."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.router(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))  # (n, experts)
        chosen = self.choose(logits)
        if self.training and self.balance is not None:
            self.balance.add(logits, chosen)
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
