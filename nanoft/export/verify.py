"""Is the merged model the model that was trained?

Before a merged model gets its final name, its logits are compared with those of base + adapter on real prompts, in
float32 on the CPU. `compare_bases` also measures onto which base to merge: perplexity and KL divergence of the merge
onto the original weights and onto the quantized ones, relative to the model in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.blocks.moe import Experts
from nanoft.config.loading import load_config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import build_datasets
from nanoft.evaluation.evaluate import held_out_prompts
from nanoft.export.merge import Onto, open_adapter, weights_of
from nanoft.export.streaming import Rows, StreamedDecoder, open_rows
from nanoft.io.tables import markdown_table
from nanoft.lora import disabled
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import LoadedModel, TrainedAdapter, is_run
from nanoft.objectives import OBJECTIVES
from nanoft.perplexity import safe_exp

# Allowed difference of logits, as a share of their standard deviation: rounding every weight to 8 (bf16) or 11 (f16)
# significant bits changes the logits by about this much; a wrong merge changes them by several standard deviations.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
PLAIN_TEXTS = ["The quick brown fox jumps over the lazy dog.", '{"city": "Oslo", "people": 4}', "1 2 3 4 5 6 7 8 9 10"]
PROMPTS = 8
VERIFY_TOKENS = 4096  # held-out tokens of --verify; an eighth of them without it
PROOF_TOKENS = 64  # of each prompt: every weight contributes to any token
PASS_TOKENS = 640  # tokens of one forward pass, which reads all weights


@dataclass(frozen=True)
class Proof:
    """Comparison of the merged model with base + adapter on the same prompts."""

    max_difference: float  # of a logit
    allowed: float
    effect: float  # largest difference that the adapter itself makes, for comparison
    same_top_token: float  # share of positions
    kind: str = "logit"  # the compared quantity; for a reward model: reward

    @property
    def holds(self) -> bool:
        return self.max_difference <= self.allowed

    def __str__(self) -> str:
        effect = f"; the adapter itself changes {self.kind}s by {self.effect:.2g}" if self.effect else ""
        same = f", same most likely token at {self.same_top_token:.1%} of positions" if self.kind == "logit" else ""
        return f"largest {self.kind} difference {self.max_difference:.2g} (allowed {self.allowed:.2g}{effect}){same}"


@dataclass(frozen=True)
class Agreement:
    """Comparison of a model's predictions with those of a reference, on the same tokens."""

    max_difference: float  # of a logit
    spread: float  # standard deviation of the reference's logits
    same_top_token: float  # share of positions
    divergence: float  # KL(reference || model) of the next token, nats per position
    perplexity: float
    wanted_perplexity: float  # the reference's


