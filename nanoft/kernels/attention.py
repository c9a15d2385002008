"""Faster attention with less memory, and the same results as the masks of nanoft/attention.py.

The weights of all pairs are never kept, so memory grows with the length and not with its square. On CUDA one kernel
does that (FlashAttention, Dao 2023), with a variant for packed documents of any lengths. Elsewhere, packed documents of
similar length are batched, which costs the sum of their squared lengths; a mask costs the square of the sum.
If PyTorch has no such kernel, or only a slow one, `_Chunked` evaluates the formula for a chunk of queries at a time.

Notation in comments: b batch, q and k positions of queries and keys, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanoft.attention import AttentionLayer, Documents, Scores, SequenceContext
from nanoft.kernels import deltanet, fused, metal
from nanoft.model import SelfAttention

SIMILAR = 0.8  # documents of at least this share of the longest one's length are batched with it
MOST_DIMENSIONS = 256  # of a head, in FlashAttention
CHUNK = 256  # queries at a time in `_Chunked`: their weights fit into a CPU's cache


class FastContext(SequenceContext):
    """A `SequenceContext` with a rotation in two passes and an attention without masks, for exactly `SelfAttention`,
    and with the delta rule in chunks."""

    rule = staticmethod(deltanet.delta_rule)

    def rotate(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        if layer.rope is None or torch.compiler.is_compiling() or not is_known(layer):
            return super().rotate(q, k, layer)  # the compiler fuses the formula itself
        cos, sin, growth = self.rotations[layer.rope]
        turn = kernels.rotate if (kernels := fused.kernels(q)) else _Rotation.apply
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        return q if growth is None else q * growth, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        if not is_known(layer):
            return super().attend(q, k, v, layer)
        return attend(q, k, v, layer.scores, self.documents, layer.sinks)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, layer: Any) -> Tensor:
        if self.documents is None:
            return self.rule(q, k, v, decay, beta)[0]
        return in_groups(lambda *parts: self.rule(*parts)[0], self.documents, q, k, v, decay, beta)

    def convolve(self, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
        if weight.requires_grad:
            return super().convolve(x, weight, layer)
        return deltanet.Convolution.apply(x, weight.to(x.dtype), self.documents and self.documents.lengths)


def describe(q: Tensor, scores: Scores, packed: bool) -> str:
    """The implementation of attention for such queries, in a few words for the log."""
    if packed and has_varlen(q, scores):
        return "varlen kernel (FlashAttention)"
    batched = ", documents of similar length batched" if packed else ""
    if _needs_chunks(q, scores):
        return f"chunks of {CHUNK} queries{batched}"
    if q.device.type != "cuda":
        return f"PyTorch's kernel for {q.device.type}{batched}"
    t = q.transpose(1, 2)
    choice = torch._fused_sdp_choice(t, t, t, is_causal=True)
    return f"{torch.nn.attention.SDPBackend(choice).name.lower().replace('_', ' ')} kernel{batched}"


def is_known(layer: Any) -> bool:
    """Whether a layer, or the module that it replaces in generation, is exactly a `SelfAttention`."""
    return getattr(layer, "kind", type(layer)) is SelfAttention


def within(scores: Scores, length: int) -> Scores:
    """The scores for sequences of this length: a window that is at least as wide is dropped."""
    return scores._replace(window=None) if scores.window is not None and scores.window >= length else scores


def attend(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, documents: Documents | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention of q, (b, q, h, d), to k and v, (b, q, g, d), h a multiple of g: (b, q, h, d)."""
    scores = within(scores, q.shape[1])
    if documents is None:
        return _causal(q, k, v, scores, sinks)
    if has_varlen(q, scores):
        return _varlen([part.flatten(0, 1) for part in (q, k, v)], documents, scores).view_as(q)
    return in_groups(lambda q, k, v: _causal(q, k, v, within(scores, q.shape[1]), sinks), documents, q, k, v)


def in_groups(function: Callable[..., Tensor], documents: Documents, *parts: Tensor) -> Tensor:
    """A causal function of sequences, (b, q, ...), of each document alone, documents of similar length batched."""
    flat = [part.flatten(0, 1) for part in parts]  # (b * q, ...): the sequences end to end
    (groups, order), outputs = group_documents(documents), []
    for places, real in groups:
        ours = [part.index_select(0, places.flatten()).unflatten(0, places.shape) for part in flat]
        outputs.append(function(*ours).flatten(0, 1).index_select(0, real))
    return torch.cat(outputs).index_select(0, order).unflatten(0, parts[0].shape[:2])


