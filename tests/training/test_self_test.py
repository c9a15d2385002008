"""The self-test passes on every kind of run, leaves no files, and each of its checks fails when it should."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, VARIANTS, one_line, quick
from tiers import rest_is_slow
from torch import Tensor

import train
from nanoft import attention as core_attention
from nanoft import recompute
from nanoft.batches import Sample, TokenDataset
from nanoft.kernels import attention
from nanoft.lora import DoRALinear, LoRALinear
from nanoft.models import adapter_files
from nanoft.objectives import sft
from nanoft.tracking.run import Run
from nanoft.training import self_test, state
from tiny_models import delta, make_chat_model, write_records

SPLITS, RESUMED = "1x8 = 2x4 = 4x2 = 8x1", "2 + 2 steps = 4 steps"
PACKED, MERGED = "packed = alone", "merged = adapter"
NEEDS_ADAPTERS = {"fresh adapter = base", "adapter saved = read", MERGED}
EVERY = {SPLITS, RESUMED, PACKED, "recomputed = kept"} | NEEDS_ADAPTERS
MORE: dict[str, dict[str, Any]] = {
    "bf16": {"model__dtype": "bfloat16"},
    "fp16": {"model__dtype": "float16", "lora__dropout": 0.1},
    "full-fp16": {"model__dtype": "float16", "training__method": "full", "training__learning_rate": 1e-4},
    "qlora-bf16": {"model__dtype": "bfloat16", "quantization__bits": 4, "quantization__dequantize": "cached"},
    "smoothed": {"training__label_smoothing": 0.1, "training__z_loss": 1e-3, "training__checkpointing": "offload"},
    "patterns": {"lora__bias": "lora_only", "lora__rank_pattern": "{q_proj: 3}", "lora__alpha_pattern": "{mlp.*: 4}"},
    "pissa-dora": {"lora__init": "pissa", "lora__dora": True, "lora__rslora": True, "lora__dropout": 0.2},
    "one-row": {
        "training__micro_batch_size": "auto",
        "training__gradient_accumulation_steps": 3,
        "data__max_samples": 5,
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small model with biases and its data, as settings."""
    root = tmp_path_factory.mktemp("selftest")
    make_chat_model(root / "base", "qwen2")
    return {"model__name": root / "base", "data__train_file": write_records(root / "data.jsonl")}


def table(out: str) -> dict[str, tuple[str, str, str, str]]:
    """Result, measured, allowed and the words of each row."""
    rows = re.findall(r"^(\S.{31}) (pass|FAIL) {2,} *(\S*) +(\S*)  (\S.*)$", out, re.MULTILINE)
    return {name.strip(): (result, *rest) for name, result, *rest in rows}


def try_it(directory: Path, base: dict[str, Any], **changes: Any) -> int:
    return train.main([*quick(directory / "run", **{**base, **changes}), "--selftest"])


