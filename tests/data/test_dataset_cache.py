"""The cache of tokenized data: found again, rebuilt if it is damaged, never incomplete."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoft import UserError
from nanoft.data import dataset
from nanoft.data.dataset import load_or_build
from nanoft.io.atomic import hash_files


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nanoft"


class Builder:
    """Writes two files, counts how often, and records messages."""

    def __init__(self) -> None:
        self.built = 0
        self.said: list[str] = []

    def __call__(self, directory: Path) -> None:
        self.built += 1
        (directory / "a.bin").write_bytes(bytes(range(256)) * 20)
        (directory / "b.txt").write_text("hello")

    def get(self, key: str = "k") -> Path:
        return load_or_build(key, self, self.said.append)[0]


def content(entry: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(entry.iterdir())}


def test_built_once_for_each_key(home: Path) -> None:
    build = Builder()
    first, again, other = build.get(), build.get(), build.get("another")
    assert first == again != other
    assert build.built == 2
    assert (first / "b.txt").read_text() == "hello"
    assert build.said == []
    assert [load_or_build(key, build, print)[1] for key in ("k", "third", "third")] == [True, False, True]


def flip(entry: Path, chance: random.Random) -> None:
    path = chance.choice(sorted(entry.iterdir()))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "bit": flip,
    "cut off": lambda entry, chance: os.truncate(entry / "a.bin", chance.randrange(5120)),
    "zeroed": lambda entry, _: (entry / "a.bin").write_bytes(bytes(5120)),
    "longer": lambda entry, _: (entry / "a.bin").write_bytes((entry / "a.bin").read_bytes() + b"\0"),
    "missing": lambda entry, _: (entry / "b.txt").unlink(),
    "extra": lambda entry, _: (entry / "c.txt").write_text("new"),
    "no manifest": lambda entry, _: (entry / "manifest.json").unlink(),
    "manifest cut off": lambda entry, _: os.truncate(entry / "manifest.json", 20),
    "manifest of nothing": lambda entry, _: (entry / "manifest.json").write_text("{}"),
    "manifest of a list": lambda entry, _: (entry / "manifest.json").write_text("[]"),
    "manifest names another": lambda entry, _: (entry / "manifest.json").write_text('{"../x": "0"}'),
    "swapped": lambda entry, _: os.replace(entry / "a.bin", entry / "b.txt"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_built_again(home: Path, name: str) -> None:
    build, chance = Builder(), random.Random(name)
    whole = content(build.get())
    for count in range(2, 8):
        DAMAGE[name](build.get(), chance)
        if content(build.get()) != whole:
            pytest.fail("a damaged entry was used")
        assert build.built == count
    assert all("damaged: rebuilding it" in line for line in build.said)
    assert len(build.said) == 6


def test_a_build_that_fails_or_dies_leaves_nothing(home: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        load_or_build("k", fail, print)
    assert list(home.iterdir()) == []
    code = (
        "import os, signal; from nanoft.data.dataset import load_or_build\n"
        "def die(directory):\n    (directory / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "load_or_build('k', die, print)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (left,) = home.iterdir()
    build = Builder()
    build.get()
    assert left.exists()  # it could still be at work
    os.utime(left, (0, 0))
    build.get("another")
    assert not left.exists()


def test_the_entry_is_made_real_last(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If any step of writing fails, the next call builds the complete entry."""
    for place, step in ((Path, "write_text"), (os, "rename")):
        build = Builder()

        def broken(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(place, step, broken)
            with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): set XDG_CACHE_HOME"):
                build.get(step)
        assert not [path for path in home.iterdir() if path.name.startswith(".tmp")]
        assert content(build.get(step))["b.txt"] == b"hello"


def test_two_builders_of_the_same(home: Path) -> None:
    """The second finds the entry of the first, and does not replace files that the first may be reading."""
    inner = Builder()
    opened: list[Any] = []

    def slow(directory: Path) -> None:
        inner(directory)
        opened.append(open(inner.get() / "b.txt"))  # noqa: SIM115 (held open while the other one ends)

    entry, _ = load_or_build("k", slow, inner.said.append)
    assert content(entry)["b.txt"] == b"hello"
    assert (entry / "b.txt").stat().st_ino == os.fstat(opened[0].fileno()).st_ino
    opened[0].close()
    assert [path.name for path in home.iterdir()] == [entry.name]


def test_what_was_not_used_for_longest_goes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_ENTRIES", 3)
    build = Builder()
    entries = {}
    for age, key in enumerate("abcd"):
        entries[key] = build.get(key)
        moment = time.time() - 1000 + age
        os.utime(entries[key], (moment, moment))
    build.get("b")  # used now
    build.get("e")
    assert {key for key, entry in entries.items() if entry.exists()} == {"b", "d"}


def test_a_build_in_progress_is_kept_however_many_entries_are_newer(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MAX_ENTRIES", 1)
    other = Builder()

    def slow(directory: Path) -> None:
        (directory / "first").write_text("x")
        os.utime(directory, (time.time() - 100,) * 2)
        other.get("other")
        (directory / "second").write_text("y")

    entry, _ = load_or_build("k", slow, print)
    assert content(entry).keys() == {"first", "second", "manifest.json"}
    assert list(home.iterdir()) == [entry]


def test_directories_that_vanish_meanwhile_do_not_matter(home: Path) -> None:
    """Other processes create and delete theirs."""
    home.mkdir()
    code = (
        "import contextlib, os, sys\n"
        "while True:\n"
        "    with contextlib.suppress(OSError):\n        os.mkdir(sys.argv[1])\n"
        "    with contextlib.suppress(OSError):\n        os.rmdir(sys.argv[1])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(home / ".tmp-x")]) as other:
        try:
            for number in range(300):
                Builder().get(str(number))
        finally:
            other.kill()


def test_no_place_to_write_but_for_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build = Builder()
    entry = build.get()
    assert content(entry) == {"a.bin": bytes(range(256)) * 20, "b.txt": b"hello"}
    assert entry.parent.parent == tmp_path
    (warning,) = build.said
    assert "file/nanoft: the cache is not writable (Not a directory): the data is not cached" in warning
    shutil.rmtree(entry)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*set XDG_CACHE_HOME"):
        build.get()


def test_what_is_prepared_for_once_goes_with_the_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = (
        "from nanoft.data.dataset import load_or_build\n"
        "print(load_or_build('k', lambda d: (d / 'x').write_text('x'), lambda _: None)[0])"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:  # what pathlib says when there is neither HOME nor an entry in the list of users
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a").write_text("one")
    first, second = (hash_files([tmp_path / "a"]) for _ in range(2))
    assert first == second
    build = Builder()
    assert content(build.get()) == content(build.get())
    assert build.built == 2


def test_a_cache_that_somebody_else_keeps_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    entry = build.get()

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("utime", "mkdir", "open"):
        monkeypatch.setattr(os, name, read_only)
    assert build.get() == entry
    assert (build.built, build.said) == (1, [])
