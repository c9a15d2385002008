"""The gated delta rule in chunks of positions: matrix products instead of a step for each position.

Within a chunk of C positions let c_t be the sum of the decays up to t, D_tj = exp(c_t - c_j) for j <= t, and S the
state before it. With u_t = beta_t (v_t - what the decayed state says of k_t), the recurrence of
nanoft/blocks/recurrence.py is a unit lower triangular system (Yang et al. 2024, section 3; 2025, eq. 12):

    A = (beta K K^T * D) below its diagonal;   (I + A) [U0, W] = [beta V, beta exp(c) K]
    U = U0 - W S;   Y = exp(c) Q S + (Q K^T * D) U;   S <- exp(c_C) S + (exp(c_C - c) K)^T U

Only U and S go from chunk to chunk. For backward just the inputs are kept; it computes the rest again.

Notation in comments: m chunks, n sequences times heads, C positions, dk and dv sizes of keys and values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoft.blocks.recurrence import widen

CHUNK = 64  # positions


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `recurrence.delta_rule`; no gradient goes through the states."""
    return _Chunked.apply(q, k, v, decay, beta, before)


class _Chunks(NamedTuple):
    """What the chunks are without the state."""

    q: Tensor  # (m, n, C, dk)
    k: Tensor
    v: Tensor  # (m, n, C, dv)
    beta: Tensor  # (m, n, C, 1)
    grown: Tensor  # exp(c), (m, n, C, 1)
    left: Tensor  # exp(c_C - c), (m, n, C, 1)
    between: Tensor  # D, (m, n, C, C)
    system: Tensor  # A, whose upper triangle does not count
    scores: Tensor  # Q K^T * D
    solved: Tensor  # [U0, W], (m, n, C, dv + dk)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> _Chunks:
        size = min(CHUNK, q.shape[1])
        q, k, v, decay, beta = (_chunk(x, size) for x in (q, k, v, decay[..., None], beta[..., None]))
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        between = decay.expand(-1, -1, -1, size).tril(-1).cumsum(2)  # c_t - c_j; a difference would be less exact
        between = between.masked_fill_(future, -torch.inf).exp_()
        grown, left = decay.cumsum(2).exp(), between[:, :, -1, :, None]
        system = ((beta * k) @ k.transpose(2, 3)).mul_(between)
        right = torch.cat((beta * v, beta * grown * k), dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        scores = (q @ k.transpose(2, 3)).mul_(between)
        return cls(q, k, v, beta, grown, left, between, system, scores, solved)

    def run(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U, (m, n, C, dv), the state before each chunk, (m, n, dk, dv), and the last one."""
        u0, w = self.solved.split([self.v.shape[-1], self.k.shape[-1]], dim=-1)
        keys, over = (self.left * self.k).transpose(2, 3), self.grown[:, :, -1:]
        u, states = torch.empty_like(u0), u0.new_empty(len(u0), *state.shape)
        for i in range(len(u0)):
            states[i] = state
            torch.baddbmm(u0[i], w[i], state, alpha=-1, out=u[i])
            state = torch.baddbmm(over[i] * state, keys[i], u[i])
        return u, states, state


class _Chunked(torch.autograd.Function):
    """The names of gradients are those of what they belong to, with a d before them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        q, k, v, decay, beta, before = inputs
        with torch.autocast(v.device.type, enabled=False):
            chunks = _Chunks.of(*widen(q, k, v, decay, beta))
            u, states, last = chunks.run(_start(chunks, before))
            y = (chunks.scores @ u).add_((chunks.grown * chunks.q) @ states)
        last = last.unflatten(0, (len(v), -1))
        ctx.mark_non_differentiable(last)
        return _unchunk(y, v).to(v.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, before = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in inputs]
                wide = widen(*inputs)
            chunks = _Chunks.of(*(x.detach() for x in wide))
            d_wide = _backward(chunks, _chunk(dy.to(wide[2].dtype), chunks.q.shape[2]), _start(chunks, before))
        grads = [_unchunk(d, x).view_as(x) for d, x in zip(d_wide, wide, strict=True)]
        return (*torch.autograd.grad(wide, inputs, grads), None)


def _backward(c: _Chunks, dy: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay and beta in chunks, (m, n, C, ...)."""
    u, states, _ = c.run(start)
    size = c.v.shape[-1]
    w, read, written = c.solved[..., size:], c.grown * c.q, c.left * c.k
    over = c.grown[:, :, -1:]
    du, d_states = c.scores.transpose(2, 3) @ dy, torch.zeros_like(states)  # of the state after each chunk
    d_read = read.transpose(2, 3) @ dy
    for i in reversed(range(len(du))):
        du[i].baddbmm_(written[i], d_states[i])
        if i:
            torch.baddbmm(d_read[i] + over[i] * d_states[i], w[i].transpose(1, 2), du[i], alpha=-1, out=d_states[i - 1])
    d_solved = torch.cat((du, du @ -states.transpose(2, 3)), dim=-1)
    d_right = torch.linalg.solve_triangular(c.system.mT, d_solved, upper=True, unitriangular=True)
    d_system = (d_right @ -c.solved.mT).tril_(-1)
    d_scores = dy @ u.mT
    dv, d_grown_k = d_right[..., :size], d_right[..., size:]  # of beta V and beta exp(c) K
    dq, dk = c.grown * (dy @ states.mT), c.left * (u @ d_states.mT)
    d_beta_k = (d_grown_k * c.grown * c.k).sum(-1, keepdim=True)
    # a decay is in exp(c) of its own and later positions, in exp(c_C - c) of earlier ones, in D between the two
    d_sums = (dq * c.q).sum(-1, keepdim=True).add_(c.beta * d_beta_k)
    d_sums[:, :, -1:] += over * (states * d_states).sum((2, 3))[..., None, None]
    d_left = (dk * c.k).sum(-1, keepdim=True)
    d_between = d_system.mul(c.system).addcmul_(d_scores, c.scores)  # the gradient of log D
    d_decay = _later(d_sums) + F.pad(d_left, (0, 0, 1, -1)).cumsum(2) + _later(d_between).tril_(-1).sum(3, keepdim=True)
    d_system *= c.between
    d_scores *= c.between
    back = d_system @ c.k  # (m, n, C, dk)
    d_beta = (back * c.k).sum(-1, keepdim=True) + d_beta_k + (dv * c.v).sum(-1, keepdim=True)
    dk += c.beta * (back + c.grown * d_grown_k) + d_system.mT @ (c.beta * c.k) + d_scores.mT @ c.q
    dq += d_scores @ c.k
    return dq, dk, c.beta * dv, d_decay, d_beta


def _later(x: Tensor) -> Tensor:
    """The sum of x over its own and later positions of a chunk, (m, n, C, ...)."""
    return x.flip(2).cumsum(2).flip(2)


def _start(chunks: _Chunks, before: Tensor | None) -> Tensor:
    """The state before the first chunk, (n, dk, dv)."""
    if before is not None:
        return before.flatten(0, 1)
    return chunks.v.new_zeros(chunks.v.shape[1], chunks.k.shape[-1], chunks.v.shape[-1])


def _chunk(x: Tensor, size: int) -> Tensor:
    """(b, q, h, d) as (m, n, C, d), with zeros at the end, which change no state."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))  # (b, m, C, h, d)
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def _unchunk(x: Tensor, like: Tensor) -> Tensor:
    """(m, n, C, d) as (b, q, h, d), with b, q and h of `like`."""
    x = x.unflatten(1, (len(like), -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return x[:, : like.shape[1]]
