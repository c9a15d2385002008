"""Before the first step: what is shown, tried and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from runs import NO_EVALUATION, Capture, Patch, copy_base, in_the_loop, nan_in, no_memory, quick, refused

import train
from nanoft import batches
from nanoft.training import preflight


def test_show_batch_prints_the_first_window_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*quick(tmp_path / "run"), "--show-batch"]) == 0
    out = capsys.readouterr().out
    assert "micro-batch 1: 4x" in out
    assert "micro-batch 2: 4x" in out
    assert out.count("[INST]") >= 8
    assert out.count("conversations.jsonl:") >= 8  # where each of them stands
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train.main(quick(tmp_path / "run")) == 0  # and is no obstacle to the run itself


def test_show_step_names_the_records_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the loop itself: a window whose loss is not finite says which records it had."""
    arguments = quick(tmp_path / "run", training__max_steps=6)
    assert train.main(arguments) == 0
    seen: list[list[int]] = []
    step = batches.Batches.next_window

    def watch(*args: Any) -> batches.Window:
        window = step(*args)
        seen.append(sorted(record for batch in window for record in batch.records))
        return window

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.Batches, "next_window", watch)
        assert train.main(quick(tmp_path / "again", training__max_steps=6)) == 0
    for number in (1, 5, 6):  # the fifth window is the first of the second epoch, with 36 records in windows of 8
        capsys.readouterr()
        assert train.main([*arguments, "--show-step", str(number)]) == 0
        out = capsys.readouterr().out
        places = sorted(int(line) - 1 for line in re.findall(r"conversations\.jsonl:(\d+), ", out))
        assert places == seen[number - 1]
    refused([*arguments, "--show-step", "0"], ["--show-step: 0"], capsys)


def test_windows_that_were_left_out_do_not_count_in_show_step(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Windows 5 to 7 are bad; from the checkpoint of step 3 it goes on with 3 and 4, then 8: of what is step 6 made?"""
    in_the_loop(monkeypatch, "accumulate", nan_in(6, 7, 8))
    changes = {"guard__max_skips": 3, "training__lr_scheduler": "constant"}
    arguments = quick(tmp_path / "run", **NO_EVALUATION, **changes)
    assert train.main(arguments) == 0
    assert "rolled back from step 5 to the checkpoint of step 3" in capsys.readouterr().out
    for step, window in ((4, 3), (5, 4), (6, 8), (8, 10)):
        assert train.main([*arguments, "--show-step", str(step)]) == 0
        place = f"step {step}: window {window % 5 + 1} of 5 in epoch {window // 5 + 1}"
        assert place in capsys.readouterr().out


def test_preflight_alone_trains_nothing_and_shows_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = quick(tmp_path / "run")
    assert train.main([*arguments, "--preflight"]) == 0
    out = capsys.readouterr().out
    names = re.findall(r"^preflight (\w+) +ok ", out, re.MULTILINE)
    assert names == ["stop", "bos", "targets", "prompt", "head", "batch", "eval", "disk"]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    shown = (tmp_path / "run" / "preview.txt").read_text()
    assert re.findall(r"^==== (\w+): ", shown, re.MULTILINE) == ["shortest", "longest", *["random"] * 3]
    assert train.main(quick(tmp_path / "run", lora__rank=2)) == 0  # what took no step can still be changed


def test_a_check_that_fails_stops_the_run_unless_it_is_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(base: Path) -> None:
        settings = json.loads((base / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
        (base / "tokenizer_config.json").write_text(json.dumps(settings))

    arguments = quick(tmp_path / "run", model__name=copy_base(tmp_path, endless), training__max_steps=1)
    refused(arguments, ["preflight: stop: 0 of ", "eos_token_id", "--force stop"], capsys)
    assert not (tmp_path / "run").exists()
    assert train.main([*arguments, "--force", "stop"]) == 0
    assert "preflight stop      FAIL" in capsys.readouterr().out


def test_out_of_memory_at_the_rehearsal_halves_too(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    rehearse, calls = preflight.rehearse, [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        return no_memory() if calls[0] == 1 else rehearse(*args)

    monkeypatch.setattr(preflight, "rehearse", failing)
    assert train.main(quick(tmp_path / "run")) == 0
    assert "with micro-batches of 4 rows: retrying with 2" in capsys.readouterr().out
