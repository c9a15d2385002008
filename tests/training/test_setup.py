"""A job that is made, and brought back: what may change in between, and what is damaged or another's."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import BASE, ROOT, Capture, Patch, equal, events, in_the_loop, losses, quick, result, steps_are_all_there

import train
from nanoft.io import untrusted
from nanoft.model import Decoder
from nanoft.models import model_files
from tiny_models import make_chat_model, write_records


def test_another_split_of_the_same_rows_may_go_on(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    constant = {"training__lr_scheduler": "constant", "training__learning_rate": 1e-3, "lora__dropout": 0.0}
    assert train.main(quick(whole, **constant)) == 0
    assert train.main(quick(other, **constant, training__max_steps=4)) == 0
    split = {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 8}
    assert train.main(quick(other, **constant, **split)) == 0
    assert [loss for _, loss in losses(other)] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora__rank": 4}, "lora.rank: 16 -> 4; the shape, scale or initialization of the adapter"),
        ({"training__micro_batch_size": 1}, "gradient_accumulation_steps: 8 -> 2; the steps already taken"),
        ({"system__seed": 5}, "system.seed: 0 -> 5; data order, dropout"),
        ({"data__packing": True}, "data.packing: False -> True; the samples or their order would differ"),
    ],
)
def test_what_may_not_change_is_said_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: Capture
) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
    capsys.readouterr()
    assert train.main(quick(tmp_path / "run", **changes)) == 2
    assert reason in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path, capsys: Capture) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert train.main(quick(mine, training__max_steps=3)) == 0
    assert train.main(quick(other, training__max_steps=6, training__learning_rate=1e-5)) == 0
    os.rename(other / "checkpoints" / "step-000006", mine / "checkpoints" / "step-000006")
    capsys.readouterr()
    assert train.main(quick(mine)) == 0
    said = capsys.readouterr().out
    assert "step-000006: belongs to another run: its config is not this one's: going back" in said
    assert "resuming  after step 3 of 8" in said


def test_going_back_by_hand_and_killed_the_later_steps_are_gone(tmp_path: Path, monkeypatch: Patch) -> None:
    """What was done after step 2 is done again: nothing of it may be taken for this run's, not even its report."""
    directory = tmp_path / "run"
    changes = {"training__save_steps": 2, "training__keep_checkpoints": 100}
    assert train.main(quick(directory, **changes)) == 0

    class Killed(BaseException):
        pass

    def dying(number: int, real: Any, *args: Any) -> Any:
        if number == 2:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        in_the_loop(patch, "accumulate", dying)
        with pytest.raises(Killed):
            train.main([*quick(directory, **changes), "--resume", str(directory / "checkpoints" / "step-000002")])
    assert [step for step, _ in losses(directory)] == [1, 2, 3]
    assert train.main(quick(directory, **changes)) == 0
    steps_are_all_there(directory, 8)
    assert [line["step"] for line in events(directory, "done")] == [8]


def test_an_older_report_does_not_stand_for_a_run_that_was_done_again(tmp_path: Path, monkeypatch: Patch) -> None:
    directory = tmp_path / "run"
    changes = {"training__save_steps": 2, "training__keep_checkpoints": 100}
    assert train.main(quick(directory, **changes)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "finalize", lambda *_: os.kill(os.getpid(), 15) or train.STOPPED_BY_SIGNAL)
        earlier = str(directory / "checkpoints" / "step-000002")
        assert train.main([*quick(directory, **changes), "--resume", earlier]) == train.STOPPED_BY_SIGNAL
    assert train.main(quick(directory, **changes)) == 0
    assert len(events(directory, "done")) == 1


@pytest.mark.parametrize("damage", [{"provenance": 5}, {"provenance": {"date": "yesterday"}}, {"lora": {}}, 7])
def test_a_damaged_config_of_a_run_is_one_line(damage: Any, tmp_path: Path, capsys: Capture) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    for name, text in (("config.json", json.dumps(damage)), ("metrics.jsonl", ""), (".lock", "")):
        (directory / name).write_text(text)
    assert train.main(quick(directory)) == 2
    assert "config.json: corrupted: remove the directory" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"rng": {}}, {"meter": 3}, {"guard": None}, {"surprise": 1}])
