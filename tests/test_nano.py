"""nanoft/nano.py against the large program: the same samples, gradient, schedule and perplexity of the demo."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from nanoft import nano
from nanoft.batches import Batches, eval_batches
from nanoft.config.loading import load_config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import build_datasets
from nanoft.lora import inject_lora
from nanoft.models.weights import load_model
from nanoft.objectives.sft import SFT
from nanoft.optim import learning_rate
from nanoft.perplexity import validation_loss

ROOT = Path(__file__).parent.parent
CONFIG = load_config(ROOT / "configs" / "tiny.py")
BASE = nano.DEMO / "base"
TOKENIZER = Tokenizer.from_file(str(BASE / "tokenizer.json"))


def test_it_is_one_page_that_stands_alone() -> None:
    source = (ROOT / "nanoft" / "nano.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 200
    assert not re.search(r"^ *(import|from) nanoft", source, re.MULTILINE)
    others = [path for path in (ROOT / "nanoft").rglob("*.py") if path.name != "nano.py"]
    assert not [path for path in others if re.search(r"nanoft(\.| import )nano\b", path.read_text(encoding="utf-8"))]


def conversations() -> list[nano.Chat]:
    lines = (nano.DEMO / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line)["messages"] for line in lines), key=nano.prompt_hash)


@pytest.fixture(scope="module")
def corpus() -> Any:
    chat = ChatTokenizer(BASE)
    return build_datasets(CONFIG.data, chat, CONFIG.model.max_seq_length, CONFIG.system.seed, print)


@pytest.fixture
def page() -> nano.Model:
    """With adapters that change something: B = 0 would hide an error in the gradient of A."""
    torch.manual_seed(0)
    model = nano.Model(BASE)
    nano.add_adapters(model)
    for _, b in model.adapters.values():
        torch.nn.init.normal_(b, std=0.02)
    return model


def as_lists(samples: Iterable[tuple[Any, Any]]) -> list[tuple[list[int], list[bool]]]:
    return sorted((ids.tolist(), is_target.tolist()) for ids, is_target in samples)


def test_samples_and_split_are_those_of_the_large_program(corpus: Any) -> None:
    chats = conversations()
    for part, samples in ((chats[:240], corpus.validation), (chats[240:], corpus.training)):
        encoded = (nano.encode(chat, TOKENIZER) for chat in part)
        assert as_lists(encoded) == as_lists((sample.ids, sample.is_target) for sample in samples)


def test_loss_and_gradient_of_the_first_step_are_those_of_the_large_program(corpus: Any, page: nano.Model) -> None:
    model = load_model(BASE, torch.device("cpu"), torch.float32)
    adapters: dict[str, Any] = inject_lora(model, CONFIG.lora, seed=0)
    assert adapters.keys() == page.adapters.keys()
    for name, (a, b) in page.adapters.items():
        adapters[name].lora_A.data, adapters[name].lora_B.data = a.detach().clone(), b.detach().clone()

    c, sft = CONFIG.training, SFT(CONFIG)
    batches = Batches(corpus.training, c.micro_batch_size, c.gradient_accumulation_steps, CONFIG.system.seed, pad_id=3)
    window = batches.next_window(0, 0)
    loss = sum(sft.loss(model, batch) for batch in window) / sft.count(window)
    loss.backward()
    samples = [(torch.tensor(s.ids).long(), torch.tensor(s.is_target)) for batch in window for s in batch.samples]
    assert nano.accumulate(page, samples) == pytest.approx(loss.item(), rel=1e-5)
    for name, factors in page.adapters.items():
        for factor, same in zip(factors, (adapters[name].lora_A, adapters[name].lora_B), strict=True):
            error = (factor.grad - same.grad).norm() / same.grad.norm()
            assert error < 1e-5, name


def test_the_settings_and_the_schedule_are_those_of_the_demo() -> None:
    c = CONFIG.training
    assert (CONFIG.lora.rank, CONFIG.lora.alpha, c.num_epochs) == (nano.RANK, nano.ALPHA, nano.EPOCHS)
    assert (c.micro_batch_size * c.gradient_accumulation_steps, c.micro_batch_size) == (nano.WINDOW, nano.MICRO_BATCH)
    assert c.max_grad_norm == nano.MAX_NORM
    assert [nano.learning_rate(step, 204) for step in range(204)] == pytest.approx(
        [learning_rate(step, 204, c) for step in range(204)]
    )


def test_a_new_adapter_changes_nothing_and_merging_keeps_the_answers(page: nano.Model) -> None:
    ids, base = torch.tensor([[1, 5, 9, 40]]), nano.Model(BASE)
    adapted = page(ids)
    assert not torch.allclose(adapted, base(ids), atol=1e-2)
    nano.merge(page)
    torch.testing.assert_close(page(ids), adapted, rtol=1e-4, atol=1e-4)
    before = base(ids)
    nano.add_adapters(base)
    assert torch.equal(base(ids), before)


@pytest.mark.slow
def test_it_reaches_the_perplexity_of_the_demo_and_leaves_a_model(corpus: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "nanoft" / "nano.py")]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    base, tuned = map(float, re.findall(r"^perplexity ([\d.]+);", said, re.MULTILINE))
    assert base == pytest.approx(482.6, abs=0.1)  # as train.py says
    assert math.log(tuned) < 0.008  # train.py: 0.0044
    for chat in conversations()[:3]:
        assert f"  {chat[-2]['content']} -> {chat[-1]['content']}\n" in said
    merged = load_model(tmp_path / "runs" / "nano", torch.device("cpu"), torch.float32)
    nats, _ = validation_loss(merged, eval_batches(corpus.validation, 32, pad_id=3))
    assert nats < 0.008
