"""Attention: which position sees which, and what computes it where.

    y_i = sum_j softmax_j(q_i k_j^T / sqrt(d)) v_j     over j in the same document, not after i, within the window

The weights of all pairs are never kept, so memory grows with the length and not with its square. On CUDA that is one
kernel (FlashAttention, Dao 2023), with a form for many packed documents at once. Elsewhere packed documents of like
length are attended to together, as a batch, which costs the sum of their squared lengths; a mask over the row would
cost the square of the sum.
Where there is no kernel for backward (Metal), or only a slow one (bfloat16 on a CPU), `_Chunked` says the formula in
plain operations, some queries at a time.

Notation in comments: b batch, q and k positions that ask and answer, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

varlen_attention: Any = None


with contextlib.suppress(ImportError):  # from PyTorch 2.10 on
    from torch.nn.attention.varlen import varlen_attn as varlen_attention


VARLEN_OPTIONS = inspect.signature(varlen_attention).parameters if varlen_attention is not None else {}
ALIKE = 0.8  # documents at least so long, relative to the longest of a group, are attended to together
CHUNK = 256  # queries at once in `_Chunked`: the weights of so many fit into a CPU's cache


@dataclass(frozen=True)
class Documents:
    """Where each document of a packed batch lies when its rows stand one behind another; known on the CPU."""

    lengths: tuple[int, ...]  # in order; the padding of a row is a document, too
    bounds: Tensor  # (documents + 1,) int32, on the model's device: 0, and the end of each

    @functools.cached_property
    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """Documents of like length: the places of their tokens, (n, width), and which of these are real, (tokens,).

        A document that is shorter than its group goes on into the next one: nothing of it sees what comes after it.
        """
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        groups, left = [], lengths.argsort(descending=True, stable=True)
        while len(left):
            width = int(lengths[left[0]])
            count = int((lengths[left] > ALIKE * width).sum())
            chosen, left = left[:count], left[count:]
            places = (starts[chosen, None] + torch.arange(width)).clamp(max=int(lengths.sum()) - 1)
            real = torch.arange(width) < lengths[chosen, None]
            groups.append((places, real.flatten().nonzero().squeeze(1)))
        return [(places.to(self.bounds.device), real.to(self.bounds.device)) for places, real in groups]

    @functools.cached_property
    def order(self) -> Tensor:
        """Where each token is found among the real tokens of all groups, (tokens,)."""
        return torch.cat([places.flatten()[real] for places, real in self.groups]).argsort()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # nothing to fuse with it, and its lengths keep changing
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Attention of q, (b, q, h, d), to k and v, (b, k, g, d), h a multiple of g (Ainslie et al. 2023): (b, q, h, d).

    Args:
        window: how many positions back a query sees, its own among them; None: all the way.
        documents: of a packed batch; None: each row is one.
    """
    window = None if window is None or window >= q.shape[1] else window
    if documents is None:
        return _causal(q, k, v, window)
    flat = [part.flatten(0, 1) for part in (q, k, v)]  # (b * q, heads, d): each row behind the one before
    if has_varlen(q, window):
        return _varlen(flat, documents, window).view_as(q)
    return _by_groups(flat, documents, window).view_as(q)


def _by_groups(flat: list[Tensor], documents: Documents, window: int | None) -> Tensor:
    """Documents of like length as one batch, (tokens, h, d)."""
    outputs = []
    for places, real in documents.groups:
        q, k, v = (part.index_select(0, places.flatten()).unflatten(0, places.shape) for part in flat)
        within = None if window is None or window >= places.shape[1] else window
        outputs.append(_causal(q, k, v, within).flatten(0, 1).index_select(0, real))
    return torch.cat(outputs).index_select(0, documents.order)


def backend(q: Tensor, window: int | None, packed: bool) -> str:
    """What computes such an attention, in a word or two for the log."""
    if packed and has_varlen(q, window):
        return "varlen kernel (FlashAttention)"
    each = ", documents of like length together" if packed else ""
    if _needs_chunks(q, window):
        return f"chunks of {CHUNK} queries{each}"
    if q.device.type != "cuda":
        return f"PyTorch's kernel for {q.device.type}{each}"
    t = q.transpose(1, 2)
    choice = torch._fused_sdp_choice(t, t, t, is_causal=True)
    return f"{torch.nn.attention.SDPBackend(choice).name.lower().replace('_', ' ')} kernel{each}"


