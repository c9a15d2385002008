"""The data of eval.py: a run's own validation split or a whole other file, and a check whether training has seen it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.batches import Sample, TokenDataset
from nanoft.config import Config, DataConfig
from nanoft.config.functions import UNTRUSTED
from nanoft.config.loading import load_config
from nanoft.data import filters
from nanoft.data.builder import NEAR
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets, data_hash
from nanoft.data.filters import preferred
from nanoft.data.formats import Conversation, format_function, read_file
from nanoft.data.sources import find_files
from nanoft.evaluation.evaluate import held_out_prompts
from nanoft.evaluation.report import leakage_of_run, settings_of
from nanoft.io.untrusted import read_json
from nanoft.metrics.rewards import Prompt
from nanoft.models.open import is_run
from nanoft.objectives import OBJECTIVES
from nanoft.objectives.rollouts import with_room_for_answers
from nanoft.runtime.device import library_versions


@dataclass(frozen=True)
class HeldOut:
    """Samples for the likelihood, prompts for the answers, a general text for forgetting, and facts about them."""

    samples: TokenDataset
    prompts: list[Prompt]
    general: list[Sample] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)  # evaluation.by_field -> its value for each sample
    leakage: dict[str, Any] = field(default_factory=dict)


def choose_data(config: Config, source: str, file: str | None) -> DataConfig:
    """All of `--data FILE`, or the run's own validation split; checked before anything is loaded."""
    data = config.data
    trained = load_config(Path(source) / "config.json", environment={}) if is_run(source) else Config()
    if file:  # read like the run's own data, but without splitting or filtering
        kept = ("format", "columns", "delimiter", "max_bad_records", "template_args", "unrendered", "train_on", "chunk")
        label = data.label_field if OBJECTIVES[config.training.objective].learns == "labels" else "ignore"
        settings: dict[str, Any] = {"label_field": label, "control_tokens": data.control_tokens or "text"}
        settings |= {name: getattr(data, name) for name in (*kept, "truncation", "roles")}
        data = DataConfig(train_file=file, validation_split=0.0, deduplicate=False, **settings)
        for name, value in vars(config.data).items():
            if value not in (getattr(trained.data, name), getattr(data, name)):
                raise UserError(f"data.{name}={value}: has no effect with --data, of which all is evaluated: remove it")
    if not data.train_file:
        what = "a model, not a run" if os.path.isdir(source) else "no such run"
        raise UserError(f"{source}: {what}, so there is no validation data: give --data FILE")
    find_files(data.train_file, "--data" if file else "data.train_file")
    if not file:
        format_function(config.data.format)  # a function must be named on the command line again
        trained_on = dataclasses.replace(trained.data, format=trained.data.format.removeprefix(UNTRUSTED))
        if (trained_on, trained.system.seed) != (config.data, config.system.seed):
            raise UserError(
                f"{source}: another seed or data setting would change the split, so that training samples would be "
                "evaluated: remove it, or give --data FILE"
            )
        _require_unchanged(config, source)
    return data


def _recorded_provenance(source: str) -> dict[str, Any]:
    return read_json(Path(source) / "config.json").get("provenance", {})


def _require_unchanged(config: Config, source: str) -> None:
    if _recorded_provenance(source).get("data_sha256") != data_hash(config.data):
        raise UserError(f"{source}: its data changed after training: restore it, or give --data FILE")


def read_held_out(
    config: Config, data: DataConfig, source: str, file: str | None, general: str | None, chat: ChatTokenizer
) -> HeldOut:
    """Read and tokenize everything to evaluate on: `data` from `choose_data`, --data and --general."""
    e, limit = config.evaluation, config.sample_length
    learns = OBJECTIVES[config.training.objective].learns
    if file:  # plain texts are evaluated completely, whatever their length
        paths = [path for part in find_files(data.train_file, "--data") for path in part]
        shapes = {str(next(iter(read_file(path, data, learns=learns)))) for path in paths}
        limit = 2**31 - 1 if shapes == {"text"} else limit
    corpus = build_datasets(data, chat, limit, config.system.seed, print, learns=learns)
    if config.sampled_tokens:
        corpus = with_room_for_answers(corpus, config.model.max_seq_length - config.sampled_tokens)
    samples = corpus.training if file else corpus.validation
    if not len(samples):
        raise UserError(f"{source}: this run has no validation data (data.validation_split=0): give --data FILE")
    prompts = held_out_prompts(corpus.conversations(corpus.untruncated(samples)), e.prompts)
    samples = samples.units(slice(e.max_samples))
    return HeldOut(
        samples,
        prompts,
        read_general(general, chat, e.max_samples, "--general") if general else read_general(e.general_file, chat),
        {e.by_field: corpus.field_values(preferred(samples), e.by_field)} if e.by_field else {},
        _leakage_of_file(source, corpus, samples, chat) if file else leakage_of_run(corpus.report, data.near_leaks),
    )


def read_general(
    file: str | None, chat: ChatTokenizer, limit: int | None = None, option: str = "evaluation.general_file"
) -> list[Sample]:
    """The texts of a file: a .txt file is one text; otherwise the messages of its records. `option` is for errors."""
    if not file:
        return []
    if Path(file).suffix == ".txt":
        try:
            texts = [Path(file).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{option}: {file}: cannot be read as UTF-8 text: {error}") from None
    else:
        records = read_file(Path(file), DataConfig(label_field="ignore"))
        texts = [record.full_text() for record in records if isinstance(record, Conversation)]
    samples = chat.encode_now([chat.text_sample(text, n) for n, text in enumerate(texts[:limit]) if text.strip()])
    if not any(sample.is_target.any() for sample in samples):
        raise UserError(f"{option}: {file}: contains no text: choose another file")
    return samples


def _leakage_of_file(
    source: str, corpus: PreparedDataset, samples: TokenDataset, chat: ChatTokenizer
) -> dict[str, Any]:
    """The number of prompts of a file that are in the run's training data."""
    if not is_run(source):
        return {"said": "not checked, because the model's training data is unknown: name its run instead"}
    try:
        trained = load_config(Path(source) / "config.json", environment={})
        _require_unchanged(trained, source)
        length, learns = trained.sample_length, OBJECTIVES[trained.training.objective].learns
        train_set = build_datasets(trained.data, chat, length, trained.system.seed, print, learns=learns)
    except UserError as reason:
        return {"said": f"not checked: {reason}"}
    prompts = [conversation.prompt(system=False) for conversation in corpus.conversations(samples)]
    trained_on = (conversation.prompt(system=False) for conversation in train_set.conversations(train_set.training))
    exact, near = filters.count_leaks(prompts, trained_on, NEAR)
    said = f"of {len(prompts):,} prompts, {exact:,} occur verbatim in the training data, and {near:,} nearly"
    return {"prompts": len(prompts), "exact": exact, "near": near, "said": said}


def provenance(config: Config, data: DataConfig, source: str, file: str | None) -> dict[str, Any]:
    """What it takes to reproduce the evaluation: model, data, settings, versions."""
    recorded = _recorded_provenance(source) if is_run(source) else {}
    return {
        "base": config.model.name,
        "data": file or config.data.validation_file or config.data.train_file,
        "data_sha256": data_hash(data),
        **{name: recorded[name] for name in ("base_sha256", "date") if name in recorded},
        "settings": settings_of(config),
        "evaluation": {name: v for name, v in dataclasses.asdict(config.evaluation).items() if v is not None},
        "versions": library_versions(),
    }
