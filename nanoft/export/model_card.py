"""The documents of an exported model: parity.json, provenance.json and the model card; and the upload to the Hub.

An engine that answers the ids in parity.json differently has another template, tokenizer or weights than training had.
provenance.json records base, data, settings, library versions and the hash of every file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.generation.generate import generate
from nanoft.io.atomic import hash_file
from nanoft.io.tables import markdown_table
from nanoft.io.untrusted import read_json
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import is_run
from nanoft.runtime.device import library_versions

PARITY_TOKENS = 256  # maximum length of a prompt
PLAIN_PROMPTS = ["What is the capital of Norway?", "Count from 1 to 5."]  # if there is no data
LIBRARIES = {"hf": "transformers", "peft": "peft", "mlx": "mlx"}
USE = {  # how each format is loaded from its directory
    "hf": 'model = transformers.AutoModelForCausalLM.from_pretrained(".")',
    "peft": 'base = transformers.AutoModelForCausalLM.from_pretrained("{base}")\n'
    'model = peft.PeftModel.from_pretrained(base, ".")',
    "mlx": 'model, tokenizer = mlx_lm.load("{base}", adapter_path=".")',
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def parity_record(
    model: Decoder, chat: ChatTokenizer, prompts: Sequence[Prompt], max_new_tokens: int, weights: str
) -> dict[str, Any]:
    """The content of parity.json: prompts as text and ids, the ids that end an answer, and the model's greedy answers.

    Long prompts and those that the template refuses are skipped. `weights` says what the answers are computed with.
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
    """The content of provenance.json: the export, its run, library versions, and every file's hash, some `known`."""
    names = sorted(path.name for path in out.iterdir() if path.is_file() and not path.name.startswith("."))
    files = {name: known.get(name) or hash_file(out / name) for name in names}
    return {**facts, "run": run_facts(source), "versions": library_versions(), "files": files}


def run_facts(source: str) -> dict[str, Any]:
    """Settings, hashes and metrics of a run; empty if the adapter is not in one."""
    run = next((place for place in (Path(source), Path(source).parent) if is_run(place)), None)
    if run is None:
        return {}
    config = read_json(run / "config.json")
    trained = config.pop("provenance", {})
    report = read_json(run / "report.json") if (run / "report.json").is_file() else {}
    metrics = {name: report[name] for name in ("base", "tuned", "training") if name in report}
    return {"config": config, "trained": trained, "metrics": metrics}


def model_card(form: str, facts: Mapping[str, Any], run: Mapping[str, Any], base: Path, proven: Sequence[str]) -> str:
    """README.md: the Hub's front matter, how to load the model, lines about what was verified, settings and metrics."""
    name, method = facts["base"]["name"], "qlora" if facts["quantization"] else "lora"
    front: dict[str, Any] = {"library_name": LIBRARIES.get(form, "transformers"), "pipeline_tag": "text-generation"}
    use, files = USE.get(form, "").format(base=(hub := hub_name(name, base)) or name), ModelFiles.read(base)
    if files.decoder.wrapped:
        use = use.replace("ForCausalLM", "ForImageTextToText")
    if facts.get("is_reward_model"):
        front["pipeline_tag"] = "text-classification"
        use = re.sub(r'CausalLM(\S+")\)', r"SequenceClassification\1, num_labels=1)", use)
    if hub:
        front |= {"base_model": hub, "base_model_relation": "finetune" if form == "hf" else "adapter"}
    if license := license_of(base):
        front["license"] = license
    front["tags"] = ["nanoft", method]
    lines = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {Path(name).name}, fine-tuned", *proven]
    if use:
        lines.append(f"```python\n{use}\n```")
    if settings := run.get("config"):
        values = {name: settings["lora"][name] for name in ("rank", "alpha")}
        values |= {"learning rate": settings["training"]["learning_rate"], "seed": settings["system"]["seed"]}
        about = {"model": files.description, "method": method, **values}
        rows = [[name, str(value)] for name, value in about.items()]
        lines.append("## Training\n\n" + markdown_table(["setting", ""], rows))
    metrics = run.get("metrics", {})
    if "tuned" in metrics:
        sides = {side: metrics[side] for side in ("base", "tuned") if side in metrics}
        rows = [
            [key.replace("_", " "), *("-" if side.get(key) is None else f"{side[key]:.4g}" for side in sides.values())]
            for key in ("perplexity", "exact_match", "stop_rate")
            if metrics["tuned"].get(key) is not None
        ]
        lines.append("## Held-out metrics\n\n" + markdown_table(["", *sides], rows))
    lines.append(
        "## Check\n\n`parity.json` holds prompts as rendered in training, their token ids, and greedy answers to "
        "check an inference engine;\n`provenance.json` holds settings, versions and the SHA-256 of every file."
    )
    return "\n\n".join(lines) + "\n"


def hub_name(name: str, directory: Path) -> str | None:
    """The base's name on the Hub: as given, or from the path of the Hub's cache; None if it has none."""
    if HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    cached = [part for part in directory.parts if part.startswith("models--") and part.count("--") == 2]
    return "/".join(cached[-1].split("--")[1:]) if cached else None


def license_of(base: Path) -> str | None:
    """The license in the front matter of the base's README.md, if any."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = re.match(r"---\r?\n(.*?)\r?\n---", (base / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
        license = front.get("license") if isinstance(front, dict) else None
        return license if isinstance(license, str) else None
    return None


def push(out: Path, repository: str) -> str:
    """Upload a finished directory to the Hub, to a private repository if it is new; return its URL."""
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out, commit_message="Upload by nanoft")
    except Exception as error:  # the Hub client raises many types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason.replace(get_token() or "\0", "(token)")
        raise UserError(
            f"--push: {repository}: {reason}: {out} is complete: fix this, then `hf upload {repository} {out}`"
        ) from None
    return str(url)


def validate_repository(repository: str) -> None:
    """Raise a UserError before the work starts if the name is invalid or there is no token."""
    from huggingface_hub import get_token

    if not HUB_NAME.fullmatch(repository):
        raise UserError(f"--push: {repository!r:.80} is not a repository name: use owner/name")
    if not get_token():
        raise UserError("--push: no Hub token: run `hf auth login`, or set HF_TOKEN")
