"""The gated delta rule in chunks of positions: matrix products instead of a step for each position; a convolution.

Within a chunk of C positions let c_t be the sum of the decays up to t, D_tj = exp(c_t - c_j) for j <= t, and S the
state before it. With u_t = beta_t (v_t - what the decayed state says of k_t), the recurrence of
nanoft/blocks/recurrence.py is a unit lower triangular system (Yang et al. 2024, section 3; 2025, eq. 12):

    T = (I + (beta K K^T * D below the diagonal))^-1;   E = V - exp(c) K S;   U = T beta E
    Y = exp(c) Q S + (Q K^T * D) U;   S <- exp(c_C) S + (exp(c_C - c) K)^T U

T is known without S, so only products go from chunk to chunk. For backward just the inputs are kept; it computes the
rest again.

Notation in comments: m chunks, n sequences times heads, C positions, dk and dv sizes of keys and values.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoft.blocks import recurrence
from nanoft.runtime.device import running_sum

CHUNK = 64  # positions


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `recurrence.delta_rule`; no gradient goes through the states."""
    if before is not None:
        return recurrence.delta_rule(q, k, v, decay, beta, before)
    return _Chunked.apply(q, k, v, decay, beta)


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
    taps = weight.T.contiguous()  # (K, c)
    y = x * taps[-1]
    rows = [part.flatten(0, 1).split(lengths) if lengths else [part] for part in (y, x)]
    for to, of in zip(*rows, strict=True):
        length = to.shape[-2]
        step = length if x.is_cuda else CHUNK  # positions that fit into a CPU's cache
        for start, j in product(range(0, length, step), range(1, len(taps))):
            shift = j if back else -j
            first, past = max(start, -shift), min(start + step, length, length - shift)
            if first < past:
                to[..., first:past, :].addcmul_(of[..., first + shift : past + shift, :], taps[-1 - j])
    return y