@pytest.mark.parametrize("variant", rest_is_slow([*VARIANTS, *MORE], "lora-dropout", "qlora", "packed"))
def test_it_passes(
    variant: str,
    base: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    changes = {**VARIANTS, **MORE}[variant]
    assert try_it(tmp_path, base, **changes) == 0
    rows = table(capsys.readouterr().out)
    assert rows.keys() == EVERY - (NEEDS_ADAPTERS if changes.get("training__method") == "full" else set())
    for result, measured, allowed, _ in rows.values():
        assert (result, float(measured) <= float(allowed)) == ("pass", True)
    for name in {"fresh adapter = base", "recomputed = kept", RESUMED} & rows.keys():
        assert rows[name][1:3] == ("0", "0")
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_the_directory_is_not_disturbed(tmp_path: Path) -> None:
    arguments = [*quick(tmp_path / "run", training__max_steps=3)]
    assert train.main(arguments) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    with Run.open(tmp_path / "run"):  # as if it were running
        held = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
        assert train.main([*arguments, "--selftest"]) == 0
        after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == held
    assert before.keys() == held.keys()


def test_ctrl_c_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would finish its step first, and save."""
    monkeypatch.setattr(self_test, "run", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 0)
    assert train.main([*quick(tmp_path / "run"), "--selftest"]) == 130


def test_a_config_for_several_processes_is_tested_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "run", lambda *_: 0)
    assert train.main([*quick(tmp_path / "run", system__ranks=2), "--selftest"]) == 0


def test_what_a_run_would_refuse_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*quick(tmp_path / "run", lora__target_modules="query"), "--selftest"]) == 2
    assert "lora.target_modules" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


# --- each check fails when what it checks is broken


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    real = sft.token_nll
    patch.setattr(
        sft, "token_nll", lambda hidden, head, targets, *more: real(hidden, head, targets, *more) / len(targets)
    )


def no_number(patch: pytest.MonkeyPatch) -> None:
    real = sft.token_nll
    patch.setattr(sft, "token_nll", lambda *arguments: real(*arguments) * float("nan"))


def see_each_other(patch: pytest.MonkeyPatch) -> None:
    """In the core and in its kernel: a kernel that differs alone is not used."""
    mask, attend = core_attention.causal_mask, attention.attend
    patch.setattr(core_attention, "causal_mask", lambda *arguments: mask(*arguments[:-1], None))
    patch.setattr(attention, "attend", lambda q, k, v, scores, *_: attend(q, k, v, scores))


def begin_anywhere(patch: pytest.MonkeyPatch) -> None:
    real = train.inject_lora

    def inject(*arguments: Any) -> dict[str, LoRALinear]:
        adapters = real(*arguments)
        list(adapters.values())[-1].lora_B.data[0, 0] = 1e-3
        return adapters

    patch.setattr(train, "inject_lora", inject)


def forget_random_numbers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state, "set_rng_state", lambda _: None)


def forget_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state, "load_optimizer_tensors", lambda *_: None)


def forget_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state, "load_weights", lambda *_: None)


def begin_the_data_again(patch: pytest.MonkeyPatch) -> None:
    real = state.read_state

    def read(*arguments: Any) -> state.TrainState:
        found = real(*arguments)
        found.epoch, found.window = 0, 0
        return found

    patch.setattr(state, "read_state", read)


def train_what_has_no_effect(patch: pytest.MonkeyPatch) -> None:
    real = train.inject_lora

    def inject(*arguments: Any) -> dict[str, LoRALinear]:
        adapters = real(*arguments)
        for adapter in adapters.values():
            adapter.register_parameter("lora_E", torch.nn.Parameter(torch.zeros(3)))
        return adapters

    patch.setattr(train, "inject_lora", inject)


def merge_twice(patch: pytest.MonkeyPatch) -> None:
    real = LoRALinear.merged
    patch.setattr(LoRALinear, "merged", lambda self, weight: real(self, weight) + delta(self))


def merge_without_lengths(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DoRALinear, "merged", lambda self, weight: weight + delta(self))


def save_rounded(patch: pytest.MonkeyPatch) -> None:
    real = adapter_files.write_tensors
    patch.setattr(adapter_files, "write_tensors", lambda path, t: real(path, {n: p.bfloat16() for n, p in t.items()}))


def save_small_ones_rounded(patch: pytest.MonkeyPatch) -> None:
    """Vectors only: biases, DoRA's lengths."""
    real = adapter_files.write_tensors

    def write(path: Path, tensors: dict[str, Tensor]) -> Any:
        return real(path, {name: t.bfloat16().float() if t.dim() == 1 else t for name, t in tensors.items()})

    patch.setattr(adapter_files, "write_tensors", write)


def save_another_alpha(patch: pytest.MonkeyPatch) -> None:
    real = adapter_files.as_plain_lora

    def double(lora: Any, tensors: dict[str, Tensor]) -> Any:
        plain, kept = real(lora, tensors)
        return replace(plain, alpha=2 * plain.alpha), kept

    patch.setattr(adapter_files, "as_plain_lora", double)


def other_dropout_the_second_time(patch: pytest.MonkeyPatch) -> None:
    real = recompute.checkpoint
    patch.setattr(
        recompute, "checkpoint", lambda *arguments, **more: real(*arguments, **more, preserve_rng_state=False)
    )


DROPOUT = {"lora__dropout": 0.3}
BF16 = {"model__dtype": "bfloat16"}
BROKEN: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], set[str]]] = [
    (mean_of_means, {}, {SPLITS, PACKED}),
    (mean_of_means, BF16, {SPLITS, PACKED}),
    (no_number, {}, {SPLITS, PACKED, "recomputed = kept", RESUMED}),
    (see_each_other, {}, {PACKED}),
    (see_each_other, BF16, {PACKED}),
    (begin_anywhere, {}, {"fresh adapter = base"}),
    (forget_random_numbers, {}, {RESUMED}),
    (forget_moments, {}, {RESUMED}),
    (forget_weights, {}, {RESUMED}),
    (forget_weights, VARIANTS["full"], {RESUMED}),
    (begin_the_data_again, {}, {RESUMED}),
    (train_what_has_no_effect, {}, {SPLITS, PACKED, "adapter saved = read"}),
    (merge_twice, {}, {MERGED}),
    (merge_twice, BF16, {MERGED}),
    (merge_without_lengths, VARIANTS["dora"], {MERGED}),
    (save_rounded, {}, {"adapter saved = read"}),
    (save_small_ones_rounded, {"lora__bias": "lora_only"}, {"adapter saved = read"}),
    (save_small_ones_rounded, VARIANTS["dora"], {"adapter saved = read"}),
    (save_another_alpha, {}, {"adapter saved = read"}),
    (other_dropout_the_second_time, DROPOUT, {"recomputed = kept"}),
]


