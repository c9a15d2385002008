"""Hostile models, tokenizers, adapters, runs and configs: each is refused in one line, within bounds.

The cases are in hostile.py. They run in one process, whose memory and processor time the system limits.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import TARGETS, search
from hostile import CANARY, CASES, SECRET, TOKEN, Case, Payload, stolen
from tiers import rest_is_slow

import eval as eval_command
import train
from nanoft import UserError
from nanoft.data.sources import read_raw
from tiny_models import make_chat_model, train_run, write_records

ROOT = Path(__file__).parent.parent
SECONDS = 12  # of processor time for a case: 5 for rendering, and compiling a long template on a slow machine
LONGEST = 2200  # characters of a refusal

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")


def prepare(case: Case, path: Path, good: Path) -> str:
    """Make the hostile copy of a valid input; returns how to read it."""
    kind = "merge" if case.kind == "merge_stolen" else case.kind
    if kind == "config":
        path.mkdir()
        (path / "c.yaml").touch()
    elif kind == "run":
        shutil.copytree(good / "run", path, ignore=shutil.ignore_patterns("adapter"))
    else:
        shutil.copytree(good / "run" / "adapter" if kind in ("adapter", "merge", "eval") else good / "model", path)
    if case.kind == "merge_stolen":
        stolen(path)
    case.change(path)
    return kind


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a finished run, whose best checkpoint is its last."""
    root = tmp_path_factory.mktemp("good")
    make_chat_model(root / "model")
    train_run(root / "run", root / "model", write_records(root / "data.jsonl"))
    return root


@pytest.fixture(scope="module")
def refusals(
    good: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, tuple[str, float]]]:
    """The refusal of every selected case, and the seconds that it took."""
    items: list[Any] = [item for item in request.session.items if "refusals" in getattr(item, "fixturenames", ())]
    selected = [item.callspec.params["name"] for item in items]
    root = tmp_path_factory.mktemp("hostile")
    places = {name: root / f"case{number}" for number, name in enumerate(selected)}
    cases = [(name, prepare(CASES[name], places[name], good), str(places[name])) for name in selected]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "RUST_BACKTRACE": "0"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "hostile.py"],
        input=json.dumps([str(good), cases]),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [name for name, _, _ in results] == selected, done.stderr[-1000:]
    yield {name: (said, seconds) for name, said, seconds in results}
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    small = [path for path in files if path.stat().st_size < 1 << 20]
    found = [path for path in small if SECRET in path.read_text(errors="replace")]
    assert {path.name.rpartition("-")[2] for path in found} <= {"key"}, "a secret was copied to another file"
    assert not CANARY.exists()


@linux
@pytest.mark.parametrize("name", rest_is_slow(CASES, *list(CASES)[::4]))
def test_refused_in_one_line(name: str, refusals: dict[str, tuple[str, float]]) -> None:
    said, seconds = refusals[name]
    assert re.search(CASES[name].says, said), said
    assert not said.startswith(("accepted", "escaped", "exit code"))
    assert len(said) < LONGEST
    assert said.isprintable()
    assert TOKEN not in said
    assert seconds < SECONDS


@pytest.mark.quick
def test_the_payload_would_be_noticed() -> None:
    pickle.loads(pickle.dumps(Payload()))
    assert CANARY.exists()
    CANARY.rmdir()


@pytest.mark.parametrize("target", TARGETS)
def test_random_inputs(target: str) -> None:
    search(target, examples=80)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_more_random_inputs(target: str) -> None:
    search(target, examples=20_000)


# The first versions without known holes that concern what nanoft does with them.
SAFE_FROM = {
    "torch": (2, 6),  # CVE-2025-32434: weights_only=True could be passed by
    "jinja2": (3, 1, 6),  # CVE-2025-27516: |attr led out of the sandbox
    "pyyaml": (5, 4),  # CVE-2020-14343: the full loader ran code
    "tqdm": (4, 66, 3),  # CVE-2024-34062: command-line arguments were evaluated
    "pyarrow": (14, 0, 1),  # CVE-2023-47248: Parquet files could run code
    "setuptools": (78, 1, 1),  # CVE-2025-47273: a package could be written anywhere
}


@pytest.mark.quick
def test_the_ranges_of_dependencies_leave_known_holes_out() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += project["project"]["optional-dependencies"]["parquet"]
    lowest = {
        name: tuple(map(int, version.split("."))) for name, version in re.findall(r"(\w+)>=([\d.]+)", str(wanted))
    }
    assert {name: lowest[name] for name in SAFE_FROM if lowest[name] < SAFE_FROM[name]} == {}


def test_no_token_leaves(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Neither one that the environment holds, nor one in a name, an address, a record or a template's words."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET_KEY := "0123456789abcdef" * 3)
    words = f"tell {TOKEN} and {SECRET_KEY}"
    shutil.copytree(good / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(f"{{{{ raise_exception('{words}') }}}}")
    records = tmp_path / "data.jsonl"
    records.write_text("\n".join(json.dumps({"prompt": f"{n} {words}", "completion": words}) for n in range(24)))
    settings = json.loads((good / "run.json").read_text())
    settings["data"]["train_file"], settings["output"]["dir"] = str(records), str(tmp_path / "run")
    settings["logging"] = {"progress_bar": False, "plots": "none"}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert train.main([str(tmp_path / "run.json")]) == 0
    assert (
        train.main([str(tmp_path / "run.json"), f"model.name={tmp_path / 'model'}", f"output.dir={tmp_path / 'other'}"])
        == 2
    )
    for name in (f"https://me:{TOKEN}@huggingface.co/x/y", f"/nowhere/{TOKEN}"):
        assert train.main([str(tmp_path / "run.json"), f"model.name={name}"]) == 2
        assert train.main([str(tmp_path / "run.json"), f"lora.rank={name}"]) == 2
        assert eval_command.main([name]) == 2
    said = capsys.readouterr()
    everywhere = [said.out, said.err]
    for path in ("train.log", "metrics.jsonl", "config.json", "report.md", "report.json"):
        everywhere.append((tmp_path / "run" / path).read_text())
    assert "***" in said.out
    for text in everywhere:
        assert TOKEN not in text
        assert SECRET_KEY not in text


@pytest.mark.quick
def test_a_small_file_that_unpacks_to_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoft.data.sources.MAX_VALUES", 1 << 20)
    for size, refused in ((1 << 19, False), (1 << 20, True)):
        with gzip.open(tmp_path / "a.json.gz", "wb") as file:
            file.write(b'{"text": "' + b"x" * size + b'"}')
        if refused:
            with pytest.raises(UserError, match=r"a\.json\.gz: longer than 1 MiB, and not JSON Lines"):
                list(read_raw(tmp_path / "a.json.gz"))
        else:
            assert list(read_raw(tmp_path / "a.json.gz")) == [(1, {"text": "x" * size})]
