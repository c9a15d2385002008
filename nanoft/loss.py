"""The loss: how many nats the model needs to name the target tokens, without ever holding all logits.

For a vocabulary of 32,768 and 4,096 positions the logits alone take 0.5 GB in float32, and their gradient as much
again, although only the rows of target tokens matter (in instruction data often one in five), each of them once. So:
the model gives the hidden states of those rows only, and of these one takes a chunk at a time; compute logits, loss and
gradient of that chunk; keep only the gradient with respect to the hidden states. Nothing of size (rows, vocab) outlives
its chunk, and a chunk is small enough to stay near the processor: on a CPU in its cache, where the passes over it are
several times faster.

With logits l = h W^T, p = softmax(l) and lse = log sum exp(l), the negative log-likelihood is  L = lse - l[target],
dL/dl = p - onehot(target),  dL/dh = (p - onehot) W,  dL/dW = (p - onehot)^T h.
With label smoothing e (Szegedy et al. 2016, section 7) the target is (1 - e) onehot + e / vocab. The z-loss adds
z lse^2 (Chowdhery et al. 2022, section 5), whose gradient is 2 z lse p: it keeps the normalizer near 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 16 << 20}  # of float32 logits at once: half of a large last-level cache
CHUNK_BYTES_ELSEWHERE = 128 << 20  # 1,024 rows of a vocabulary of 32,768: enough to fill a GPU


def target_nll(
    hidden: Tensor, head: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Sum the negative log-likelihood over target tokens (Bengio et al. 2003, eq. 2), in chunks.

    Args:
        hidden: last hidden states of the tokens whose NEXT token is a target, (..., hidden), n in all; n may be 0.
        head: output embedding, (vocab, hidden); gets a gradient if it wants one.
        targets: those next tokens, (n,) int64.
        label_smoothing: probability spread evenly over the vocabulary.
        z_loss: weight of the squared log-normalizer.
    Returns:
        Scalar float32, in nats, not divided.
    """
    return _SummedNLL.apply(hidden.flatten(0, -2), head, targets, label_smoothing, z_loss)


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each target token, (n,) float32 in nats: for evaluation."""
    selected = hidden.flatten(0, -2)
    pieces = [_chunk_nll(h @ head.T, t, 0.0)[0] for h, t in _chunks(selected, targets, len(head))]
    return torch.cat(pieces) if pieces else selected.new_zeros(0, dtype=torch.float32)


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows of logits that are computed at once; at least 16, so that the matrix product is one."""
    return max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (4 * vocab))


def _chunks(selected: Tensor, targets: Tensor, vocab: int) -> list[tuple[Tensor, Tensor]]:
    rows = chunk_rows(vocab, selected.device)
    return list(zip(selected.split(rows), targets.split(rows), strict=True)) if len(targets) else []


def _chunk_nll(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, (n,); p, (n, vocab); lse, (n, 1); in float32 from logits, (n, vocab), of any dtype."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = logits.softmax(-1, dtype=wide)
    # The largest p is exp(largest logit - lse) and at least 1 / vocab, so its logarithm is safe and gives lse.
    lse = logits.amax(-1, keepdim=True).to(wide) - p.amax(-1, keepdim=True).log()
    nll = lse - (1 - smoothing) * logits.gather(-1, targets[:, None]).to(wide)
    if smoothing:
        nll = nll - smoothing * logits.mean(-1, keepdim=True, dtype=wide)
    return nll.squeeze(-1), p, lse


def _logit_gradient(p: Tensor, lse: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """(1 + 2 z lse) p - target distribution, computed in p's own memory, (n, vocab)."""
    if z_loss:
        p *= 1 + 2 * z_loss * lse
    if smoothing:
        p -= smoothing / p.shape[-1]
    return p.scatter_add_(1, targets[:, None], torch.full_like(targets[:, None], smoothing - 1.0, dtype=p.dtype))


class _SummedNLL(torch.autograd.Function):
    """The sum over rows; its gradients are computed on the way forward, while each chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, selected: Tensor, head: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
        want_hidden, want_head = ctx.needs_input_grad[:2]
        total = selected.new_zeros((), dtype=torch.promote_types(selected.dtype, torch.float32))
        grad_hidden = torch.empty_like(selected) if want_hidden else None
        grad_head = torch.zeros_like(head, dtype=total.dtype) if want_head else None
        weight = head.to(selected.dtype)  # under autocast the head is float32 and the hidden states are not
        start = 0
        for h, t in _chunks(selected, targets, len(head)):
            nll, p, lse = _chunk_nll(h @ weight.T, t, smoothing)
            total += nll.sum()
            if z_loss:
                total += z_loss * lse.square().sum()
            if want_hidden or want_head:
                d_logits = _logit_gradient(p, lse, t, smoothing, z_loss).to(h.dtype)
            if grad_hidden is not None:
                torch.mm(d_logits, weight, out=grad_hidden[start : start + len(t)])
            if grad_head is not None:
                grad_head += d_logits.T @ h
            start += len(t)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale).to(ctx.head_dtype),
            None,
            None,
            None,
        )