@torch.no_grad()
def hidden_states(model: Decoder, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states of all positions of all sequences, concatenated, (tokens, hidden)."""
    found: list[Tensor] = []
    while sequences:
        size = 1  # sequences in this pass
        while size < len(sequences) and (size + 1) * max(map(len, sequences[: size + 1])) <= PASS_TOKENS:
            size += 1
        batch, sequences = sequences[:size], sequences[size:]
        # Padding is on the right, where no token attends to it.
        ids = nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in batch], batch_first=True)
        found += [hidden[: len(sequence)] for hidden, sequence in zip(model(ids), batch, strict=True)]
    return torch.cat(found)


def predictions(model: Decoder, hidden: Tensor) -> Tensor:
    """Logits, (n, vocab), from hidden states (n, hidden); for a reward model, rewards, (n, 1)."""
    return model.logits(hidden) if model.score is None else model.score(hidden)


@torch.no_grad()
def compare(model: Decoder, hidden: Tensor, wanted_model: Decoder, wanted_hidden: Tensor, targets: Tensor) -> Agreement:
    """Compare two models' predictions, from hidden states (tokens, hidden) and the targets of `next_tokens`."""
    farthest, total, squares, numbers = 0.0, 0.0, 0.0, 0
    same, divergence, nats, wanted_nats, count = 0, 0.0, 0.0, 0.0, int((targets >= 0).sum())
    for positions in torch.arange(len(targets)).split(64):
        found, wanted = predictions(model, hidden[positions]), predictions(wanted_model, wanted_hidden[positions])
        difference = (found - wanted).abs().nan_to_num(nan=math.inf)  # inf - inf: a weight overflowed
        farthest = max(farthest, difference.max().item())
        total += wanted.sum(dtype=torch.float64).item()
        squares += wanted.square().sum(dtype=torch.float64).item()
        numbers += wanted.numel()
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        found, wanted = found.log_softmax(-1), wanted.log_softmax(-1)
        divergence += (wanted.exp() * (wanted - found)).sum().item()  # sum p log(p / q)
        nats += F.nll_loss(found.double(), targets[positions], ignore_index=-1, reduction="sum").item()
        wanted_nats += F.nll_loss(wanted.double(), targets[positions], ignore_index=-1, reduction="sum").item()
    spread = math.sqrt(max(0.0, squares - total * total / numbers) / max(1, numbers - 1))
    perplexities = [safe_exp(n / count) if count else math.nan for n in (nats, wanted_nats)]
    return Agreement(farthest, spread, same / len(targets), max(0.0, divergence / len(targets)), *perplexities)


def next_tokens(sequences: Sequence[Sequence[int]], targeted: Sequence[Sequence[bool]] | None = None) -> Tensor:
    """The next token of each position, (tokens,); -1 where it is not a target, and at the end of a sequence."""
    found: list[int] = []
    for ids, is_target in zip(sequences, targeted or [[True] * len(ids) for ids in sequences], strict=True):
        found += [token if counts else -1 for token, counts in zip(ids[1:], is_target[1:], strict=True)] + [-1]
    return torch.tensor(found)


def held_out(source: str, chat: ChatTokenizer) -> tuple[list[Sample], list[Prompt]]:
    """Samples and prompts of a run, held out if it has a validation split; none if its data is missing."""
    if is_run(source):
        config = load_config(Path(source) / "config.json")
        with suppress(UserError):
            learns, length = OBJECTIVES[config.training.objective].learns, config.sample_length
            corpus = build_datasets(config.data, chat, length, config.system.seed, print, learns=learns)
            samples = corpus.validation if len(corpus.validation) else corpus.training
            prompts = held_out_prompts(corpus.conversations(corpus.untruncated(samples)), PROMPTS)
            return list(samples[: VERIFY_TOKENS // 8]), prompts
    return [], []


def proof_prompts(chat: ChatTokenizer, samples: Sequence[Sample]) -> list[list[int]]:
    """Token ids to verify a merge on: a few plain texts, and a few samples of the run."""
    ids = [chat.tokenizer.encode(text).ids for text in PLAIN_TEXTS]
    return [prompt for prompt in ids + [sample.ids.tolist() for sample in samples[:PROMPTS]] if prompt]


def describe_weights(opened: LoadedModel, merged: bool, onto: Onto = "nf4") -> str:
    """The weights of the answers in parity.json, since an adapter on another base may answer differently."""
    if merged:
        return "those of this export, before its own quantization, if any"
    quantization = opened.quantization if onto == "nf4" else ModelFiles.read(opened.base_directory).quantization
    form = quantization[0] if quantization else "its own number format"
    return f"the adapter on its base in {form}; on another base answers may differ"


def verify_merge(opened: LoadedModel, merged: Path, prompts: Sequence[list[int]], dtype: torch.dtype) -> Proof:
    """Compare the logits of a merged directory, in `dtype`, with those of base + adapter; see `prove`."""
    return prove(opened, open_rows(merged), prompts, TOLERANCE[dtype])


def prove(opened: LoadedModel, merged: Rows, prompts: Sequence[list[int]], tolerance: float) -> Proof:
    """Compare logits of merged weights and of base + adapter; `tolerance` is a share of their standard deviation."""
    prompts, model, merged_model = [ids[:PROOF_TOKENS] for ids in prompts], opened.model, StreamedDecoder(merged)
    chosen, has_score = list[Tensor](), model.config.has_score

    def record(layer: Experts, logits: Tensor) -> Tensor:
        chosen.append(Experts.choose(layer, logits))
        return chosen[-1]

    with choosing(model, record):
        targets, wanted = next_tokens(prompts), hidden_states(model, prompts)
    again = iter(chosen)
    with choosing(merged_model, lambda layer, logits: next(again)):
        merged_hidden = hidden_states(merged_model, prompts)
    targets = torch.full_like(targets, -1) if has_score else targets  # rewards predict no tokens
    with disabled({name: adapter for name, adapter in opened.adapters.items() if name != "score"}):
        base = hidden_states(model, prompts)
    effect = compare(model, base, model, wanted, targets).max_difference
    found = compare(merged_model, merged_hidden, model, wanted, targets)
    kind = "reward" if has_score else "logit"
    return Proof(found.max_difference, tolerance * found.spread, effect, found.same_top_token, kind)


@contextmanager
def choosing(model: Decoder, choose: Callable[[Experts, Tensor], Tensor]) -> Iterator[None]:
    """Choose experts in this way. Rounded weights may choose otherwise where two are near, which is no mistake."""
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    for layer in layers:
        layer.choose = partial(choose, layer)  # type: ignore[method-assign]
    yield
    for layer in layers:
        del layer.choose


def compare_bases(
    adapter: TrainedAdapter, dtype: torch.dtype, chat: ChatTokenizer, samples: Sequence[Sample], limit: int
) -> tuple[dict[Onto, Agreement], int]:
    """Compare the merge onto each base, in `dtype`, with the model in training; also return the number of tokens.

    Held-out samples with about `limit` tokens in total are used; without samples, plain texts.
    """
    before = np.cumsum([0, *(len(sample.ids) for sample in samples)])
    used = [sample for sample, tokens in zip(samples, before, strict=False) if tokens < limit]
    sequences, targeted = [sample.ids.tolist() for sample in used], [sample.is_target.tolist() for sample in used]
    if not sequences:
        sequences, targeted = [prompt for prompt in proof_prompts(chat, []) if len(prompt) > 1], []
    trained = open_adapter(adapter, "nf4")
    wanted, targets = hidden_states(trained.model, sequences), next_tokens(sequences, targeted)
    found: dict[Onto, Agreement] = {}
    for onto in get_args(Onto) if adapter.quantization else ("original",):
        merged = StreamedDecoder(replace(weights_of(trained, onto), adapters=trained.adapters, dtype=dtype))
        found[onto] = compare(merged, hidden_states(merged, sequences), trained.model, wanted, targets)
    return found, sum(map(len, sequences))


def describe_bases(found: dict[Onto, Agreement], tokens: int, chosen: str) -> list[str]:
    """The comparison as lines: a table and, if there is a choice, a recommendation."""
    trained = next(iter(found.values())).wanted_perplexity
    rows = [
        [f"--base {name}", f"{a.perplexity:.5g}", f"{a.perplexity / a.wanted_perplexity - 1:+.3%}",
         f"{a.divergence:.2e}", f"{a.same_top_token:.1%}"]
        for name, a in found.items()
    ]  # fmt: skip
    lines = [
        f"on {tokens:,} held-out tokens, compared with the model in training (perplexity {trained:.5g}):",
        markdown_table(["merged", "perplexity", "change", "KL (nats)", "same top token"], rows),
    ]
    best = recommend_base(found)
    switch = "" if best == chosen else f": --base {best} merges onto those"
    return lines + [f"recommended: onto the {best} weights{switch}"] * (len(found) > 1)


def recommend_base(found: dict[Onto, Agreement]) -> Onto:
    """The base with the lower perplexity; within 0.1 %, the one closer to the trained model."""
    lowest = min(agreement.perplexity for agreement in found.values())
    near = [name for name, a in found.items() if a.perplexity <= 1.001 * lowest]
    return min(near or found, key=lambda name: found[name].divergence)
