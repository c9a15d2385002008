"""Distillation against torch's divergences, autograd on all logits, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train
from nanoft import UserError
from nanoft.batches import Batches, Sample, TokenDataset
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.lora import inject_lora
from nanoft.models.adapter_files import adapter_tensors, load_adapter_tensors, save_adapter
from nanoft.models.open import read_trained_adapter
from nanoft.models.weights import load_model
from nanoft.objectives.distill import Distill, OtherAdapter, Teacher, divergence
from nanoft.objectives.rollouts import Prompts
from tiny_models import make_chat_model, train_run, write_records

CPU, VOCAB = torch.device("cpu"), 40


def by_torch(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Of each row, by torch's own KL divergence (target first in the formula, second in the call)."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        log_p, log_q = (t, s) if beta == 0 else (s, t)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    parts = [F.kl_div(m, log_p, reduction="none", log_target=True).sum(-1) for log_p in (t, s)]
    return beta * parts[0] + (1 - beta) * parts[1]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_divergence_is_torchs(beta: float) -> None:
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(7, VOCAB, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(divergence(student, teacher, beta), by_torch(student, teacher, beta))
    assert (divergence(student, teacher, beta) > 0).all()
    torch.testing.assert_close(divergence(student, student, beta), torch.zeros(7, dtype=torch.float64))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("models") / "base"
    make_chat_model(directory)
    return directory


def another_adapter(base: Path, out: Path) -> Path:
    """A teacher: an adapter with an effect, of another rank, on other linears than the student's."""
    config = Config().override(lora={"rank": 3, "target_modules": ("q_proj", "down_proj")})
    model = load_model(base, CPU, torch.float32)
    adapters = inject_lora(model, config.lora, 3)
    shake(adapters, 5)
    save_adapter(out, model, adapters, config.lora, str(base), {})
    return out


