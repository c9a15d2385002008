"""train.py as a whole: exact for every split of a window and after every interruption, and one line for a mistake."""

from __future__ import annotations

import itertools
import json
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    BASE,
    VARIANTS,
    command,
    copy_base,
    equal,
    gradients,
    losses,
    one_line,
    quick,
    record,
    refused,
    result,
    sentences,
    stop_after,
    write,
)
from safetensors.torch import load_file, save_file
from tiers import rest_is_slow

import train
from nanoft.config.loading import load_config
from nanoft.objectives import sft
from nanoft.training import recovery, self_test
from nanoft.training.state import optimizer_tensors

# --- exactness


@pytest.mark.quick
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_a_window_has_one_gradient_however_it_is_split(
    tmp_path: Path, packing: bool, dtype: torch.dtype, allowed: float
) -> None:
    changes = {"data__packing": packing, "model__max_seq_length": 160}
    whole = gradients(tmp_path / "8x1", 8, 1, dtype, **changes)
    for size, count in ((4, 2), (2, 4), (1, 8)):
        split = gradients(tmp_path / f"{size}x{count}", size, count, dtype, **changes)
        assert self_test.gradient_error(split, whole) <= allowed
        if dtype == torch.float64:  # float32 rounds single small tensors by a little more than all of them together
            assert max(self_test.relative_error(split[name], gradient) for name, gradient in whole.items()) <= allowed