class _Chunks(NamedTuple):
    """What the chunks are without the state."""

    q: Tensor  # of length dk^-0.5, (m, n, C, dk)
    k: Tensor  # of length 1
    v: Tensor  # (m, n, C, dv)
    beta: Tensor  # (m, n, C, 1)
    scales: tuple[Tensor, Tensor]  # the factors of q and k that gave them their lengths, (m, n, C, 1)
    grown: Tensor  # exp(c), (m, n, C, 1)
    left: Tensor  # exp(c_C - c), (m, n, C, 1)
    between: Tensor  # D, (m, n, C, C)
    similar: Tensor  # K K^T * D
    scores: Tensor  # Q K^T * D
    inverse: Tensor  # T
    read: Tensor  # exp(c) K, (m, n, C, dk)
    written: Tensor  # exp(c_C - c) K

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> _Chunks:
        size, wide = min(CHUNK, q.shape[1]), torch.promote_types(v.dtype, torch.float32)
        parts = (x.to(wide) for x in (q, k, v, decay[..., None], beta[..., None]))
        q, k, v, decay, beta = (_chunk(x, size, v.shape[2] // x.shape[2]) for x in parts)
        scales = recurrence.scale(q, q.shape[-1] ** -0.5), recurrence.scale(k)
        q, k = q * scales[0], k * scales[1]
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        between = running_sum(decay.expand(-1, -1, -1, size).tril(-1), 2)  # c_t - c_j; a difference would be less exact
        between = between.masked_fill_(future, -torch.inf).exp_()
        grown, left = running_sum(decay, 2).exp(), between[:, :, -1, :, None]
        similar, scores = (k @ k.mT).mul_(between), (q @ k.mT).mul_(between)
        # of the system only what is below the diagonal counts
        one = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(similar)
        inverse = torch.linalg.solve_triangular(beta * similar, one, upper=False, unitriangular=True)
        return cls(q, k, v, beta, scales, grown, left, between, similar, scores, inverse, grown * k, left * k)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """E and U, (m, n, C, dv), and the states before each chunk and after the last, (m + 1, n, dk, dv)."""
        over, changed = self.grown[:, :, -1:], self.inverse * self.beta.mT
        e, u = torch.empty_like(self.v), torch.empty_like(self.v)
        states = u.new_empty(len(u) + 1, u.shape[1], self.k.shape[-1], u.shape[-1])
        states[0] = 0
        for i in range(len(u)):
            torch.baddbmm(self.v[i], self.read[i], states[i], alpha=-1, out=e[i])
            torch.bmm(changed[i], e[i], out=u[i])
            torch.mul(states[i], over[i], out=states[i + 1]).baddbmm_(self.written[i].mT, u[i])
        return e, u, states


class _Chunked(torch.autograd.Function):
    """The names of gradients are those of what they belong to, with a d before them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        v = inputs[2]
        with torch.autocast(v.device.type, enabled=False):
            chunks = _Chunks.of(*inputs)
            _, u, states = chunks.run()
            y = _add_product((chunks.q @ states[:-1]).mul_(chunks.grown), chunks.scores, u)
        last = states[-1].unflatten(0, (len(v), -1)).clone()
        ctx.mark_non_differentiable(last)
        return _unchunk(y, v).to(v.dtype), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            chunks = _Chunks.of(*inputs)
            grads = _backward(chunks, _chunk(dy.to(chunks.v.dtype), chunks.q.shape[2]))
        return tuple(_unchunk(d, x).reshape(x.shape).to(x.dtype) for d, x in zip(grads, inputs, strict=True))


def _backward(c: _Chunks, dy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, decay and beta in chunks, (m, n, C, ...)."""
    e, u, states = c.run()
    states, over, d_read = states[:-1], c.grown[:, :, -1:], c.grown * dy
    du, d_states = c.scores.mT @ dy, torch.empty_like(states)  # of the state after each chunk, first of its reading
    torch.bmm(*(x[1:].flatten(0, 1) for x in (c.q.mT, d_read)), out=d_states[:-1].flatten(0, 1))
    right, dv = torch.empty_like(du), torch.empty_like(du)  # right: the gradient of beta E, the system's right side
    d_states[-1] = 0
    for i in reversed(range(len(du))):
        du[i].baddbmm_(c.written[i], d_states[i])
        torch.bmm(c.inverse[i].mT, du[i], out=right[i])
        torch.mul(right[i], c.beta[i], out=dv[i])  # and of E
        if i:
            d_states[i - 1].baddbmm_(c.read[i].mT, dv[i], alpha=-1).addcmul_(over[i], d_states[i])
    dq, dk, d_written = d_read @ states.mT, (dv @ states.mT).mul_(-c.grown), u @ d_states.mT
    d_scores = dy @ u.mT
    d_system = (right @ u.mT).neg_().tril_(-1)  # of beta (K K^T * D)
    d_beta = (right * e).sum(-1, keepdim=True) + (d_system * c.similar).sum(-1, keepdim=True)
    d_similar = d_system.mul_(c.beta)
    # a decay is in exp(c) of its own and later positions, in exp(c_C - c) of earlier ones, in D between the two
    log_scores, log_similar = d_scores * c.scores, d_similar * c.similar  # the gradients of their logarithms
    along_q, along_k = ((d * x).sum(-1, keepdim=True) for d, x in ((dq, c.q), (dk, c.k)))
    d_sums, d_left = along_q + along_k, (d_written * c.written).sum(-1, keepdim=True)
    d_sums[:, :, -1:] += over * (states * d_states).sum((2, 3))[..., None, None]
    d_between = _later(log_scores + log_similar).tril_(-1).sum(3, keepdim=True)
    d_decay = _later(d_sums) + running_sum(F.pad(d_left, (0, 0, 1, -1)), 2) + d_between
    along_q += log_scores.sum(3, keepdim=True)
    along_k += d_left + log_similar.sum(3, keepdim=True) + (log_similar + log_scores).sum(2)[..., None]
    d_similar.mul_(c.between)
    d_scores.mul_(c.between)
    _add_product(dk.addcmul_(d_written, c.left), d_similar + d_similar.mT, c.k)
    _add_product(dk, d_scores.mT, c.q)
    _add_product(dq, d_scores, c.k)
    # x / |x| changes only across x
    dq.addcmul_(c.q, along_q, value=-c.q.shape[-1]).mul_(c.scales[0])
    dk.addcmul_(c.k, along_k, value=-1).mul_(c.scales[1])
    return dq, dk, dv, d_decay, d_beta


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a b in place, of chunks."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return x


def _later(x: Tensor) -> Tensor:
    """The sum of x over its own and later positions of a chunk, (m, n, C, ...)."""
    return running_sum(x.flip(2), 2).flip(2)


def _chunk(x: Tensor, size: int, copies: int = 1) -> Tensor:
    """(b, q, h, d) as (m, n, C, d), each head so many times; with zeros at the end, which change no state."""
    if missing := -x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    x = x.unflatten(1, (-1, size))[..., None, :].expand(-1, -1, -1, -1, copies, -1)  # (b, m, C, h, copies, d)
    return x.permute(1, 0, 3, 4, 2, 5).flatten(1, 3).contiguous()


def _unchunk(x: Tensor, like: Tensor) -> Tensor:
    """(m, n, C, d) as (b, q, h, d), with b, q and h of `like`: the sum over copies of a head."""
    x = x.unflatten(1, (len(like), like.shape[2], -1))
    x = x.sum(3) if x.shape[3] > 1 else x.squeeze(3)
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : like.shape[1]]
