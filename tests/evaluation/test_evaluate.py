"""Evaluation against transformers and against cases with known results."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.config import EvaluationConfig, LoRAConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import Conversation
from nanoft.evaluation import evaluate
from nanoft.evaluation.evaluate import Completion, EvalResult, compare_quantization
from nanoft.generation.sampling import Sampling
from nanoft.lora import disabled, inject_lora
from nanoft.metrics.answers import select_metrics
from nanoft.metrics.bootstrap import Figure
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.models.open import open_model
from nanoft.models.weights import load_model
from nanoft.nf4 import PackedLinear, quantize
from tiny_models import make_chat_model, train_run, write_records

CPU = torch.device("cpu")


FEW = EvaluationConfig(batch_size=2, prompt_batch_size=2, max_new_tokens=3)


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


def test_measuring_leaves_the_model_as_it_was(parts: Any) -> None:
    model, chat, _, _ = parts
    samples = encoded(chat)
    prompts = evaluate.held_out_prompts(unequal(), 2)
    for training in (True, False):
        model.train(training)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        evaluate.measure(model, chat, samples, prompts, FEW, 512, general=samples[:2])
        assert model.training is training
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_held_out_prompts_are_all_but_the_last_answer() -> None:
    text = Conversation([], "plain text", "made.jsonl", 3)
    chats = [text, conversation("a", "b"), conversation("c", "d", "e", "f"), conversation("g", "h")]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chats.insert(1, Conversation([{"role": "user", "content": "a"}, call], None, "made.jsonl", 4))
    earlier = [{"role": r, "content": t} for r, t in (("user", "c"), ("assistant", "d"), ("user", "e"))]
    assert evaluate.held_out_prompts(chats, 2) == [
        Prompt([{"role": "user", "content": "a"}], "b", where="made.jsonl:1"),
        Prompt(earlier, "f", where="made.jsonl:1"),
    ]
    assert evaluate.held_out_prompts(chats, 0) == []


@torch.no_grad()
def answer_of_transformers(reference: PreTrainedModel, directory: Path, messages: Any, count: int) -> tuple[str, bool]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": stop}
    new = reference.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), stop in new


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_answers_come_back_in_order_and_equal_transformers(parts: Any, batch_size: int) -> None:
    model, chat, reference, directory = parts
    prompts = evaluate.held_out_prompts(unequal(), 50)
    completions = evaluate.answer_all(model, chat, prompts, batch_size, 6)
    assert [e.reference for e in completions] == [prompt.reference for prompt in prompts]
    assert [e.prompt for e in completions] == [prompt.messages[-1]["content"] for prompt in prompts]
    expected = [answer_of_transformers(reference, directory, prompt.messages, 6) for prompt in prompts]
    assert [(e.answer, e.stopped) for e in completions] == expected
    assert len({e.answer for e in completions}) > 1


def test_a_model_that_always_stops_and_one_that_never_does(parts: Any) -> None:
    _, chat, _, directory = parts
    prompts = evaluate.held_out_prompts(unequal(), 3)
    (stop,) = chat.stop_ids
    for sign, expected in ((1.0, 1.0), (-1.0, 0.0)):
        model = load_model(directory, CPU, torch.float32)
        with torch.no_grad():  # the head's row of the stop token decides: hidden states have norm 1 and a fixed part
            model.model.norm.weight.zero_()[0] = 1.0
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight[:, 0] = 5.0
            model.lm_head.weight.normal_(std=0.01)
            model.lm_head.weight[stop, 0] = sign
        completions = evaluate.answer_all(model, chat, prompts, 2, 4)
        assert evaluate.answer_figures(completions, [])["stop_rate"].value == expected
        assert all((e.answer == "") == (sign > 0) for e in completions)


def completion(answer: str, reference: str, stopped: bool = True) -> Completion:
    return Completion("prompt", reference, answer, stopped, tokens=3)


def test_exact_match_ignores_outer_space_only() -> None:
    same = [("a b", "a b"), (" a b\n", "a b"), ("a b", "\ta b ")]
    other = [("a  b", "a b"), ("A b", "a b"), ("a b.", "a b"), ("", "a b"), ("a b a b", "a b")]
    assert all(completion(*pair).exact for pair in same)
    assert not any(completion(*pair).exact for pair in other)


def test_metrics_stand_beside_exact_match_and_stop_rate() -> None:
    completions = [completion("x", "x"), completion("x", "y"), completion("y z", "y", False), completion("z", "z")]
    found = evaluate.answer_figures(completions, select_metrics(["exact_match", "contains", "token_f1"]))
    assert {name: figure.value for name, figure in found.items()} == {
        "exact_match": 0.5,
        "stop_rate": 0.75,
        "response_tokens": 3.0,
        "contains": 0.75,
        "token_f1": pytest.approx((1 + 0 + 2 / 3 + 1) / 4),
    }
    assert evaluate.answer_figures([], select_metrics(["contains"])) == {}


# ---- Likelihoods


@torch.no_grad()
def every_nll(reference: PreTrainedModel, ids: Any) -> Any:
    """The negative log-likelihood of each token but the first, by transformers, in one piece."""
    ids = torch.as_tensor(ids).long()[None]
    return cross_entropy(reference(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none").numpy()


def test_bits_per_byte_go_by_the_text_of_the_answers(parts: Any) -> None:
    model, chat, _, _ = parts
    samples = encoded(chat)
    found = evaluate.likelihoods(model, chat, samples, 4, context=512)
    said = [[m["content"] for m in c.messages if m["role"] == "assistant"] for c in unequal()]
    expected = [sum(len(text.encode()) for text in texts) for texts in said]
    assert found.text_bytes.tolist() == expected
    bits = found.nats[:, 0].sum() / math.log(2) / sum(expected)
    assert found.figures()["bits_per_byte"].value == pytest.approx(bits)


def test_bytes_are_not_characters(parts: Any) -> None:
    model, chat, _, _ = parts
    (sample,) = chat.encode(iter([chat.text_sample("naïve 漢字", 0)]))
    assert evaluate.likelihoods(model, chat, [sample], 1, 64).text_bytes.tolist() == [len("naïve 漢字".encode()) - 1]


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(50, 16, 5), (50, 16, 15), (33, 32, 1), (16, 16, 8), (40, 9, 4)]
)
def test_windows_count_each_token_once_with_the_longest_history(length: int, context: int, stride: int) -> None:
    counted = [token for _, first, end in evaluate.windows(length, context, stride) for token in range(first, end)]
    assert counted == list(range(1, length))
    for start, first, end in evaluate.windows(length, context, stride):
        assert end - start <= context
        assert first - start >= min(first, context - stride)


@pytest.mark.parametrize(("context", "stride"), [(24, 7), (24, 23), (40, None)])
def test_a_text_longer_than_the_context_is_read_through_windows(parts: Any, context: int, stride: int | None) -> None:
    """Each token by brute force: transformers is shown exactly the window that is to count it."""
    model, chat, reference, _ = parts
    rng = random.Random(0)
    texts = ["".join(rng.choice("abcdefgh ") for _ in range(size)) for size in (130, 10, 77)]
    samples = chat.encode_now([chat.text_sample(text, n) for n, text in enumerate(texts)])
    found = evaluate.likelihoods(model, chat, samples, 3, context, stride)
    step = stride or context // 2
    for number, sample in enumerate(samples):
        nats = 0.0
        for token in range(1, len(sample.ids)):
            start = 0
            while start + context <= token:
                start += step
            nats += every_nll(reference, sample.ids[start : start + context])[token - start - 1]
        assert found.nats[number] == pytest.approx([nats, 0.0], rel=1e-5)
        assert found.tokens[number].tolist() == [len(sample.ids) - 1, 0]
    assert found.figures().keys() == {"loss", "overall_loss", "bits_per_byte"}  # a text has no prompt


def test_base_and_tuned_are_one_model_and_the_same_tokens(parts: Any) -> None:
    _, chat, _, directory = parts
    model = load_model(directory, CPU, torch.float32)
    adapters = inject_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=0)
    samples, prompts = encoded(chat), evaluate.held_out_prompts(unequal(), 2)
    fresh = evaluate.measure(model, chat, samples, prompts, FEW, 512, general=samples[:3])
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(std=0.3)
    tuned = evaluate.measure(model, chat, samples, prompts, FEW, 512, general=samples[:3])
    with disabled(adapters):
        base = evaluate.measure(model, chat, samples, prompts, FEW, 512, general=samples[:3])
    assert base.to_dict() == fresh.to_dict()
    for name in ("loss", "prompt_loss", "overall_loss", "general_loss", "bits_per_byte"):
        assert np.array_equal(base.figures[name].parts[:, 1], tuned.figures[name].parts[:, 1])
        assert base.figures[name].value != tuned.figures[name].value


def test_sampled_answers_follow_the_seed(parts: Any) -> None:
    model, chat, _, _ = parts
    prompts = evaluate.held_out_prompts(unequal(), 5)

    def said(temperature: float, seed: int) -> list[str]:
        return [e.answer for e in evaluate.answer_all(model, chat, prompts, 2, 6, Sampling(temperature), seed)]

    assert said(1.5, 1) == said(1.5, 1) != said(1.5, 2)
    assert said(0.0, 1) == said(0.0, 2)


def test_a_result_holds_what_was_measured_and_nothing_else() -> None:
    completions = [completion("x", "x"), completion("x", "y"), completion("y", "y", False), completion("z", "z")]
    assert EvalResult().to_dict() == {}
    assert EvalResult().perplexity is None
    loss = Figure(np.array([[5 * math.log(7), 5], [7 * math.log(7), 7]]), unit="nats")
    assert EvalResult({"loss": loss}).to_dict() == {
        "perplexity": pytest.approx(7),
        "loss": pytest.approx(math.log(7)),
        "target_tokens": 12,
    }
    measured = EvalResult(evaluate.answer_figures(completions, []), completions)
    assert measured.to_dict() == {"exact_match": 0.75, "stop_rate": 0.75, "response_tokens": 3.0, "prompts": 4}


# ---- Quantization


def test_base_and_adapter_are_evaluated_on_both_weights(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    run = train_run(tmp_path / "run", tmp_path / "base", write_records(tmp_path / "data.jsonl"))
    loaded = open_model(str(run), CPU, torch.float32)
    ids, original = torch.arange(5, 40)[None], {}
    for name, adapter in loaded.adapters.items():
        original[name] = adapter.base.weight.detach().clone()  # type: ignore[union-attr]
        with torch.no_grad():
            adapter.lora_B.add_(0.1)
    logits: list[torch.Tensor] = []

    def perplexity() -> float:
        with torch.no_grad():
            logits.append(loaded.model.logits(loaded.model(ids)))
        return float(len(logits))

    figures, text = compare_quantization(str(run), loaded, perplexity)
    assert figures == {"quantization": {"original": {"base": 1.0, "tuned": 2.0}, "nf4": {"base": 3.0, "tuned": 4.0}}}
    assert text.endswith("trained on the original weights")
    pairs = [(i, j) for i in range(4) for j in range(i)]
    assert all(not torch.equal(logits[i], logits[j]) for i, j in pairs)  # four different models
    for name, adapter in loaded.adapters.items():
        assert isinstance(adapter.base, PackedLinear)
        expected = quantize(original[name], ("nf4", True), torch.float32).dequantize()
        assert torch.equal(adapter.base.dequantize(), expected)


def test_a_model_without_an_adapter_has_nothing_to_compare(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    loaded = open_model(str(tmp_path / "base"), CPU, torch.float32)
    with pytest.raises(UserError, match=r"--quantization: .* has no adapter"):
        compare_quantization(str(tmp_path / "base"), loaded, lambda: 1.0)