def has_varlen(q: Tensor, window: int | None) -> bool:
    """Whether one kernel can attend to documents of different lengths."""
    able = varlen_attention is not None and (window is None or "window_size" in VARLEN_OPTIONS)
    return able and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def _needs_chunks(q: Tensor, window: int | None) -> bool:
    """Metal has no kernel for backward, a CPU only a slow one for bfloat16; none of PyTorch's knows windows."""
    return window is not None or q.device.type == "mps" or (q.device.type == "cpu" and q.dtype == torch.bfloat16)


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    if _needs_chunks(q, window):
        return _Chunked.apply(q, k, v, window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, q, d)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _varlen(flat: list[Tensor], documents: Documents, window: int | None) -> Tensor:
    """One kernel for all documents, (tokens, h, d). What its options are called depends on PyTorch's version."""
    q, k, v = flat
    bounds, longest = documents.bounds, max(documents.lengths)
    options: dict[str, Any] = {"is_causal": True}
    if "window_size" in VARLEN_OPTIONS:
        options = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True
    else:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    return varlen_attention(q, k, v, bounds, bounds, longest, longest, **options)


class _Chunked(torch.autograd.Function):
    """Causal attention, some queries at a time; backward computes their weights P again (Dao et al. 2022, section 3).

        S = q k^T / sqrt(d),  P = softmax(S),  y = P v
        dv = P^T dy,  dP = dy v^T,  dS = P (dP - sum_k P dP),  dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d)

    The h / g query heads that share a key head stand one below another as rows of one matrix.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.window = window
        keys, values = _by_head(k), _by_head(v)  # (b g, k, d)
        y = torch.empty_like(q)
        for here, seen in _chunks(q.shape[1], window):
            p = _weights(q[:, here], keys[:, seen], here.start - seen.start, window)
            y[:, here] = _ungrouped(p @ values[:, seen], y[:, here])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        keys, values = _by_head(k), _by_head(v)
        dq, scale = torch.empty_like(q), q.shape[-1] ** -0.5
        dk, dv = (torch.zeros(keys.shape, dtype=torch.float32, device=q.device) for _ in range(2))
        for here, seen in _chunks(q.shape[1], ctx.window):
            p = _weights(q[:, here], keys[:, seen], here.start - seen.start, ctx.window)  # (b g, h/g q, k)
            dy = _grouped(grad_outputs[0][:, here], keys.shape[0])
            dp = dy @ values[:, seen].transpose(1, 2)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dv[:, seen] += p.transpose(1, 2) @ dy
            dk[:, seen] += ds.transpose(1, 2) @ _grouped(q[:, here], keys.shape[0])
            dq[:, here] = _ungrouped(ds @ keys[:, seen], dq[:, here])
        unheaded = [t.to(k.dtype).unflatten(0, (len(k), -1)).transpose(1, 2) for t in (dk.mul_(scale), dv)]
        return dq.mul_(scale), *unheaded, None


def _chunks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that any of them sees); the last ones first, for the others fit into the memory they leave."""
    for start in reversed(range(0, length, CHUNK)):
        first = 0 if window is None else max(0, start - window + 1)
        end = min(start + CHUNK, length)
        yield slice(start, end), slice(first, end)


def _weights(q: Tensor, keys: Tensor, offset: int, window: int | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) of a chunk, (b g, h/g q, k); its first query is the `offset`-th of the keys."""
    length, repeats = q.shape[1], q.shape[0] * q.shape[2] // keys.shape[0]
    unseen = torch.full((length, keys.shape[1]), -torch.inf, dtype=q.dtype, device=q.device)
    hidden = unseen.triu(offset + 1)  # -inf for keys after the query, 0 for the others
    if window is not None:
        hidden = hidden + unseen.tril(offset - window)
    queries = _grouped(q, len(keys))
    scores = torch.baddbmm(hidden.repeat(repeats, 1)[None], queries, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1)


def _by_head(x: Tensor) -> Tensor:
    """(b, k, g, d) -> (b g, k, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _grouped(q: Tensor, groups: int) -> Tensor:
    """(b, q, h, d) -> (b g, h/g q, d): the heads of a key head one below another."""
    return q.transpose(1, 2).reshape(groups, -1, q.shape[-1])


def _ungrouped(rows: Tensor, like: Tensor) -> Tensor:
    """The way back, to the shape of `like`, (b, q, h, d)."""
    batch, length, heads, size = like.shape
    return rows.view(batch, heads, length, size).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by its position's angle (RoFormer, Su et al. 2021, eq. 34).

    Args:
        x: (b, q, heads, d).
        cos: (b or 1, q, 1, d / 2), as sin.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the formula by itself
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Two passes over x instead of five. The gradient of a rotation is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y_first, y_second = y.chunk(2, dim=-1)
        torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=y_second).addcmul_(first, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad_outputs[0], cos, -sin), None, None
