"""Evaluation of one model: likelihood of held-out samples, and answers to held-out prompts.

Perplexity is exp(sum NLL / sum target tokens) over the whole set: a mean of batch means would give short batches too
much weight. Bits per byte do not depend on the tokenizer. Exact match compares the generated answer with the reference,
character by character. The stop rate, the share of answers that the model ended itself, shows what the loss does not.

A sample longer than the context is read in overlapping windows. Each token is counted once, in the window in which it
has the longest history: the first window counts all its tokens, each later window its last `stride`:

    context 6, stride 2:   [. 1 2 3 4 5]
                               [. . . . 6 7]
                                   [. . . . 8 9]
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from nanoft import UserError
from nanoft.batches import Sample, TokenDataset, collate, eval_batches
from nanoft.config import EvaluationConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.filters import is_preferred
from nanoft.data.formats import Conversation
from nanoft.generation.generate import generate
from nanoft.generation.sampling import GREEDY, Sampling, completion_noise
from nanoft.io.bars import track
from nanoft.io.tables import markdown_table
from nanoft.lora import DoRALinear, disabled
from nanoft.loss import token_nll
from nanoft.metrics.answers import Metric, exact_match
from nanoft.metrics.bootstrap import Array, Figure
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import LoadedModel
from nanoft.nf4 import quantize
from nanoft.objectives.reward import answer_rewards
from nanoft.perplexity import evaluating, safe_exp
from nanoft.runtime import distributed

# Losses and the names of exp(loss), in the order of the report.
PERPLEXITIES = {
    "loss": "perplexity",
    "prompt_loss": "prompt_perplexity",
    "overall_loss": "overall_perplexity",
    "general_loss": "general_perplexity",
}
Judge = Callable[[Sequence[Prompt], Sequence[str]], list[dict[str, float]]]  # the rewards of answers, by name


@dataclass(frozen=True)
class Completion:
    """A held-out prompt, its reference answer, and the model's answer."""

    prompt: str
    reference: str
    answer: str
    stopped: bool  # the model ended its turn
    tokens: int = 0  # of the answer
    rewards: dict[str, float] = field(default_factory=dict)  # by name, in runs that learn from rewards

    @property
    def worth(self) -> str:
        """The rewards as text."""
        said = ", ".join(f"{name.removeprefix('rewards/')} {value:.3g}" for name, value in self.rewards.items())
        return f" ({said})" if said else ""

    @property
    def exact(self) -> bool:
        return bool(exact_match(self.answer, self.reference))


@dataclass(frozen=True)
class Likelihoods:
    """Negative log-likelihood of each of n samples, summed over its target tokens and its other tokens."""

    nats: Array  # (n, 2) float64
    tokens: Array  # (n, 2)
    text_bytes: Array  # (n,): UTF-8 length of the targets; a stop token has none

    def __getitem__(self, which: Array) -> Likelihoods:
        return Likelihoods(self.nats[which], self.tokens[which], self.text_bytes[which])

    def figures(self) -> dict[str, Figure]:
        """Losses in nats per token, and bits per byte of the targets; figures without tokens are omitted."""
        columns = {
            "loss": (self.nats[:, 0], self.tokens[:, 0]),
            "prompt_loss": (self.nats[:, 1], self.tokens[:, 1]),
            "overall_loss": (self.nats.sum(axis=1), self.tokens.sum(axis=1)),
            "bits_per_byte": (self.nats[:, 0] / math.log(2), self.text_bytes),
        }
        found: dict[str, Figure] = {}
        for name, pair in columns.items():
            if pair[1].sum() > 0:
                unit: Literal["nats", "number"] = "number" if name == "bits_per_byte" else "nats"
                found[name] = Figure(np.stack(pair, axis=1).astype(np.float64), unit=unit)
        return found


@dataclass(frozen=True)
class EvalResult:
    """Figures and answers of one model on one validation set."""

    figures: dict[str, Figure] = field(default_factory=dict)
    completions: list[Completion] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """Nats per target token."""
        return self.figures["loss"].value if "loss" in self.figures else None

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else safe_exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """The `base` or `tuned` object of report.json: only what was evaluated."""
        result: dict[str, Any] = {}
        for name, figure in self.figures.items():
            result |= {PERPLEXITIES[name]: safe_exp(figure.value)} if name in PERPLEXITIES else {}
            result[name] = figure.value
        for name, key in (("loss", "target_tokens"), ("prompt_loss", "prompt_tokens")):
            if name in self.figures:
                result[key] = int(self.figures[name].parts[:, 1].sum())
        return result | ({"prompts": len(self.completions)} if self.completions else {})


