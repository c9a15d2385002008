"""Checkpoints under every fault: killed, refused by the disk, cut off by a power loss, damaged afterwards."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import rest_is_slow
from torch import Tensor

from nanoft import UserError, checkpoint
from nanoft.checkpoint import AsyncCheckpointWriter, CheckpointCorrupted, CheckpointManager, verify
from nanoft.models.adapter_files import copy_matching

FILES = ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
OPERATIONS = ["open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"]


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "adapter": {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)},
        "optimizer": {"a.exp_avg": torch.randn(4, 3, generator=generator), "a.step": torch.tensor(float(step))},
    }


def save(checkpoints: CheckpointManager, step: int, best: tuple[int, float] | None = None) -> Path:
    return checkpoints.save(step, tensors(step), {"step": step, "note": "é"}, best)


def is_whole(path: Path, step: int) -> bool:
    """Whether the files hold the state saved at `step`, read only with safetensors and json."""
    files = {name: load_file(path / f"{name}.safetensors") for name in ("adapter", "optimizer")}
    same = all(torch.equal(files[f][n], t) for f, named in tensors(step).items() for n, t in named.items())
    return same and json.loads((path / "state.json").read_text())["step"] == step


# --- saving, keeping, loading


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=3)
    assert checkpoints.newest() == (None, [])
    path = save(checkpoints, 100)
    assert path == tmp_path / "checkpoints" / "step-000100"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    saved, damage = CheckpointManager(tmp_path / "checkpoints", keep=3).newest()
    assert saved is not None
    assert damage == []
    assert saved.state == {"step": 100, "note": "é"}
    for name, expected in tensors(100).items():
        found = saved.tensors(name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    manifest = json.loads((path / "manifest.json").read_text())["body"]["files"]
    for name in set(FILES) - {"manifest.json"}:
        content = (path / name).read_bytes()
        assert manifest[name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=2)
    for step, best in ((1, (1, 3.0)), (2, (2, 2.0)), (3, (2, 2.0)), (4, (2, 2.0)), (5, (2, 2.0)), (6, (6, 1.0))):
        save(checkpoints, step, best)
        assert checkpoints.best() == best
        last = {step - 1, step} - {0}
        assert set(checkpoints.steps()) == last | {best[0]}
    noted = json.loads((tmp_path / "best.json").read_text())
    assert noted == {"step": 6, "validation_loss": 1.0, "checkpoint": "checkpoints/step-000006"}


def test_keeping_one_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=1)
    for step in (10, 20, 30):
        save(checkpoints, step, (10, 1.0))
    assert checkpoints.steps() == [10, 30]


def test_a_million_steps_are_still_in_order(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=2)
    for step in (999_999, 1_000_000, 1_000_001):
        save(checkpoints, step)
    assert checkpoints.steps() == [1_000_000, 1_000_001]
    saved, _ = checkpoints.newest()
    assert saved is not None
    assert saved.state["step"] == 1_000_001


def test_a_run_that_went_back_leaves_no_later_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        save(checkpoints, step, (30, 1.0))
    (checkpoints.path(30) / "manifest.json").unlink()
    save(checkpoints, 15, (10, 2.0))
    assert checkpoints.steps() == [10, 15]
    saved, damage = checkpoints.newest()
    assert saved is not None
    assert (saved.path, damage) == (checkpoints.path(15), [])
    assert checkpoints.best() == (10, 2.0)
    checkpoints.delete_after(12)  # so does one that has only begun to
    assert (checkpoints.steps(), checkpoints.best()) == ([10], (10, 2.0))
    checkpoints.delete_after(5)
    assert (checkpoints.steps(), (tmp_path / "best.json").exists()) == ([], False)
    save(checkpoints, 12)  # before the first evaluation
    assert checkpoints.best() is None
    assert not (tmp_path / "best.json").exists()


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("step-12", "step-abcdef", "notes"):
        (tmp_path / name).mkdir()
    checkpoints = CheckpointManager(tmp_path, keep=1)
    save(checkpoints, 7)
    assert checkpoints.steps() == [7]
    assert {path.name for path in tmp_path.iterdir()} == {"step-12", "step-abcdef", "notes", "step-000007"}


def test_a_valid_checkpoint_of_the_same_step_stays_and_a_corrupted_one_is_replaced(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=2)
    path = save(checkpoints, 1)
    before = (path / "state.json").stat().st_ino
    assert save(checkpoints, 1, (1, 0.5)) == path
    assert ((path / "state.json").stat().st_ino, checkpoints.best()) == (before, (1, 0.5))
    (path / "state.json").write_bytes(b"{}")
    save(checkpoints, 1, (1, 0.5))
    assert is_whole(verify(path).path, 1)


def test_every_kth_stays_for_good(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=1, keep_every=4)
    for step in range(10):
        save(checkpoints, step)
    assert checkpoints.steps() == [4, 8, 9]


def test_only_our_own_leftovers_are_swept(tmp_path: Path) -> None:
    inside = tmp_path / "checkpoints"
    (inside / ".tmp-step-000007-4711").mkdir(parents=True)
    others = [".tmp-step-mine", ".tmp-mine-12", "tmp-step-1-2"]
    for name in others:
        (inside / name).write_bytes(b"x")
    CheckpointManager(inside, keep=1)
    assert sorted(path.name for path in inside.iterdir()) == sorted(others)


def test_a_checkpoint_says_whose_it_is_and_another_runs_is_not_taken(tmp_path: Path) -> None:
    mine = {"config_sha256": "1", "base_sha256": "2", "versions": {"torch": "2.8"}}
    path = save(CheckpointManager(tmp_path / "a", 3, identity=mine), 5)
    assert json.loads((path / "manifest.json").read_text())["body"]["belongs_to"] == mine
    newer = CheckpointManager(tmp_path / "a", 3, identity={**mine, "versions": {"torch": "2.13"}})
    assert newer.newest()[0] is not None, "other versions may go on"
    other = CheckpointManager(tmp_path / "a", 3, identity={**mine, "base_sha256": "3"})
    with pytest.raises(UserError, match="belongs to another run: its base differs"):
        other.newest()


def test_what_reads_back_otherwise_never_gets_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that silently stores other bytes than were written."""
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=1)
    save(checkpoints, 1)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data).replace(b"exp_avg", b"exp_avh")))
    with pytest.raises(OSError, match="read back after writing"):
        save(checkpoints, 2)
    monkeypatch.undo()
    assert checkpoints.steps() == [1]
    assert is_whole(checkpoints.path(1), 1)


