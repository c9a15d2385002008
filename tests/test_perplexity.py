"""Tests of nanoft/perplexity.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from nanoft import UserError, perplexity
from nanoft.batches import Sample, eval_batches
from nanoft.config import LoRAConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import Conversation
from nanoft.evaluation import evaluate
from nanoft.evaluation.evaluate import EvalResult
from nanoft.lora import disabled, inject_lora
from nanoft.metrics.bootstrap import Figure
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from tiny_models import make_chat_model

CPU = torch.device("cpu")


LENGTHS = [1, 40, 3, 3, 90, 7, 25]  # words of the answers: a mean of batch means would show


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, ChatTokenizer, PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("evaluate") / "model"
    reference = make_chat_model(directory)
    return load_model(directory, CPU, torch.float32), ChatTokenizer(directory), reference, directory


def conversation(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return Conversation(messages, None, "made.jsonl", 1)


def unequal() -> list[Conversation]:
    chats = [conversation(f"Question {'?' * (n * 5 % 7)}{n}", "x y " * words) for n, words in enumerate(LENGTHS)]
    return [*chats, conversation("One", "first answer", "Two", "second answer")]


def encoded(chat: ChatTokenizer) -> list[Sample]:
    return list(chat.encode(r for n, c in enumerate(unequal()) for r in chat.render_samples(c.messages, n)))


@torch.no_grad()
def nats_of_transformers(reference: PreTrainedModel, sample: Sample) -> list[float]:
    """The negative log-likelihood of each target token of one sample alone."""
    ids = torch.from_numpy(sample.ids).long()[None]
    logits = reference(ids).logits[0, :-1].double()
    nll = cross_entropy(logits, ids[0, 1:], reduction="none")
    return nll[torch.from_numpy(sample.is_target)[1:]].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_loss_weighs_every_target_token_alike(parts: Any, batch_size: int) -> None:
    model, chat, reference, _ = parts
    samples = encoded(chat)
    nats = [nll for sample in samples for nll in nats_of_transformers(reference, sample)]
    loss, tokens = perplexity.validation_loss(model, eval_batches(samples, batch_size, chat.pad_id))
    assert tokens == len(nats)
    assert abs(loss - sum(nats) / len(nats)) < 1e-5
    means = [sum(part) / len(part) for part in (nats_of_transformers(reference, sample) for sample in samples)]
    assert abs(loss - sum(means) / len(means)) > 0.01  # the mean of means is something else


def test_dropout_is_off_while_measuring(parts: Any) -> None:
    _, chat, _, directory = parts
    model = load_model(directory, CPU, torch.float32)
    adapters = inject_lora(model, LoRAConfig(rank=4, alpha=8.0, dropout=0.5, target_modules=("q_proj",)), seed=0)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(std=0.5)
    samples = encoded(chat)
    model.train()
    first, second = (perplexity.validation_loss(model, eval_batches(samples, 4, chat.pad_id)) for _ in range(2))
    assert first == second
    with disabled(adapters):
        assert perplexity.validation_loss(model, eval_batches(samples, 4, chat.pad_id)) != first


# ---- Likelihoods


@torch.no_grad()
def every_nll(reference: PreTrainedModel, ids: Any) -> Any:
    """The negative log-likelihood of each token but the first, by transformers, in one piece."""
    ids = torch.as_tensor(ids).long()[None]
    return cross_entropy(reference(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_prompt_response_and_overall_perplexity_are_those_of_transformers(parts: Any, batch_size: int) -> None:
    model, chat, reference, _ = parts
    samples = encoded(chat)
    found = evaluate.likelihoods(model, chat, samples, batch_size, context=512)
    for number, sample in enumerate(samples):
        nll, is_target = every_nll(reference, sample.ids), sample.is_target[1:]
        assert found.nats[number] == pytest.approx([nll[is_target].sum(), nll[~is_target].sum()], rel=1e-5)
        assert found.tokens[number].tolist() == [is_target.sum(), (~is_target).sum()]
    pairs = [(every_nll(reference, sample.ids), sample.is_target[1:]) for sample in samples]
    nll, is_target = (np.concatenate(column) for column in zip(*pairs, strict=True))
    figures = evaluate.EvalResult(found.figures()).to_dict()
    expected = {"perplexity": nll[is_target], "prompt_perplexity": nll[~is_target], "overall_perplexity": nll}
    for name, nats in expected.items():
        assert figures[name] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert figures["target_tokens"] == is_target.sum()
    assert figures["prompt_tokens"] == (~is_target).sum()
    assert (figures["loss"], figures["target_tokens"]) == pytest.approx(
        perplexity.validation_loss(model, eval_batches(samples, batch_size, chat.pad_id)), rel=1e-6
    )


def test_samples_without_targets_cannot_be_measured(parts: Any) -> None:
    model, chat, _, _ = parts
    masked = [Sample(sample.ids, np.zeros(len(sample.ids), bool), 0) for sample in encoded(chat)]
    with pytest.raises(UserError, match="no sample has target tokens"):
        perplexity.validation_loss(model, eval_batches(masked, 4, chat.pad_id))
    assert evaluate.likelihoods(model, chat, masked, 4, 512).figures().keys() == {"prompt_loss", "overall_loss"}


def test_perplexity_of_a_hopeless_model_is_infinite_not_an_error() -> None:
    assert EvalResult({"loss": Figure(np.array([[1e6, 1]]))}).perplexity == math.inf
    assert EvalResult({"loss": Figure(np.array([[10.0, 1]]))}).perplexity == pytest.approx(math.exp(10))
    assert math.isnan(perplexity.safe_exp(math.nan))
