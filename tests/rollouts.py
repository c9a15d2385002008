"""Given answers that replace the sampled ones in tests of GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from nanoft.batches import Sample, TokenDataset, Window, collate
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.data.formats import Conversation
from nanoft.metrics.rewards import Rewards
from nanoft.model import Decoder
from nanoft.objectives.distill import Distill
from nanoft.objectives.grpo import GRPO
from nanoft.objectives.rollouts import Prompts, Rollout

PAD = 0


def random_rollouts(prompts: int = 3, group: int = 4, vocab: int = 32) -> list[Rollout]:
    """Answers of different lengths, most with rewards of their own; the second prompt's are all worth the same."""
    chance, made = np.random.default_rng(11), list[Rollout]()
    for n in range(prompts):
        prompt = chance.integers(2, vocab, 2 + 3 * n).tolist()
        for at in range(group):
            ids = chance.integers(2, vocab, chance.integers(1, 8)).tolist()
            reward = 0.5 if n == 1 else float(chance.normal())
            made.append(Rollout(n, prompt, ids, [-1.0] * len(ids), [reward], reward, at % 3 != 1))
    return made


class Given(Prompts):
    """Prompts whose sampled answers are always the given ones."""

    def __init__(self, config: Config, found: Sequence[Rollout]):
        self.config, self.rl, self.found = config, config.rl, list(found)
        self.chat: Any = SimpleNamespace(pad_id=PAD)
        self.rewards, self.log = Rewards(config.rl), print

    def sample(self, *_: Any, **__: Any) -> list[Rollout]:
        return self.found

    def encode(self, record: int) -> list[int]:
        return next(answer.prompt_ids for answer in self.found if answer.record == record)


def given(config: Config, adapters: dict[str, Adapter], found: Sequence[Rollout]) -> GRPO:
    """GRPO on these answers, a group after the other."""
    groups = len({answer.record for answer in found})
    sizes = {"rl.reward": ("exact_match",), "rl.group_size": len(found) // groups, "training.objective": "grpo"}
    return GRPO(changed := config.override(sizes), adapters, Given(changed, found))


class Taught(Distill):
    """Distillation from a teacher that is already loaded."""

    def __init__(self, config: Config, adapters: dict[str, Adapter], found: Sequence[Rollout], teacher: Decoder):
        super().__init__(config, adapters, Given(config, found))
        self.teacher: Any = SimpleNamespace(as_model=lambda: nullcontext(teacher))

    def begin(self, *_: object) -> None:
        """No model has to be opened."""


def prompt_window(found: Sequence[Rollout]) -> Window:
    """The prompts of a step, as the data has them."""
    return window_of([*dict.fromkeys(answer.record for answer in found)])


class Numbers:
    """A chat tokenizer without a template: a text is numbers, each of which is a token."""

    stop_ids, pad_id = (1,), PAD
    control: Any = SimpleNamespace(remove=lambda text: text)

    def encode_prompt(self, messages: list[dict[str, Any]], *_: object) -> list[int]:
        return [int(word) for message in messages for word in message["content"].split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def sampling(config: Config, adapters: dict[str, Adapter], records: dict[str, str], reward: Any = None) -> GRPO:
    """GRPO that samples answers to prompts of numbers, each with its reference; `reward`: of an Answered."""
    conversations = [
        Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": reference}], 1, "f", n + 1)
        for n, (prompt, reference) in enumerate(records.items())
    ]
    ids = np.arange(1, 3, dtype=np.int32)
    samples = TokenDataset.of([Sample(ids, ids > 1, n) for n in range(len(conversations))])
    corpus: Any = SimpleNamespace(
        training=samples,
        validation=samples[:0],
        conversations=lambda part: (conversations[record] for record in np.unique(part.records)),
    )
    config = config.override({"rl.reward": config.rl.reward or ("exact_match",), "training.objective": "grpo"})
    prompts = Prompts(config, corpus, Numbers())  # type: ignore[arg-type]
    prompts.rewards = Rewards(config.rl)
    if reward is not None:
        prompts.rewards.functions = [reward]
    return GRPO(config, adapters, prompts)


def window_of(records: Sequence[int], index: int = 0) -> Window:
    """A window of the prompts of some records."""
    ids = np.arange(1, 3, dtype=np.int32)
    samples = TokenDataset.of([Sample(ids, ids > 1, record) for record in records])
    return Window([collate(samples, list(np.arange(len(samples))[:, None]), PAD)], [0, index], [0, index + 1])