@torch.no_grad()
def likelihoods(
    model: Decoder, chat: ChatTokenizer, samples: Sequence[Sample], batch_size: int, context: int,
    stride: int | None = None,
) -> Likelihoods:  # fmt: skip
    """NLL of every token of every sample except the first, which nothing predicts.

    Samples longer than `context` are read in windows; each window after the first counts `stride` < `context` tokens.
    None: half of the context. Both end where learned positions do.
    """
    context = min(context, model.config.positions or context)
    stride = min(stride, context - 1) if stride else None
    device, samples = model.device, TokenDataset.of(samples)
    nats, counted = np.zeros((len(samples), 2)), [sample.is_target[1:] for sample in samples]
    pieces = [(number, *w) for number, size in enumerate(samples.lengths) for w in windows(int(size), context, stride)]
    pieces.sort(key=lambda piece: piece[3] - piece[1])
    found: dict[int, list[float]] = {}  # piece -> nats of its targets, and of its other tokens
    with evaluating(model), distributed.same_exception(device):
        for at in track([*distributed.split_work(range(0, len(pieces), batch_size))], "evaluating", "batches"):
            group = pieces[at : at + batch_size]
            cut: list[Sample] = []  # the tokens that each window reads, with those that it counts as targets
            for number, start, first, end in group:
                sample = samples[number]
                cut.append(Sample(sample.ids[start:end], np.arange(start, end) >= first, sample.record))
            batch = collate(TokenDataset.of(cut), list(np.arange(len(cut))[:, None]), chat.pad_id).to(device)
            hidden = model(batch.ids, batch.positions, batch.documents, batch.target_positions)
            nll = token_nll(hidden, model.head, batch.targets, cap=model.config.logit_cap).cpu().double().numpy()
            ends = np.cumsum([end - first for _, _, first, end in group])  # of each window's counted tokens
            for place, own in enumerate(np.split(nll, ends[:-1]), start=at):
                number, _, first, end = pieces[place]
                is_target = counted[number][first - 1 : end - 1]
                found[place] = [own[is_target].sum().item(), own[~is_target].sum().item()]
    for place, sums in distributed.all_gather_dict(found).items():
        nats[pieces[place][0]] += sums
    tokens = np.array([(own.sum(), (~own).sum()) for own in counted], np.int64).reshape(-1, 2)
    return Likelihoods(nats, tokens, np.array([_text_bytes(chat, sample) for sample in samples], np.int64))


@torch.no_grad()
def reward_figures(model: Decoder, pairs: TokenDataset, batch_size: int) -> dict[str, Figure]:
    """The share of pairs whose chosen answer has the higher reward, and the mean margin."""
    batches, found = list(eval_batches(pairs, batch_size, 0)), dict[int, float]()
    with evaluating(model), distributed.same_exception(model.device):
        for at in distributed.split_work(range(len(batches))):
            batch = batches[at].to(model.device)
            found |= zip(batch.samples.chosen.tolist(), answer_rewards(model, batch).tolist(), strict=True)
    found = distributed.all_gather_dict(found)
    rewards = np.array([found[number] for number in pairs.chosen.tolist()]).reshape(-1, 2)  # (pairs, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    return {"pair_accuracy": Figure.mean(margins > 0), "reward_margin": replace(Figure.mean(margins), unit="number")}


