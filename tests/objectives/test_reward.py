"""Reward models against the Bradley-Terry model by hand, and transformers and PEFT reading what is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import eval as eval_command
import merge as merge_command
import train
from nanoft import UserError
from nanoft.__main__ import main as nanoft_command
from nanoft.batches import Batches, Sample, TokenDataset, collate
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.evaluation.evaluate import reward_figures
from nanoft.metrics.rewards import Answered, Prompt
from nanoft.model import Decoder
from nanoft.models.open import open_model
from nanoft.models.weights import add_score, load_model
from nanoft.objectives.reward import RewardModel, TrainedReward, answer_rewards, reward_loss
from tiny_models import CASES, make_chat_model, make_reference, train_run

CPU = torch.device("cpu")


def pairs(count: int = 6, vocab: int = 199) -> TokenDataset:
    """Pairs of random answers to random prompts, which end in a target; the margin of pair i is i / 4."""
    chance, made = np.random.default_rng(0), []
    for at in range(2 * count):
        length = int(chance.integers(5, 20))
        is_target = (np.arange(length) >= length // 2) & (np.arange(length) < length - at % 2)
        made.append(Sample(chance.integers(1, vocab, length, np.int32), is_target, at // 2, label=(at // 2) / 4))
    return TokenDataset.of(made, unit_size=2)


def rewards_of(reference: Any, samples: TokenDataset) -> Tensor:
    """transformers' reward of each sample alone, (samples,)."""
    with torch.no_grad():
        return torch.cat([reference(torch.from_numpy(s.ids).long()[None]).logits[0] for s in samples])


def own_rewards(model: Decoder, samples: TokenDataset) -> Tensor:
    with torch.no_grad():
        return answer_rewards(model, collate(samples, [np.arange(len(samples))], 0))


def fresh(directory: Path, case: str = "qwen3") -> Decoder:
    make_reference(case, directory)
    model = load_model(directory, CPU, torch.float32)
    add_score(model, seed=3)
    return model


