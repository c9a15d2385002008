"""Did it help? The same questions to the base and to the tuned model.

Perplexity is exp of the mean negative log-likelihood over all target tokens, summed over the whole set before it is
divided: a mean of batch means would weigh a short batch like a long one. Exact match asks what users ask: is the
generated answer the right one, character by character? The stop rate, the share of answers that the model ended itself,
shows what the loss hides: a model that never learned to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nanoft.batches import in_order
from nanoft.chat import ChatTokenizer, Message, Sample
from nanoft.generate import generate
from nanoft.loss import token_nll
from nanoft.metrics import table
from nanoft.model import Decoder
from nanoft.records import Conversation


@dataclass(frozen=True)
class Prompt:
    """What is asked, the answer that the data has, and the tools on offer."""

    messages: list[Message]
    reference: str
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Exchange:
    """A held-out prompt, the reference answer, and what the model said."""

    prompt: str
    reference: str
    answer: str
    stopped: bool

    @property
    def exact(self) -> bool:
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Measured:
    """One model on one validation set."""

    loss: float | None = None  # nats per target token
    target_tokens: int = 0
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else safe_exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """What was measured, and nothing else."""
        result: dict[str, Any] = {}
        if self.loss is not None:
            result |= {"perplexity": self.perplexity, "loss": self.loss, "target_tokens": self.target_tokens}
        if self.exchanges:
            count = len(self.exchanges)
            result["exact_match"] = sum(e.exact for e in self.exchanges) / count
            result["stop_rate"] = sum(e.stopped for e in self.exchanges) / count
            result["prompts"] = count
        return result


def safe_exp(nats: float) -> float:
    """exp that gives infinity where Python would raise."""
    return math.exp(nats) if nats < 700 else math.inf


@torch.no_grad()
def validation_loss(model: Decoder, samples: Sequence[Sample], batch_size: int, pad_id: int) -> tuple[float, int]:
    """(nats per target token, target tokens) over all samples; sums in float64, on the CPU."""
    training, device = model.training, model.head.device
    model.eval()
    nats, count = 0.0, 0
    for batch in in_order(samples, batch_size, pad_id):
        placed = batch.to(device)
        hidden = model(placed.ids, placed.positions, placed.documents, rows=placed.rows)
        nats += token_nll(hidden, model.head, placed.targets).double().sum().item()
        count += batch.target_tokens
    model.train(training)
    return nats / count, count


def held_out_prompts(conversations: Sequence[Conversation], limit: int) -> list[Prompt]:
    """The last exchange of the first `limit` conversations that end in an answer, not in the call of a tool."""
    chats = [c for c in conversations if c.messages and not c.messages[-1].get("tool_calls")][:limit]
    return [Prompt(list(c.messages[:-1]), c.messages[-1]["content"], c.tools) for c in chats]


def answer_all(
    model: Decoder, chat: ChatTokenizer, prompts: Sequence[Prompt], batch_size: int, max_new: int
) -> list[Exchange]:
    """Greedy answers to every prompt; prompts of like length together."""
    training = model.training
    model.eval()
    encoded = [chat.encode_prompt(prompt.messages, prompt.tools) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    exchanges: dict[int, Exchange] = {}
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        answers = generate(model, [encoded[i] for i in group], chat.stop_ids, max_new)
        for i, said in zip(group, answers, strict=True):
            asked = prompts[i].messages[-1]["content"]
            exchanges[i] = Exchange(asked, prompts[i].reference, chat.decode(said.ids), said.stopped)
    model.train(training)
    return [exchanges[i] for i in range(len(prompts))]


def measure(
    model: Decoder,
    chat: ChatTokenizer,
    samples: Sequence[Sample],
    prompts: Sequence[Prompt],
    batch_size: int,
    prompt_batch_size: int,
    max_new_tokens: int,
) -> Measured:
    """Loss on the samples and answers to the prompts."""
    loss, tokens = validation_loss(model, samples, batch_size, chat.pad_id) if len(samples) else (None, 0)
    exchanges = answer_all(model, chat, prompts, prompt_batch_size, max_new_tokens) if prompts else []
    return Measured(loss, tokens, exchanges)


def comparison(base: Measured | None, tuned: Measured) -> str:
    """Base beside tuned, as a table; what was not measured is a dash."""
    columns = {"base": base.to_dict() if base else {}, "tuned": tuned.to_dict()}
    forms = {"perplexity": "{:.4g}", "exact_match": "{:.1%}", "stop_rate": "{:.1%}"}
    rows = [
        [name.replace("_", " "), *(form.format(c[name]) if name in c else "-" for c in columns.values())]
        for name, form in forms.items()
        if any(name in c for c in columns.values())
    ]
    return table(["", *columns], rows) if rows else "nothing was measured: there is no validation data"


def side_by_side(base: Measured | None, tuned: Measured, count: int) -> str:
    """The first few prompts with the reference and both answers."""
    blocks = []
    for index, exchange in enumerate(tuned.exchanges[:count]):
        lines = [("prompt", exchange.prompt), ("wanted", exchange.reference)]
        if base and index < len(base.exchanges):
            lines.append(("base", base.exchanges[index].answer))
        lines.append(("tuned", exchange.answer))
        blocks.append("\n".join(f"{name:>7}: {_one_line(text)}" for name, text in lines))
    return "\n\n".join(blocks)


def report(
    name: str, base: Measured | None, tuned: Measured, training: dict[str, float], count: int
) -> tuple[dict[str, Any], str, str]:
    """What a run ends with: report.json's object, the text for the terminal, and report.md."""
    comparing, samples = comparison(base, tuned), side_by_side(base, tuned, count)
    figures = table(["training", ""], [[key.replace("_", " "), f"{value:,}"] for key, value in training.items()])
    terminal = f"\n{comparing}\n\n{samples}".rstrip()
    markdown = f"# {name}\n\n{comparing}\n\n{figures}\n" + (f"\n```\n{samples}\n```\n" if samples else "")
    return {**results(base, tuned), "training": training}, terminal, markdown


def _one_line(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def results(base: Measured | None, tuned: Measured) -> dict[str, Any]:
    """The `base` and `tuned` objects of report.json and of eval.py --json."""
    return {**({"base": base.to_dict()} if base else {}), "tuned": tuned.to_dict()}
