"""Tests of nanoft/models/model_files.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub import Hub
from safetensors.torch import load_file, save_file

from nanoft import UserError
from nanoft.config import Config, QuantizationConfig
from nanoft.model import Decoder
from nanoft.models.model_files import ModelFiles, check_quantization, find_model, quantization_of
from nanoft.models.weights import load_model
from tiny_models import make_chat_model, make_packed, make_reference

CPU = torch.device("cpu")


IDS = torch.randint(0, 199, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    result: torch.Tensor = model.logits(model(ids)) if isinstance(model, Decoder) else model(ids).logits
    return result


def load(directory: Path, **settings: Any) -> Decoder:
    return load_model(directory, CPU, torch.float32, **settings)


FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, None),
        ({"bits": 8}, ("int8", False)),
        ({"bits": 4}, ("nf4", True)),
        ({"bits": 4, "type": "fp4", "double": False}, ("fp4", False)),
    ],
)
def test_the_fields_of_quantization_make_one_form(fields: dict[str, Any], form: Any) -> None:
    assert quantization_of(Config(quantization=QuantizationConfig(**fields))) == form


# --- models that bitsandbytes packed


def settings_of(form: tuple[str, bool]) -> dict[str, Any]:
    """The form in transformers' words."""
    kind, double = form
    if kind == "int8":
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases and a tied head, and in each form as transformers saves it; and that in small shards."""
    root = tmp_path_factory.mktemp("packed")
    make_reference("qwen2", root / "source")
    for kind, double in FORMS:
        make_packed(root / "source", root / f"{kind}-{double}", **settings_of((kind, double)))
        shutil.copytree(root / f"{kind}-{double}", shards := root / f"{kind}-{double}-shards")
        tensors = load_file(shards / "model.safetensors")
        (shards / "model.safetensors").unlink()
        apart = sorted(tensors, key=lambda name: name[::-1])  # a weight's tensors far from one another
        write_sharded(shards, {name: tensors[name] for name in apart}, 20_000)
    return root


@pytest.mark.parametrize(
    ("stored", "asked", "fields"),
    [
        ("nf4-True", None, "bits=4 quantization.type=nf4 quantization.double=true"),
        ("nf4-True", ("nf4", False), "bits=4 quantization.type=nf4 quantization.double=true"),
        ("fp4-False", ("nf4", True), "bits=4 quantization.type=fp4 quantization.double=false"),
        ("fp4-False", ("int8", False), "bits=4 quantization.type=fp4 quantization.double=false"),
        ("int8-False", None, "bits=8, "),
        ("int8-False", ("nf4", True), "bits=8, "),
    ],
)
def test_settings_that_are_not_what_the_model_is_are_told_what_to_be(
    stored: str, asked: Any, fields: str, packed: Path
) -> None:
    with pytest.raises(UserError, match=f"stored in .*: set quantization.{fields}") as raised:
        check_quantization(ModelFiles.read(packed / stored), asked)
    assert str(packed / stored) in str(raised.value)
    if asked:
        with pytest.raises(UserError, match="stored in"):
            load(packed / stored, quantization=asked)


def test_settings_that_are_what_the_model_is_are_accepted(packed: Path) -> None:
    for form in FORMS:
        directory = packed / f"{form[0]}-{form[1]}"
        check_quantization(ModelFiles.read(directory), form)
        assert torch.equal(logits(load(directory, quantization=form)), logits(load(directory)))
        check_quantization(ModelFiles.read(packed / "source"), form)
    check_quantization(ModelFiles.read(packed / "source"), None)


def write_sharded(directory: Path, state: dict[str, torch.Tensor], limit: int) -> None:
    """One file, or several with an index, in the format's own writer."""
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in state.items():
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > limit:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        save_file(files[0], directory / "model.safetensors")
        return
    weight_map = {}
    for number, part in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --- the Hub


@pytest.fixture
def hub(tmp_path: Path, serve_hub: Callable[[Any], None]) -> type[Hub]:
    handler = type("ThisHub", (Hub,), {"repository": "models/some/model", "files": tmp_path / "remote", "asked": []})
    serve_hub(handler)
    return handler


def test_a_hub_name_is_fetched_once_and_only_as_data(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    make_chat_model(hub.files)
    shutil.move(hub.files / "model.safetensors", hub.files / "model-00001-of-00001.safetensors")
    (hub.files / "original").mkdir()
    surplus = ["modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors", "original/x.safetensors", "a.pkl"]
    for name in surplus:
        (hub.files / name).write_text("never read")
    names = load_file(hub.files / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (hub.files / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    found = find_model("some/model")
    fetched = {str(path.relative_to(found)) for path in found.rglob("*") if not path.is_dir()}
    expected = {str(path.relative_to(hub.files)) for path in hub.files.rglob("*") if path.is_file()} - {*surplus}
    assert fetched == expected
    assert not [path for path in hub.asked if any(path.endswith(name) for name in surplus)]
    ids = torch.arange(9)[None]
    assert torch.equal(logits(load(found), ids), logits(load(hub.files), ids))

    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_model("some/model") == found  # from the cache
    assert hub.asked == []


def test_a_hub_name_that_cannot_be_had_is_one_line(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^model.name: no/such: no such directory, and could not be downloaded from the Hub: "
    ) as raised:
        find_model("no/such")
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"^lora: some/model: ") as raised:
        find_model("some/model", "lora")
    assert "\n" not in str(raised.value)


def test_what_looks_like_a_path_is_not_asked_of_the_hub(hub: type[Hub]) -> None:
    for name in ("./x", "/no/such/directory", "~/x", "a/b/c"):
        with pytest.raises(UserError, match=f"{name}: no such directory"):
            find_model(name)
    with pytest.raises(UserError, match="empty"):
        find_model("")
    assert hub.asked == []