def test_tensors_are_put_back_by_name_and_only_if_all_fit() -> None:
    def fresh() -> dict[str, Tensor]:
        return {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}

    saved = {"b": torch.ones(4, dtype=torch.bfloat16), "a": torch.full((2, 3), 2.0)}
    own = fresh()
    copy_matching(own, saved, "here", "fix it")
    assert all(torch.equal(own[name], saved[name]) for name in own)
    wrong = {
        "a: missing": {"b": saved["b"]},
        "c: ": {**saved, "c": torch.zeros(1)},
        r"a: \(3, 2\)": {**saved, "a": torch.zeros(3, 2)},
        "b: .*float32, but .*bfloat16 is needed: fix it": {**saved, "b": torch.ones(4)},
    }
    for message, tensors in wrong.items():
        own = fresh()
        with pytest.raises(UserError, match=f"here: {message}"):
            copy_matching(own, tensors, "here", "fix it")
        assert not any(tensor.any() for tensor in own.values()), "nothing was changed"


# --- in the background


def plenty() -> float:
    return 1e12


def begin(saves: AsyncCheckpointWriter, step: int, changed: Tensor | None = None) -> None:
    named = tensors(step)
    if changed is not None:
        named["adapter"]["a"] = changed
    saves.start(step, named, {"step": step}, None)


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make writes wait until the event is set."""
    write, free = os.write, threading.Event()
    monkeypatch.setattr(os, "write", lambda fd, data: (free.wait(60), write(fd, data))[1])
    return free


def test_training_goes_on_while_a_save_is_written_and_what_is_saved_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = hold_writes(monkeypatch)
    saves = AsyncCheckpointWriter(CheckpointManager(tmp_path / "checkpoints", keep=3), plenty)
    weight = tensors(1)["adapter"]["a"].clone()
    with saves:
        begin(saves, 1, weight)
        weight += 100  # the next optimizer step
        assert saves.collect() is None
        assert saves.last_step == -1
        disk.set()
        outcome = saves.collect(wait=True)
    assert outcome is not None
    assert (outcome.step, outcome.error, saves.last_step) == (1, None, 1)
    assert is_whole(outcome.path, 1)
    assert outcome.waited_seconds <= outcome.seconds
    assert saves.collect(wait=True) is None, "it was told already"


def test_a_failed_save_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = AsyncCheckpointWriter(CheckpointManager(tmp_path / "checkpoints", keep=3), plenty)

    def full(_fd: int, _data: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        begin(saves, 1)
        outcome = saves.collect(wait=True)
    assert outcome is not None
    assert isinstance(outcome.error, OSError)
    assert saves.last_step == -1
    assert not saves.overdue(), "not at once"
    monkeypatch.setattr("nanoft.checkpoint.RETRY_S", -1.0)
    assert saves.overdue()
    begin(saves, 2)
    saves.collect(wait=True)
    assert (saves.last_step, saves.overdue()) == (2, False)


def test_what_does_not_fit_twice_into_memory_is_saved_while_training_waits(tmp_path: Path) -> None:
    saves = AsyncCheckpointWriter(CheckpointManager(tmp_path / "checkpoints", keep=3), lambda: 1.0)
    begin(saves, 1)
    assert is_whole(tmp_path / "checkpoints" / "step-000001", 1), "it is there when start() returns"


def test_copies_that_do_not_fit_after_all_cost_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, weight, copy = (
        AsyncCheckpointWriter(CheckpointManager(tmp_path / "checkpoints", keep=3), plenty),
        tensors(1),
        Tensor.to,
    )

    def second_fails(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        full = options.get("copy") and tensor.shape == weight["adapter"]["b"].shape
        return copy(torch.empty(2**60, dtype=torch.uint8) if full else tensor, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", second_fails)
        saves.start(1, weight, {"step": 1, "note": "é"}, None)
    assert is_whole(tmp_path / "checkpoints" / "step-000001", 1), "it is there when start() returns"
    outcome = saves.collect()
    assert outcome is not None
    assert outcome.error is None


def test_without_a_thread_to_be_had_it_is_saved_while_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    saves = AsyncCheckpointWriter(CheckpointManager(tmp_path / "checkpoints", keep=3), plenty)
    begin(saves, 1)
    outcome = saves.collect()
    assert outcome is not None
    assert is_whole(outcome.path, 1)
    assert saves.collect() is None


@pytest.mark.parametrize(("leaving", "waits"), [(None, True), (UserError, True), (KeyboardInterrupt, False)])
def test_leaving_waits_unless_told_to_leave_at_once(
    leaving: Any, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = hold_writes(monkeypatch)
    saves = AsyncCheckpointWriter(CheckpointManager(tmp_path / "checkpoints", keep=3), plenty)
    threading.Timer(0.3, disk.set).start()
    with suppress(UserError, KeyboardInterrupt), saves:
        begin(saves, 1)
        if leaving:
            raise leaving("")
    assert (tmp_path / "checkpoints" / "step-000001").is_dir() is waits
    saves.collect(wait=True)


# --- damage


def damaged(path: Path) -> str:
    """The message of verify; any other exception fails the test."""
    with pytest.raises(CheckpointCorrupted) as caught:
        verify(path)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(CheckpointManager(tmp_path / "checkpoints", keep=3), 5)


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_passes(name: str, path: Path) -> None:
    content = (path / name).read_bytes()
    bits = random.Random(0).sample(range(8 * len(content)), min(300, 8 * len(content)))
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(changed)
        assert name in damaged(path)
    (path / name).write_bytes(content)
    assert verify(path).state["step"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_passes_anywhere(name: str, path: Path) -> None:
    content = (path / name).read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(changed)
        damaged(path)


@pytest.mark.parametrize("name", FILES)
def test_no_other_content_passes(name: str, path: Path) -> None:
    content = (path / name).read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        (path / name).write_bytes(content[:length])
        assert name in damaged(path)
    (path / name).write_bytes(content + b"x")
    assert name in damaged(path)
    (path / name).write_bytes(bytes(len(content)))  # a page of zeros
    assert name in damaged(path)
    (path / name).unlink()
    assert name in damaged(path)
    (path / name).mkdir()
    assert name in damaged(path)


def test_files_of_another_checkpoint_do_not_pass(path: Path) -> None:
    other = save(CheckpointManager(path.parents[1] / "other", keep=3), 6)
    for name in FILES:
        before = (path / name).read_bytes()
        shutil.copyfile(other / name, path / name)
        damaged(path)
        (path / name).write_bytes(before)
    verify(path)


def test_surplus_files_and_links_do_not_pass(path: Path) -> None:
    (path / "more.bin").write_bytes(b"")
    assert "more.bin" in damaged(path)
    (path / "more.bin").unlink()
    (path / "state.json").rename(path.parent / "elsewhere")
    (path / "state.json").symlink_to(path.parent / "elsewhere")
    assert "state.json" in damaged(path)


def seal(body: Any) -> bytes:
    """A manifest with the right hash of itself, as an attacker would write it."""
    text = json.dumps(body, indent=1, sort_keys=True).encode()
    return json.dumps({"body": body, "sha256": hashlib.sha256(text).hexdigest()}).encode()


def test_the_seal_of_these_tests_is_the_real_one(path: Path) -> None:
    body = json.loads((path / "manifest.json").read_text())["body"]
    (path / "manifest.json").write_bytes(seal(body))
    assert verify(path).state["step"] == 5


HASH = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
MANIFESTS = {
    "outside": seal({"format": 2, "step": 5, "files": {"../x": HASH}}),
    "absolute": seal({"format": 2, "step": 5, "files": {"/etc/hostname": HASH}}),
    "below": seal({"format": 2, "step": 5, "files": {"a/b": HASH}}),
    "dots": seal({"format": 2, "step": 5, "files": {"..": HASH}}),
    "no name": seal({"format": 2, "step": 5, "files": {"": HASH}}),
    "null byte": seal({"format": 2, "step": 5, "files": {"a\0": HASH}}),
    "no files": seal({"format": 2, "step": 5, "files": {}}),
    "files a list": seal({"format": 2, "step": 5, "files": ["state.json"]}),
    "files null": seal({"format": 2, "step": 5, "files": None}),
    "files missing": seal({"format": 2, "step": 5}),
    "another format": seal({"format": 1, "step": 5, "files": {}}),
    "body a list": seal([1]),
    "body null": seal(None),
    "owner a list": seal({"format": 2, "step": 5, "belongs_to": [1], "files": {}}),
    "a number": b"5",
    "null": b"null",
    "a list": b"[]",
    "no json": b"{",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "no hash": b'{"body": {}}',
    "empty": b"",
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_no_other_manifest_passes(case: str, path: Path) -> None:
    (path / "manifest.json").write_bytes(MANIFESTS[case])
    damaged(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"[" * 100_000, b"\xff"])
def test_a_state_that_is_no_object_does_not_pass(content: bytes, path: Path) -> None:
    body = json.loads((path / "manifest.json").read_text())["body"]
    (path / "state.json").write_bytes(content)
    body["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(seal(body))
    damaged(path)


def test_a_file_that_the_disk_cannot_read_is_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.hash_file

    def bad_sector(file: Path) -> Any:
        if file.name == "optimizer.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return real(file)

    monkeypatch.setattr(checkpoint, "hash_file", bad_sector)
    with pytest.raises(CheckpointCorrupted, match=r"optimizer\.safetensors: cannot be read: Input/output error"):
        verify(path)


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    damaged(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"x")
    damaged(tmp_path / "file")


def test_the_newest_whole_one_is_taken_and_the_damage_told(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        save(checkpoints, step)
    (checkpoints.path(3) / "adapter.safetensors").write_bytes(b"x")
    (checkpoints.path(2) / "manifest.json").unlink()
    saved, damage = checkpoints.newest()
    assert saved is not None
    assert saved.path == checkpoints.path(1)
    assert [str(checkpoints.path(3) / "adapter.safetensors") in damage[0], str(checkpoints.path(2)) in damage[1]] == [
        True,
        True,
    ]
    (checkpoints.path(1) / "state.json").unlink()
    with pytest.raises(UserError, match=r"step-000003.*no other checkpoint is valid: start a new run"):
        checkpoints.newest()


# --- faults while saving


class Fault(OSError):
    pass


@contextmanager
def patched(around: Callable[..., Any]) -> Iterator[None]:
    """Each operation that changes the disk becomes around(name, the real one, its arguments)."""
    real = {name: getattr(os, name) for name in OPERATIONS}
    for name in OPERATIONS:
        setattr(os, name, functools.partial(around, name, real[name]))
    try:
        yield
    finally:
        for name in OPERATIONS:
            setattr(os, name, real[name])


@contextmanager
def every_operation(before: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `before` ahead of each operation that changes the disk."""

    def around(name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        before(name, args)
        return real(*args, **options)

    with patched(around):
        yield


def count_operations(action: Callable[[], Any]) -> list[str]:
    names: list[str] = []
    with every_operation(lambda name, _: names.append(name)):
        action()
    return names


def fail_at(number: int, fault: Callable[[], None]) -> Callable[[str, tuple[Any, ...]], None]:
    left = [number]

    def before(_name: str, _args: tuple[Any, ...]) -> None:
        left[0] -= 1
        if left[0] == -1:
            fault()

    return before


def scene(tmp_path: Path, redo: bool) -> Callable[[], Callable[[], Any]]:
    """Makes a directory with checkpoints 1, 2 and 3 (keep 2, best 1), and gives the save to disturb: of 4, or of 3."""
    directory = tmp_path / "checkpoints"

    def make() -> Callable[[], Any]:
        shutil.rmtree(tmp_path, ignore_errors=True)
        checkpoints = CheckpointManager(directory, keep=2)
        for step in (1, 2, 3):
            save(checkpoints, step, (1, 1.0))
        step = 3 if redo else 4
        return lambda: save(checkpoints, step, (step, 0.5))

    return make


def check_what_is_left(tmp_path: Path, redo: bool) -> int:
    """After a fault: every checkpoint that counts is whole, none of the newest is lost, and saving works again."""
    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=2)
    saved, _ = checkpoints.newest()
    assert saved is not None
    newest = int(saved.state["step"])
    assert newest in ((3,) if redo else (3, 4))
    assert is_whole(saved.path, newest)
    assert not list((tmp_path / "checkpoints").glob(".*")), "leftovers are swept"
    best = checkpoints.best()
    assert best is not None
    assert best[0] in (1, 3, 4)
    assert is_whole(verify(checkpoints.path(best[0])).path, best[0])
    save(checkpoints, 5, (5, 0.1))
    saved, damage = checkpoints.newest()
    assert saved is not None
    assert (saved.state["step"], damage) == (5, [])
    return newest


