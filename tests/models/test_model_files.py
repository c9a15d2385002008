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
from transformers import AutoModelForCausalLM

from nanoft import UserError
from nanoft.config import Config, ModelConfig, QuantizationConfig
from nanoft.export.streaming import StreamedDecoder, open_rows
from nanoft.model import Decoder
from nanoft.models.model_files import ModelFiles, check_quantization, find_model, quantization_of, split_reference
from nanoft.models.weights import load_model, save_model
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
    """Write one file, or several with an index, with the safetensors library."""
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


# --- weights that are not what config.json says


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Read the single weights file, change the dictionary, write it again."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def set_config(directory: Path, **changes: Any) -> None:
    """Change config.json; None removes a field."""
    stored = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not None}))


def assert_equal_to_transformers(directory: Path) -> None:
    wanted = logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager"))
    assert (logits(load(directory)) - wanted).abs().max() < 1e-4


def test_a_head_that_differs_from_the_embedding_is_not_tied_to_it(tmp_path: Path) -> None:
    """As in transformers 5; and the exported model says so to every reader."""
    make_reference("llama-tied", tmp_path / "model")
    rewrite(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    files = ModelFiles.read(tmp_path / "model")
    assert files.decoder.tied
    assert not files.notes
    rewrite(tmp_path / "model", lambda t: t["lm_head.weight"].mul_(-2))
    files = ModelFiles.read(tmp_path / "model")
    assert not files.decoder.tied
    assert files.notes == (
        f"{tmp_path}/model/config.json: tie_word_embeddings is true, but lm_head.weight differs from the embedding: "
        "it is used",
    )
    assert_equal_to_transformers(tmp_path / "model")
    (tmp_path / "out").mkdir()
    save_model(load(tmp_path / "model"), tmp_path / "model", tmp_path / "out", torch.float32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "model")))
    assert not ModelFiles.read(tmp_path / "out").notes


