"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nanoft.export.merge import TOLERANCE, open_adapter, weights_of
from nanoft.export.streaming import StreamedDecoder, open_rows
from nanoft.lora import disabled
from nanoft.model import Decoder
from nanoft.models.open import LoadedModel, TrainedAdapter
from nanoft.perplexity import safe_exp

PROOF_TOKENS = 64  # of each prompt: every weight has its part in any token
PASS_TOKENS = 640  # that go through a model together, which reads all of its weights each time
LOGIT_ROWS = 64  # positions whose logits are held at a time


@dataclass(frozen=True)
class Proof:
    """Merged against adapter on the same prompts: the largest difference of a logit, and what was allowed."""

    max_difference: float
    allowed: float
    effect: float  # the largest difference that the adapter itself makes, for comparison
    same_top_token: float  # share of positions

    @property
    def holds(self) -> bool:
        return self.max_difference <= self.allowed


# --- the proof


@dataclass(frozen=True)
class Agreement:
    """What one model says beside what another says, on the same tokens."""

    max_difference: float  # of a logit
    spread: float  # standard deviation of the other's logits
    same_top_token: float  # share of positions
    divergence: float  # KL from the other's distribution of the next token to this one's, nats a position
    perplexity: float
    wanted_perplexity: float  # the other's


@torch.no_grad()
def hidden_states(model: Decoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states of every position of every row, one after another, (tokens, hidden)."""
    found: list[Tensor] = []
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * max(map(len, rows[start : stop + 1])) <= PASS_TOKENS:
            stop += 1
        group = rows[start:stop]
        ids = torch.zeros(len(group), max(map(len, group)), dtype=torch.int64)
        for at, row in enumerate(group):
            ids[at, : len(row)] = torch.tensor(row)  # padding on the right: no token sees it
        hidden = model(ids)  # (b, longest, hidden)
        found += [hidden[at, : len(row)] for at, row in enumerate(group)]
        start = stop
    return torch.cat(found)


@torch.no_grad()
def compare(model: Decoder, hidden: Tensor, wanted_model: Decoder, wanted_hidden: Tensor, targets: Tensor) -> Agreement:
    """Two models' predictions from their last hidden states, (tokens, hidden), some positions at a time.

    Args:
        targets: the token that follows, (tokens,); -1 where it does not count for perplexity.
    """
    farthest, total, squares, numbers = 0.0, 0.0, 0.0, 0
    same, divergence, nats, wanted_nats, count = 0, 0.0, 0.0, 0.0, int((targets >= 0).sum())
    for rows in (slice(at, at + LOGIT_ROWS) for at in range(0, len(targets), LOGIT_ROWS)):
        found, wanted = model.logits(hidden[rows]), wanted_model.logits(wanted_hidden[rows])  # (n, vocab)
        farthest = max(farthest, _farthest(found, wanted))
        total += wanted.sum(dtype=torch.float64).item()
        squares += wanted.square().sum(dtype=torch.float64).item()
        numbers += wanted.numel()
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        found, wanted = found.log_softmax(-1), wanted.log_softmax(-1)
        divergence += (wanted.exp() * (wanted - found)).sum().item()  # sum of p log(p / q)
        targeted = targets[rows] >= 0
        chosen = targets[rows][targeted][:, None]
        nats -= found[targeted].gather(1, chosen).double().sum().item()
        wanted_nats -= wanted[targeted].gather(1, chosen).double().sum().item()
    spread = math.sqrt(max(0.0, squares - total * total / numbers) / max(1, numbers - 1))
    perplexities = [safe_exp(n / count) if count else math.nan for n in (nats, wanted_nats)]
    return Agreement(farthest, spread, same / len(targets), max(0.0, divergence / len(targets)), *perplexities)


def _farthest(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite if a weight became infinite on the way, so that NaN comes out."""
    return (a - b).abs().nan_to_num(nan=math.inf).max().item()


def next_tokens(rows: Sequence[Sequence[int]], targeted: Sequence[Sequence[bool]] | None = None) -> Tensor:
    """What follows each position of each row, (tokens,); -1 at a row's end, and where the next token is no target."""
    found: list[int] = []
    for at, row in enumerate(rows):
        follows = [True] * len(row) if targeted is None else targeted[at]
        found += [token if counts else -1 for token, counts in zip(row[1:], follows[1:], strict=True)] + [-1]
    return torch.tensor(found)


def prove(opened: LoadedModel, merged_directory: Path, prompts: list[list[int]], dtype: torch.dtype) -> Proof:
    """Compare the merged model's logits with base + adapter, both computed in float32 on the CPU.

    Args:
        prompts: token ids, none empty, at least one; the first `PROOF_TOKENS` of each are used.
    """
    rows = [ids[:PROOF_TOKENS] for ids in prompts]
    targets = next_tokens(rows)
    model, merged = opened.model, StreamedDecoder(open_rows(merged_directory))
    wanted = hidden_states(model, rows)
    with disabled(opened.adapters):
        base = hidden_states(model, rows)
    effect = compare(model, base, model, wanted, targets).max_difference
    found = compare(merged, hidden_states(merged, rows), model, wanted, targets)
    return Proof(found.max_difference, TOLERANCE[dtype] * found.spread, effect, found.same_top_token)


def verify(
    adapter: TrainedAdapter, dtype: torch.dtype, rows: list[list[int]], targeted: list[list[bool]]
) -> dict[str, Agreement]:
    """How near each possible merge is to the model that was trained: base as in training, adapter beside it.

    Nothing is written: the merged weights are made, and rounded to `dtype`, as they are asked for.

    Args:
        rows: token ids of held-out samples.
        targeted: which of them are targets, for perplexity.
    Returns:
        By base, `original` and, if the adapter was trained on a quantized one, `nf4`.
    """
    trained = open_adapter(adapter, "nf4")
    wanted, targets = hidden_states(trained.model, rows), next_tokens(rows, targeted)
    found: dict[str, Agreement] = {}
    bases: tuple[Literal["original", "nf4"], ...] = ("original", "nf4") if adapter.quantization else ("original",)
    for onto in bases:
        weights = weights_of(trained, onto)
        merged = StreamedDecoder(replace(weights, adapters=trained.adapters, dtype=dtype))
        found[onto] = compare(merged, hidden_states(merged, rows), trained.model, wanted, targets)
    return found


def recommended(found: dict[str, Agreement]) -> str:
    """The base with the lower perplexity; where they are within 0.1 %, the one nearer to what was trained."""
    lowest = min(agreement.perplexity for agreement in found.values())
    near = {name: a for name, a in found.items() if a.perplexity <= 1.001 * lowest}
    return min(near or found, key=lambda name: found[name].divergence)
