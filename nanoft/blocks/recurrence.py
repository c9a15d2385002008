"""What passes from position to position in a layer without attention: a short convolution, and the gated delta rule.

A convolution sees the last few positions. The delta rule keeps all of them in a matrix S, (dk, dv) for each head, that
maps keys to values: at each position S decays, and what it says of the key is moved towards the value.

    S <- exp(decay_t) S;   S <- S + k_t (beta_t (v_t - S^T k_t))^T;   y_t = S^T q_t

(Gated DeltaNet, Yang et al. 2025, eq. 10). Both start anew in each document; where a sequence goes on later, the last
inputs of a convolution and S are kept. nanoft/kernels/deltanet.py computes the rule in chunks of positions.

Notation in comments: b batch, q positions, g key heads, h value heads, dk and dv their sizes, c channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Kept = dict[tuple[int, str], Tensor]  # what a layer keeps of each sequence, by the layer's index and the operation


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y, (b, q, h, dv), and the last S, (b, h, dk, dv) in float32, of the S `before`, or of zeros.

    q and k are (b, q, g, dk) and are scaled to length 1 here, v is (b, q, h, dv), and h / g value heads share a key
    head; decay and beta are (b, q, h).
    """
    dtype, y = v.dtype, []
    with torch.autocast(v.device.type, enabled=False):
        q, k, v, decay, beta = widen(q, k, v, decay, beta)
        state = v.new_zeros(len(v), v.shape[2], k.shape[3], v.shape[3]) if before is None else before
        for q_t, k_t, v_t, decay_t, beta_t in zip(*(part.unbind(1) for part in (q, k, v, decay, beta)), strict=True):
            state = decay_t[..., None, None].exp() * state
            error = v_t - (k_t[:, :, None] @ state)[:, :, 0]  # (b, h, dv)
            state = state + k_t[..., None] * (beta_t[..., None] * error)[:, :, None]
            y.append((q_t[:, :, None] @ state)[:, :, 0])
    return torch.stack(y, dim=1).to(dtype), state


def widen(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> list[Tensor]:
    """All in float32 at least, q and k of length 1 for each value head, and q divided by sqrt(dk)."""
    wide, copies = torch.promote_types(v.dtype, torch.float32), v.shape[2] // k.shape[2]
    q, k = q.to(wide), k.to(wide)
    q, k = q * scale(q, q.shape[-1] ** -0.5), k * scale(k)
    q, k = (part if copies == 1 else part.repeat_interleave(copies, dim=2) for part in (q, k))
    return [q, k, v.to(wide), decay.to(wide), beta.to(wide)]


def scale(x: Tensor, length: float = 1.0) -> Tensor:
    """length / |x|, over the last dimension, (..., 1)."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + 1e-6).rsqrt() * length


def convolution(x: Tensor, weight: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_j w_j x_{t - K + 1 + j} in each channel, (b, q, c), and the last K - 1 inputs, (b, K - 1, c).

    x is (b, q, c), w is (c, K); `before` are the inputs before x, or zeros.
    """
    length, past = x.shape[1], weight.shape[1] - 1
    x = F.pad(x, (0, 0, past, 0)) if before is None else torch.cat((before, x), dim=1)
    y = sum(weight[:, j].to(x.dtype) * x[:, j : j + length] for j in range(past + 1))
    return y, x[:, length:]  # type: ignore[return-value]


class Recurrence:
    """The part of a forward pass's context (nanoft/attention.py) for layers of this kind."""

    documents: Any  # attention.Documents of a packed batch, or None
    kept: Kept | None = None  # where sequences go on: what is known of each, renewed by each pass
    rule: Callable[..., tuple[Tensor, Tensor]] = staticmethod(delta_rule)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, layer: Any) -> Tensor:
        """The delta rule over each document, (b, q, h, dv)."""
        return self._recur((layer.index, "scan"), self.rule, q, k, v, decay, beta)

    def convolve(self, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
        """The causal convolution of each document, (b, q, c), with a weight (c, K)."""
        return self._recur((layer.index, "convolve"), partial(convolution, weight=weight), x)

    def _recur(self, key: tuple[int, str], function: Callable[..., tuple[Tensor, Tensor]], *parts: Tensor) -> Tensor:
        if self.kept is None:
            return self.by_document(function, *parts)[0]
        y, self.kept[key] = self.by_document(partial(function, before=self.kept.get(key)), *parts)
        return y

    def by_document(self, function: Callable[..., tuple[Tensor, Tensor]], *parts: Tensor) -> tuple[Tensor, Tensor]:
        """A function of sequences, (b, q, ...), of each document alone: its y, and what each document leaves."""
        if self.documents is None:
            return function(*parts)
        documents = zip(*(part.flatten(0, 1)[None].split(self.documents.lengths, 1) for part in parts), strict=True)
        y, left = zip(*(function(*document) for document in documents), strict=True)
        return torch.cat(y, dim=1).view(*parts[0].shape[:2], *y[0].shape[2:]), torch.cat(left)
