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
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # with AMX
        return _Transposed.apply(q, k, v, scores.scale)
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
    The n = h / g query heads that share a key head are stacked into one matrix.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.scores = scores
        like, (q, k, v) = q, _stacked(q, k, v)
        y, repeats = torch.empty_like(q), q.shape[1] // k.shape[1]
        for rows, seen in _chunks(k.shape[1], repeats, scores.window):
            p, _ = _weights(q[:, rows], k[:, seen], repeats, scores, sinks)
            y[:, rows] = p @ v[:, seen]
            del p  # before the next chunk's
        return _unstacked(y, like)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *given, sinks = ctx.saved_tensors
        q, k, v, dy = _stacked(*given, grad_outputs[0])
        repeats, dq, scale = q.shape[1] // k.shape[1], torch.empty_like(q), ctx.scores.scale
        wide = torch.promote_types(k.dtype, torch.float32)  # of the sums over chunks
        dk, dv = (torch.zeros_like(k, dtype=wide) for _ in range(2))
        d_sinks = torch.zeros_like(sinks, dtype=wide) if ctx.needs_input_grad[3] else None
        for rows, seen in _chunks(k.shape[1], repeats, ctx.scores.window):
            p, slope = _weights(q[:, rows], k[:, seen], repeats, ctx.scores, sinks)
            dv[:, seen] += p.transpose(1, 2) @ dy[:, rows]
            dp = dy[:, rows] @ v[:, seen].transpose(1, 2)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # (b g, q n, k)
            if d_sinks is not None:
                rest = (p.sum(-1, dtype=wide) - 1) * (p * dp).sum(-1, dtype=wide)  # (b g, q n)
                d_sinks += rest.view(-1, len(sinks) // repeats, rest.shape[1] // repeats, repeats).sum((0, 2)).flatten()
            ds = ds if slope is None else ds * slope
            del p, dp, slope  # memory is at its peak here
            dk[:, seen] += ds.transpose(1, 2) @ q[:, rows]
            dq[:, rows] = ds @ k[:, seen]
            del ds  # before the next chunk's p
        gradients = zip((dq.mul_(scale), dk.mul_(scale), dv), given, strict=True)
        d_sinks = None if d_sinks is None else d_sinks.to(sinks.dtype)
        return *(_unstacked(d, like) for d, like in gradients), d_sinks, None


class _Transposed(torch.autograd.Function):
    """Causal attention in bfloat16 on a CPU with matrix units (AMX): forward is PyTorch's kernel, and backward the same
    algorithm as its own (Dao et al. 2022, algorithm 4), in those products that such units compute fastest:

        P^T = exp(scale k q^T - lse),  dS^T = P^T (v dy^T - D),  where D = sum(y dy) for each query
        dv = P^T dy,  dk = scale dS^T q,  dq = scale dS k

    The products subtract lse and D: q and dy have two more columns, -lse and -D in two parts of 8 bits, k and v ones.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        repeats = q.shape[2] // k.shape[2]  # in PyTorch 2.8, this kernel cannot share keys itself
        heads = (part.transpose(1, 2) for part in (q, *(part.repeat_interleave(repeats, dim=2) for part in (k, v))))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(*heads, 0.0, True, scale=scale)
        ctx.scale, y = scale, y.transpose(1, 2)
        ctx.save_for_backward(q, k, v, y, lse.transpose(1, 2))  # lse: (b, q, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *given, y, lse = ctx.saved_tensors
        (q, k, v), dy, d = given, grad_outputs[0], y.shape[-1]
        widened = _widened(q * ctx.scale, -lse), _widened(dy, -(y * dy).sum(-1, dtype=lse.dtype))
        k, v = (torch.cat((part, part.new_ones(*part.shape[:3], 2)), -1) for part in (k, v))
        q, k, v, dy = _stacked(widened[0], k, v, widened[1])  # (b g, q n or k, d + 2)
        repeats, dq = q.shape[1] // k.shape[1], torch.empty_like(q[..., :d])
        dk, dv = (torch.zeros_like(k[..., :d], dtype=lse.dtype) for _ in range(2))  # sums over chunks
        for rows, seen in _chunks(k.shape[1], repeats):
            s, length = k[:, seen] @ q[:, rows].transpose(1, 2), (rows.stop - rows.start) // repeats  # (b g, k, q n)
            s[:, -length:] += s.new_full((length, length), -torch.inf).tril(-1).repeat_interleave(repeats, 1)
            p = s.exp_()
            dv[:, seen] += p @ dy[:, rows, :d]
            ds = (v[:, seen] @ dy[:, rows].transpose(1, 2)).mul_(p)
            del s, p
            dk[:, seen] += ds @ q[:, rows, :d]
            dq[:, rows] = ds.transpose(1, 2) @ k[:, seen, :d]
            del ds
        return *(_unstacked(part, like) for part, like in zip((dq.mul_(ctx.scale), dk, dv), given, strict=True)), None


def _chunks(length: int, repeats: int, window: int | None = None) -> Iterator[tuple[slice, slice]]:
    """(rows of stacked queries, keys that any of them attends to).

    The last chunk comes first: the others fit into the memory it frees.
    """
    for start in reversed(range(0, length, CHUNK)):
        first = 0 if window is None else max(0, start - window + 1)
        end = min(start + CHUNK, length)
        yield slice(repeats * start, repeats * end), slice(first, end)


def _weights(q: Tensor, k: Tensor, repeats: int, scores: Scores, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """P of a chunk, (b g, q n, k), whose last query has the position of the last key; with a cap also dC/dS."""
    if scores.cap is None:
        s, slope = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scores.scale), None
    else:
        capped = torch.tanh(q @ k.transpose(1, 2) * (scores.scale / scores.cap))
        s, slope = scores.cap * capped, 1 - capped.square()
    _hide_later(s, repeats, scores.window)
    if sinks is None:
        return s.softmax(-1), slope
    own = sinks.to(s.dtype).view(-1, 1, repeats).repeat(len(q) * repeats // len(sinks), q.shape[1] // repeats, 1)
    return torch.cat((s, own.view(*s.shape[:2], 1)), dim=-1).softmax(-1)[..., :-1], slope


def _hide_later(s: Tensor, repeats: int, window: int | None = None) -> None:
    """Make the scores of a chunk, (b g, q n, k), -inf for keys after the query or before its window."""
    length, keys = s.shape[1] // repeats, s.shape[2]
    unseen = torch.full((length, length), -torch.inf, dtype=s.dtype, device=s.device)
    s[..., -length:] += unseen.triu(1).repeat_interleave(repeats, 0)
    if window is not None:  # the first query is at key `keys - length`
        s[..., :length] += unseen.tril(keys - length - window).repeat_interleave(repeats, 0)


def _widened(x: Tensor, column: Tensor) -> Tensor:
    """x, (b, q, h, d), and two columns whose sum is `column`, (b, q, h), which has more bits."""
    high = column.to(x.dtype)
    return torch.cat((x, torch.stack((high, (column - high).to(x.dtype)), -1)), -1)


def _stacked(q: Tensor, k: Tensor, *others: Tensor) -> list[Tensor]:
    """Each (b, q, h, d) -> (b g, q n, d), with the n = h / g heads that share one of k's next to each other."""
    groups = k.shape[2]
    return [x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1) for x in (q, k, *others)]


def _unstacked(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_stacked`, with the shape and dtype of `like`, (b, q, h, d)."""
    batch, length, heads, size = like.shape
    groups = len(x) // batch
    return x.to(like.dtype).view(batch, groups, length, heads // groups, size).transpose(1, 2).reshape(like.shape)


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
