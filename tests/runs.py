"""Small runs of train.py for tests, access to the files they write, and faults injected into the loop."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merge
import train
from nanoft import TrainingFailed
from nanoft.tracking.run import Run
from nanoft.training import self_test

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny.py"
BASE = ROOT / "configs" / "tiny" / "base"
CONVERSATIONS = ROOT / "configs" / "tiny" / "conversations.jsonl"
QUICK = {
    "data.max_samples": "40",
    "training.micro_batch_size": "4",
    "training.gradient_accumulation_steps": "2",
    "training.eval_steps": "4",
    "training.save_steps": "3",
    "training.log_steps": "1",
    "training.max_steps": "8",
    "evaluation.prompts": "2",
    "evaluation.max_new_tokens": "4",
    "logging.progress_bar": "false",
    "logging.plots": "none",  # they take seconds
}
VARIANTS = {
    "lora-dropout": {"lora__dropout": 0.1},
    "dora": {"lora__dora": True, "lora__rslora": True, "lora__freeze_a": True, "lora__alpha": 4.0},
    "pissa": {"lora__init": "pissa", "lora__rank_pattern": "{q_proj: 4}", "lora__alpha": 16.0},
    "qlora": {"quantization__bits": 4, "training__checkpointing": "full"},
    "int8": {"quantization__bits": 8, "training__neftune_alpha": 5, "training__z_loss": 1e-4},
    "packed": {"data__packing": True, "model__max_seq_length": 200, "training__micro_batch_size": 1},
    "full": {"training__method": "full", "training__learning_rate": 1e-4},
    "full-8bit": {"training__method": "full", "training__learning_rate": 1e-4, "training__optimizer": "adamw_8bit"},
    "sgd": {
        "training__optimizer": "sgd",
        "training__learning_rate": 0.5,
        "training__lora_plus_ratio": 4,
        "training__lr_scheduler": "polynomial",
        "training__lr_power": 2,
    },
    "qlora-fp16": {"quantization__bits": 4, "model__dtype": "float16", "lora__dropout": 0.1},
    "in-order": {"training__shuffle": False, "training__eval_steps": 0.25, "training__save_steps": "epoch"},
    "packed-in-order": {"training__shuffle": False, "data__packing": True, "model__max_seq_length": 200},
    "full-bf16": {"training__method": "full", "training__learning_rate": 1e-4, "model__dtype": "bfloat16"},
}
NO_EVALUATION = {"training__eval_steps": 0}  # so that a checkpoint of step 4, the best so far, is not saved
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def quick(directory: Path, **changes: Any) -> list[str]:
    """Arguments of a run of a few steps; `section__field=value` changes it."""
    named = {key.replace("__", "."): str(value) for key, value in changes.items()}
    settings = {**QUICK, "output.dir": str(directory), **named}
    return [str(TINY), *(f"{key}={value}" for key, value in settings.items())]


def losses(directory: Path, event: str = "train") -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["event"] == event]


def result(directory: Path) -> dict[str, torch.Tensor]:
    name = "adapter/adapter_model.safetensors" if (directory / "adapter").is_dir() else "model/model.safetensors"
    return load_file(directory / name)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Send this process a signal as soon as the step has been logged."""
    log = Run.log

    def signalling(self: Run, event: str, at: int, **values: Any) -> None:
        log(self, event, at, **values)
        if event == "train" and at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "log", signalling)


def sentences(directory: Path) -> str:
    """Validation data that the base is better at than the tuned model: the more tool calls, the less prose."""
    texts = [f"{who} likes soup and {who} likes tea." for who in ("Ada", "Ben", "Eva", "Leo")]
    said = "".join(record(prompt="How is the weather?", completion=text) for text in texts)
    return write(directory / "sentences.jsonl", said)


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert text.endswith("\n"), text
    assert "Traceback" not in text
    return text.rstrip()


def record(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def copy_base(tmp_path: Path, change: Callable[[Path], None]) -> str:
    shutil.copytree(BASE, tmp_path / "base")
    change(tmp_path / "base")
    return str(tmp_path / "base")


def refused(arguments: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments) == 2
    error = one_line(capsys.readouterr().err)
    assert error.startswith("error: ")
    for fragment in fragments:
        assert fragment in error


def gradients(
    directory: Path, micro_batch_size: int, accumulation: int, dtype: torch.dtype, **changes: Any
) -> dict[str, torch.Tensor]:
    """The gradients that the real loop passes to the optimizer at its first step."""
    sizes = {"training__micro_batch_size": micro_batch_size, "training__gradient_accumulation_steps": accumulation}
    taken: dict[str, torch.Tensor] = {}

    def take(ctx: train.TrainContext, _: str) -> Any:
        ctx.model.to(dtype)
        self_test.perturb_adapters(ctx.adapters)  # at its start, A has no gradient
        ctx.run.open_metrics(0, [0, 0], [])
        taken.update(self_test.gradient(ctx, train.train, ctx.batches))
        assert {name: len(part) for name, part in taken.items()} == {name: p.numel() for name, p in ctx.trained}
        raise TrainingFailed("that is all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "restore", take)
        assert train.main(quick(directory, **{**sizes, **changes})) == 3
    return taken


# --- faults in the loop


def in_the_loop(patch: Patch, name: str, around: Callable[..., Any], module: Any = train) -> None:
    """While the loop runs, and not before, `module.<name>(...)` becomes around(call number, the real one, ...)."""
    loop, real = train.train, getattr(module, name)
    calls = [0]

    def replaced(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return around(calls[0], real, *args, **options)

    def looping(*args: Any) -> Any:
        setattr(module, name, replaced)
        try:
            return loop(*args)
        finally:
            setattr(module, name, real)

    patch.setattr(train, "train", looping)


def no_memory(*_: Any, **__: Any) -> Any:
    """The error that torch itself raises."""
    return torch.empty(2**60, dtype=torch.uint8)


def nan_in(*numbers: int) -> Callable[..., Any]:
    """The loss of these windows is NaN."""

    def around(number: int, real: Any, *args: Any) -> Any:
        loss, norm = real(*args)
        return (float("nan"), norm) if number in numbers else (loss, norm)

    return around


# --- metrics


def events(directory: Path, event: str = "warning") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def steps_are_all_there(directory: Path, last: int) -> None:
    assert [step for step, _ in losses(directory)] == list(range(1, last + 1))


def write_events(directory: Path, events: list[dict[str, Any]], tail: bytes = b"") -> Path:
    directory.mkdir(exist_ok=True)
    text = "".join(json.dumps(event) + "\n" for event in events)
    (directory / "metrics.jsonl").write_bytes(text.encode() + tail)
    return directory


def training(steps: int) -> list[dict[str, Any]]:
    """A run that logs every second step and evaluates every tenth."""
    events: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        values = {
            "loss": 5 / step,
            "learning_rate": step * 1e-5,
            "grad_norm": step % 3 + 0.5,
            "tokens_per_second": 90.0,
        }
        events.append({"event": "train", "step": step, **values, "peak_memory_gb": 1.5, "time": 100.0 + step})
        if step % 10 == 0:
            events.append({"event": "eval", "step": step, "loss": 6 / step, "perplexity": 2.0, "time": 100.5 + step})
    return events


def run_merge(*arguments: Any) -> int:
    return merge.main([str(argument) for argument in arguments])