@pytest.mark.parametrize("redo", [False, True])
def test_killed_before_any_operation_a_whole_checkpoint_is_left(redo: bool, tmp_path: Path) -> None:
    make = scene(tmp_path / "run", redo)
    total = len(count_operations(make()))
    assert total > (3 if redo else 20)
    outcomes = []
    for number in range(total + 1):
        action = make()
        child = os.fork()
        if child == 0:
            with every_operation(fail_at(number, lambda: os._exit(9))):
                action()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if number < total else 0)
        outcomes.append(check_what_is_left(tmp_path / "run", redo))
    if not redo:
        assert outcomes == sorted(outcomes), "first the old one, then the new one"
        assert set(outcomes) == {3, 4}


@pytest.mark.parametrize("error", rest_is_slow([28, 5, 122], 28))  # ENOSPC, EIO, EDQUOT
@pytest.mark.parametrize("redo", [False, True])
def test_refused_by_the_disk_anywhere_nothing_is_lost(error: int, redo: bool, tmp_path: Path) -> None:
    def refuse() -> None:
        raise Fault(error, os.strerror(error))

    make = scene(tmp_path / "run", redo)
    total = len(count_operations(make()))
    for number in range(total):
        action = make()
        with every_operation(fail_at(number, refuse)), suppress(Fault):
            action()
        check_what_is_left(tmp_path / "run", redo)


