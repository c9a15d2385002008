"""The environment check: what works is ok, what does not is FAIL and says why, and the exit code follows."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from metal import pretended_metal

import train
from nanoft.__main__ import main
from nanoft.models.model_files import find_model
from nanoft.training import doctor
from tiny_models import make_chat_model

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.py")
CPU = torch.device("cpu")


def lines(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and outcome and text of each line by name."""
    code = main(["doctor", *arguments])
    whole = re.sub(r"\n {10,}", " ", capsys.readouterr().out)  # lines that were wrapped
    found = [line.split(maxsplit=1) for line in whole.splitlines()]
    return code, {rest[:13].strip(): (outcome, rest[14:]) for outcome, rest in found}


def test_this_machine_runs_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lines([TINY, "system.device=cpu", "quantization.bits=4"], capsys)
    assert code == 0
    assert "FAIL" not in {outcome for outcome, _ in said.values()}
    assert importlib.metadata.version("torch") in said["torch"][1]
    assert "math" in said["attention"][1]
    assert "4 layers of 128" in said["model"][1]
    assert "GFLOP/s" in said["matmul"][1]
    assert said["room"][0] == "ok"
    troubles = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    named = re.findall(r"nanoft doctor[^|]*?\(lines? ([^)]*)\)", troubles)
    lines_of_document = {name for names in named for name in re.findall(r"`([^`]+)`", names)}
    assert len(lines_of_document) >= 5
    assert lines_of_document - {"bfloat16"} <= said.keys()  # that one is of a GPU without


REFUSED = {
    "a device that is not here": (["system.device=mps"], "settings", "mps is not available here"),
    "an optimizer of another device": (["training.optimizer=adamw_paged"], "settings", "adamw_paged"),
    "a metric that there is not": (["evaluation.metrics=bleux"], "settings", "did you mean bleu?"),
    "a model that is not there": (["model.name=no/where/at/all"], "model", "no/where/at/all"),
    "data that is not there": (["data.train_file=README.md,nothing.jsonl"], "data", "nothing.jsonl: no such file"),
    "too long": (["model.max_seq_length=10000000"], "room", "a sequence of 10,000,000 tokens take"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_lacks_fails(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, name, text = REFUSED[case]
    if case == "a device that is not here" and torch.backends.mps.is_available():
        changes = ["system.device=cuda"]
    code, said = lines([TINY, *changes], capsys)
    assert code == 2
    assert said[name][0] == "FAIL"
    assert text.replace("mps", changes[0].rpartition("=")[2]) in said[name][1]


def test_rows_that_will_be_halved_warn(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = lines([TINY, "system.device=cpu", "training.micro_batch_size=100000"], capsys)
    assert (code, said["room"][0]) == (0, "warn")


def test_the_device_is_that_of_the_config(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pretended_metal(monkeypatch):
        for arguments, name in (([TINY], "Metal"), ([TINY, "system.device=cpu"], "CPU")):
            code, said = lines(arguments, capsys)
            assert code == 0
            assert said["device"][1].startswith(f"{name}, ")
            assert ("Metal" in said) == (name == "Metal")


def test_a_model_on_the_hub_is_looked_at_not_fetched(
    tmp_path: Path, serve_hub: Callable[[Any], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "remote"
    make_chat_model(files)
    hub = type("ThisHub", (Hub,), {"repository": "models/some/one", "files": files, "asked": []})
    serve_hub(hub)
    code, said = lines([TINY, "system.device=cpu", "model.name=some/one"], capsys)
    assert code == 0
    assert said["model"][1].endswith("its weights are not in the Hub cache yet")
    assert {asked.rpartition("/")[2] for asked in hub.asked if "/resolve/" in asked} == {"config.json"}
    find_model("some/one")
    _, said = lines([TINY, "system.device=cpu", "model.name=some/one"], capsys)
    assert "not in the Hub cache" not in said["model"][1]


def test_a_run_begins_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a file is read: a bitsandbytes that does not load, an extra that is missing."""

    def broken(*_: Any) -> torch.Tensor:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "unpack_bitsandbytes", broken)
    monkeypatch.setitem(sys.modules, "wandb", None)
    own = [TINY, "system.device=cpu", "data.train_file=nothing.jsonl", f"output.dir={tmp_path / 'run'}"]
    for changes, text in (
        (["quantization.bits=4"], "4-bit weights: bitsandbytes fails (libcudart.so: cannot open"),
        (["training.optimizer=adamw_8bit"], "4-bit weights: bitsandbytes fails"),
        (["logging.report_to=wandb"], "logging.report_to: wandb is not installed: pip install"),
        ([], "data.train_file: nothing.jsonl"),
    ):
        for command in ([], ["--selftest"]):
            assert train.main([*own, *changes, *command]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: {text}")
            assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_bitsandbytes_that_dequantizes_incorrectly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.unpack_bitsandbytes

    def wrong(*args: Any) -> torch.Tensor:
        return real(*args).flip(0)

    def broken(*_: Any) -> torch.Tensor:
        raise OSError("libcudart.so: cannot open shared object file")

    assert doctor.four_bits(CPU).outcome == "ok"
    for fault, text in ((wrong, "dequantizes incorrectly"), (broken, "libcudart")):
        monkeypatch.setattr(doctor, "unpack_bitsandbytes", fault)
        line = doctor.four_bits(CPU)
        assert line.outcome == "FAIL"
        assert text in line.found
        assert "quantization.bits=16" in line.fix


def test_a_bitsandbytes_that_a_config_does_without_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "unpack_bitsandbytes", lambda *_: torch.zeros(64 * 128))
    for changes, expected in (([], (0, "warn")), (["quantization.bits=4"], (2, "FAIL"))):
        code, said = lines([TINY, "system.device=cpu", *changes], capsys)
        assert (code, said["4-bit weights"][0]) == expected


def test_attention_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = doctor.attention(CPU)
    assert line.outcome == "ok"
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: q)
    (line,) = doctor.attention(CPU)
    assert (line.outcome, line.found) == ("FAIL", "no kernel work")


def test_other_versions_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "library_versions", lambda: {"python": "3.12.1", "torch": "3.1.0+cpu", "numpy": "2.0"})
    found = {line.name: line for line in doctor.versions()}
    assert (found["torch"].outcome, found["torch"].fix) == ("warn", "tested with 2.8 to 2.13")
    assert (found["python"].outcome, found["libraries"].found) == ("ok", "numpy 2.0")


def test_a_little_disk_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GB_ON_DISK", 1e9)
    assert {line.outcome for line in doctor.disk()} == {"warn"}


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    line = doctor.hub()
    assert "hf_" not in str(line)


def test_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "nanoft", "doctor", "nothing.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing.py: no such config file")
    assert done.stderr.count("\n") == 1
