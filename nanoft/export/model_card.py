"""The documents of an exported model: parity.json, provenance.json and the model card; and the upload to the Hub.

An engine that answers the prompts in parity.json differently uses another template, tokenizer or other weights than
training. provenance.json records base, data, settings, library versions and the hash of every file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token

from nanoft import UserError
from nanoft.config import LoRAConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.sources import HUB
from nanoft.generation.generate import generate
from nanoft.io.atomic import hash_file
from nanoft.io.tables import markdown_table
from nanoft.io.untrusted import read_json
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import LoadedModel, run_of
from nanoft.runtime.device import library_versions

PARITY_TOKENS = 256  # maximum length of a prompt
PLAIN_PROMPTS = ["What is the capital of Norway?", "Count from 1 to 5."]  # if there is no data
LIBRARIES = {"hf": "transformers", "peft": "peft", "mlx": "mlx", "gguf": "gguf", "gguf-lora": "gguf"}
LOAD = {  # in Python
    "hf": 'model = transformers.AutoModelForCausalLM.from_pretrained("{here}")',
    "peft": 'base = transformers.AutoModelForCausalLM.from_pretrained("{base}")\n'
    'model = peft.PeftModel.from_pretrained(base, "{here}")',
}
ASK = """
tokenizer = transformers.AutoTokenizer.from_pretrained("{here}")
chat = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
OLLAMA = "\nollama create tuned -f Modelfile && ollama run tuned"
SERVE = {  # in a shell
    "hf": "vllm serve {here}\nmlx_lm.chat --model {here}",
    "peft": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={here}",
    "mlx": "mlx_lm.chat --model {base} --adapter-path .",
    "gguf": "llama-cli -m {file}" + OLLAMA,
    "gguf-lora": "llama-cli -m base.gguf --lora {file}" + OLLAMA,
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def parity_record(
    model: Decoder, chat: ChatTokenizer, prompts: Sequence[Prompt], max_new_tokens: int, weights: str
) -> dict[str, Any]:
    """The content of parity.json: prompts as text and ids, the ids that end an answer, and the model's greedy answers.

    Long prompts and those that the template refuses are skipped. `weights` describes the weights of the answers.
    """
    plain = [Prompt([{"role": "user", "content": text}], "") for text in PLAIN_PROMPTS]
    asked: list[dict[str, Any]] = []
    for prompt in [*prompts, *plain]:
        with suppress(UserError):  # the template needs a system message, or accepts none
            given = prompt.messages, prompt.tools, prompt.template_args
            text, ids = chat.render_prompt(*given), chat.encode_prompt(*given)
            if 0 < len(ids) <= PARITY_TOKENS:
                own = {"chat_template_kwargs": prompt.template_args} if prompt.template_args else {}
                asked.append({"messages": prompt.messages, "tools": prompt.tools, **own, "text": text, "ids": ids})
    asked = asked[:4]
    if max_new_tokens and asked:
        answers = generate(model, [item["ids"] for item in asked], chat.stop_ids, max_new_tokens)
        for item, answer in zip(asked, answers, strict=True):
            item |= {"answer_ids": answer.ids, "answer": chat.decode(answer.ids), "stopped": answer.stopped}
    decoding = "greedy, float32; the ids of an answer do not include the stop id"
    return {
        "weights": weights, "decoding": decoding, "max_new_tokens": max_new_tokens,
        "stop_ids": list(chat.stop_ids), "prompts": asked,
    }  # fmt: skip


def provenance_record(source: str, facts: Mapping[str, Any], out: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The content of provenance.json: the export, its run, library versions, and the hash of every file."""
    names = sorted(path.name for path in out.iterdir() if path.is_file() and not path.name.startswith("."))
    files = {name: known.get(name) or hash_file(out / name) for name in names}
    return {**facts, "run": run_facts(source), "versions": library_versions(), "files": files}


def run_facts(source: str) -> dict[str, Any]:
    """Settings, hashes and metrics of a run; empty if the adapter is not in one."""
    if (run := run_of(source)) is None:
        return {}
    config = read_json(run / "config.json")
    trained = config.pop("provenance", {})
    report = read_json(run / "report.json") if (run / "report.json").is_file() else {}
    metrics = {name: report[name] for name in ("base", "tuned", "training") if name in report}
    return {"config": config, "trained": trained, "metrics": metrics}


def model_card(form: str, opened: LoadedModel, source: str, proven: Sequence[str], **names: Any) -> str:
    """README.md: the Hub's front matter, what was verified, how to use the export, figures and settings of the run.

    `names` are the placeholders in LOAD and SERVE; `here` is the export's directory or its repository on the Hub.
    """
    settings, base, run = run_facts(source).get("config", {}), opened.base_directory, run_of(source)
    name = str(base) if opened.adapters else settings.get("model", {}).get("name", str(base))  # not RUN/model
    names["base"] = hub_name(name, base) or name
    method = ("qlora" if opened.quantization else "lora") if opened.adapters else "full"
    data = [place for place in settings.get("data", {}).get("train_file", "").split(",") if place]
    relation = {"base_model_relation": "finetune" if form in ("hf", "gguf") else "adapter"}
    front = {
        "library_name": LIBRARIES[form],
        "pipeline_tag": "text-classification" if opened.model.config.has_score else "text-generation",
        **({"base_model": hub, **relation} if (hub := hub_name(name, base)) else {}),
        "datasets": [place.removeprefix(HUB) for place in data if place.startswith(HUB)],
        "tags": ["nanoft", method],
    }
    yaml_block = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False)
    trained_on = " and ".join(PurePath(place).stem for place in data)
    title = f"# {PurePath(names['base']).name}" + f" fine-tuned on {trained_on}" * bool(trained_on)
    lines = [f"---\n{yaml_block}---", title, "\n".join(proven), *usage(form, opened, names)]
    if run and (run / "report.md").is_file():  # its verdict, warnings and table
        text = (run / "report.md").read_text(encoding="utf-8")
        found = re.search(r"\*\*Verdict.*?(?=\n\| training|\n## |\Z)", text, re.DOTALL)
        start = settings["lora"]["start_from"]
        lines += [f"## Evaluation\n\n{found[0].strip()}"] if found else []
        lines += [f"`base` includes the adapter that training started from, {start}."] if found and start else []
    if settings:
        shape = [[name, str(settings["lora"][name])] for name in ("rank", "alpha")] if opened.adapters else []
        rows = [["model", ModelFiles.read(base).description], ["method", method], *shape]
        rows += [[name.replace("_", " "), str(settings["training"][name])] for name in ("objective", "learning_rate")]
        rows.append(["seed", str(settings["system"]["seed"])])
        lines.append("## Training\n\n" + markdown_table(["setting", ""], rows))
    lines.append(
        "## Check\n\n`parity.json` has rendered prompts, their token ids and greedy answers, to check an engine."
    )
    return "\n\n".join(lines) + "\n"


def usage(form: str, opened: LoadedModel, names: Mapping[str, Any]) -> Iterator[str]:
    """The code that loads an export, and the commands that serve it."""
    load, serves = LOAD.get(form, ""), form in SERVE and names.get("rank", 1)
    if ModelFiles.read(opened.base_directory).decoder.wrapped:
        load = load.replace("ForCausalLM", "ForImageTextToText")
    if opened.model.config.has_score:
        load, serves = re.sub(r'CausalLM(\S+")\)', r"SequenceClassification\1, num_labels=1)", load), False
    elif load:
        load += ASK
    if load:
        imports = "import peft\n" * (form == "peft") + "import transformers"
        yield f"```python\n{imports}\n\n{load.format(**names)}\n```"
    if serves:
        yield f"```sh\n{SERVE[form].format(**names)}\n```"


def vllm_rank(lora: LoRAConfig) -> int:
    """The --max-lora-rank that vLLM needs for an adapter; 0 if vLLM cannot serve it."""
    if lora.dora or lora.bias != "none" or lora.modules_to_save or lora.trainable_token_indices:
        return 0
    rank = max(8, 1 << (lora.rank - 1).bit_length())  # a power of two
    return rank if rank <= 512 else 0


def hub_name(name: str, directory: Path) -> str | None:
    """The base's name on the Hub: as given, or from the path of the Hub's cache; None if it has none."""
    if HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    cached = [part for part in directory.parts if part.startswith("models--") and part.count("--") == 2]
    return "/".join(cached[-1].split("--")[1:]) if cached else None


def push(out: Path, repository: str, private: bool) -> str:
    """Upload a finished directory to the Hub, creating the repository if it is new; return its URL."""
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out, commit_message="Upload by nanoft")
    except Exception as error:  # the Hub client raises many types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason.replace(get_token() or "\0", "(token)").rstrip(".")
        again = f"hf upload {repository} {out}" + " --private" * private
        raise UserError(f"--push: {repository}: {reason}: {out} is complete: fix this, then `{again}`") from None
    return str(url)


def validate_repository(repository: str) -> None:
    """Raise a UserError, before the work starts, if the name is invalid or there is no token."""
    if not HUB_NAME.fullmatch(repository):
        raise UserError(f"--push: {repository!r:.80} is not a repository name: use owner/name")
    if not get_token():
        raise UserError("--push: no Hub token: run `hf auth login`, or set HF_TOKEN")