# --- power loss


@dataclass
class Disk:
    """What a journaling file system may hold after a power loss: names in order, data only if it was synced.

    `names` follows the operations; `synced` is each file's content at its last fsync. A crash may lose the names since
    the last fsync of a directory, or none of them, and any content that was not synced.
    """

    root: Path
    names: dict[str, Any] = field(default_factory=dict)  # path -> inode number, or None for a directory
    content: dict[int, bytes] = field(default_factory=dict)
    synced: dict[int, bytes] = field(default_factory=dict)
    kept_names: dict[str, Any] = field(default_factory=dict)  # at the last fsync of a directory
    open_files: dict[int, str] = field(default_factory=dict)

    def states(self) -> Iterator[tuple[dict[str, Any], bool]]:
        for names in (self.names, self.kept_names):
            for zeros in (False, True):
                yield names, zeros

    def write_to(self, directory: Path, names: dict[str, Any], zeros: bool) -> None:
        """Write such a state to disk: content that was not synced is missing, or zeros of the right length."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for path in sorted(names):
            inode = names[path]
            if inode is None:
                (directory / path).mkdir(exist_ok=True)
                continue
            lost = bytes(len(self.content[inode])) if zeros else b""
            (directory / path).write_bytes(self.synced.get(inode, lost))

    def note(self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Apply an operation that was just done to the model of the disk."""
        folder = self.root / self.open_files.get(options.get("dir_fd") or -1, "")
        paths = [str((folder / a).relative_to(self.root)) for a in args if isinstance(a, (str, Path))]
        if name == "open":
            self.open_files[result] = paths[0]
            if args[1] & os.O_CREAT:
                self.names[paths[0]] = len(self.content)
                self.content[len(self.content)] = b""
        elif name == "write":
            self.content[self.names[self.open_files[args[0]]]] += bytes(args[1])[:result]
        elif name == "fsync":
            inode = self.names.get(self.open_files[args[0]])
            if inode is None:
                self.kept_names = dict(self.names)
            else:
                self.synced[inode] = self.content[inode]
        elif name == "mkdir":
            self.names[paths[0]] = None
        elif name in ("unlink", "rmdir"):
            del self.names[paths[0]]
        else:
            old, new = paths[0], paths[1]
            moved = {p: p.replace(old, new, 1) for p in self.names if p == old or p.startswith(old + "/")}
            self.names = {moved.get(p, p): i for p, i in self.names.items() if p in moved or p != new}


