"""model.dtype=float16: close to float32 while gradients fit into it, and what happens when they overflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import Capture, Patch, equal, events, in_the_loop, losses, nan_in, no_memory, result
from safetensors.torch import load_file, save_file

import eval as eval_command
import merge
import train
from nanoft.__main__ import main as nanoft
from nanoft.kernels import sharding
from nanoft.runtime import device
from nanoft.tracking.run import Run
from nanoft.training import self_test
from tiny_models import make_chat_model, write_records

FLOAT16: dict[str, Any] = {"model__dtype": "float16"}
SHORT: dict[str, Any] = {"training__eval_steps": 0, "evaluation__prompts": 0}
FULL: dict[str, Any] = {"training__method": "full", "training__learning_rate": 1e-4}
PLAIN: dict[str, Any] = {"system__kernels": "plain", "lora__dora": True, "data__packing": True}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"quantization__bits": 4},
    "int8": {"quantization__bits": 8, "training__checkpointing": "full"},
    "full": FULL,
    "plain, DoRA, packed": {**PLAIN, "model__max_seq_length": 200, "training__micro_batch_size": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model so small that float16 is not slow on a CPU, and 40 records: five windows an epoch."""
    root = tmp_path_factory.mktemp("float16")
    make_chat_model(root / "base", dtype=torch.float16)  # which both dtypes hold
    write_records(root / "data.jsonl", 40)
    return root / "base"


def quick(base: Path, directory: Path, **changes: Any) -> list[str]:
    """Arguments of a short run of that model."""
    named = {"model__name": base, "data__train_file": base.parent / "data.jsonl", "training__learning_rate": 0.01}
    return runs.quick(directory, **{**named, **changes})


def start_at(patch: Patch, scale: float, growth_interval: int = 2000) -> None:
    """Begin with this loss scale, and double it after so many windows without an overflow."""

    def build(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
        enabled = dtype == torch.float16
        return torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=growth_interval, enabled=enabled)

    patch.setattr(train, "build_scaler", build)
    patch.setattr(self_test, "build_scaler", build)