@torch.no_grad()
def shake(adapters: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for tensor in adapter_tensors(adapters).values():
        tensor.copy_(torch.randn_like(tensor) * 0.3)


def student_of(base: Path, config: Config) -> tuple[Any, Any]:
    model = load_model(base, CPU, torch.float32)
    adapters = inject_lora(model, config.lora, 0)
    shake(adapters, 6)
    return model, adapters


def logits_of(directory: Path, adapter: Path | None, ids: Tensor) -> Tensor:
    """Of a model with an adapter of its own, (seq, vocab)."""
    model = load_model(directory, CPU, torch.float32)
    if adapter is not None:
        opened = read_trained_adapter(str(adapter))
        load_adapter_tensors(inject_lora(model, opened.lora, 0), opened.tensors, str(adapter))
    with torch.no_grad():
        return model.logits(model(ids[None]))[0]


def random_samples(count: int = 6) -> TokenDataset:
    chance = np.random.default_rng(4)
    made = []
    for n in range(count):
        ids = chance.integers(3, 200, 6 + 3 * n).astype(np.int32)
        made.append(Sample(ids, np.arange(len(ids)) >= 3 + n, n))
    return TokenDataset.of(made)


@pytest.mark.parametrize("shared", [True, False], ids=["the same base", "two models"])
@pytest.mark.parametrize(("beta", "top_k", "temperature"), [(1.0, 0, 1.0), (0.0, 0, 2.0), (0.4, 7, 0.8)])
def test_a_step_has_the_gradient_of_all_logits_however_it_is_split(
    shared: bool, beta: float, top_k: int, temperature: float, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("nanoft.objectives.distill.compared_rows", lambda *_: 4)  # several chunks in a batch
    teacher = another_adapter(base, tmp_path / "teacher") if shared else tmp_path / "larger"
    if not shared:
        make_chat_model(teacher, "qwen3", seed=9, num_hidden_layers=3)
    d = {"teacher": str(teacher), "teacher_bits": 16, "beta": beta, "top_k": top_k, "temperature": temperature}
    config = Config().override(distill={**d, "on_policy": False}, lora={"rank": 4}, model={"name": str(base)})
    model, adapters = student_of(base, config)
    objective, samples = distill(config, adapters, base), random_samples()
    objective.begin(model)
    assert isinstance(objective.teacher, OtherAdapter if shared else Teacher)

    total, targets = torch.zeros(()), 0
    for sample in samples:
        ids, places = torch.from_numpy(sample.ids.astype(np.int64)), np.flatnonzero(sample.is_target) - 1
        s = model.logits(model(ids[None]))[0][places] / temperature
        t = logits_of(*((base, teacher) if shared else (teacher, None)), ids)[places] / temperature
        if top_k:
            t, likeliest = t.topk(top_k)
            s = s.gather(-1, likeliest)
        total, targets = total + by_torch(s, t, beta).sum(), targets + len(places)
    (total / targets).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for rows, packed in ((1, None), (2, None), (6, None), (2, 64)):
        model.zero_grad()
        window = Batches(samples, rows, 6, 0, 0, packed, shuffle=False).next_window(0, 0)
        loss = sum(objective.loss(model, batch) / objective.count(window) for batch in window)
        loss.backward()
        torch.testing.assert_close(loss, total.detach() / targets, rtol=1e-5, atol=1e-6)
        for name, p in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-6)


def distill(config: Config, adapters: Any, base: Path) -> Distill:
    """The objective without data."""
    none = TokenDataset.of([])
    corpus: Any = SimpleNamespace(training=none, validation=none, conversations=lambda *_: [])
    return Distill(config, adapters, Prompts(config, corpus, ChatTokenizer(base)))


def test_another_adapter_takes_the_place_of_the_students_only_while_it_teaches(base: Path, tmp_path: Path) -> None:
    teacher = another_adapter(base, tmp_path / "teacher")
    config = Config().override(distill={"teacher": str(teacher)}, model={"name": str(base)})
    model, adapters = student_of(base, config)
    objective, ids = distill(config, adapters, base), torch.arange(3, 20)
    before, modules = model(ids[None]), dict(model.named_modules())
    objective.begin(model)
    with objective.teacher.as_model() as taught, torch.no_grad():
        found = taught.logits(taught(ids[None]))[0]
    torch.testing.assert_close(found, logits_of(base, teacher, ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids[None]), before)
    assert dict(model.named_modules()) == modules
    assert all(adapter.lora_A.requires_grad for adapter in adapters.values())


@pytest.mark.parametrize("on_policy", [True, False])
def test_a_student_comes_nearer_to_its_teacher(on_policy: bool, base: Path, tmp_path: Path) -> None:
    """Without being shown the answers of the data, on-policy."""
    records = write_records(tmp_path / "data.jsonl")
    changes = {"training__objective": "distill", "distill__teacher": str(another_adapter(base, tmp_path / "teacher"))}
    changes |= {"distill__on_policy": on_policy, "distill__max_new_tokens": 8, "training__max_steps": 12}
    changes |= {"training__eval_steps": 6, "training__learning_rate": 1e-2, "evaluation__on_start": True}
    run = train_run(tmp_path / "run", base, records, **changes, data__validation_split=0.3)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "eval"]
    assert losses[-1] < 0.85 * losses[0]


def test_a_teacher_of_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 900, "content": "<|new|>"})
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = Config().override(distill={"teacher": str(tmp_path / "other")}, model={"name": str(base)})
    model, adapters = student_of(base, config)
    with pytest.raises(UserError, match=r"^distill.teacher: .*other: its vocabulary differs from .*base"):
        distill(config, adapters, base).begin(model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.objective=distill"], "distill.teacher: empty"),
        (["training.objective=distill", "distill.teacher=no/such/model/here"], "distill.teacher: no/such"),
        (["distill.beta=0.5"], "distill.beta: has no effect with training.objective=sft"),
        (["training.objective=distill", "distill.teacher=BASE", "distill.max_new_tokens=1024"], "distill.max_new"),
        (["training.objective=distill", "distill.teacher=BASE", "rl.beta=1"], "rl.beta: has no effect"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, base: Path, capsys: Any, tmp_path: Path) -> None:
    words = [word.replace("BASE", str(base)) for word in words]
    assert train.main(["configs/tiny.py", f"output.dir={tmp_path / 'run'}", *words]) == 2
    assert f"error: {message}" in capsys.readouterr().err
