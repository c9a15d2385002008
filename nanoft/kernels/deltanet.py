"""The gated delta rule in chunks of positions: matrix products instead of a step for each position; a convolution.

Within a chunk of C positions let c_t be the sum of the decays up to t, D_tj = exp(c_t - c_j) for j <= t, and S the
state before it. With u_t = beta_t (v_t - what the decayed state says of k_t), the recurrence of
nanoft/blocks/recurrence.py is a unit lower triangular system (Yang et al. 2024, section 3; 2025, eq. 12):

    T = (I + (beta K K^T * D below the diagonal))^-1;   U0 = T beta V;   W = T beta exp(c) K
    U = U0 - W S;   Y = exp(c) Q S + (Q K^T * D) U;   S <- exp(c_C) S + (exp(c_C - c) K)^T U

Only U and S go from chunk to chunk. For backward just the inputs are kept; it computes the rest again. Factors of
positions are multiplied into matrices of C x C, which are smaller than those of keys and values.

Notation in comments: m chunks, n sequences times heads, C positions, dk and dv sizes of keys and values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoft.blocks import recurrence

CHUNK = 64  # positions


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `recurrence.delta_rule`; no gradient goes through the states."""
    return (
        recurrence.delta_rule(q, k, v, decay, beta, before)
        if before is not None
        else _Chunked.apply(q, k, v, decay, beta)
    )


class Convolution(torch.autograd.Function):
    """y of `recurrence.convolution`: shifted products, added in place; in backward they shift to the other side.

    x is (b, q, c), the weight (c, K) has no gradient; `lengths` are those of documents, end to end; None: of each row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lengths: tuple[int, ...] | None) -> Tensor:
        ctx.rest = weight, lengths
        return _shift_and_add(x, weight, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _shift_and_add(dy, ctx.rest[0], ctx.rest[1], back=True), None, None


def _shift_and_add(x: Tensor, weight: Tensor, lengths: tuple[int, ...] | None, back: bool = False) -> Tensor:
    y = x * weight[:, -1]
    rows = [part.flatten(0, 1).split(lengths) if lengths else [part] for part in (y, x)]
    for to, of in zip(*rows, strict=True):
        for j in range(1, min(weight.shape[1], to.shape[-2])):
            later, earlier = slice(j, None), slice(-j)
            to[..., earlier if back else later, :].addcmul_(of[..., later if back else earlier, :], weight[:, -1 - j])
    return y


class _Chunks(NamedTuple):
    """What the chunks are without the state."""

    q: Tensor  # (m, n, C, dk)
    k: Tensor
    v: Tensor  # (m, n, C, dv)
    beta: Tensor  # (m, n, C, 1)
    grown: Tensor  # exp(c), (m, n, C, 1)
    left: Tensor  # exp(c_C - c), (m, n, C, 1)
    between: Tensor  # D, (m, n, C, C)
    similar: Tensor  # K K^T * D
    scores: Tensor  # Q K^T * D
    inverse: Tensor  # T
    written: Tensor  # exp(c_C - c) K, (m, n, C, dk)
    u0: Tensor  # (m, n, C, dv)
    w: Tensor  # (m, n, C, dk)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> _Chunks:
        size = min(CHUNK, q.shape[1])
        q, k, v, decay, beta = (_chunk(x, size) for x in (q, k, v, decay[..., None], beta[..., None]))
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        between = decay.expand(-1, -1, -1, size).tril(-1).cumsum(2)  # c_t - c_j; a difference would be less exact
        between = between.masked_fill_(future, -torch.inf).exp_()
        grown, left = decay.cumsum(2).exp(), between[:, :, -1, :, None]
        similar, scores = (k @ k.mT).mul_(between), (q @ k.mT).mul_(between)
        # of the system only what is below the diagonal counts
        one = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(similar)
        inverse = torch.linalg.solve_triangular(beta * similar, one, upper=False, unitriangular=True)
        changed = inverse * beta.mT
        u0, w = changed @ v, (changed * grown.mT) @ k
        return cls(q, k, v, beta, grown, left, between, similar, scores, inverse, left * k, u0, w)

    def run(self) -> tuple[Tensor, Tensor]:
        """U, (m, n, C, dv), and the states before each chunk and after the last, (m + 1, n, dk, dv)."""
        over, u = self.grown[:, :, -1:], torch.empty_like(self.u0)
        states = u.new_zeros(len(u) + 1, u.shape[1], self.k.shape[-1], u.shape[-1])
        for i in range(len(u)):
            torch.baddbmm(self.u0[i], self.w[i], states[i], alpha=-1, out=u[i])
            torch.mul(states[i], over[i], out=states[i + 1]).baddbmm_(self.written[i].mT, u[i])
        return u, states


class _Chunked(torch.autograd.Function):
    """The names of gradients are those of what they belong to, with a d before them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        v = inputs[2]
        with torch.autocast(v.device.type, enabled=False):
            chunks = _Chunks.of(*recurrence.widen(*inputs))
            u, states = chunks.run()
            y = (chunks.q @ states[:-1]).mul_(chunks.grown).add_(chunks.scores @ u)
        last = states[-1].unflatten(0, (len(v), -1)).clone()
        ctx.mark_non_differentiable(last)
        return _unchunk(y, v).to(v.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in inputs]
                wide = recurrence.widen(*inputs)
            chunks = _Chunks.of(*(x.detach() for x in wide))
            d_wide = _backward(chunks, _chunk(dy.to(wide[2].dtype), chunks.q.shape[2]))
        grads = [_unchunk(d, x).view_as(x) for d, x in zip(d_wide, wide, strict=True)]
        return torch.autograd.grad(wide, inputs, grads)


