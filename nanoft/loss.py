"""The loss: the negative log-likelihood of each target token, without ever holding all logits.

For a vocabulary of 32,768 and 4,096 positions, the logits alone take 0.5 GB in float32, and their gradient as much
again, although only positions that predict a target matter (in instruction data often one in five). So the model
returns the hidden states of only those positions, and `token_nll` processes them in chunks: it computes the chunk's
logits, losses and gradient, and keeps only the gradient with respect to the hidden states. A chunk's logits fit into a
CPU's shared cache, and the passes over a few of its rows at a time into those of single cores, which are faster.

With logits l = W h, p = softmax(l) and lse = log sum exp(l), the negative log-likelihood is  L = lse - l[target],
dL/dl = p - onehot(target),  dL/dh = W^T (p - onehot),  dL/dW = (p - onehot) h^T.
With label smoothing e (Szegedy et al. 2016, section 7) the target is (1 - e) onehot + e / vocab. The z-loss adds
z lse^2 (Chowdhery et al. 2022, section 5), whose gradient is 2 z lse p: it keeps the normalizer near 1. With a soft cap
the logits are  l = cap tanh(W h / cap),  and  dL/d(W h) = dL/dl (1 - (l / cap)^2).

An objective may weight the tokens (a mean, a preference, an advantage). The gradient of each row is linear in the
weight g of its token, so backward scales the gradient from forward:  dh = g dL/dh,  exact for any weights. A trained
head needs  dW = sum g (p - onehot) h^T,  whose terms cannot be kept; then backward recomputes each chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanoft.attention import soft_cap

CORE_CACHES = 2 << 20  # bytes: what two cores of a CPU have as caches of their own


def token_nll(
    hidden: Tensor, head: Tensor, targets: Tensor,
    label_smoothing: float = 0.0, z_loss: float = 0.0, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """The negative log-likelihood of each target token (Bengio et al. 2003, eq. 2), in chunks, differentiable.

    Args:
        hidden: hidden states of the tokens whose next token is a target, (..., hidden), n in all; n may be 0.
        head: output embedding, (vocab, hidden); gets a gradient if it requires one.
        targets: those next tokens, (n,) int64.
        label_smoothing: probability spread evenly over the vocabulary.
        z_loss: weight of the squared log-normalizer.
        cap: soft cap of the logits, if the model has one.
    Returns:
        (n,) float32 (float64 for float64 inputs), in nats.
    """
    hidden = hidden.flatten(0, -2)
    if len(hidden) != len(targets):
        raise ValueError(f"token_nll: {len(hidden)} hidden states for {len(targets)} targets")
    return _TokenNLL.apply(hidden, head, targets, label_smoothing, z_loss, cap)


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows of float32 logits to compute at once; at least 16, so that it stays a matrix-matrix product."""
    cache = 32 << 20  # bytes: a large last-level cache of a CPU, of which 16-bit logits take half
    enough = 128 << 20  # to fill a GPU: 1,024 rows of a vocabulary of 32,768
    return max(16, (cache if device.type == "cpu" else enough) // (4 * vocab))


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits W h, which may be overwritten. All chunks share memory, since new memory is slow."""
    rows = chunk_rows(len(weight), hidden.device)
    buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        yield chunk, torch.mm(hidden[chunk], weight.T, out=buffer[: len(hidden[chunk])])


def _nll_and_gradient(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float, cap: float | None) -> Tensor:
    """Loss of each row of W h, (n, vocab), in float32, (n,); dL/d(W h) takes the place of W h.

    On a CPU, each block of rows is small enough in float32 to stay in the caches of its cores.
    """
    losses = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    few = max(1, CORE_CACHES // (4 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), few):
        rows = slice(start, start + few)
        losses[rows], p, lse, slope = _nll(logits[rows], targets[rows], smoothing, z_loss, cap)
        logits[rows] = _logit_gradient(p, lse, slope, targets[rows], smoothing, z_loss)
    return losses


def _nll(
    logits: Tensor, targets: Tensor, smoothing: float, z_loss: float, cap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss of each row, (n,); p, (n, vocab); lse, (n, 1); with a cap, dl/d(W h); in float32 from W h, (n, vocab)."""
    slope = None
    if cap is not None:
        logits = soft_cap(logits, cap)
        slope = 1 - (logits / cap).square()
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = logits.softmax(-1, dtype=wide)
    # The largest p is exp(largest logit - lse) and at least 1 / vocab, so its logarithm is finite and gives lse.
    lse = logits.amax(-1, keepdim=True).to(wide) - p.amax(-1, keepdim=True).log()
    nll = lse - (1 - smoothing) * logits.gather(-1, targets[:, None]).to(wide)
    if smoothing:
        nll = nll - smoothing * logits.mean(-1, keepdim=True, dtype=wide)
    if z_loss:
        nll = nll + z_loss * lse.square()
    return nll.squeeze(-1), p, lse, slope


def _logit_gradient(
    p: Tensor, lse: Tensor, slope: Tensor | None, targets: Tensor, smoothing: float, z_loss: float
) -> Tensor:
    """((1 + 2 z lse) p - target distribution) dl/d(W h), computed in place in p, (n, vocab)."""
    if z_loss:
        p *= 1 + 2 * z_loss * lse
    if smoothing:
        p -= smoothing / p.shape[-1]
    p.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], smoothing - 1.0, dtype=p.dtype))
    return p if slope is None else p.mul_(slope)


class _TokenNLL(torch.autograd.Function):
    """Frozen head: forward computes each row's gradient while its logits exist. Trained head: backward does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, *settings: Any) -> Tensor:
        want_hidden, want_head = ctx.needs_input_grad[:2]
        nll = hidden.new_empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if torch.is_autocast_enabled(hidden.device.type):  # it casts no product with a given result, and no backward
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        grad_hidden = torch.empty_like(hidden) if want_hidden and not want_head else None
        weight = head.to(hidden.dtype)
        for chunk, logits in _chunks(hidden, weight):
            nll[chunk] = _nll_and_gradient(logits, targets[chunk], *settings)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[chunk])
        ctx.settings = settings
        ctx.save_for_backward(grad_hidden, *((hidden, head, targets) if want_head else ()))
        return nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *inputs = ctx.saved_tensors
        weights = grad_outputs[0][:, None]  # of each token in the final loss, (n, 1)
        if not inputs:  # the head is frozen
            return (grad_hidden * weights).to(grad_hidden.dtype), *[None] * 5
        hidden, head, targets = inputs
        grad_hidden, weight = torch.empty_like(hidden), head.to(hidden.dtype)
        grad_head = torch.zeros_like(head, dtype=weights.dtype)
        for chunk, d_logits in _chunks(hidden, weight):
            _nll_and_gradient(d_logits, targets[chunk], *ctx.settings)
            d_logits *= weights[chunk]
            torch.mm(d_logits, weight, out=grad_hidden[chunk])
            grad_head += d_logits.T @ hidden[chunk]
        return grad_hidden, grad_head.to(head.dtype), *[None] * 4