@functools.lru_cache(maxsize=1)  # once for all layers
def group_documents(documents: Documents) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Batches of documents of similar length: positions of their tokens, (n, width); which of them are real, (tokens,).

    A document shorter than its batch is padded with the tokens that follow it, to which none of its own tokens attends.
    Also returns the place of each token among the real tokens of all batches, (tokens,).
    """
    lengths = torch.tensor(documents.lengths)
    starts = lengths.cumsum(0) - lengths
    groups, left = [], lengths.argsort(descending=True, stable=True)
    while len(left):
        width = int(lengths[left[0]])
        count = int((lengths[left] > SIMILAR * width).sum())
        chosen, left = left[:count], left[count:]
        places = (starts[chosen, None] + torch.arange(width)).clamp(max=int(lengths.sum()) - 1)
        real = torch.arange(width) < lengths[chosen, None]
        groups.append((places, real.flatten().nonzero().squeeze(1)))
    order, device = torch.cat([places.flatten()[real] for places, real in groups]).argsort(), documents.bounds.device
    return [(places.to(device), real.to(device)) for places, real in groups], order.to(device)


def _needs_chunks(q: Tensor, scores: Scores) -> bool:
    """PyTorch's kernels have no windows, caps, sinks or, on CUDA, large heads; on Metal they keep all weights, and in
    bfloat16 they are slow on a CPU without matrix units (AMX)."""
    return (
        scores.window is not None
        or scores.cap is not None
        or scores.sinks
        or metal.needs_chunks(q)
        or (q.is_cuda and q.shape[-1] > MOST_DIMENSIONS)
        or (q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported())
    )


def _causal(q: Tensor, k: Tensor, v: Tensor, scores: Scores, sinks: Tensor | None) -> Tensor:
    if _needs_chunks(q, scores):
        return _Chunked.apply(q, k, v, sinks, scores)
    if q.shape[2] > k.shape[2] and not shares_keys(q):  # with shared keys, PyTorch would keep all weights
        k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], dim=2) for part in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (b, heads, q, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=True)
    return y.transpose(1, 2)


@functools.cache
def _varlen_kernel() -> Any:
    """PyTorch's attention for documents of different lengths; None in versions without all of its options."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # takes 71 MB and a second, so it is imported for CUDA only
    except ImportError:
        return None
    options = {"scale", "window_size", "enable_gqa"}
    return varlen_attn if options <= inspect.signature(varlen_attn).parameters.keys() else None


def shares_keys(q: Tensor) -> bool:
    """Whether heads can share keys: on CUDA, in FlashAttention alone, in 16 bits and from Ampere on."""
    return not q.is_cuda or (q.dtype.itemsize == 2 and torch.cuda.get_device_capability(q.device) >= (8, 0))


def has_varlen(q: Tensor, scores: Scores) -> bool:
    """Whether one kernel can attend to documents of different lengths."""
    is_supported = q.is_cuda and shares_keys(q) and q.shape[-1] <= MOST_DIMENSIONS
    return is_supported and scores.cap is None and not scores.sinks and _varlen_kernel() is not None


def _varlen(flat: list[Tensor], documents: Documents, scores: Scores) -> Tensor:
    """One kernel for all documents, (tokens, h, d)."""
    bounds, longest = documents.bounds, max(documents.lengths)
    window = (-1 if scores.window is None else scores.window - 1, 0)  # positions back, and ahead
    of_each = bounds, bounds, longest, longest
    return _varlen_kernel()(*flat, *of_each, scale=scores.scale, window_size=window, enable_gqa=True)