def _backward(c: _Chunks, dy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay and beta in chunks, (m, n, C, ...)."""
    u, states = c.run()
    states, over, d_read = states[:-1], c.grown[:, :, -1:], c.grown * dy
    du, d_states = c.scores.mT @ dy, torch.empty_like(states)  # of the state after each chunk
    d_before = c.q.mT @ d_read  # of the state before each chunk, from what is read of it
    d_states[-1] = 0
    for i in reversed(range(len(du))):
        du[i].baddbmm_(c.written[i], d_states[i])
        if i:
            torch.baddbmm(d_before[i], c.w[i].mT, du[i], alpha=-1, out=d_states[i - 1])
            d_states[i - 1].addcmul_(over[i], d_states[i])
    dw, d_written = (du @ states.mT).neg_(), u @ d_states.mT
    d_scores, dq = dy @ u.mT, d_read @ states.mT
    changed = c.inverse * c.beta.mT
    dv, dk = changed.mT @ du, (changed * c.grown.mT).mT @ dw
    # U0 = T beta V and W = T beta exp(c) K: factors of T's columns; T = (I + A)^-1, A = beta (K K^T * D)
    d_grown_k = (dk * c.k).sum(-1, keepdim=True)
    d_changed = (du @ c.v.mT).addcmul_(dw @ c.k.mT, c.grown.mT)
    d_beta = (d_changed * c.inverse).sum(2)[..., None]
    d_system = (c.inverse.mT @ d_changed.mul_(c.beta.mT) @ c.inverse.mT).neg_().tril_(-1)
    d_beta += (d_system * c.similar).sum(-1, keepdim=True)
    d_similar = d_system.mul_(c.beta)
    # a decay is in exp(c) of its own and later positions, in exp(c_C - c) of earlier ones, in D between the two
    d_sums = (dq * c.q).sum(-1, keepdim=True).add_(d_grown_k)
    d_sums[:, :, -1:] += over * (states * d_states).sum((2, 3))[..., None, None]
    d_left = (d_written * c.written).sum(-1, keepdim=True)
    d_between = (d_similar * c.similar).addcmul_(d_scores, c.scores)  # the gradient of log D
    d_decay = _later(d_sums) + F.pad(d_left, (0, 0, 1, -1)).cumsum(2) + _later(d_between).tril_(-1).sum(3, keepdim=True)
    d_similar.mul_(c.between)
    d_scores.mul_(c.between)
    dk.addcmul_(d_written, c.left).add_((d_similar + d_similar.mT) @ c.k).add_(d_scores.mT @ c.q)
    return dq.add_(d_scores @ c.k), dk, dv, d_decay, d_beta


def _later(x: Tensor) -> Tensor:
    """The sum of x over its own and later positions of a chunk, (m, n, C, ...)."""
    return x.flip(2).cumsum(2).flip(2)


def _chunk(x: Tensor, size: int) -> Tensor:
    """(b, q, h, d) as (m, n, C, d), with zeros at the end, which change no state."""
    if missing := -x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    x = x.unflatten(1, (-1, size))  # (b, m, C, h, d)
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def _unchunk(x: Tensor, like: Tensor) -> Tensor:
    """(m, n, C, d) as (b, q, h, d), with b, q and h of `like`."""
    x = x.unflatten(1, (len(like), -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return x[:, : like.shape[1]]