@pytest.mark.parametrize("variant", rest_is_slow(VARIANTS, "lora-dropout", "qlora", "full", "packed"))
def test_resumed_equals_uninterrupted_bit_for_bit(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(quick(whole, **VARIANTS[variant])) == 0
    with monkeypatch.context() as patch:
        stop_after(5, patch, signal.SIGTERM)  # between two saves, in the second epoch
        assert train.main(quick(halves, **VARIANTS[variant])) == train.STOPPED_BY_SIGNAL
    assert not (halves / "report.json").exists()
    assert train.main(quick(halves, **VARIANTS[variant])) == 0
    assert losses(halves) == losses(whole)
    assert len(losses(whole)) == 8
    assert losses(halves, "eval") == losses(whole, "eval")
    assert equal(result(halves), result(whole))
    figures = [json.loads((run / "report.json").read_text()) for run in (whole, halves)]
    assert figures[0]["tuned"] == figures[1]["tuned"]


def test_killed_without_warning_it_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train.main(quick(whole)) == 0
    process = subprocess.Popen(command(quick(killed)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-000003").is_dir() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert train.main(quick(killed)) == 0
    assert losses(killed) == losses(whole)
    assert equal(result(killed), result(whole))


def test_an_interrupt_from_the_keyboard_saves_and_ends_with_75(tmp_path: Path) -> None:
    arguments = quick(tmp_path / "run", training__max_steps=1000, training__save_steps=0)
    process = subprocess.Popen(command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err == ""
    steps = losses(tmp_path / "run")[-1][0]
    assert f"stopped   by SIGINT after step {steps}" in out
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}" / "manifest.json").is_file()


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    def limit() -> None:  # no file may grow beyond what the adapter's takes, so the optimizer's cannot be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))

    directory = tmp_path / "run"
    assert train.main(quick(directory, training__max_steps=3, training__lr_scheduler="constant")) == 0
    arguments = quick(directory, training__lr_scheduler="constant")
    done = subprocess.run(command(arguments), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert "File too large" in one_line(done.stderr)
    assert re.search(r"warning: saving step 6 failed after step \d: OSError: \[Errno 27\] File too large", done.stdout)
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"step-000000", "step-000003"}
    assert train.main(arguments) == 0
    assert [step for step, _ in losses(directory)] == list(range(1, 9))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, directory = tmp_path / "whole", tmp_path / "run"
    assert train.main(quick(whole)) == 0
    assert train.main(quick(directory, training__max_steps=8)) == 0
    (directory / "report.json").unlink()
    damaged = directory / "checkpoints" / "step-000008" / "adapter.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 4
    damaged.write_bytes(content)
    capsys.readouterr()
    assert train.main(quick(directory)) == 0
    said = capsys.readouterr().out
    assert f"{damaged}: its content differs from what was saved: using an earlier checkpoint" in said
    assert "resuming  after step 6 of 8" in said
    assert equal(result(directory), result(whole))


def test_resume_takes_never_and_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    assert train.main(quick(directory)) == 0
    before = result(directory)
    assert train.main([*quick(directory), "--resume", "never"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    earlier = directory / "checkpoints" / "step-000006"
    assert train.main([*quick(directory), "--resume", str(earlier)]) == 0
    assert "resuming  after step 6 of 8" in capsys.readouterr().out
    assert equal(result(directory), before)
    assert train.main([*quick(directory), "--resume", str(directory / "checkpoints" / "nothing")]) == 2
    assert "nothing" in one_line(capsys.readouterr().err)
    assert train.main([*quick(tmp_path / "other"), "--resume", str(earlier)]) == 2
    assert "not a checkpoint of this run" in one_line(capsys.readouterr().err)


def test_going_back_leaves_the_other_branch_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, changed = tmp_path / "run", {"training__max_steps": 20}
    assert train.main(quick(directory)) == 0  # checkpoints of steps 4, 6 and 8
    earlier = directory / "checkpoints" / "step-000006"
    with monkeypatch.context() as patch:
        stop_after(8, patch, signal.SIGTERM)  # step 8 again, at another learning rate
        assert train.main([*quick(directory, **changed), "--resume", str(earlier)]) == train.STOPPED_BY_SIGNAL
    redone = load_file(directory / "checkpoints" / "step-000008" / "adapter.safetensors")
    assert not equal(redone, result(directory))
    with monkeypatch.context() as patch:
        stop_after(7, patch, signal.SIGTERM)
        assert train.main([*quick(directory, **changed), "--resume", str(earlier)]) == train.STOPPED_BY_SIGNAL
    assert max(path.name for path in (directory / "checkpoints").iterdir()) == "step-000007"


def test_a_finished_run_is_left_alone_and_more_steps_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    assert train.main(quick(directory, training__max_steps=4, training__lr_scheduler="constant")) == 0
    before = (directory / "report.json").read_bytes()
    capsys.readouterr()
    assert train.main(quick(directory, training__max_steps=4, training__lr_scheduler="constant")) == 0
    assert "complete" in capsys.readouterr().out
    assert (directory / "report.json").read_bytes() == before
    assert train.main(quick(directory, training__max_steps=6, training__lr_scheduler="constant")) == 0
    assert [step for step, _ in losses(directory)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_without_checkpoints_is_not_trained_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    assert train.main(quick(directory, training__max_steps=2)) == 0
    learned = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(directory / "checkpoints")
    capsys.readouterr()
    assert train.main(quick(directory, training__max_steps=2)) == 2
    assert "this run has ended and has no checkpoints" in capsys.readouterr().err
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == learned
    assert (directory / "report.json").is_file()


# --- what a run does on its way


def test_the_checkpoints_kept_are_the_last_and_the_best(tmp_path: Path) -> None:
    changes = {"training__save_steps": 1, "training__keep_checkpoints": 2, "training__eval_steps": 2}
    changes |= {"data__validation_file": sentences(tmp_path), "training__learning_rate": 5e-3}
    assert train.main(quick(tmp_path / "run", **changes)) == 0
    evaluations = losses(tmp_path / "run", "eval")
    best = min(evaluations, key=lambda pair: pair[1])
    assert best[0] < 7, evaluations
    noted = json.loads((tmp_path / "run" / "best.json").read_text())
    assert (noted["step"], noted["validation_loss"]) == best
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {7, 8, best[0]}
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{best[0]:06d}" / "adapter.safetensors")
    assert equal(result(tmp_path / "run"), saved), "the result is the best checkpoint's"
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert figures["tuned"]["loss"] == pytest.approx(best[1], rel=1e-6)


def test_it_stops_early_when_the_validation_loss_no_longer_falls(tmp_path: Path) -> None:
    changes = {"training__early_stopping_patience": 2, "training__early_stopping_threshold": 5.0}
    assert train.main(quick(tmp_path / "run", **changes, training__eval_steps=1, training__max_steps=50)) == 0
    values = [loss for _, loss in losses(tmp_path / "run", "eval")]
    gains = [value < min(values[:i], default=float("inf")) - 5.0 for i, value in enumerate(values)]
    assert gains[0]
    assert gains[-2:] == [False, False], "patience ran out"
    assert not any(pair == (False, False) for pair in itertools.pairwise(gains[:-1])), "and not before"
    assert len(values) < 20
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"]["steps"] == len(values)


def test_early_stopping_without_effect_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patience = {"training__early_stopping_patience": 2}
    asked = quick(tmp_path / "run", **patience, data__validation_split=0, training__eval_steps=1)
    refused(asked, ["training.early_stopping_patience: 2: there is no validation data", "data.validation_size"], capsys)
    refused(
        quick(tmp_path / "run", **patience, training__eval_steps=0), ["no effect with training.eval_steps=0"], capsys
    )


def test_a_window_with_nan_changes_nothing_and_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = sft.token_nll, []
    snapshots: list[dict[str, torch.Tensor]] = []
    warn = recovery.warn_of_window

    def poisoned(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) - rehearsed == 6 else 1.0)

    def noting(ctx: train.TrainContext, *rest: Any) -> None:
        snapshots.append({n: p.detach().clone() for n, p in ctx.trained})
        moments.append({n: t.clone() for n, t in optimizer_tensors(ctx.optimizer, ctx.trained).items()})
        warn(ctx, *rest)

    moments: list[dict[str, torch.Tensor]] = []
    loop = train.train

    def watched(*args: Any) -> train.TrainState:
        nonlocal rehearsed
        rehearsed = len(calls)
        return loop(*args)

    rehearsed = 0
    monkeypatch.setattr(sft, "token_nll", poisoned)
    monkeypatch.setattr(recovery, "warn_of_window", noting)
    monkeypatch.setattr(train, "train", watched)
    assert train.main(quick(tmp_path / "run", training__save_steps=1, training__keep_checkpoints=9)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (warning,) = [line for line in lines if line["event"] == "warning"]
    assert (warning["step"], warning["window"]) == (2, [0, 2])  # the sixth micro-batch is in the third window
    assert len({record for record in warning["records"] if "conversations.jsonl:" in record}) == 8
    before = tmp_path / "run" / "checkpoints" / "step-000002"  # parameters and moments of the step before
    saved = load_file(before / "adapter.safetensors")
    assert equal({f"base_model.model.{n}.weight": p for n, p in snapshots[0].items()}, saved)
    assert equal(moments[0], load_file(before / "optimizer.safetensors"))
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))
    assert all(tensor.isfinite().all() for tensor in result(tmp_path / "run").values())


def test_full_training_gives_a_model_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert train.main(quick(tmp_path / "run", **VARIANTS["full"])) == 0
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(BASE / "model.safetensors")
    assert trained.keys() == before.keys()
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}, "as its base"
    matrices = [name for name, tensor in before.items() if tensor.dim() == 2]
    assert not any(torch.equal(trained[name], before[name]) for name in matrices)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert torch.equal(model.state_dict()["lm_head.weight"], trained["lm_head.weight"].float())


@pytest.mark.quick
def test_the_run_directory_holds_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = quick(tmp_path / "run")
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {
        "config.json", "metrics.jsonl", "train.log", "checkpoints", "best.json", "adapter", "report.md", "report.html",
        "report.json", "rejected.jsonl", "preview.txt",
    }  # fmt: skip
    assert (run / "train.log").read_text() == out
    assert load_config(run / "config.json", []) == load_config(arguments[0], arguments[1:])
    report = json.loads((run / "report.json").read_text())
    for column in ("base", "tuned"):
        assert {"perplexity", "exact_match", "stop_rate"} <= report[column].keys()
    assert {"steps", "seconds", "tokens_per_second", "peak_memory_gb"} <= report["training"].keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} <= {
        "train", "eval", "sample", "checkpoint", "warning", "memory", "done",
    }  # fmt: skip
    fields = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "target_tokens_per_second", "peak_memory_gb"}
    assert all(fields <= line.keys() for line in lines if line["event"] == "train")
    checkpoint = {path.name for path in (run / "checkpoints" / "step-000008").iterdir()}
    assert checkpoint == {"adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in (run / "adapter").iterdir()
    }


def test_a_template_that_prints_the_date_has_the_date_of_the_runs_first_session(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dated(base: Path) -> None:
        settings = json.loads((base / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{{ strftime_now('%Y-%m-%d ') }}" + settings["chat_template"]
        (base / "tokenizer_config.json").write_text(json.dumps(settings))

    changes: dict[str, Any] = {"model__name": copy_base(tmp_path, dated)}
    assert train.main(quick(tmp_path / "run", **changes, training__max_steps=2)) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["provenance"]["date"] = "2020-02-29"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert train.main(quick(tmp_path / "run", **changes, training__max_steps=3)) == 0
    assert "2020-02-29" in (tmp_path / "run" / "preview.txt").read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["provenance"]["date"] == "2020-02-29"


@pytest.mark.parametrize("part", ["nanoft.training.setup.load_base", "train.train"])
def test_out_of_memory_anywhere_is_one_line_and_3(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate(*_: Any, **__: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(part, allocate)
    assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 3
    said = one_line(capsys.readouterr().err)
    assert said.startswith("failed: out of memory with micro-batch size 4: try ")
    assert said.count(" (saves about ") == 3


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    assert "python train.py configs/tiny.py" in capsys.readouterr().out


# --- mistakes: exit 2, one line, nothing left behind


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def truncated(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[: len(content) // 2])


def renamed_tensor(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(tensors, base / "model.safetensors")


def unknown_architecture(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mamba", "architectures": ["Mamba"]}))


def without_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


PAIR = record(prompt="one", completion="two")
DATA = {
    "missing": (lambda p: str(p / "nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    "directory": (lambda p: str(p), ["a directory without data files"]),
    "empty": (lambda p: write(p / "d.jsonl", ""), ["d.jsonl", "empty"]),
    "blank": (lambda p: write(p / "d.jsonl", "\n \n"), ["d.jsonl", "empty"]),
    "wrong field": (lambda p: write(p / "d.jsonl", record(query="a", reply="b") * 9), ["d.jsonl", "query"]),
    "one in ten bad": (
        lambda p: write(p / "d.jsonl", PAIR * 9 + record(prompt=True, completion="two")),
        ["d.jsonl:10: prompt: true is not a string", "1 of 10 records"],
    ),
    "not json": (lambda p: write(p / "d.jsonl", PAIR + "{oops\n"), ["d.jsonl:2"]),
    "nan": (lambda p: write(p / "d.jsonl", (PAIR + '{"prompt": "x", "completion": NaN}\n')), ["d.jsonl:2", "NaN"]),
    "infinity": (lambda p: write(p / "d.json", '[{"instruction": "x", "output": Infinity}]'), ["d.json", "Infinity"]),
    "no target": (
        lambda p: write(p / "d.jsonl", record(messages=[{"role": "user", "content": "hi"}]) * 9),
        ["d.jsonl"],
    ),
    "parquet": (lambda p: write(p / "d.parquet", "PAR1"), ["d.parquet"]),
}
MODELS = {
    "without weights": (without_weights, ["no weights here"]),
    "truncated": (truncated, ["model.safetensors", "corrupted"]),
    "renamed tensor": (renamed_tensor, ["missing model.layers.0.mlp.gate_proj.weight", "unexpected"]),
    "unknown architecture": (unknown_architecture, ["config.json", "Mamba is not supported", "MistralForCausalLM"]),
    "without tokenizer": (without_tokenizer, ["tokenizer.json"]),
}
SETTINGS = {
    "rank 0": ({"lora__rank": 0}, ["lora.rank", "0"]),
    "unknown target": ({"lora__target_modules": "q_proj,query"}, ["lora.target_modules", "'query'", "q_proj"]),
    "misspelled": ({"training__lerning_rate": 1}, ["training.lerning_rate", "did you mean training.learning_rate"]),
    "wrong type": ({"training__max_steps": "many"}, ["training.max_steps", "'many'"]),
    "nan rate": ({"training__learning_rate": "nan"}, ["training.learning_rate", "nan"]),
    "no such model": ({"model__name": "./nowhere"}, ["model.name", "./nowhere"]),
    "nothing fits": ({"model__max_seq_length": 8}, ["model.max_seq_length=8"]),
    "no gpu": ({"system__device": "mps"}, ["system.device", "mps"]),
    "paged": ({"training__optimizer": "adamw_paged", "system__device": "cpu"}, ["training.optimizer", "adamw_paged"]),
    "full on 4 bits": ({"training__method": "full", "quantization__bits": 4}, ["quantization.bits"]),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, fragments = DATA[case]
    refused(quick(tmp_path / "runs" / "run", data__train_file=make(tmp_path)), fragments, capsys)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize("case", MODELS)
def test_a_bad_model_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, fragments = MODELS[case]
    refused(quick(tmp_path / "runs" / "run", model__name=copy_base(tmp_path, change)), fragments, capsys)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_setting_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, fragments = SETTINGS[case]
    refused(quick(tmp_path / "runs" / "run", **changes), fragments, capsys)
    assert not (tmp_path / "runs" / "run").exists()


def test_the_directory_of_another_run_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "d.jsonl"
    own.write_text("".join(record(prompt=f"say {n}", completion=f"{n}") for n in range(20)))
    settings: dict[str, Any] = {"data__train_file": own, "training__max_steps": 2}
    assert train.main(quick(tmp_path / "run", **settings)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix}
    capsys.readouterr()
    refused(quick(tmp_path / "run", **settings, lora__rank=2), ["output.dir", "lora.rank: 16 -> 2"], capsys)
    own.write_text(own.read_text() + record(prompt="more", completion="x"))
    refused(quick(tmp_path / "run", **settings), ["output.dir", "the data changed"], capsys)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.suffix}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    refused(quick(tmp_path / "other", **settings), ["output.dir", "not a nanoft run"], capsys)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


@pytest.mark.quick
def test_a_config_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["configs/nowhere.py"], ["configs/nowhere.py", "no such config file"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_the_fast_step_has_the_loss_curve_of_the_plain_one(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded demo, packed; then without kernels, and with all logits at once."""

    def curve(name: str, **changes: Any) -> list[float]:
        changes |= {"data__packing": True, "model__max_seq_length": 256, "data__max_samples": "none"}
        changes |= {"training__max_steps": steps, "training__eval_steps": 0, "evaluation__prompts": 0}
        assert train.main(quick(tmp_path / name, **changes)) == 0
        return [loss for _, loss in losses(tmp_path / name)]

    fast = curve("fast")
    monkeypatch.setattr(sft, "token_nll", plain_nll)
    plain = curve("plain", system__kernels="plain")
    assert len(fast) == len(plain) == steps
    assert plain[-1] < 0.9 * plain[0]
    if steps == 8:
        assert max(abs(a - b) / b for a, b in zip(fast, plain, strict=True)) < 1e-4
    assert abs(fast[-1] - plain[-1]) < 0.01 * plain[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("rounding", ["bfloat16", "float16"])
def test_on_cuda_16_bits_have_the_loss_curve_of_float32(rounding: str, bits: int, tmp_path: Path) -> None:
    def curve(dtype: str) -> list[float]:
        changes = {"model__dtype": dtype, "system__device": "cuda", "data__packing": True, "quantization__bits": bits}
        changes |= {"training__max_steps": 60, "training__eval_steps": 0, "data__max_samples": "none"}
        assert train.main(quick(tmp_path / dtype, **changes)) == 0
        return [loss for _, loss in losses(tmp_path / dtype)]

    rounded, exact = curve(rounding), curve("float32")
    assert exact[-1] < 0.5 * exact[0]
    assert abs(sum(rounded[-10:]) / sum(exact[-10:]) - 1) < 0.05


def plain_nll(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, *_: float) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(hidden.flatten(0, 1) @ head.T, targets, reduction="none")
