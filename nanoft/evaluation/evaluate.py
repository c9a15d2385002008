"""Did it help? The same questions to the base and to the tuned model.

Perplexity is exp of the mean negative log-likelihood over all target tokens, summed over the whole set before it is
divided: a mean of batch means would weigh a short batch like a long one. Beside it stand the perplexity of the prompts,
which shows whether the model still reads as it did, and bits per byte, which does not depend on the tokenizer. Exact
match asks what users ask: is the generated answer the right one, character by character? The stop rate, the share of
answers that the model ended itself, shows what the loss hides: a model that never learned to stop.

A text longer than the context is read through windows that overlap. Each token is counted once, in the window where it
has the longest history, so the first window counts all its tokens and each later one its last `stride`:

    context 6, stride 2:   [. 1 2 3 4 5]
                               [. . . . 6 7]
                                   [. . . . 8 9]
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanoft.batches import Sample, TokenDataset, collate
from nanoft.config import EvaluationConfig
from nanoft.data.chat_tokenizer import ChatTokenizer, Message
from nanoft.data.formats import Conversation
from nanoft.generation.generate import generate
from nanoft.generation.sampling import GREEDY, Sampling
from nanoft.loss import token_nll
from nanoft.metrics.answers import Metric, exact_match
from nanoft.metrics.bootstrap import Array, Figure
from nanoft.model import Decoder
from nanoft.perplexity import safe_exp
from nanoft.runtime import distributed

# Losses, by figure, and what exp of them is called; in the order of the report.
PERPLEXITIES = {
    "loss": "perplexity",
    "prompt_loss": "prompt_perplexity",
    "overall_loss": "overall_perplexity",
    "general_loss": "general_perplexity",
}


@dataclass(frozen=True)
class Prompt:
    """What is asked, the answer that the data has, and the tools on offer."""

    messages: list[Message]
    reference: str
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Completion:
    """A held-out prompt, the reference answer, and what the model said."""

    prompt: str
    reference: str
    answer: str
    stopped: bool

    @property
    def exact(self) -> bool:
        return bool(exact_match(self.answer, self.reference))


@dataclass(frozen=True)
class Likelihoods:
    """How likely a model finds each of n samples: sums over its target tokens and over all its others."""

    nats: Array  # (n, 2) float64
    tokens: Array  # (n, 2)
    text_bytes: Array  # (n,) of the targets as text: a token that only ends a turn has none

    def figures(self) -> dict[str, Figure]:
        """Losses in nats per token, and bits per byte of the targets; without what no token counts for."""
        columns = {
            "loss": (self.nats[:, 0], self.tokens[:, 0]),
            "prompt_loss": (self.nats[:, 1], self.tokens[:, 1]),
            "overall_loss": (self.nats.sum(axis=1), self.tokens.sum(axis=1)),
            "bits_per_byte": (self.nats[:, 0] / math.log(2), self.text_bytes),
        }
        units: dict[str, Any] = {"bits_per_byte": "number"}
        return {
            name: Figure(np.stack(pair, axis=1).astype(np.float64), unit=units.get(name, "nats"))
            for name, pair in columns.items()
            if pair[1].sum() > 0
        }


@dataclass(frozen=True)
class EvalResult:
    """One model on one validation set."""

    figures: dict[str, Figure] = field(default_factory=dict)
    exchanges: list[Completion] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """Nats per target token."""
        return self.figures["loss"].value if "loss" in self.figures else None

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else safe_exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """What was measured, and nothing else."""
        result: dict[str, Any] = {}
        for name, figure in self.figures.items():
            result |= {PERPLEXITIES[name]: safe_exp(figure.value)} if name in PERPLEXITIES else {}
            result[name] = figure.value
        for name, key in (("loss", "target_tokens"), ("prompt_loss", "prompt_tokens")):
            if name in self.figures:
                result[key] = int(self.figures[name].parts[:, 1].sum())
        return result | ({"prompts": len(self.exchanges)} if self.exchanges else {})


@torch.no_grad()
def likelihoods(
    model: Decoder,
    chat: ChatTokenizer,
    samples: Sequence[Sample],
    batch_size: int,
    context: int,
    stride: int | None = None,
) -> Likelihoods:
    """How likely every token of every sample is, but for the first, which nothing predicts.

    Args:
        context: tokens that the model sees at once; longer samples are read through windows.
        stride: tokens that each further window counts, below `context`; None: half of the context.
    """
    training, device, samples = model.training, model.head.device, TokenDataset.of(samples)
    model.eval()
    nats, tokens = np.zeros((len(samples), 2)), np.zeros((len(samples), 2), np.int64)
    pieces = [(number, *w) for number, size in enumerate(samples.lengths) for w in windows(int(size), context, stride)]
    pieces.sort(key=lambda piece: piece[3] - piece[1])
    found: dict[int, list[float]] = {}  # by piece: nats of its targets, and of the others
    with distributed.same_exception(device):
        for at in distributed.split_work(range(0, len(pieces), batch_size)):
            group = pieces[at : at + batch_size]
            cut = [_window(samples[number], start, first, end) for number, start, first, end in group]
            batch = collate(TokenDataset.of(cut), list(np.arange(len(cut))[:, None]), chat.pad_id).to(device)
            hidden = model(batch.ids, batch.positions, batch.documents, batch.target_positions)
            nll = token_nll(hidden, model.head, batch.targets).cpu().double().numpy()  # row behind row
            for place, own in enumerate(np.split(nll, _ends(group)), start=at):
                number, _, first, end = pieces[place]
                is_target = samples[number].is_target[first:end]
                found[place] = [own[is_target].sum().item(), own[~is_target].sum().item()]
    for place, sums in distributed.all_gather_dict(found).items():
        number, _, first, end = pieces[place]
        is_target = samples[number].is_target[first:end]
        nats[number] += sums
        tokens[number] += is_target.sum(), (~is_target).sum()
    model.train(training)
    return Likelihoods(nats, tokens, np.array([_text_bytes(chat, sample) for sample in samples], np.int64))


def windows(length: int, context: int, stride: int | None = None) -> list[tuple[int, int, int]]:
    """(start, first, end) of each window over a sample: it sees [start, end) and counts [first, end)."""
    stride = stride or max(1, context // 2)
    found, start = [(0, 1, min(context, length))], 0
    while (counted := found[-1][2]) < length:
        start += stride
        found.append((start, counted, min(start + context, length)))
    return found


def _window(sample: Sample, start: int, first: int, end: int) -> Sample:
    """What a window sees, with the tokens that it counts as targets."""
    return Sample(sample.ids[start:end], np.arange(start, end) >= first, sample.record)


def _ends(group: Sequence[tuple[int, int, int, int]]) -> Array:
    """Where the counted tokens of each window end among those of all, without the last."""
    return np.cumsum([end - first for _, _, first, end in group])[:-1]


def _text_bytes(chat: ChatTokenizer, sample: Sample) -> int:
    """Bytes of the targets as UTF-8 text."""
    bounds = np.flatnonzero(np.diff(sample.is_target, prepend=False, append=False)).tolist()
    sizes = [len(chat.decode(sample.ids[:bound].tolist()).encode()) for bound in bounds]  # up to each end of a run
    return sum(sizes[1::2]) - sum(sizes[::2])


# ---- What it says


def held_out_prompts(conversations: Sequence[Conversation], limit: int) -> list[Prompt]:
    """The last exchange of the first `limit` conversations that end in an answer, not in the call of a tool."""
    chats = [c for c in conversations if c.messages and not c.messages[-1].get("tool_calls")][:limit]
    return [Prompt(list(c.messages[:-1]), c.messages[-1]["content"], c.tools) for c in chats]


def answer_all(
    model: Decoder,
    chat: ChatTokenizer,
    prompts: Sequence[Prompt],
    batch_size: int,
    max_new: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[Completion]:
    """Answers to every prompt, so many at once; the longest first, so that memory is short at once or not at all."""
    training, generator = model.training, torch.Generator().manual_seed(seed)
    model.eval()
    encoded = [chat.encode_prompt(prompt.messages, prompt.tools) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    longest_first = [encoded[i] for i in order]
    with distributed.same_exception(model.head.device):
        mine = list(distributed.split_work(range(len(order))))
        answers = generate(model, longest_first, chat.stop_ids, max_new, sampling, generator, batch_size, mine)
        found = {order[at]: (chat.decode(answers[at].ids), answers[at].stopped) for at in mine}
    found = distributed.all_gather_dict(found)
    model.train(training)
    return [Completion(p.messages[-1]["content"], p.reference, *found[i]) for i, p in enumerate(prompts)]


def answer_figures(exchanges: Sequence[Completion], metrics: Sequence[Metric]) -> dict[str, Figure]:
    """Exact match, stop rate, and the metrics that were asked for."""
    if not exchanges:
        return {}
    pairs = [(exchange.answer, exchange.reference) for exchange in exchanges]
    own = {metric.name: metric.figure(pairs) for metric in metrics if metric.name != "exact_match"}
    exact, stopped = (Figure.mean([getattr(e, name) for e in exchanges]) for name in ("exact", "stopped"))
    return {"exact_match": exact, "stop_rate": stopped, **own}


# ---- Both


def measure(
    model: Decoder,
    chat: ChatTokenizer,
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    e: EvaluationConfig,
    context: int,
    metrics: Sequence[Metric] = (),
    general: Sequence[Sample] = (),
    seed: int = 0,
) -> EvalResult:
    """Likelihood of the samples, answers to the prompts, and loss on a general text.

    Args:
        context: tokens that the model sees at once (model.max_seq_length).
        metrics: of the answers, besides exact match and stop rate.
        seed: of sampled answers.
    """
    started = time.perf_counter()
    figures: dict[str, Figure] = {}
    if len(samples):
        figures |= likelihoods(model, chat, samples, e.batch_size, context, e.stride).figures()
    if len(general):
        probe = likelihoods(model, chat, general, e.batch_size, context, e.stride).figures()
        figures["general_loss"] = probe["loss"]
    exchanges: list[Completion] = []
    if prompts:
        sampling = Sampling(e.temperature, e.top_k, e.top_p, e.min_p, e.repetition_penalty)
        exchanges = answer_all(model, chat, prompts, e.prompt_batch_size, e.max_new_tokens, sampling, seed)
    figures |= answer_figures(exchanges, metrics)
    return EvalResult(figures, exchanges, time.perf_counter() - started)