class _Chunked(torch.autograd.Function):
    """Causal attention, a chunk of queries at a time; backward recomputes their weights P (Dao et al. 2022, section 3).

        S = scale q k^T,  P = softmax(S),  y = P v
        dv = P^T dy,  dP = dy v^T,  dS = P (dP - sum_k P dP),  dq = scale dS k,  dk = scale dS^T q

    With a cap P = softmax(C), C = cap tanh(S / cap), and dS = dC (1 - (C / cap)^2). With sinks the rows of P do not add
    up to 1, and the rest p times -(sum_k P dP) is their gradient.
    The h / g query heads that share a key head are stacked into one matrix.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.scores = scores
        keys, values = (_grouped(t, len(t) * t.shape[2]) for t in (k, v))  # (b g, k, d)
        y = torch.empty_like(q)
        for here, seen in _chunks(q.shape[1], scores.window):
            p, _ = _weights(q[:, here], keys[:, seen], here.start - seen.start, scores, sinks)
            y[:, here] = _ungrouped(p @ values[:, seen], y[:, here])
            del p  # before the next chunk's
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        keys, values = (_grouped(t, len(t) * t.shape[2]) for t in (k, v))
        dq, scale = torch.empty_like(q), ctx.scores.scale
        wide = torch.promote_types(k.dtype, torch.float32)  # of the sums over chunks
        dk, dv = (torch.zeros(keys.shape, dtype=wide, device=q.device) for _ in range(2))
        d_sinks = torch.zeros_like(sinks, dtype=wide) if ctx.needs_input_grad[3] else None
        for here, seen in _chunks(q.shape[1], ctx.scores.window):
            p, slope = _weights(q[:, here], keys[:, seen], here.start - seen.start, ctx.scores, sinks)
            dy = _grouped(grad_outputs[0][:, here], keys.shape[0])
            dv[:, seen] += p.transpose(1, 2) @ dy
            dp = dy @ values[:, seen].transpose(1, 2)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # (b g, h/g q, k)
            if d_sinks is not None:
                rest = (p.sum(-1, dtype=wide) - 1) * (p * dp).sum(-1, dtype=wide)  # (b g, h/g q)
                d_sinks += rest.view(len(q), len(sinks), -1).sum((0, 2))
            ds = ds if slope is None else ds * slope
            del p, dp, slope  # memory is at its peak here
            dk[:, seen] += ds.transpose(1, 2) @ _grouped(q[:, here], keys.shape[0])
            dq[:, here] = _ungrouped(ds @ keys[:, seen], dq[:, here])
            del ds  # before the next chunk's p
        unheaded = [t.to(k.dtype).unflatten(0, (len(k), -1)).transpose(1, 2) for t in (dk.mul_(scale), dv)]
        return dq.mul_(scale), *unheaded, None if d_sinks is None else d_sinks.to(sinks.dtype), None


def _chunks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that any of them attends to), the last chunk first: the others fit into the memory it frees."""
    for start in reversed(range(0, length, CHUNK)):
        first = 0 if window is None else max(0, start - window + 1)
        end = min(start + CHUNK, length)
        yield slice(start, end), slice(first, end)


def _weights(
    q: Tensor, keys: Tensor, offset: int, scores: Scores, sinks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """P of a chunk, (b g, h/g q, k), whose first query has the position of key `offset`; with a cap also dC/dS."""
    length, repeats = q.shape[1], q.shape[0] * q.shape[2] // keys.shape[0]
    unseen = torch.full((length, keys.shape[1]), -torch.inf, dtype=q.dtype, device=q.device)
    hidden = unseen.triu(offset + 1)  # -inf for keys after the query, 0 for the others
    if scores.window is not None:
        hidden = hidden + unseen.tril(offset - scores.window)
    queries, hidden = _grouped(q, len(keys)), hidden.repeat(repeats, 1)[None]
    if scores.cap is None:
        s, slope = torch.baddbmm(hidden, queries, keys.transpose(1, 2), alpha=scores.scale), None
    else:
        capped = torch.tanh(queries @ keys.transpose(1, 2) * (scores.scale / scores.cap))
        s, slope = torch.add(hidden, capped, alpha=scores.cap), 1 - capped.square()
    if sinks is None:
        return s.softmax(-1), slope
    own = sinks.to(s.dtype).repeat_interleave(length).view(-1, s.shape[1], 1).repeat(len(q), 1, 1)
    return torch.cat((s, own), dim=-1).softmax(-1)[..., :-1], slope


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(b, q, h, d) -> (b g, h/g q, d): the heads of a key head stacked."""
    return x.transpose(1, 2).reshape(groups, -1, x.shape[-1])


def _ungrouped(stacked: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_grouped`, to the shape of `like`, (b, q, h, d)."""
    batch, length, heads, size = like.shape
    return stacked.view(batch, heads, length, size).transpose(1, 2)


class _Rotation(torch.autograd.Function):
    """`rotate` in two passes over x instead of five. Its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        n = 2 * cos.shape[-1]  # dimensions that are rotated
        first, second = x[..., :n].chunk(2, dim=-1)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        y[..., n:] = x[..., n:]
        y_first, y_second = y[..., :n].chunk(2, dim=-1)
        torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=y_second).addcmul_(first, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad_outputs[0], cos, -sin), None, None
