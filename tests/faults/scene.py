"""A run of six steps that crosses an epoch, evaluates, draws dropout and saves; what must be the same after faults."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Fault, Outcome, Running, Server

from nanoft import checkpoint
from tiny_models import make_chat_model

STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "float32", "max_seq_length": 128},
    "lora": {"rank": 2, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj"]},
    "data": {"validation_split": 0.25},
    "training": {
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "log_steps": 1,
        "eval_steps": 3,
        "save_steps": 2,
        "keep_checkpoints": 2,
        "learning_rate": 0.01,
    },
    "evaluation": {"prompts": 2, "max_new_tokens": 4},
    "logging": {"progress_bar": False, "show_example": False, "plots": "none"},
    "system": {"device": "cpu", "threads": 1},
}


@dataclass(frozen=True)
class Facts:
    """The results of a run, without its times."""

    adapter: bytes
    checkpoints: dict[str, dict[str, Any]]  # of each: its files' bytes, and its state
    metrics: list[tuple[Any, ...]]
    report: tuple[Any, ...]
    names: set[str]  # of all files


def facts(directory: Path) -> Facts:
    """Read a finished run; fails if a line of its metrics or a checkpoint is incomplete."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text("utf-8").splitlines()]
    keys = {"train": ("event", "step", "loss", "learning_rate", "grad_norm"), "eval": ("event", "step", "loss")}
    metrics = [tuple(line[key] for key in keys[line["event"]]) for line in lines if line["event"] in keys]
    assert [line["event"] for line in lines].count("done") == 1
    checkpoints = {}
    for path in sorted((directory / "checkpoints").iterdir()):
        if not (path / checkpoint.MANIFEST).is_file():
            continue  # killed while it was removed
        saved = checkpoint.verify(path)
        meter = {key: value for key, value in saved.state["meter"].items() if "seconds" not in key}
        files = {name: (path / f"{name}.safetensors").read_bytes() for name in ("adapter", "optimizer")}
        checkpoints[path.name] = {**files, "state": {**saved.state, "meter": meter}}
    report = json.loads((directory / "report.json").read_text("utf-8"))
    names = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    return Facts(adapter, checkpoints, metrics, (report["base"], report["tuned"], report["training"]["steps"]), names)


@dataclass
class Scene:
    """A base, data, settings, and the undisturbed run."""

    server: Server
    config: Path
    records: Path
    whole: Facts
    seconds: float  # that it took
    operations: list[str]  # on its checkpoints, in order: "write /path"

    def argv(self, directory: Path, *more: str) -> list[str]:
        return [str(self.config), f"output.dir={directory}", *more]

    def start(self, directory: Path, *more: str, fault: Fault | None = None) -> Running:
        return self.server.start(self.argv(directory, *more), fault)

    def run(self, directory: Path, *more: str, fault: Fault | None = None) -> Outcome:
        return self.start(directory, *more, fault=fault).wait()

    def check_result(self, directory: Path) -> Facts:
        """Assert that the result is the same, bit for bit; the run may have saved at other steps."""
        found, last = facts(directory), f"step-{STEPS:06d}"
        assert found.metrics == self.whole.metrics
        assert found.checkpoints[last] == self.whole.checkpoints[last]
        assert found.adapter == self.whole.adapter
        assert found.report == self.whole.report
        return found

    def check(self, directory: Path) -> None:
        """Also assert that saves are equal, and that nothing is left except checkpoints that were to be removed."""
        found, expected = self.check_result(directory), self.whole
        assert {name: found.checkpoints[name] for name in expected.checkpoints} == expected.checkpoints
        surplus = [name for name in found.names - expected.names if not name.startswith("checkpoints/step-")]
        assert (surplus, expected.names - found.names) == ([], set())

    def goes_on(self, directory: Path, *more: str) -> Outcome:
        """Assert that the same command leads to the same result."""
        done = self.run(directory, *more)
        assert (done.code, done.err) == (0, "")
        self.check(directory)
        return done

    def save_of(self, step: int) -> range:
        """The numbers of the operations of that save."""
        begins = [number for number, line in enumerate(self.operations) if line.startswith("mkdir") and ".tmp-" in line]
        steps = [int(re.findall(r"\.tmp-step-(\d+)", self.operations[number])[0]) for number in begins]
        ends = [*begins[1:], len(self.operations)]
        return range(begins[steps.index(step)], ends[steps.index(step)])


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


def wait_for(path: Path, text: str = "") -> None:
    """Until the file is there, and holds the text."""
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text("utf-8")):
        assert time.monotonic() < deadline, path
        time.sleep(0.002)


def make_scene(server: Server, root: Path) -> Scene:
    make_chat_model(root / "base")
    turns = [(f"Say {n} {'and again ' * (n % 4)}… 日本", f"{n}, {n + 1}é" + "!" * (n % 3)) for n in range(24)]
    lines = [json.dumps({"prompt": ask, "completion": reply}, ensure_ascii=False) + "\n" for ask, reply in turns]
    (root / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {name: dict(section) for name, section in SETTINGS.items()}
    settings["model"]["name"], settings["data"]["train_file"] = str(root / "base"), str(root / "data.jsonl")
    (root / "config.json").write_text(json.dumps(settings))
    argv = [str(root / "config.json"), f"output.dir={root / 'whole'}"]
    assert server.run([*argv, "--preflight"]).code == 0  # fills the cache
    (root / "whole").rename(root / "preflight")
    started = time.monotonic()
    done = server.run(argv, Fault(log=str(root / "operations")))
    seconds = time.monotonic() - started
    assert (done.code, done.err) == (0, "")
    operations = (root / "operations").read_text().splitlines()
    return Scene(server, root / "config.json", root / "data.jsonl", facts(root / "whole"), seconds, operations)