@pytest.mark.parametrize(
    ("margin", "center", "expected"),
    [
        (0.0, 0.0, math.log1p(math.exp(-1.5))),
        (0.5, 0.0, math.log1p(math.exp(-1.0))),
        (0.0, 0.01, math.log1p(math.exp(-1.5)) + 0.01 * 2.5**2),
    ],
)
def test_the_loss_is_the_negative_log_likelihood_of_bradley_and_terry(
    margin: float, center: float, expected: float
) -> None:
    values = [torch.tensor([value], dtype=torch.float64) for value in (2.0, 0.5, margin)]
    assert reward_loss(*values, center).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rewards_are_those_that_transformers_pools(case: str, tmp_path: Path) -> None:
    model, samples = fresh(tmp_path, case), pairs()
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, attn_implementation="eager")
    reference.score.weight.data = model.score.weight.detach()
    torch.testing.assert_close(own_rewards(model, samples), rewards_of(reference, samples), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_a_window_is_that_of_the_mean_over_its_pairs(
    micro_batch: int, packed: bool, tmp_path: Path
) -> None:
    model, samples = fresh(tmp_path).double(), pairs(4)
    config = Config().override({"training.objective": "reward", "preference.center": 0.01})
    batches = Batches(samples, micro_batch, 4 // micro_batch, 0, 0, 64 if packed else None)
    windows = [batches.next_window(0, index) for index in range(batches.windows_in_epoch())]
    objective = RewardModel(config, {})
    loss = torch.stack([objective.loss(model, batch) for window in windows for batch in window]).sum()
    loss = loss / sum(objective.count(window) for window in windows)
    rewards = []
    for sample in samples:  # by hand: each answer alone
        hidden = model(torch.from_numpy(sample.ids).long()[None])[0, -1]
        rewards.append(hidden.float() @ model.score.weight[0].float())
    chosen, rejected = torch.stack(rewards[::2]), torch.stack(rewards[1::2])
    margin = torch.arange(4) / 4
    expected = (1 + (margin - (chosen - rejected)).exp()).log() + 0.01 * (chosen + rejected) ** 2
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=0)
    trained = [p for name, p in model.named_parameters() if "embed" not in name]
    for found, wanted in zip(
        torch.autograd.grad(loss, trained), torch.autograd.grad(expected.mean(), trained), strict=True
    ):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_figures_count_the_pairs_whose_chosen_answer_has_the_higher_reward(tmp_path: Path) -> None:
    model, samples = fresh(tmp_path), pairs()
    margins = own_rewards(model, samples).view(-1, 2) @ torch.tensor([1.0, -1.0])
    figures = reward_figures(model, samples, batch_size=4)
    assert figures["pair_accuracy"].value == pytest.approx((margins > 0).float().mean().item())
    assert figures["reward_margin"].value == pytest.approx(margins.mean().item(), rel=1e-4)
    config = Config().override({"training.objective": "reward"})
    batches = [collate(samples, [np.arange(len(samples))], 0)]
    evaluated = RewardModel(config, {}).evaluate(model, batches)
    assert evaluated["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert evaluated["rewards/accuracies"] == pytest.approx(figures["pair_accuracy"].value)
    assert evaluated["rewards/chosen"] - evaluated["rewards/rejected"] == pytest.approx(margins.mean().item(), rel=1e-4)


# ---- Runs


def write_pairs(path: Path, count: int = 24) -> Path:
    """The answer that ends in an exclamation mark is better."""
    records = [
        {"prompt": f"Say {n}.", "chosen": f"{n}, {n + 1}!", "rejected": f"{n}, {n + 1}?", "points": 0.5}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a head of its own; runs with LoRA, QLoRA and every parameter; lora has a margin and center."""
    root = tmp_path_factory.mktemp("reward")
    make_chat_model(root / "base")
    data, settings = write_pairs(root / "pairs.jsonl"), {"training__objective": "reward"}
    more = {"data__margin_field": "points", "preference__center": 0.01}
    train_run(root / "lora", root / "base", data, **settings, **more)
    train_run(root / "qlora", root / "base", data, **settings, quantization__bits=4)
    train_run(root / "full", root / "base", data, **settings, training__method="full", training__learning_rate=1e-3)
    return root


def held_out(root: Path) -> TokenDataset:
    """Conversations as the chat template renders them."""
    chat, reference = ChatTokenizer(root / "base"), AutoTokenizer.from_pretrained(root / "base")
    made: list[Sample] = []
    for line in (root / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[:4]:
        record = json.loads(line)
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record[side]}]
            made += chat.encode_now(chat.render_samples(turns, 0))
            assert made[-1].ids.tolist() == reference.apply_chat_template(turns, return_dict=False)
    assert not any(sample.is_target[-1] for sample in made)  # a line break follows the turn
    return TokenDataset.of(made, unit_size=2)


@pytest.mark.parametrize("run", ["lora", "full"])
def test_a_run_learns_to_tell_the_answers_apart(run: str, trained: Path) -> None:
    report = json.loads((trained / run / "report.json").read_text())
    assert report["tuned"]["pair_accuracy"] > 0.8
    assert "base" not in report
    assert "prompts" not in report["tuned"]
    events = [json.loads(line) for line in (trained / run / "metrics.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "eval"][-1]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4)


@pytest.mark.parametrize("run", ["lora", "full"])
def test_a_run_judges_answers_as_transformers_does(run: str, trained: Path, tmp_path: Path) -> None:
    """Each answer alone, whatever its batch; also an empty one."""
    directory = merged(trained, run, tmp_path, "--dtype", "f32")
    reference = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer, expected, answers = AutoTokenizer.from_pretrained(trained / "base"), [], []
    for n, said in enumerate(["", "4, 5!", "4, 5?", "well, " * 9, " "]):
        asked: list[dict[str, Any]] = [{"role": "user", "content": f"Say {n}."}]
        asked += [{"role": "assistant", "content": "Why?", "weight": 0}, *asked] * (n % 2)
        answers.append(Answered(Prompt(asked, ""), said, ""))
        turns = [{k: v for k, v in turn.items() if k != "weight"} for turn in asked]
        turns.append({"role": "assistant", "content": said if said.strip() else ""})
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            expected.append(reference(ids).logits.item())
    judge = TrainedReward(str(trained / run), CPU, torch.float32)
    assert judge(answers) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert judge(answers, batch_size=1) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert judge([]) == []


def test_tools_and_variables_of_the_template_are_part_of_the_conversation(trained: Path, monkeypatch: Any) -> None:
    judge = TrainedReward(str(trained / "lora"), CPU, torch.float32)
    render, given, judge.chat.may_omit = judge.chat.render_samples, list[Any](), True

    def noting(*arguments: Any, **options: Any) -> Any:
        given.append((arguments, options))
        return render(*arguments, **options)

    monkeypatch.setattr(judge.chat, "render_samples", noting)
    asked, tools = [{"role": "user", "content": "Say 3."}], [{"type": "function", "function": {"name": "say"}}]
    judge([Answered(Prompt(asked, "4", tools, {"style": "short"}), "3!", "4")])
    whole = [*asked, {"role": "assistant", "content": "3!"}]
    assert given == [((whole, 0, tools), {"template_args": {"style": "short"}})]


@pytest.mark.parametrize("run", ["lora", "qlora"])
def test_peft_gives_the_same_rewards(run: str, trained: Path) -> None:
    adapter = trained / run / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"].shape == (1, 32)
    base = AutoModelForSequenceClassification.from_pretrained(trained / "base", num_labels=1)
    reference, samples = PeftModel.from_pretrained(base, adapter), held_out(trained)
    opened = open_model(str(trained / run), CPU, torch.float32, original_base=True)
    torch.testing.assert_close(own_rewards(opened.model, samples), rewards_of(reference, samples), rtol=1e-4, atol=1e-4)


def merged(trained: Path, run: str, tmp_path: Path, *options: str) -> Path:
    if run == "full":
        return trained / run / "model"
    assert merge_command.main([str(trained / run), "--out", str(tmp_path / "merged"), *options]) == 0
    return tmp_path / "merged"


@pytest.mark.parametrize(
    ("run", "base"), [("lora", "original"), ("qlora", "original"), ("qlora", "nf4"), ("full", "original")]
)
def test_transformers_gives_the_same_rewards(run: str, base: str, trained: Path, tmp_path: Path) -> None:
    """Merged onto the weights of training, or onto the original ones."""
    directory = merged(trained, run, tmp_path, "--base", base, "--dtype", "f32")
    reference, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reference.config.num_labels == 1
    samples = held_out(trained)
    opened = open_model(str(trained / run), CPU, torch.float32, original_base=base == "original")
    expected = own_rewards(opened.model, samples)
    torch.testing.assert_close(rewards_of(reference, samples), expected, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(directory)  # padded in one batch, on the side of its choice
    batch = tokenizer.pad({"input_ids": [s.ids.tolist() for s in samples]}, return_tensors="pt")
    with torch.no_grad():
        found = reference(**batch).logits[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own_rewards(open_model(str(directory), CPU, torch.float32).model, samples), expected)


def test_a_pad_token_that_ends_turns_is_replaced(trained: Path, tmp_path: Path) -> None:
    """transformers takes the reward at the last token that does not pad."""
    base = tmp_path / "base"
    make_chat_model(base)
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}))
    run = train_run(tmp_path / "run", base, trained / "pairs.jsonl", training__objective="reward")
    directory, chat = merged(tmp_path, "run", tmp_path), ChatTokenizer(base)
    pad = json.loads((directory / "config.json").read_text())["pad_token_id"]
    assert pad not in chat.stop_ids
    assert AutoTokenizer.from_pretrained(directory).pad_token_id == pad
    samples = held_out(trained)
    batch = AutoTokenizer.from_pretrained(directory).pad(
        {"input_ids": [s.ids.tolist() for s in samples]}, return_tensors="pt"
    )
    with torch.no_grad():
        found = AutoModelForSequenceClassification.from_pretrained(directory)(**batch).logits[:, 0]
    expected = own_rewards(open_model(str(run), CPU, torch.float32).model, samples)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_merge_with_another_head_is_not_published(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = merge_command.merge

    def broken(*args: Any, **options: Any) -> Any:
        found, file = real(*args, **options), args[3] / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "score.weight": 2 * tensors["score.weight"]}, file)
        return found

    monkeypatch.setattr(merge_command, "merge", broken)
    assert merge_command.main([str(trained / "lora"), "--out", str(tmp_path / "out")]) == 2
    assert "largest reward difference" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_self_test_passes_and_a_resumed_run_is_the_same(trained: Path) -> None:
    assert train.main([str(trained / "lora.json"), "--selftest"]) == 0


def test_full_training_resumes_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    settings = {"training__objective": "reward", "training__method": "full", "training__learning_rate": 1e-3}
    half = train_run(tmp_path / "run", trained / "base", trained / "pairs.jsonl", **settings, training__save_steps=1)
    for name in ("step-000003", "step-000004"):
        for file in (half / "checkpoints" / name).glob("*"):
            file.unlink()
        (half / "checkpoints" / name).rmdir()
    (half / "report.json").unlink()
    assert train.main([str(tmp_path / "run.json")]) == 0
    found, whole = (load_file(run / "model" / "model.safetensors") for run in (half, trained / "full"))
    assert "score.weight" in whole
    assert "lm_head.weight" not in whole
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_it_starts_from_an_adapter_of_supervised_training_with_a_fresh_head(trained: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    records = tmp_path / "chats.jsonl"
    records.write_text(json.dumps({"prompt": "Say 1.", "completion": "1, 2!"}) + "\n", encoding="utf-8")
    sft = train_run(tmp_path / "sft", trained / "base", records, data__validation_split=0.0, training__eval_steps=0)
    settings = {"training__objective": "reward", "training__learning_rate": 1e-12}
    run = train_run(tmp_path / "run", trained / "base", data, lora__start_from=str(sft / "adapter"), **settings)
    before, after = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (sft, run))
    head = after.pop("base_model.model.score.weight")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert head.std().item() == pytest.approx(33**-0.5, rel=0.4)
    config = tmp_path / "dpo.json"
    config.write_text(
        json.dumps({"data": {"train_file": str(data)}, "model": {"name": str(trained / "base")},
                    "training": {"objective": "dpo"}, "lora": {"start_from": str(run / "adapter")}})
    )  # fmt: skip
    assert train.main([str(config), f"output.dir={tmp_path / 'dpo'}"]) == 2


def test_a_merged_reward_model_can_be_trained_further_as_one_only(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, data = merged(trained, "lora", tmp_path), trained / "pairs.jsonl"
    again = train_run(tmp_path / "again", directory, data, training__objective="reward", training__learning_rate=1e-12)
    samples = held_out(trained)
    models = [open_model(str(one), CPU, torch.float32).model for one in (directory, again)]
    torch.testing.assert_close(*(own_rewards(model, samples) for model in models), rtol=1e-4, atol=1e-4)
    assert train.main([str(trained / "lora.json"), f"model.name={directory}", "training.objective=dpo",
                       "data.margin_field=none", "preference.center=0", f"output.dir={tmp_path}/dpo"]) == 2  # fmt: skip
    assert "is a reward model: set training.objective=reward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["merge", "--format", "gguf"], "is a reward model"),
        (["merge", "--format", "gguf-lora"], "is a reward model"),
        (["merge", "--format", "mlx"], "score"),
        (["merge", "--verify"], "--verify"),
        (["merge", "--only", "attention"], "--only"),
        (["chat", "--prompt", "Hi"], "generates no answers"),
        (["eval", "--compare-base"], "--compare-base"),
        (["eval", "--quantization"], "--quantization"),
    ],
)
def test_what_needs_logits_is_refused_in_one_line(
    command: list[str], said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    source = str(trained / "lora")
    if name == "merge":
        code = merge_command.main([source, "--out", str(tmp_path / "out"), *options])
    else:
        code = eval_command.main([source, *options]) if name == "eval" else nanoft_command(["chat", source, *options])
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert said in error[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["lora", "full"])
def test_eval_measures_the_pairs_of_a_run(run: str, trained: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    assert eval_command.main([str(trained / run), "--json", str(figures)]) == 0
    report = json.loads((trained / run / "report.json").read_text())["tuned"]
    found = json.loads(figures.read_text())["tuned"]
    assert found["pair_accuracy"] == report["pair_accuracy"]
    assert found["reward_margin"] == pytest.approx(report["reward_margin"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"training.objective": "dpo", "data.margin_field": "points"},
        {"training.objective": "dpo", "preference.center": 0.01},
        {"training.objective": "reward", "preference.beta": 0.1},
        {"training.objective": "reward", "lora.modules_to_save": ("lm_head",)},
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any]) -> None:
    from nanoft.training.validation import validate_config

    with pytest.raises(UserError):
        validate_config(Config().override(settings))


def test_the_plan_counts_the_scalar_head_and_no_logits(tmp_path: Path) -> None:
    from nanoft.models.model_files import ModelFiles
    from nanoft.training.memory_plan import count_parameters
    from nanoft.training.setup import with_score

    make_reference("mistral", tmp_path)
    decoder = ModelFiles.read(tmp_path).decoder
    plain = Config()
    reward = with_score(plain.override({"training.objective": "reward"}))
    counts, wanted = count_parameters(decoder, reward), count_parameters(decoder, plain)
    assert counts.trained == wanted.trained + decoder.hidden_size
    assert counts.others == wanted.others - decoder.vocab_size * decoder.hidden_size + decoder.hidden_size
