"""What goes along with an exported model: where it comes from, how to check it, and the way to the Hub.

parity.json holds prompts as they were rendered, their token ids, the ids that end an answer, and greedy answers. An
engine that is given these ids and says something else has another template, another tokenizer or other weights than
training had. provenance.json says which base, data, settings and library versions the files come from, and their
hashes. README.md is the model card that the Hub shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.evaluation.evaluate import Prompt
from nanoft.generation.generate import generate
from nanoft.io.atomic import hash_file, write_file
from nanoft.io.tables import markdown_table
from nanoft.io.untrusted import read_json
from nanoft.model import Decoder
from nanoft.models.open import is_run
from nanoft.runtime.device import library_versions

PARITY_PROMPTS = 4
PARITY_TOKENS = 256  # of a prompt: longer ones are left out
PLAIN_PROMPTS = ["What is the capital of Norway?", "Count from 1 to 5."]  # where there is no data to take them from
LIBRARIES = {"hf": "transformers", "peft": "peft", "mlx": "mlx"}
USE = {  # how each is loaded, from the directory that it lies in
    "hf": 'model = transformers.AutoModelForCausalLM.from_pretrained(".")',
    "peft": 'base = transformers.AutoModelForCausalLM.from_pretrained("{base}")\n'
    'model = peft.PeftModel.from_pretrained(base, ".")',
    "mlx": 'model, tokenizer = mlx_lm.load("{base}", adapter_path=".")',
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, [(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()])


def parity_record(
    model: Decoder, chat: ChatTokenizer, prompts: Sequence[Prompt], max_new_tokens: int, weights: str
) -> dict[str, Any]:
    """What parity.json holds: prompts as text and as ids, and the model's greedy answers to them.

    Args:
        model: as it is exported.
        prompts: of the run; those that the template refuses or that are long are left out.
        max_new_tokens: in an answer; 0: no answers.
        weights: what the answers are computed with, in words.
    """
    plain = [Prompt([{"role": "user", "content": text}], "") for text in PLAIN_PROMPTS]
    asked: list[dict[str, Any]] = []
    for prompt in [*prompts, *plain]:
        with suppress(UserError):  # a template that wants a system message, or none
            text = chat.render_prompt(prompt.messages, prompt.tools)
            ids = chat.encode_prompt(prompt.messages, prompt.tools)
            if 0 < len(ids) <= PARITY_TOKENS:
                asked.append({"messages": prompt.messages, "tools": prompt.tools, "text": text, "ids": ids})
    asked = asked[:PARITY_PROMPTS]
    if max_new_tokens and asked:
        answers = generate(model, [item["ids"] for item in asked], chat.stop_ids, max_new_tokens)
        for item, said in zip(asked, answers, strict=True):
            item |= {"answer_ids": said.ids, "answer": chat.decode(said.ids), "stopped": said.stopped}
    how = "greedy, in float32, one token after another; an answer's ids are without the one that ended it"
    return {
        "weights": weights,
        "decoding": how,
        "max_new_tokens": max_new_tokens,
        "stop_ids": list(chat.stop_ids),
        "prompts": asked,
    }


def provenance_record(source: str, facts: Mapping[str, Any], out: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What provenance.json holds: `facts` of the export, the run that it comes from, versions, and every file's hash.

    Args:
        source: the run, or the adapter in it.
        known: size and SHA-256 of files that were hashed while they were written.
    """
    names = sorted(path.name for path in out.iterdir() if path.is_file() and not path.name.startswith("."))
    files = {name: known.get(name) or hash_file(out / name) for name in names}
    return {**facts, "run": run_facts(source), "versions": library_versions(), "files": files}


def run_facts(source: str) -> dict[str, Any]:
    """The settings, hashes and figures of a run; nothing if the adapter does not lie in one."""
    run = next((place for place in (Path(source), Path(source).parent) if is_run(place)), None)
    if run is None:
        return {}
    config = read_json(run / "config.json")
    origin = config.pop("provenance", {})
    report = read_json(run / "report.json") if (run / "report.json").is_file() else {}
    figures = {name: report[name] for name in ("base", "tuned", "training") if name in report}
    return {"config": config, "trained": origin, "metrics": figures}