def test_without_a_head_the_embedding_is_the_head(tmp_path: Path) -> None:
    reference = make_reference("llama", tmp_path)
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert "there is no lm_head.weight: the head is the embedding" in ModelFiles.read(tmp_path).notes[0]
    reference.lm_head.weight = reference.model.embed_tokens.weight
    assert (logits(load(tmp_path)) - logits(reference)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: name.replace("layers.1.mlp", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.mlp"),
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("model."),
    ],
)
def test_names_that_other_tools_wrapped_are_the_same_weights(rename: Any, tmp_path: Path) -> None:
    reference = make_reference("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert (logits(load(tmp_path)) - logits(reference)).abs().max() < 1e-4


def test_a_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    make_reference("qwen2", tmp_path)
    rewrite(tmp_path, lambda t: t.update({"module.model.norm.weight": t["model.norm.weight"] + 1}))
    with pytest.raises(UserError, match=r"model.safetensors: model.norm.weight is stored twice"):
        load(tmp_path)


def test_shards_without_an_index_are_found_if_all_are_there(tmp_path: Path) -> None:
    reference = make_reference("mistral", tmp_path, "100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert (logits(load(tmp_path)) - logits(reference)).abs().max() < 1e-4
    last = max(tmp_path.glob("model-*"))
    last.unlink()
    with pytest.raises(UserError, match=f"{last.name}: one of .* files, but missing"):
        load(tmp_path)


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    """The same weights twice are read once; different ones are refused; an index without its shards is a leftover."""
    reference = make_reference("mistral", tmp_path, "100KB")
    tensors = {name: tensor for shard in tmp_path.glob("model-*") for name, tensor in load_file(shard).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert ModelFiles.read(tmp_path).shards() == [tmp_path / "model.safetensors"]
    assert (logits(load(tmp_path)) - logits(reference)).abs().max() < 1e-4
    tensors["model.norm.weight"] += 1
    newer = tmp_path / "newer"
    shutil.copytree(tmp_path, newer)
    save_file(tensors, newer / "model.safetensors")
    with pytest.raises(UserError, match=r"newer/model.safetensors: differs from the shards next to it"):
        load(newer)
    next(newer.glob("model-00001-*")).unlink()
    assert torch.equal(load(newer).model.norm.weight, tensors["model.norm.weight"])


LEFT_OVER = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_quantization_config_beside_plain_weights_is_ignored_with_a_line(tmp_path: Path) -> None:
    reference = make_reference("qwen2", tmp_path)
    set_config(tmp_path, quantization_config=LEFT_OVER)
    files = ModelFiles.read(tmp_path)
    assert files.quantization is None
    assert "quantization_config is ignored: the weights are not quantized" in files.notes[0]
    check_quantization(files, ("int8", False))
    assert (logits(load(tmp_path)) - logits(reference)).abs().max() < 1e-4
    set_config(tmp_path, quantization_config={**LEFT_OVER, "load_in_4bit": False})  # switched off
    assert not ModelFiles.read(tmp_path).notes
    for other in ({"quant_method": "gptq", "bits": 4}, {"bits": 4}):
        set_config(tmp_path, quantization_config=other)
        with pytest.raises(UserError, match=r"quantization_config: .* if the weights are not quantized, remove the"):
            load(tmp_path)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_packed_weights_may_be_stored_as_numbers_of_another_type(
    storage: torch.dtype, packed: Path, tmp_path: Path
) -> None:
    settings = {**settings_of(("nf4", True)), "bnb_4bit_quant_storage": storage}
    make_packed(packed / "source", tmp_path, **settings)
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == storage
    assert torch.equal(logits(load(tmp_path)), logits(load(packed / "nf4-True")))


@torch.no_grad()
def test_a_packed_head_is_read(tmp_path: Path) -> None:
    make_reference("llama", tmp_path / "source")
    theirs = make_packed(tmp_path / "source", tmp_path / "4", llm_int8_skip_modules=["none"], **settings_of(FORMS[0]))
    assert load_file(tmp_path / "4" / "model.safetensors")["lm_head.weight"].dtype == torch.uint8
    ours = load(tmp_path / "4")
    assert (logits(ours) - logits(theirs.train())).abs().max() < 1e-4
    streamed = StreamedDecoder(open_rows(tmp_path / "4"))
    assert (logits(streamed) - logits(ours)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_a_usable_dtype_the_stored_form_counts(dtype: torch.dtype, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path).to(dtype).save_pretrained(tmp_path)
    for said in (None, "auto", 7):
        set_config(tmp_path, dtype=said, torch_dtype=None)
        assert ModelFiles.read(tmp_path).dtype() == dtype
    set_config(tmp_path, dtype="torch.float16")
    assert ModelFiles.read(tmp_path).dtype() == torch.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantization", [None, ("nf4", True), ("int8", False)])
def test_weights_that_are_not_finite_are_named_as_damaged(value: float, quantization: Any, tmp_path: Path) -> None:
    make_reference("qwen2", tmp_path)
    rewrite(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    message = r"model.safetensors: model.layers.1.mlp.up_proj.weight contains NaN or infinity: download"
    with pytest.raises(UserError, match=message):
        load(tmp_path, quantization=quantization)
    with pytest.raises(UserError, match=message):
        list(open_rows(tmp_path).rows("model.layers.1.mlp.up_proj.weight"))


# --- what is not a model


def adapter_only(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"")


def trainer_output(directory: Path) -> None:
    for step in (500, 1000):
        make_reference("llama", directory / f"checkpoint-{step}")


def a_run(directory: Path) -> None:
    tree = {**Config().to_dict(), "provenance": {}}
    tree["model"]["name"] = "some/base"
    (directory / "config.json").write_text(json.dumps(tree))
    (directory / "checkpoints").mkdir()


def files_named(*names: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        for name in names:
            (directory / name).write_bytes(b"x")

    return make


def with_config(*names: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        make_reference("llama", directory)
        (directory / "model.safetensors").unlink()
        files_named(*names)(directory)

    return make


def dangling(directory: Path) -> None:
    make_reference("llama", directory)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(directory / "blobs" / "gone")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (adapter_only, "is an adapter, not a model: set model.name to its base, and lora.start_from={0}"),
        (trainer_output, "only checkpoints of a Trainer: name one of them, such as {0}/checkpoint-1000"),
        (a_run, "a run, not a model: set model.name to its base, and lora.start_from={0}"),
        (files_named("model-Q4_K_M.gguf"), "has its weights in GGUF, which is for inference: name the original model"),
        (with_config("model-f16.gguf"), "has its weights in GGUF"),
        (with_config("pytorch_model.bin"), "pickles, such as pytorch_model.bin, which can run code and are not read"),
        (with_config("other.safetensors"), "no weights here: expected model.safetensors"),
        (dangling, "model.safetensors: no such file: a link to .*gone, which is missing"),
    ],
)
def test_what_is_not_a_model_is_said_to_be_what_it_is(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message.format(tmp_path)) as raised:
        ModelFiles.find(str(tmp_path)).shards()
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_home_directory_is_found_and_a_wrong_path_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_chat_model(tmp_path / "base")
    assert find_model("~/base") == tmp_path / "base"
    files = ModelFiles.find("~/base")
    assert files.fetch().shards() == [tmp_path / "base" / "model.safetensors"]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"link: a link to .*/gone, which is missing"):
        find_model(str(tmp_path / "link"))
    with pytest.raises(UserError, match=r"config.json: a file: name the directory of a model"):
        find_model(str(tmp_path / "base" / "config.json"))
    with pytest.raises(UserError, match=r"base is a directory, which has no revisions: remove @v2"):
        find_model(ModelConfig(name=str(tmp_path / "base"), revision="v2").reference)


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
    for name in ("./x", "/no/such/directory", "~/x", "a/b/c", "./x@main"):
        with pytest.raises(UserError, match=f"{name}: no such directory"):
            find_model(name)
    with pytest.raises(UserError, match="empty"):
        find_model("")
    assert hub.asked == []


def test_a_revision_is_what_is_asked_for(hub: type[Hub]) -> None:
    make_chat_model(hub.files)
    found = ModelFiles.find(ModelConfig(name="some/model", revision="v1.0").reference).fetch()
    assert found.shards()
    assert "/api/models/some/model/revision/v1.0" in hub.asked
    assert split_reference("some/model@v1.0") == ("some/model", "v1.0")
    assert split_reference("some/model") == ("some/model", None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], "some/model: has its weights in pickles, such as pytorch_model.bin"),
        (["model-Q4_K_M.gguf"], "some/model: has its weights in GGUF"),
        (["checkpoint-9/model.safetensors"], "some/model: .*: name one of them, such as some/model/checkpoint-9"),
        (["adapter_model.safetensors", "adapter_config.json"], "some/model: is an adapter, not a model"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_a_repository_without_weights_is_said_to_be_what_it_is(
    names: list[str], message: str, has_config: bool, hub: type[Hub]
) -> None:
    make_chat_model(hub.files)
    (hub.files / "model.safetensors").unlink()
    if not has_config:
        (hub.files / "config.json").unlink()
    for name in names:
        (hub.files / name).parent.mkdir(exist_ok=True)
        (hub.files / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        ModelFiles.find("some/model").fetch().shards()


def test_a_gated_repository_is_explained_to_the_end(hub: type[Hub]) -> None:
    def refuse(self: Hub, _: bool) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        text = "Access to model some/model is restricted. Visit the page to ask for access."
        self.send_header("X-Error-Message", text)
        self.send_header("Content-Length", "0")
        self.end_headers()

    hub.answer = refuse  # type: ignore[method-assign]
    with pytest.raises(UserError) as raised:
        find_model("some/model")
    assert "accept its terms at https://huggingface.co/some/model, then set HF_TOKEN" in str(raised.value)
    assert "Visit the page to ask for access." in str(raised.value)
    assert "\n" not in str(raised.value)