@contextmanager
def recorded(disk: Disk, after: Callable[[], None], skip_fsync: Callable[[str], bool]) -> Iterator[None]:
    """Follow every operation on a model of the disk, and call `after` behind each."""

    def around(name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        result = real(*args, **options)
        if not (name == "fsync" and skip_fsync(disk.open_files[args[0]])):
            disk.note(name, args, options, result)
        after()
        return result

    with patched(around):
        yield


def lose_power_everywhere(tmp_path: Path, skip_fsync: Callable[[str], bool] = lambda _: False) -> list[str]:
    """Save once, and check every state that a power loss may leave; returns the errors."""
    root, replay = tmp_path / "run", tmp_path / "replay"
    action = scene(root, False)()
    disk = Disk(root)
    for path in sorted(root.rglob("*")):
        name, number = str(path.relative_to(root)), len(disk.content)
        disk.names[name] = None if path.is_dir() else number
        if path.is_file():
            disk.content[number] = disk.synced[number] = path.read_bytes()
    disk.kept_names = dict(disk.names)
    faults: list[str] = []
    snapshots: list[tuple[dict[str, Any], bool, dict[int, bytes], dict[int, bytes]]] = []

    def after() -> None:
        snapshots.extend((dict(n), z, dict(disk.content), dict(disk.synced)) for n, z in disk.states())

    with recorded(disk, after, skip_fsync):
        action()
    done = len(snapshots) - 4  # the states after the last operation: the save has returned
    for number, (names, zeros, content, synced) in enumerate(snapshots):
        Disk(root, content=content, synced=synced).write_to(replay, names, zeros)
        try:
            newest = check_what_is_left(replay, redo=False)
            if number >= done and newest != 4:
                faults.append("the save returned, and yet it is gone")
        except (AssertionError, UserError, CheckpointCorrupted, ValueError) as error:
            faults.append(f"state {number}: {error!r:.200}")
    return faults


def test_power_may_fail_at_any_time(tmp_path: Path) -> None:
    assert lose_power_everywhere(tmp_path) == []


@pytest.mark.parametrize(
    "forgotten", rest_is_slow(["adapter.safetensors", "state.json", "manifest.json", "best.json"], "manifest.json")
)
def test_a_forgotten_fsync_would_be_found(forgotten: str, tmp_path: Path) -> None:
    assert lose_power_everywhere(tmp_path, lambda path: forgotten in path) != []


def test_a_forgotten_fsync_of_the_directory_would_be_found(tmp_path: Path) -> None:
    assert lose_power_everywhere(tmp_path, lambda path: Path(path).suffix == "") != []


def test_everything_is_synced_before_the_name_is_given(tmp_path: Path) -> None:
    events: list[str] = []
    opened: dict[int, str] = {}
    real_open = os.open

    def opening(path: Any, *args: Any, **options: Any) -> int:
        descriptor = real_open(path, *args, **options)
        opened[descriptor] = Path(path).name
        return descriptor

    checkpoints = CheckpointManager(tmp_path / "checkpoints", keep=2)
    os.open = opening  # type: ignore[assignment]
    try:
        with every_operation(lambda name, args: events.append(f"fsync {opened[args[0]]}" if name == "fsync" else name)):
            save(checkpoints, 1)
    finally:
        os.open = real_open
    published = events.index("rename")
    for name in FILES:
        assert events.index(f"fsync {name}") < published
    assert events.index("fsync manifest.json") > max(events.index(f"fsync {n}") for n in FILES if n != "manifest.json")
    assert events[published - 1].startswith("fsync .tmp-step-000001")
    assert "fsync checkpoints" in events[published:]