def state(directory: Path, step: int = 8) -> dict[str, Any]:
    return json.loads((directory / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())


def overflows(directory: Path) -> list[list[int]]:
    """The windows whose gradient overflowed."""
    return [line["window"] for line in events(directory) if line["what"] == "overflow"]


# --- as float32


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_those_of_float32(case: str, base: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    start_at(monkeypatch, 1024.0)
    changes = {**CASES[case], **SHORT, "training__max_steps": 20, "training__keep_checkpoints": 99}
    changes["training__learning_rate"] = 0.005 if case != "full" else 0.05
    changes["training__optimizer"] = "sgd"  # AdamW makes steps of full size from the smallest differences
    for dtype in ("float32", "float16"):
        assert train.main(quick(base, tmp_path / dtype, **changes, model__dtype=dtype)) == 0
    rounded, exact = (dict(losses(tmp_path / dtype)) for dtype in ("float16", "float32"))
    assert max(abs(rounded[step] - exact[step]) for step in exact) < 1e-2
    assert exact[20] < 0.9 * exact[1]
    assert not overflows(tmp_path / "float16")
    norms = [[line["grad_norm"] for line in events(tmp_path / d, "train")] for d in ("float16", "float32")]
    assert norms[0] == pytest.approx(norms[1], rel=0.04), "of the unscaled gradient"
    file = "model.safetensors" if case == "full" else "adapter.safetensors"
    updates = []
    for dtype in ("float16", "float32"):
        start, end = (
            load_file(tmp_path / dtype / "checkpoints" / step / file) for step in ("step-000000", "step-000020")
        )
        assert {tensor.dtype for tensor in end.values()} == {torch.float32}
        updates.append(torch.cat([(end[name] - start[name]).flatten() for name in sorted(end)]))
    assert (updates[0] - updates[1]).norm() < 0.04 * updates[1].norm()  # 2^-11 a product, amplified by the steps


# --- overflows


def test_a_scale_too_large_costs_windows_and_nothing_else(
    base: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Until the scale fits, windows are passed over; then the run is the one that never saw them."""
    short = {**FLOAT16, **SHORT, "training__log_steps": 2, "data__validation_split": 0}
    with monkeypatch.context() as patch:
        start_at(patch, 2.0**20)
        assert train.main(quick(base, tmp_path / "run", **short)) == 0
    said = capsys.readouterr().out
    passed = len(overflows(tmp_path / "run"))
    assert passed >= 4
    assert overflows(tmp_path / "run") == [[0, at] for at in range(passed)][:5] + [[1, at] for at in range(passed - 5)]
    assert "after step 0: the gradient overflows float16 at loss scale 1.04858e+06, now 524288: window skipped" in said
    ended = state(tmp_path / "run")
    assert (ended["step"], ended["overflow_steps"], ended["scaler"]["scale"]) == (8, passed, 2.0 ** (20 - passed))
    assert (ended["guard"]["skips"], ended["guard"]["suspects"], ended["guard"]["rollbacks"]) == (0, [], 0)
    assert 5 * ended["epoch"] + ended["window"] == 8 + passed
    logged = {(line["overflow_steps"], line["loss_scale"]) for line in events(tmp_path / "run", "train")}
    assert logged == {(passed, 2.0 ** (20 - passed))}
    (done,) = events(tmp_path / "run", "done")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert done["overflow_steps"] == report["training"]["overflow_steps"] == passed

    start_at(monkeypatch, 64.0)
    in_the_loop(monkeypatch, "accumulate", nan_in(*range(1, passed + 1)))
    assert train.main(quick(base, tmp_path / "other", **short, guard__max_skips=99)) == 0
    assert dict(losses(tmp_path / "run")) == pytest.approx(dict(losses(tmp_path / "other")), abs=1e-2)

    capsys.readouterr()
    assert train.main([*quick(base, tmp_path / "run", **short), "--show-step", "1"]) == 0
    epoch, window = divmod(passed, 5)
    assert f"step 1: window {window + 1} of 5 in epoch {epoch + 1}" in capsys.readouterr().out


@pytest.mark.parametrize("after", [1, 3, 6], ids="after {} overflows".format)
@pytest.mark.parametrize(
    "case", [{}, {"quantization__bits": 4, "lora__dropout": 0.1}, FULL], ids=["lora", "qlora", "full"]
)
def test_resumed_between_overflows_it_is_the_same_run(
    case: dict[str, Any], after: int, base: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The scale grows after every other window, so overflows go on until the end."""
    start_at(monkeypatch, 2.0**22, growth_interval=2)
    changes = {**FLOAT16, **case}
    assert train.main(quick(base, tmp_path / "whole", **changes)) == 0
    assert len(overflows(tmp_path / "whole")) > 6
    log, seen = Run.log, [0]

    def interrupted(self: Run, event: str, step: int, **values: Any) -> None:
        log(self, event, step, **values)
        seen[0] += values.get("what") == "overflow"
        if values.get("what") == "overflow" and seen[0] == after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        assert train.main(quick(base, tmp_path / "halves", **changes)) == train.STOPPED_BY_SIGNAL
    assert train.main(quick(base, tmp_path / "halves", **changes)) == 0
    for event in ("train", "eval"):
        assert losses(tmp_path / "halves", event) == losses(tmp_path / "whole", event)
    assert overflows(tmp_path / "halves") == overflows(tmp_path / "whole")
    assert equal(result(tmp_path / "halves"), result(tmp_path / "whole"))
    ended = [state(tmp_path / name) for name in ("halves", "whole")]
    for key in ("overflow_steps", "scaler", "rng", "epoch", "window"):
        assert ended[0][key] == ended[1][key]


def test_a_gradient_that_no_scale_helps_is_for_the_guard(
    base: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Its backward pass always overflows: the scale falls to 1, then the windows count as bad, and the run ends."""
    start_at(monkeypatch, 8.0)

    def infinite(number: int, real: Any, parameters: Any, *rest: Any) -> float:
        parameters[0].grad.fill_(torch.inf)
        return float(real(parameters, *rest))

    monkeypatch.setattr(torch.amp.GradScaler, "_unscale_grads_", lambda *_: {torch.device("cpu"): torch.tensor(1.0)})
    in_the_loop(monkeypatch, "clip_grad_norm", infinite, sharding)
    assert train.main(quick(base, tmp_path / "run", **FLOAT16, guard__max_rollbacks=0, guard__max_skips=2)) == 3
    assert "2 consecutive windows failed after step 0" in capsys.readouterr().err
    assert overflows(tmp_path / "run") == [[0, 0], [0, 1], [0, 2]]


def test_out_of_memory_before_the_step_takes_the_window_again(base: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    start_at(monkeypatch, 64.0)
    changes = {**FLOAT16, **SHORT}
    assert train.main(quick(base, tmp_path / "whole", **changes)) == 0

    def short(number: int, real: Any, *args: Any) -> Any:
        return no_memory() if number == 3 else real(*args)

    in_the_loop(monkeypatch, "clip_grad_norm", short, sharding)
    assert train.main(quick(base, tmp_path / "run", **changes)) == 0
    assert dict(losses(tmp_path / "run")) == pytest.approx(dict(losses(tmp_path / "whole")), abs=1e-2)
    assert [line["what"] for line in events(tmp_path / "run")] == ["out of memory"]


def test_weights_beyond_float16_are_refused_before_the_first_step(base: Path, tmp_path: Path, capsys: Capture) -> None:
    def enlarge(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    large = Path(shutil.copytree(base, tmp_path / "large"))
    enlarge(large)
    assert train.main(quick(base, tmp_path / "run", **FLOAT16, model__name=large)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: model.dtype: weights or activations overflow float16 on the longest batch, (4, " in error
    assert error.endswith("): set model.dtype=bfloat16 or float32\n")
    assert train.main(quick(base, tmp_path / "wide", **SHORT, model__name=large, training__max_steps=1)) == 0


# --- beside training


def test_auto_says_that_it_takes_float16(base: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(device, "choose_dtype", lambda *_: torch.float16)
    assert train.main([*quick(base, tmp_path / "run", model__dtype="auto"), "--preflight"]) == 0
    said = capsys.readouterr().out
    assert "; computing in float16, with loss scaling: this GPU has no native bfloat16\n" in said


@pytest.mark.parametrize("bits", [16, 4])
def test_a_run_in_float16_is_evaluated_merged_and_answers(
    bits: int, base: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "run"
    assert train.main(quick(base, run, **FLOAT16, quantization__bits=bits, training__max_steps=4)) == 0
    tuned = json.loads((run / "report.json").read_text())["tuned"]
    assert eval_command.main([str(run), "--json", str(tmp_path / "eval.json")]) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["tuned"]["perplexity"] == tuned["perplexity"]
    assert eval_command.main([str(run), "--json", str(tmp_path / "wide.json"), "model.dtype=float32"]) == 0
    wide = json.loads((tmp_path / "wide.json").read_text())["tuned"]["perplexity"]
    assert tuned["perplexity"] == pytest.approx(wide, rel=1e-2)
    assert json.loads((run / "adapter" / "nanoft.json").read_text())["dtype"] == "float16"
    onto = ["--base", "nf4"] if bits == 4 else []
    assert merge.main([str(run), "--out", str(tmp_path / "merged"), "--dtype", "f16", *onto]) == 0
    assert nanoft(["chat", str(run), "--prompt", "Hello", "--max-new-tokens", "3"]) == 0
    assert "Traceback" not in capsys.readouterr().err
