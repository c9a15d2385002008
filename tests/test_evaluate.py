"""What is measured, against transformers and against cases whose answer is known beforehand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel

from models import make_chat_model
from nanoft import evaluate
from nanoft.chat import ChatTokenizer, Sample
from nanoft.config import LoRAConfig
from nanoft.evaluate import Exchange, Measured, Prompt
from nanoft.lora import disabled, inject_lora
from nanoft.model import Decoder
from nanoft.records import Conversation
from nanoft.weights import load_model

CPU = torch.device("cpu")
LENGTHS = [1, 40, 3, 3, 90, 7, 25]  # words of the answers: a mean of batch means would show


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, ChatTokenizer, PreTrainedModel, Path]:
    directory = tmp_path_factory.mktemp("evaluate") / "model"
    reference = make_chat_model(directory)
    return load_model(directory, CPU, torch.float32), ChatTokenizer.from_directory(directory), reference, directory


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
    loss, tokens = evaluate.validation_loss(model, samples, batch_size, chat.pad_id)
    assert tokens == len(nats)
    assert abs(loss - sum(nats) / len(nats)) < 1e-5
    means = [sum(part) / len(part) for part in (nats_of_transformers(reference, sample) for sample in samples)]
    assert abs(loss - sum(means) / len(means)) > 0.01  # the mean of means is something else


def test_measuring_leaves_the_model_as_it_was(parts: Any) -> None:
    model, chat, _, _ = parts
    samples = encoded(chat)
    prompts = evaluate.held_out_prompts(unequal(), 2)
    for training in (True, False):
        model.train(training)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        evaluate.measure(model, chat, samples, prompts, 2, 2, 3)
        assert model.training is training
        assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_measuring(parts: Any) -> None:
    _, chat, _, directory = parts
    model = load_model(directory, CPU, torch.float32)
    adapters = inject_lora(model, LoRAConfig(rank=4, alpha=8.0, dropout=0.5, target_modules=("q_proj",)), seed=0)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(std=0.5)
    samples = encoded(chat)
    model.train()
    first, second = (evaluate.validation_loss(model, samples, 4, chat.pad_id) for _ in range(2))
    assert first == second
    with disabled(adapters):
        assert evaluate.validation_loss(model, samples, 4, chat.pad_id) != first


def test_held_out_prompts_are_all_but_the_last_answer() -> None:
    text = Conversation([], "plain text", "made.jsonl", 3)
    chats = [text, conversation("a", "b"), conversation("c", "d", "e", "f"), conversation("g", "h")]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chats.insert(1, Conversation([{"role": "user", "content": "a"}, call], None, "made.jsonl", 4))
    assert evaluate.held_out_prompts(chats, 2) == [
        Prompt([{"role": "user", "content": "a"}], "b"),
        Prompt([{"role": r, "content": t} for r, t in (("user", "c"), ("assistant", "d"), ("user", "e"))], "f"),
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
    exchanges = evaluate.answer_all(model, chat, prompts, batch_size, 6)
    assert [e.reference for e in exchanges] == [prompt.reference for prompt in prompts]
    assert [e.prompt for e in exchanges] == [prompt.messages[-1]["content"] for prompt in prompts]
    expected = [answer_of_transformers(reference, directory, prompt.messages, 6) for prompt in prompts]
    assert [(e.answer, e.stopped) for e in exchanges] == expected
    assert len({e.answer for e in exchanges}) > 1


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
        measured = Measured(exchanges=evaluate.answer_all(model, chat, prompts, 2, 4))
        assert measured.to_dict()["stop_rate"] == expected
        assert all((e.answer == "") == (sign > 0) for e in measured.exchanges)


def exchange(answer: str, reference: str, stopped: bool = True) -> Exchange:
    return Exchange("prompt", reference, answer, stopped)


def test_exact_match_ignores_outer_space_only() -> None:
    same = [("a b", "a b"), (" a b\n", "a b"), ("a b", "\ta b ")]
    other = [("a  b", "a b"), ("A b", "a b"), ("a b.", "a b"), ("", "a b"), ("a b a b", "a b")]
    assert all(exchange(*pair).exact for pair in same)
    assert not any(exchange(*pair).exact for pair in other)


def test_a_result_holds_what_was_measured_and_nothing_else() -> None:
    exchanges = [exchange("x", "x"), exchange("x", "y"), exchange("y", "y", False), exchange("z", "z")]
    assert Measured().to_dict() == {}
    assert Measured(math.log(7), 12).to_dict() == {
        "perplexity": pytest.approx(7),
        "loss": math.log(7),
        "target_tokens": 12,
    }
    assert Measured(exchanges=exchanges).to_dict() == {"exact_match": 0.75, "stop_rate": 0.75, "prompts": 4}
    both = evaluate.results(Measured(1.0, 5), Measured(0.5, 5))
    assert both.keys() == {"base", "tuned"}
    assert both["tuned"]["loss"] == 0.5
    assert evaluate.results(None, Measured(0.5, 5)).keys() == {"tuned"}


def test_perplexity_of_a_hopeless_model_is_infinite_not_an_error() -> None:
    assert Measured(loss=1e6).perplexity == math.inf
    assert Measured(loss=10.0).perplexity == pytest.approx(math.exp(10))
    assert Measured().perplexity is None


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table without its rule."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


def test_the_table_shows_base_beside_tuned_and_a_dash_for_what_is_missing() -> None:
    tuned = Measured(math.log(2), 9, [exchange("x", "x"), exchange("x", "y", False)])
    assert cells(evaluate.comparison(Measured(math.log(12.34567), 9), tuned)) == [
        ["", "base", "tuned"],
        ["perplexity", "12.35", "2"],
        ["exact match", "-", "50.0%"],
        ["stop rate", "-", "50.0%"],
    ]
    assert "nothing was measured" in evaluate.comparison(None, Measured())
    assert cells(evaluate.comparison(None, Measured(math.log(3), 9))) == [
        ["", "base", "tuned"],
        ["perplexity", "-", "3"],
    ]


def test_samples_show_both_answers_on_one_line_each() -> None:
    tuned = Measured(exchanges=[exchange("new\nanswer", "wanted"), exchange("long " * 100, "b")])
    base = Measured(exchanges=[exchange("old", "wanted"), exchange("older", "b")])
    both = evaluate.side_by_side(base, tuned, 1)
    assert [line.split(": ", 1) for line in both.splitlines()] == [
        [" prompt", "prompt"],
        [" wanted", "wanted"],
        ["   base", "old"],
        ["  tuned", "new answer"],
    ]
    alone = evaluate.side_by_side(None, tuned, 2)
    assert "base" not in alone
    assert max(len(line) for line in alone.splitlines()) <= 220
    assert evaluate.side_by_side(base, tuned, 0) == ""


def test_a_report_holds_figures_table_and_samples() -> None:
    tuned = Measured(math.log(2), 9, [exchange("x", "x")])
    training = {"steps": 1200, "seconds": 3.5, "tokens_per_second": 12345.6, "peak_memory_gb": 0.5}
    values, terminal, markdown = evaluate.report("name", Measured(math.log(4), 9), tuned, training, 1)
    assert values["training"] == training
    assert values["base"]["perplexity"] == pytest.approx(4)
    assert values["tuned"]["exact_match"] == 1.0
    assert "perplexity" in terminal
    assert "wanted: x" in terminal
    assert markdown.startswith("# name\n")
    for part in ("| steps ", "1,200", "12,345.6", "perplexity", "wanted: x"):
        assert part in markdown