def model_card(form: str, facts: Mapping[str, Any], run: Mapping[str, Any], base: Path, proven: Sequence[str]) -> str:
    """README.md: the Hub's front matter, what was done, the figures, and how to load it.

    Args:
        facts: as in provenance.json.
        run: of `run_facts`.
        base: the base's directory, whose card may name a license.
        proven: lines that say what was proven.
    """
    name = facts["base"]["name"]
    method = "qlora" if facts["quantization"] else "lora"
    front: dict[str, Any] = {"library_name": LIBRARIES.get(form, "transformers"), "pipeline_tag": "text-generation"}
    if hub := hub_name(name, base):
        front |= {"base_model": hub, "base_model_relation": "finetune" if form == "hf" else "adapter"}
    if license := license_of(base):
        front["license"] = license
    front["tags"] = ["nanoft", method]
    lines = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {Path(name).name}, fine-tuned", *proven]
    if form in USE:
        lines.append(f"```python\n{USE[form].format(base=hub or name)}\n```")
    settings = run.get("config", {})
    if settings:
        training, lora = settings["training"], settings["lora"]
        rows = [["method", method], ["rank", lora["rank"]], ["alpha", lora["alpha"]]]
        rows += [["learning rate", training["learning_rate"]], ["seed", settings["system"]["seed"]]]
        lines.append("## Training\n\n" + markdown_table(["setting", ""], [[name, str(value)] for name, value in rows]))
    metrics = run.get("metrics", {})
    if "tuned" in metrics:
        sides = {side: metrics[side] for side in ("base", "tuned") if side in metrics}
        measured = [key for key in ("perplexity", "exact_match", "stop_rate") if key in metrics["tuned"]]
        rows = [
            [key.replace("_", " "), *(f"{figures[key]:.4g}" if key in figures else "-" for figures in sides.values())]
            for key in measured
        ]
        lines.append("## Held-out figures\n\n" + markdown_table(["", *sides], rows))
    lines.append(
        "## Check\n\n`parity.json` holds prompts as rendered in training, their token ids, and greedy answers to "
        "compare an engine with;\n`provenance.json` holds settings, versions and the SHA-256 of every file."
    )
    return "\n\n".join(lines) + "\n"


def hub_name(name: str, directory: Path) -> str | None:
    """The base's name on the Hub, if it has one: as it was given, or as the Hub's cache has it."""
    if HUB_NAME.fullmatch(name) and not Path(name).exists():
        return name
    cached = [part for part in directory.parts if part.startswith("models--") and part.count("--") == 2]
    return "/".join(cached[-1].split("--")[1:]) if cached else None


def license_of(base: Path) -> str | None:
    """What the front matter of the base's own README.md says, if it has one."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        found = re.match(r"---\r?\n(.*?)\r?\n---", (base / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
        license = front.get("license") if isinstance(front, dict) else None
        return license if isinstance(license, str) else None
    return None


def push(out: Path, repository: str) -> str:
    """Upload a finished directory to the Hub; a repository that is new is private. Returns its address.

    The token is the Hub client's own: HF_TOKEN, or what `hf auth login` stored.

    Raises:
        UserError: the Hub refused; the directory stays.
    """
    from huggingface_hub import HfApi, get_token

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out, commit_message="Upload by nanoft")
    except Exception as error:  # the Hub client raises many kinds: no network, no token, no right to write, bad name
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = reason.replace(get_token() or "\0", "(token)")
        raise UserError(
            f"--push: {repository}: {reason}: {out} is complete: put that right, then `hf upload {repository} {out}`"
        ) from None
    return str(address)


def validate_repository(repository: str) -> None:
    """Find out before the work that the name is none, or that nobody is logged in.

    Raises:
        UserError: with the fix.
    """
    from huggingface_hub import get_token

    if not HUB_NAME.fullmatch(repository):
        raise UserError(f"--push: {repository!r:.80} is no name of a repository: write owner/name")
    if not get_token():
        raise UserError("--push: no token of the Hub here: run `hf auth login`, or set HF_TOKEN")
