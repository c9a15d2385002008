"""The checks of docs/exercises.md: each fails with the program as it is, and passes once the exercise is solved.

python docs/solutions/checks.py             all of them
python docs/solutions/checks.py schedule    one
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402  # of this checkout, whatever is installed

TINY = ROOT / "configs" / "tiny"


def schedule() -> None:
    from nanoft.config import TrainingConfig
    from nanoft.optim import learning_rate

    c = TrainingConfig(lr_scheduler="sqrt", learning_rate=1.0, warmup_ratio=0.0)
    rates = [learning_rate(step, 100, c) for step in (0, 25, 49, 100)]
    assert torch.allclose(torch.tensor(rates), torch.tensor([1.0, 0.5, 0.3, 0.0])), rates


def metric() -> None:
    from nanoft.metrics.answers import select_metrics

    (edit,) = select_metrics(["edit_similarity"])
    pairs = {
        ("kitten", "sitting"): 1 - 3 / 7,
        ("same", "same"): 1.0,
        ("", "abc"): 0.0,
        ("ab", "ba"): 0.0,
        ("", ""): 1.0,
    }
    for (answer, reference), wanted in pairs.items():
        found = edit.score(answer, reference, "")
        assert abs(found - wanted) < 1e-9, f"{answer!r} and {reference!r}: {found} instead of {wanted}"


def shape() -> None:
    from nanoft.config import DataConfig
    from nanoft.data.formats import read_file

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pairs.jsonl"
        path.write_text(json.dumps({"translation": {"en": "Good morning.", "de": "Guten Morgen."}}) + "\n")
        detected, record = read_file(path, DataConfig(train_file=str(path)))
    said = [(message["role"], message["content"]) for message in getattr(record, "messages", [])]
    asked = "Translate from en to de.\n\nGood morning."
    assert said == [("user", asked), ("assistant", "Guten Morgen.")], (detected, record)


def loss() -> None:
    from nanoft.config import Config
    from nanoft.objectives.preference import DPO_LOSSES, Answers

    for name in ("hinge", "apo_zero"):  # both can be chosen in a config
        Config().override({"training.objective": "dpo", "preference.loss": name})
    c, r, n = torch.tensor([3.0, 30.0]), torch.tensor([1.0, -4.0]), torch.ones(2)
    gain, beta = Answers(c, r, n, n), 0.1
    assert torch.allclose(DPO_LOSSES["hinge"](gain, beta, 0.0), torch.tensor([0.8, 0.0]))
    wanted = 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r)
    assert torch.allclose(DPO_LOSSES["apo_zero"](gain, beta, 0.0), wanted)


def reward() -> None:
    tool_call = importlib.import_module("tool_reward").tool_call
    wanted = {"name": "send_note", "arguments": {"to": "Ida", "text": "Hi"}}
    asked, said = {"role": "user", "content": "Write Ida: Hi"}, {"role": "assistant", "content": json.dumps(wanted)}
    nearly = wanted | {"arguments": {"to": "Eva", "text": "Hi"}}
    answers = ["Hi", json.dumps({"name": "play_song", "arguments": {}}), json.dumps(nearly), json.dumps(wanted)]
    found = [tool_call("Write Ida: Hi", answer, {"messages": [asked, said]}) for answer in answers]
    assert found == sorted(set(found)), f"the nearer an answer, the larger its reward: {found}"
    assert (found[0], found[-1]) == (0.0, 1.0), found
    assert [tool_call("", answer, {"messages": [asked, said]}) for answer in ("[1]", '"text"', "7", "")] == [0.0] * 4


def adapter() -> None:
    from nanoft.config import LoRAConfig
    from nanoft.lora import inject_lora
    from nanoft.models.weights import load_model

    torch.manual_seed(0)
    model = load_model(TINY / "base", torch.device("cpu"), torch.float32)
    ids = torch.arange(4, 20)[None]
    before = model(ids)
    adapters: dict[str, Any] = inject_lora(model, LoRAConfig(rank=4, alpha=8.0, init="xs"), seed=0)
    assert torch.equal(model(ids), before), "a fresh adapter changes nothing"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(4, 4)] * len(adapters), "R alone is trained"
    model(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained), "R gets a gradient from the start"
    one, x = adapters["model.layers.0.self_attn.q_proj"], torch.randn(3, 128)
    torch.nn.init.normal_(one.lora_R)
    a, b, r = (getattr(one, name).detach() for name in ("lora_A", "lora_B", "lora_R"))
    change = 2.0 * b @ r @ a  # s = alpha / rank = 2
    assert torch.allclose(one(x), x @ (one.base.weight + change).T, atol=1e-4)
    assert torch.allclose(one.merged(one.base.weight), one.base.weight + change, atol=1e-5)
    largest = torch.linalg.svdvals(one.base.weight)[:4]
    assert torch.allclose(torch.linalg.svdvals(b @ a)[:4], largest, rtol=1e-3), "B A: the largest singular directions"


def accumulation() -> None:
    def gradient_norm(size: int) -> float:
        """Of the first step: 8 sequences in micro-batches of a size."""
        with tempfile.TemporaryDirectory() as directory:
            settings = {
                "output.dir": directory, "data.max_samples": 12, "training.max_steps": 1, "evaluation.prompts": 0,
                "training.micro_batch_size": size, "training.gradient_accumulation_steps": 8 // size,
                "training.log_steps": 1, "logging.progress_bar": False,
            }  # fmt: skip
            arguments = [str(TINY.with_suffix(".py")), *(f"{name}={value}" for name, value in settings.items())]
            with contextlib.redirect_stdout(io.StringIO()):
                assert train.main(arguments) == 0
            events = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
        return next(event["grad_norm"] for event in events if event["event"] == "train")

    norms = gradient_norm(8), gradient_norm(1)
    print(f"gradient norm of 1 x 8 sequences: {norms[0]:.6f}, of 8 x 1: {norms[1]:.6f}")
    assert abs(norms[0] / norms[1] - 1) > 1e-3, "the split does not matter: nothing is broken"


def family() -> None:
    from transformers import ArceeConfig, ArceeForCausalLM

    from nanoft.models.weights import load_model

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    reference = ArceeForCausalLM(ArceeConfig(**sizes, mlp_bias=True))
    torch.nn.init.normal_(reference.model.layers[0].mlp.up_proj.bias)
    ids = torch.randint(0, 99, (2, 20))
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        reference.save_pretrained(directory)
        model = load_model(Path(directory), torch.device("cpu"), torch.float32)
        assert torch.allclose(model.logits(model(ids)), reference(ids).logits, atol=1e-4)


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check for check in (schedule, metric, shape, loss, reward, adapter, accumulation, family)
}


def main() -> int:
    """Print what passes; returns how many do not."""
    parser = argparse.ArgumentParser(description="Run the checks of docs/exercises.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)}; default: all")
    names, failures = parser.parse_args().names or list(CHECKS), 0
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"{unknown[0]}: no such exercise: choose one of {', '.join(CHECKS)}")
    for name in names:
        try:
            CHECKS[name]()
            print(f"{name}: passes", flush=True)
        except Exception as error:  # whatever an unsolved exercise raises
            failures += 1
            print(f"{name}: fails: {type(error).__name__}: {error}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