def test_a_sealed_state_that_is_none_is_one_line(change: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
    """As an attacker would write it: all hashes are right."""
    directory = tmp_path / "run"
    assert train.main(quick(directory, training__max_steps=1)) == 0
    (directory / "report.json").unlink()
    shutil.rmtree(directory / "checkpoints" / "step-000000")
    path = directory / "checkpoints" / "step-000001"
    state = json.dumps({**json.loads((path / "state.json").read_text()), **change}).encode()
    (path / "state.json").write_bytes(state)
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["files"]["state.json"] = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    text = json.dumps(body, indent=1, sort_keys=True).encode()
    sealed = {"body": body, "sha256": hashlib.sha256(text).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(sealed))
    capsys.readouterr()
    assert train.main(quick(directory, training__max_steps=1)) == 2
    captured = capsys.readouterr()
    assert "state.json: " in captured.err
    assert captured.err.count("\n") == 1


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    base = tmp_path / "base"
    make_chat_model(base, vocab_size=64)
    changes = {"model__name": base, "data__train_file": write_records(tmp_path / "data.jsonl")}
    assert train.main(quick(tmp_path / "run", **changes)) == 2
    assert "its vocabulary has 64 tokens, and its tokenizer gives the id " in capsys.readouterr().err


def test_the_model_is_looked_up_once_and_built_on_meta_twice(tmp_path: Path, monkeypatch: Patch) -> None:
    """Once to count its parameters, once to load it."""
    looked_up, read, built = [], [], []
    find, read_json, build = model_files.find_model, untrusted.read_json, Decoder.__init__

    def reading(path: Path, *args: Any) -> Any:
        read.append(str(path))
        return read_json(path, *args)

    def building(self: Decoder, config: Any) -> None:
        build(self, config)
        built.append(self.head.device.type)

    monkeypatch.setattr(model_files, "find_model", lambda name, *a, **o: looked_up.append(name) or find(name, *a, **o))
    for module in [m for m in sys.modules.values() if getattr(m, "read_json", None) is read_json]:
        monkeypatch.setattr(module, "read_json", reading)
    monkeypatch.setattr(Decoder, "__init__", building)
    assert train.main(quick(tmp_path / "run", training__max_steps=2)) == 0
    assert looked_up == [str(BASE)]
    assert read.count(str(BASE / "config.json")) == 1
    assert built.count("meta") == 2


def test_threads_are_decided_in_the_first_session(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
        torch.set_num_threads(before + 1)
        assert train.main(quick(tmp_path / "run", training__max_steps=2)) == 0
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_another_number_of_threads_is_warned_of(tmp_path: Path, capsys: Capture) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1, system__threads=1)) == 0
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    recorded["provenance"]["threads"] = 7
    path.write_text(json.dumps(recorded))
    capsys.readouterr()
    assert train.main(quick(tmp_path / "run", training__max_steps=2, system__threads=1)) == 0
    warning = "warning: system.threads: 1 instead of 7: from here on the run is not bit-identical"
    assert warning in capsys.readouterr().out


def test_a_run_whose_directory_base_and_data_were_copied_goes_on_bit_for_bit(tmp_path: Path, capsys: Capture) -> None:
    make_chat_model(tmp_path / "base")
    first = {"model__name": tmp_path / "base", "data__train_file": write_records(tmp_path / "a.jsonl")}
    first["training__lr_scheduler"] = "constant"
    assert train.main(quick(tmp_path / "whole", **first, training__max_steps=6)) == 0
    assert train.main(quick(tmp_path / "run", **first, training__max_steps=3)) == 0
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere" / "base")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    (tmp_path / "copy" / "checkpoints" / "step-000003" / ".DS_Store").touch()  # of a Mac
    capsys.readouterr()
    moved = {**first, "model__name": tmp_path / "elsewhere" / "base", "data__train_file": tmp_path / "b.jsonl"}
    for steps in (4, 6):  # from a checkpoint of the first place, and from one of the second
        assert train.main(quick(tmp_path / "copy", **moved, training__max_steps=steps)) == 0
        assert "resuming  after step" in capsys.readouterr().out
    assert losses(tmp_path / "copy") == losses(tmp_path / "whole")
    assert equal(result(tmp_path / "copy"), result(tmp_path / "whole"))
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write((tmp_path / "a.jsonl").read_text().splitlines()[0] + "\n")
    assert train.main(quick(tmp_path / "copy", **{**first, "data__train_file": tmp_path / "b.jsonl"})) == 2
    assert "the data changed since that run began" in capsys.readouterr().err


def test_preflight_of_a_finished_run_does_its_work(tmp_path: Path, capsys: Capture) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
    report = (tmp_path / "run" / "report.json").read_bytes()
    capsys.readouterr()
    assert train.main([*quick(tmp_path / "run", training__max_steps=1), "--preflight"]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"preflight {name:9} ok") for name in ("stop", "batch", "disk")] == [1, 1, 1]
    assert all(len(line) <= 80 for line in said.splitlines() if line.startswith(("preflight", "|", "         ")))
    assert (tmp_path / "run" / "report.json").read_bytes() == report


def test_a_changed_source_is_warned_of(tmp_path: Path, capsys: Capture) -> None:
    assert train.main(quick(tmp_path / "run", training__max_steps=1)) == 0
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    assert re.fullmatch("[0-9a-f]{64}", recorded["provenance"]["source_sha256"])
    recorded["provenance"]["source_sha256"] = "0" * 64
    path.write_text(json.dumps(recorded))
    capsys.readouterr()
    assert train.main(quick(tmp_path / "run", training__max_steps=2)) == 0
    assert "warning: the source of nanoft has changed since the run began" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--help", "--version", "--no-such-option"])
def test_help_version_and_mistakes_do_not_import_torch(option: str) -> None:
    run = "    runpy.run_path('train.py', run_name='__main__')"
    code = f"import runpy, sys\ntry:\n{run}\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, option], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
    assert done.returncode == (2 if option == "--no-such-option" else 0)


def test_the_log_says_when_data_came_from_the_cache(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for is_cached in (False, True):
        assert train.main([*quick(tmp_path / "run"), "--show-batch"]) == 0
        assert ("data      from the cache: " in capsys.readouterr().out) is is_cached
