"""Names of table entries: each entry passes, and for a misspelled one a one-line error suggests the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

import train
from nanoft import UserError
from nanoft.config import Config, TrainingConfig
from nanoft.data.formats import SHAPES
from nanoft.lora import VARIANTS, LoRALinear
from nanoft.metrics.answers import METRICS
from nanoft.optim import OPTIMIZERS, SCHEDULES
from nanoft.training.validation import check_schedule, validate_config

TABLES: dict[str, list[str]] = {
    "training.optimizer": list(OPTIMIZERS),
    "training.lr_scheduler": list(SCHEDULES),
    "data.format": ["auto", *SHAPES],
    "lora.init": [init for init, dora in VARIANTS if not dora],
    "evaluation.metrics": [name for name, entry in METRICS.items() if not entry.argument],
}
ENTRIES = [(field, name) for field, names in TABLES.items() for name in names]


def with_name(field: str, name: str) -> Config:
    return Config().override({field: (name,) if field == "evaluation.metrics" else name})


@pytest.mark.parametrize(("field", "name"), ENTRIES)
def test_every_entry_of_a_table_is_valid_and_its_misspelling_is_answered_with_it(field: str, name: str) -> None:
    validate_config(with_name(field, name))
    with pytest.raises(UserError) as caught:
        validate_config(with_name(field, f"{name}z"))
    message = str(caught.value)
    assert message.startswith(f"{field}: ")
    assert f"did you mean {name}?" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharding_follows_the_table(name: str) -> None:
    config = Config().override(training={"optimizer": name, "sharding": "full"})
    if OPTIMIZERS[name].shardable:
        validate_config(config)
    else:
        with pytest.raises(UserError, match=f"training.optimizer: the state of {name} cannot be sharded: set "):
            validate_config(config)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_shards_of_integers_need_pytorch_2_12(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config().override({"training.sharding": "full", "quantization.bits": bits})
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.0+cpu"))
    validate_config(config)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    if bits == 16:
        validate_config(config)
    else:
        with pytest.raises(UserError, match=r"training.sharding: full: .* PyTorch 2.12 or later, this is 2.11.0: "):
            validate_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.optimizer=adamw_8bits", "training.optimizer: 'adamw_8bits' is not known: did you mean adamw_8bit?"),
        ("training.lr_scheduler=cosin", "training.lr_scheduler: 'cosin' is not known: did you mean cosine?"),
    ],
)
def test_train_answers_before_anything_is_made(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Any = tmp_path / "run"
    assert train.main(["configs/tiny.py", change, f"output.dir={run}"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not run.exists()


class TrainsA(LoRALinear):
    """A variant that trains A alone."""

    TRAINED = ("lora_A",)


class TrainsB(LoRALinear):
    TRAINED = ("lora_B",)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (LoRALinear, {"lora.init": "pissa", "lora.rank": 2049}, "lora.rank: 2049: pissa is saved as LoRA with 2 times"),
        (LoRALinear, {"lora.init": "pissa", "lora.rank_pattern": {"q": 4000}}, "set lora.rank to 2048 or less"),
        (TrainsB, {"lora.freeze_a": True}, "lora.freeze_a: has no effect with lora.init=default: remove it"),
        (TrainsA, {"training.lora_plus_ratio": 4.0}, "training.lora_plus_ratio: has no effect with lora.init=default"),
    ],
)
def test_what_a_variant_does_not_train_is_refused(
    variant: type[LoRALinear], changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, ("default", False), variant)
    with pytest.raises(UserError, match=message):
        validate_config(Config().override(changes))
    if variant is not LoRALinear:
        monkeypatch.setitem(VARIANTS, ("default", False), LoRALinear)
        validate_config(Config().override(changes))


@pytest.mark.parametrize("rate", [0.0, 1.01, 2e4])
def test_a_learning_rate_that_cannot_be_meant_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match=r"^training\.learning_rate: "):
        validate_config(Config().override({"training.learning_rate": rate}))


def test_a_warmup_that_is_longer_than_the_run_is_refused() -> None:
    t = TrainingConfig(warmup_steps=30)
    for total_steps in (None, 30):
        check_schedule(t, total_steps)
    check_schedule(TrainingConfig(warmup_ratio=1.0), 30)
    with pytest.raises(UserError, match=r"^training\.warmup_steps: 30: the run has 29 steps"):
        check_schedule(t, 29)