@pytest.mark.parametrize(("break_it", "changes", "wrong"), rest_is_slow(BROKEN, *BROKEN[::6]))
def test_it_fails_where_something_is_wrong_and_only_there(
    break_it: Callable[[pytest.MonkeyPatch], None],
    changes: dict[str, Any],
    wrong: set[str],
    base: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        break_it(patch)
        assert try_it(tmp_path, base, **changes) == 3
    said = capsys.readouterr()
    rows = table(said.out)
    failed = [name for name, (result, *_) in rows.items() if result == "FAIL"]
    assert set(failed) == wrong
    error = one_line(said.err)
    assert error.startswith(f"failed: self-test: {failed[0]}: ")
    assert error.endswith(f"({len(failed)} checks failed)")
    assert list(tmp_path.iterdir()) == []


# --- how it measures


def test_what_is_no_number_is_infinitely_far() -> None:
    one = torch.tensor([3.0, 4.0])
    assert self_test.relative_error(torch.tensor([3.0, 4.5]), one) == pytest.approx(0.1)
    assert self_test.relative_error(one, one) == 0.0
    assert self_test.relative_error(1e-30 * one, 1.1e-30 * one) == pytest.approx(
        1 / 11, rel=1e-4
    )  # small as Adam's are
    for odd in (float("nan"), float("inf")):
        broken = torch.tensor([odd, 4.0])
        assert (
            self_test.relative_error(broken, one)
            == self_test.relative_error(one, broken)
            == self_test.relative_error(broken, broken)
            == torch.inf
        )
    assert self_test.relative_error(one, 0 * one) == torch.inf
    assert self_test.relative_error(0 * one, 0 * one) == 0.0
    assert self_test.gradient_error({"a": one}, {"a": one, "b": one}) == torch.inf


def test_pieces_end_in_a_target_and_are_of_all_lengths() -> None:
    import numpy as np

    samples = TokenDataset.of(
        [Sample(np.arange(n, dtype=np.int32), np.arange(n) % 7 == 3, n) for n in (5, 300, 40, 1000, 200)]
    )
    for tokens in (8, 64, 640, 2048):
        pieces = self_test.cut(samples, tokens)
        assert len(pieces) == self_test.DOCUMENTS
        assert all(piece.is_target[-1] and len(piece.ids) >= 2 for piece in pieces)
        most = max(tokens // self_test.DOCUMENTS, self_test.DOCUMENTS)
        for i, piece in enumerate(pieces, start=1):
            assert len(piece.ids) <= max(2, most * i // self_test.DOCUMENTS)
            whole = samples[[s.record for s in samples].index(piece.record)]
            end = int(piece.ids[-1]) + 1
            assert piece.ids.tolist() == whole.ids[end - len(piece.ids) : end].tolist()


@pytest.mark.slow
def test_the_demo_passes(tmp_path: Path) -> None:
    assert train.main([str(TINY), f"output.dir={tmp_path / 'run'}", "--selftest"]) == 0
