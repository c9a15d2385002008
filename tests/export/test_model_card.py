"""Files beside an exported model: parity against transformers, hashes, the card as the Hub reads it, and the upload."""

from __future__ import annotations

import base64
import hashlib
import http.server
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from runs import run_merge
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoft import UserError
from nanoft.__main__ import main
from nanoft.config import LoRAConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export.model_card import PARITY_TOKENS, hub_name, parity_record, push, vllm_rank
from nanoft.metrics.rewards import Prompt
from nanoft.models.weights import load_model
from tiny_models import make_chat_model

TOKEN = "hf_secretSecretSecret"


def test_an_engine_that_is_given_the_parity_file_says_the_same(runs: Path, tmp_path: Path) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--dtype", "bf16", "--parity-tokens", "16") == 0
    told = json.loads((tmp_path / "out" / "parity.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    assert len(told["prompts"]) == 4
    assert told["stop_ids"] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for item in told["prompts"]:
        text = tokenizer.apply_chat_template(item["messages"], add_generation_prompt=True, tokenize=False)
        assert text == item["text"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == item["ids"]
        row = torch.tensor([item["ids"]])
        settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        said = model.generate(row, attention_mask=torch.ones_like(row), **settings)[0, row.shape[1] :].tolist()
        assert said == item["answer_ids"] + told["stop_ids"] * item["stopped"]
        assert tokenizer.decode(item["answer_ids"], skip_special_tokens=True) == item["answer"]


def test_prompts_that_are_long_or_that_the_template_refuses_are_left_out(tmp_path: Path) -> None:
    make_chat_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    chat, model = ChatTokenizer(tmp_path), load_model(tmp_path, torch.device("cpu"), torch.float32)
    texts = ["no", "x" * 9 * PARITY_TOKENS, "yes"]
    prompts = [Prompt([{"role": "user", "content": text}], "") for text in texts]
    told = parity_record(model.eval(), chat, prompts, 0, "its own")
    assert [item["text"] for item in told["prompts"]] == [
        "yes",
        "What is the capital of Norway?",
        "Count from 1 to 5.",
    ]
    assert told["weights"] == "its own"
    assert "answer" not in told["prompts"][0]


@pytest.mark.parametrize("form", ["hf", "peft", "mlx"])
def test_every_export_says_where_it_is_from(form: str, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_merge(runs / "lora", "--out", out, "--format", form) == 0
    said = json.loads((out / "provenance.json").read_text())
    files = {path.name for path in out.iterdir()} - {"provenance.json"}
    assert said["files"].keys() == files
    for name in files:
        content = (out / name).read_bytes()
        assert said["files"][name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    recorded = json.loads((runs / "lora" / "config.json").read_text())
    assert said["base"]["sha256"] == recorded["provenance"]["base_sha256"]
    assert said["run"]["trained"]["data_sha256"] == recorded["provenance"]["data_sha256"]
    assert said["run"]["config"]["lora"]["rank"] == 4
    report = json.loads((runs / "lora" / "report.json").read_text())
    assert said["run"]["metrics"]["tuned"] == report["tuned"]
    assert said["versions"]["torch"] == importlib.metadata.version("torch")
    assert ("proof" in said) == (form == "hf")
    card = huggingface_hub.ModelCard((out / "README.md").read_text())  # the Hub's own reader
    assert card.data.library_name == {"hf": "transformers", "peft": "peft", "mlx": "mlx"}[form]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["nanoft", "lora"]
    assert card.text.strip().startswith("# base fine-tuned on data\n")
    assert len(json.loads((out / "parity.json").read_text())["prompts"]) == 4


def test_the_base_on_the_hub_is_named(tmp_path: Path) -> None:
    assert hub_name("some/base", tmp_path) == "some/base"
    cached = tmp_path / "models--some--base-model" / "snapshots" / "abc"
    assert hub_name(str(cached), cached) == "some/base-model"
    assert hub_name(str(tmp_path), tmp_path) is None


def test_the_method_is_in_the_card(runs: Path, tmp_path: Path) -> None:
    assert run_merge(runs / "qlora", "--out", tmp_path / "out") == 0
    card = huggingface_hub.ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.tags == ["nanoft", "qlora"]


def code_of(card: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize("form", ["hf", "peft"])
def test_the_code_in_the_card_answers_with_the_export(
    form: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--format", form) == 0
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(code_of(Path("README.md").read_text(), "python"), {})
    said = capsys.readouterr().out
    assert main(["chat", str(runs / "lora"), "--prompt", "Hello!"]) == 0
    assert said[:200] == capsys.readouterr().out[:200]  # until the limit, where they cut a character differently


@pytest.mark.parametrize(
    ("form", "source", "commands"),
    [
        ("hf", "lora", ["vllm serve me/model", "mlx_lm.chat --model me/model"]),
        (
            "peft",
            "lora",
            ["vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules tuned=me/model"],
        ),
        ("mlx", "qlora", ["mlx_lm.chat --model BASE --adapter-path ."]),
        ("gguf", "lora", ["llama-cli -m model-f16.gguf", "ollama create tuned -f Modelfile && ollama run tuned"]),
        (
            "gguf-lora",
            "lora",
            ["llama-cli -m base.gguf --lora adapter-f32.gguf", "ollama create tuned -f Modelfile && ollama run tuned"],
        ),
        ("gguf", "full", ["llama-cli -m model-f16.gguf", "ollama create tuned -f Modelfile && ollama run tuned"]),
    ],
)
def test_the_card_has_the_commands_of_its_export_and_the_figures_of_the_report(
    form: str, source: str, commands: list[str], runs: Path, tmp_path: Path, receive: Callable[..., type[Receiver]]
) -> None:
    receive()
    assert run_merge(runs / source, "--out", tmp_path / "out", "--format", form, "--push", "me/model") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert code_of(text, "sh").replace(str(runs / "base"), "BASE").splitlines() == commands
    report = (runs / source / "report.md").read_text()
    (row,) = re.findall(r"^\| perplexity .*$", report, re.MULTILINE)
    (verdict,) = re.findall(r"^\*\*Verdict.*$", report, re.MULTILINE)
    assert row in text
    assert verdict in text
    assert ("| rank " in text) == (source != "full")
    card = huggingface_hub.ModelCard(text)
    again = huggingface_hub.ModelCardData(**card.data.to_dict())  # every field has the type that the Hub wants
    assert again.to_dict() == card.data.to_dict()
    assert card.data.tags == ["nanoft", source]


def test_vllm_is_not_promised_what_it_refuses() -> None:
    assert [vllm_rank(LoRAConfig(rank=rank)) for rank in (4, 16, 17, 300, 1000)] == [8, 16, 32, 512, 0]
    refused = [{"dora": True}, {"bias": "all"}, {"modules_to_save": ("lm_head",)}]
    assert all(vllm_rank(LoRAConfig(**change)) == 0 for change in refused)


class Receiver(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload asks for; every file goes into the commit itself."""

    posted: list[tuple[str, Any]]
    tokens: set[str | None]
    refuses, status = "", 403

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.tokens.add(self.headers.get("Authorization"))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        self.posted.append((path, lines))
        if self.refuses and self.refuses in path:
            return self.answer(self.status, {"error": f"{TOKEN} may not write here"})
        if path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            return self.answer(200, {"files": files})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/commit/" in path:
            return self.answer(
                200, {"commitUrl": "https://huggingface.co/me/model/commit/1", "commitOid": "1" * 40, "success": True}
            )
        return self.answer(200, {"url": "https://huggingface.co/me/model", "name": "me/model", "id": "me/model"})

    def do_GET(self) -> None:
        if self.refuses == "/create":  # no such repository either
            return self.answer(self.status, {})
        return self.answer(200, {"id": "me/model", "sha": "0" * 40, "siblings": []})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receive(serve_hub: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Receiver]]:
    """A Hub that receives, or refuses one kind of request, and a token for it."""

    def start(refuses: str = "", status: int = 403) -> type[Receiver]:
        handler = type("Own", (Receiver,), {"posted": [], "tokens": set(), "refuses": refuses, "status": status})
        serve_hub(handler)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        return handler

    return start


def test_a_push_uploads_every_file_once_it_is_proven(
    runs: Path, tmp_path: Path, receive: Callable[..., type[Receiver]], capsys: pytest.CaptureFixture[str]
) -> None:
    handler = receive()
    out = tmp_path / "out"
    assert run_merge(runs / "lora", "--out", out, "--push", "me/model") == 0
    said = capsys.readouterr()
    assert "pushed to " in said.out
    assert TOKEN not in said.out + said.err
    assert handler.tokens == {f"Bearer {TOKEN}"}
    posted = dict(handler.posted)
    (created,) = posted["/api/repos/create"]
    assert (created["name"], created["organization"]) == ("model", "me")
    assert is_private(created)
    sent = {line["value"]["path"]: line["value"] for line in posted["/api/models/me/model/commit/main"][1:]}
    assert sent.keys() == {path.name for path in out.iterdir()}
    for name, value in sent.items():
        assert base64.b64decode(value["content"]) == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("refuses", "status"),
    [("/create", 401), ("/create", 403), ("/commit/", 403), ("/commit/", 404), ("/preupload/", 500)],
)
def test_a_push_that_is_refused_keeps_the_result_and_the_token_to_itself(
    refuses: str, status: int, runs: Path, tmp_path: Path, receive: Callable[..., type[Receiver]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    receive(refuses, status)
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--push", "me/model") == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --push: me/model: ")
    assert str(status) in said.err
    assert said.err.endswith(
        f": {tmp_path}/out is complete: fix this, then `hf upload me/model {tmp_path}/out --private`\n"
    )
    assert said.err.count("\n") == 1
    assert TOKEN not in said.out + said.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def is_private(created: dict[str, Any]) -> bool:
    return created.get("visibility") == "private" or created.get("private") is True  # of newer and older clients


def test_a_gguf_directory_is_pushed_and_a_public_repository_must_be_asked_for(
    runs: Path, tmp_path: Path, receive: Callable[..., type[Receiver]]
) -> None:
    handler = receive()
    pushed = ["--format", "gguf-lora", "--push", "me/model", "--no-private"]
    assert run_merge(runs / "lora", "--out", tmp_path / "out", *pushed) == 0
    (created,) = dict(handler.posted)["/api/repos/create"]
    assert not is_private(created)


def test_nothing_is_sent_unless_it_is_asked_for(
    runs: Path, tmp_path: Path, receive: Callable[..., type[Receiver]]
) -> None:
    handler = receive()
    assert run_merge(runs / "lora", "--out", tmp_path / "out") == 0
    assert handler.posted == []


@pytest.mark.parametrize(("repository", "message"), [("model", "use owner/name"), ("a/b/c", "use owner/name")])
def test_a_name_that_is_none_is_refused_before_any_work(
    repository: str, message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--push", repository) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_token_nothing_is_begun(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert run_merge(runs / "lora", "--out", tmp_path / "out", "--push", "me/model") == 2
    assert "hf auth login" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="--push: me/model: ") as refused:
        push(tmp_path, "me/model", private=True)
    assert TOKEN not in str(refused.value)
