"""The loss: how many nats the model needs to name the target tokens, without ever holding all logits.

For a vocabulary of 32,768 and 4,096 positions the logits alone take 0.5 GB in float32, and their gradient as much
again, although only the rows of target tokens matter (in instruction data often one in five), each of them once. So:
take the hidden states of the target rows only, a chunk at a time; compute logits, loss and gradient of that chunk; keep
only the gradient with respect to the hidden states. Nothing of size (rows, vocab) outlives its chunk.

With p = softmax(h W^T), the negative log-likelihood is  L = logsumexp(h W^T) - (h W^T)[target],  its gradient
dL/dlogits = p - onehot(target),  dL/dh = (p - onehot) W,  dL/dW = (p - onehot)^T h.
With label smoothing e (Szegedy et al. 2016, section 7) the target is (1 - e) onehot + e / vocab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024


def target_nll(hidden: Tensor, head: Tensor, rows: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum the negative log-likelihood over target tokens (Bengio et al. 2003, eq. 2), in chunks.

    Args:
        hidden: last hidden states, (batch, seq, hidden), compute dtype.
        head: output embedding, (vocab, hidden); gets a gradient if it wants one.
        rows: flat positions b * seq + s whose NEXT token is a target, (n,) int64; n may be 0.
        targets: those next tokens, (n,) int64.
        label_smoothing: probability spread evenly over the vocabulary.
    Returns:
        Scalar float32, in nats, not divided.
    """
    selected = hidden.flatten(0, 1).index_select(0, rows)  # (n, hidden)
    return _SummedNLL.apply(selected, head, targets, label_smoothing)


@torch.no_grad()
def token_nll(hidden: Tensor, head: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each target token, (n,) float32 in nats: for evaluation."""
    selected = hidden.flatten(0, 1).index_select(0, rows)
    pieces = [_chunk_nll(h, head, t, 0.0)[0] for h, t in _chunks(selected, targets)]
    return torch.cat(pieces) if pieces else selected.new_zeros(0, dtype=torch.float32)


def _chunks(selected: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(selected.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)) if len(targets) else []


def _chunk_nll(h: Tensor, head: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row, (n,); its logits, (n, vocab); their logsumexp, (n, 1); all float32."""
    logits = (h @ head.T).float()
    normaliser = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(-1, targets[:, None])
    nll = normaliser - (1 - smoothing) * picked
    if smoothing:
        nll = nll - smoothing * logits.mean(-1, keepdim=True)
    return nll.squeeze(-1), logits, normaliser


class _SummedNLL(torch.autograd.Function):
    """The sum over rows; its gradients are computed on the way forward, while each chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, selected: Tensor, head: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        want_hidden, want_head = ctx.needs_input_grad[:2]
        total = selected.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(selected) if want_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if want_head else None
        weight = head.to(selected.dtype)  # under autocast the head is float32 and the hidden states are not
        start = 0
        for h, t in _chunks(selected, targets):
            nll, logits, normaliser = _chunk_nll(h, weight, t, smoothing)
            total += nll.sum()
            if want_hidden or want_head:
                d_logits = _logit_gradient(logits, normaliser, t, smoothing).to(h.dtype)
            if grad_hidden is not None:
                torch.mm(d_logits, weight, out=grad_hidden[start : start + len(t)])
            if grad_head is not None:
                grad_head += d_logits.T @ h
            start += len(t)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_outputs[0]
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale).to(ctx.head_dtype),
            None,
            None,
        )


def _logit_gradient(logits: Tensor, normaliser: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """softmax(logits) - target distribution, computed in the logits' own memory, (n, vocab)."""
    gradient = logits.sub_(normaliser).exp_()
    if smoothing:
        gradient -= smoothing / logits.shape[-1]
    return gradient.scatter_add_(
        1, targets[:, None], torch.full_like(targets[:, None], smoothing - 1.0, dtype=torch.float32)
    )