def windows(length: int, context: int, stride: int | None = None) -> list[tuple[int, int, int]]:
    """(start, first, end) of each window: it reads tokens [start, end) and counts [first, end)."""
    stride = stride or max(1, context // 2)
    found, start = [(0, 1, min(context, length))], 0
    while (counted := found[-1][2]) < length:
        start += stride
        found.append((start, counted, min(start + context, length)))
    return found


def _text_bytes(chat: ChatTokenizer, sample: Sample) -> int:
    bounds = np.flatnonzero(np.diff(sample.is_target, prepend=False, append=False)).tolist()
    sizes = [len(chat.decode(sample.ids[:bound].tolist()).encode()) for bound in bounds]  # prefixes up to each boundary
    return sum(sizes[1::2]) - sum(sizes[::2])


# ---- Answers


def held_out_prompts(conversations: Iterable[Conversation], limit: int) -> list[Prompt]:
    """The last turn of the first `limit` conversations that end with an answer rather than a tool call."""
    good = (c for c in conversations if c.messages and (c.worse or c.label) and not c.messages[-1].get("tool_calls"))
    return [Prompt.of(c) for c in itertools.islice(good, limit)]


def answer_all(
    model: Decoder, chat: ChatTokenizer, prompts: Sequence[Prompt], batch_size: int, max_new: int,
    sampling: Sampling = GREEDY, seed: int = 0,
) -> list[Completion]:  # fmt: skip
    """Answers to every prompt, in batches; the longest prompts first, so that memory runs out at once or never."""
    encoded = [chat.encode_prompt(prompt.messages, prompt.tools, prompt.template_args) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    with evaluating(model), distributed.same_exception(model.device):
        mine = [order[at] for at in distributed.split_work(range(len(order)))]
        noise = completion_noise([(seed, i) for i in mine], max_new)
        answers = generate(model, [encoded[i] for i in mine], chat.stop_ids, max_new, sampling, noise, batch_size)
        found = {i: (chat.decode(a.ids), a.stopped, len(a.ids)) for i, a in zip(mine, answers, strict=True)}
    found = distributed.all_gather_dict(found)
    references = [chat.control.remove(prompt.reference) for prompt in prompts]
    return [Completion(prompt.text, references[i], *found[i]) for i, prompt in enumerate(prompts)]


def answer_figures(completions: Sequence[Completion], metrics: Sequence[Metric]) -> dict[str, Figure]:
    """Exact match, stop rate, length of the answers, the requested metrics, and the reward if there is one."""
    if not completions:
        return {}
    triples = [(c.answer, c.reference, c.prompt) for c in completions]
    own = {metric.name: metric.figure(triples) for metric in metrics if metric.name != "exact_match"}
    exact, stopped = (Figure.mean([getattr(c, name) for c in completions]) for name in ("exact", "stopped"))
    length = replace(Figure.mean([c.tokens for c in completions]), unit="number")
    figures = {"exact_match": exact, "stop_rate": stopped, "response_tokens": length, **own}
    if completions[0].rewards:  # without those that failed
        values = np.array([c.rewards["reward"] for c in completions])
        figures["reward"] = Figure(np.stack([np.nan_to_num(values), ~np.isnan(values)], axis=1), unit="number")
    return figures


def measure(
    model: Decoder, chat: ChatTokenizer, samples: Sequence[Sample], prompts: Sequence[Prompt], e: EvaluationConfig,
    context: int, metrics: Sequence[Metric] = (), general: Sequence[Sample] = (), seed: int = 0,
    judge: Judge | None = None,
) -> EvalResult:  # fmt: skip
    """The likelihood of samples, answers to prompts, their metrics and rewards, and the loss on a general text.

    For a reward model: its accuracy and margin on pairs.
    """
    started, figures, completions = time.perf_counter(), dict[str, Figure](), list[Completion]()
    if model.config.has_score:
        figures = reward_figures(model, TokenDataset.of(samples), e.batch_size) if len(samples) else figures
        return EvalResult(figures, [], time.perf_counter() - started)
    if len(samples):
        samples = TokenDataset.of(samples)
        found = likelihoods(model, chat, samples, e.batch_size, context, e.stride)
        figures |= found[is_preferred(samples)].figures()
        if samples.unit_size == 2:
            figures["pair_accuracy"] = Figure.mean(found.nats[::2, 0] < found.nats[1::2, 0])
    if len(general):
        figures["general_loss"] = likelihoods(model, chat, general, e.batch_size, context, e.stride).figures()["loss"]
    sampling = Sampling(e.temperature, e.top_k, e.top_p, e.min_p, e.repetition_penalty)
    if prompts:
        completions = answer_all(model, chat, prompts, e.prompt_batch_size, e.max_new_tokens, sampling, seed)
        if judge and (rewards := judge(prompts, [c.answer for c in completions])):
            completions = [replace(c, rewards=each) for c, each in zip(completions, rewards, strict=True)]
    figures |= answer_figures(completions, metrics)
    return EvalResult(figures, completions, time.perf_counter() - started)


def compare_quantization(
    source: str, loaded: LoadedModel, perplexity: Callable[[], float | None]
) -> tuple[dict[str, Any], str]:
    """The cost of quantization: base and adapter on the original and on quantized weights, as figures and as a table.

    Weights get the run's own quantization, or else NF4, and stay quantized. `perplexity` evaluates `loaded.model` as it
    is at that moment.
    """
    form = loaded.quantization or ("nf4", True)
    if not loaded.adapters:
        raise UserError(f"--quantization: {source} has no adapter: name a LoRA run or an adapter")
    if ModelFiles.read(loaded.base_directory).quantization:
        raise UserError(
            f"--quantization: {loaded.base_directory} has quantized weights only: name a run on the original"
        )

    def both() -> dict[str, float | None]:
        with disabled(loaded.adapters):
            base = perplexity()
        return {"base": base, "tuned": perplexity()}

    figures = {"original": both()}
    for name, linear in list(loaded.model.named_modules()):  # one after another; the adapters stay
        if isinstance(linear, nn.Linear) and name.startswith("model.layers."):
            quantized = quantize(linear.weight.detach(), form, loaded.dtype)
            quantized.register_parameter("bias", linear.bias)
            loaded.model.set_submodule(name, quantized)
    for adapter in loaded.adapters.values():
        if isinstance(adapter, DoRALinear):
            adapter.measure_base()
    figures[form[0]] = both()
    rows = [[weights, *(f"{value:.5g}" for value in pair.values())] for weights, pair in figures.items()]
    trained_on = f"{loaded.quantization[0]} weights" if loaded.quantization else "the original weights"
    text = f"{markdown_table(['perplexity on weights', 'base', 'tuned'], rows)}\n\ntrained on {trained_on}"
    return {"quantization": figures}, text
