"""Distillation: a student learns a teacher's distribution over the next token, at every token of an answer.

A single token instead of the teacher's whole distribution wastes most of what it knows (Hinton et al. 2015). With s and
t the distributions of student and teacher over the next token, the loss per token is the generalized Jensen-Shannon
divergence (Agarwal et al. 2024, "On-Policy Distillation of Language Models", eq. 1):

    beta KL(t | m) + (1 - beta) KL(s | m),  m = beta t + (1 - beta) s

    beta = 0: KL(t | s), the student covers everything that the teacher finds likely (mode covering)
    beta = 1: KL(s | t), it concentrates on a part of that (mode seeking)

Off-policy, the answers are those of the data. On-policy, the student samples them, so it is corrected in the contexts
that its own mistakes lead to. The teacher is a model with the same vocabulary, in NF4 unless it is a run; or, if it is
an adapter on the student's base, that adapter on the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanoft import UserError, kernels
from nanoft.attention import soft_cap
from nanoft.batches import Batch, Batches, Window, share_of_rank
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.config.settings import DistillConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import Learns
from nanoft.generation.sampling import GREEDY, Sampling
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.adapter_files import load_adapter_tensors
from nanoft.models.model_files import find_model, quantization_of
from nanoft.models.open import TrainedAdapter, find_adapter, is_run, open_model, read_trained_adapter
from nanoft.models.weights import load_model
from nanoft.objectives.objective import Objective
from nanoft.objectives.preference import add, means
from nanoft.objectives.reference import compared_rows, kl_divergence
from nanoft.objectives.rollouts import Prompts, check_answers_fit
from nanoft.perplexity import evaluating
from nanoft.runtime import distributed
from nanoft.runtime.command import StopRequest

NF4 = "nf4", True


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalized Jensen-Shannon divergence of each row of logits, (n, vocab) both, in nats, (n,)."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta == 0:
        return kl_divergence(log_t, log_s)
    if beta == 1:
        return kl_divergence(log_s, log_t)
    shares = torch.tensor([beta, 1 - beta], device=student.device, dtype=student.dtype).log()
    log_m = torch.logsumexp(torch.stack((log_t + shares[0], log_s + shares[1])), 0)
    return beta * kl_divergence(log_t, log_m) + (1 - beta) * kl_divergence(log_s, log_m)


class Teacher:
    """A second, frozen model."""

    def __init__(self, source: str, bits: int, student: Decoder):
        if is_run(source) or find_adapter(source):
            opened = open_model(source, student.device, student.dtype)
            self.model, self.tokenizer = opened.model, opened.tokenizer_directory
        else:
            self.tokenizer = find_model(source, "distill.teacher")
            self.model = load_model(self.tokenizer, student.device, student.dtype, NF4 if bits == 4 else None)
            kernels.apply(self.model)
        self.model.requires_grad_(False).eval()

    @contextmanager
    def as_model(self) -> Iterator[Decoder]:
        yield self.model


class OtherAdapter:
    """Another adapter on the student's base; within `as_model` it replaces the student's own."""

    def __init__(self, adapter: TrainedAdapter, student: Decoder, own: dict[str, Adapter]):
        self.student, self.own, self.tokenizer = student, own, adapter.tokenizer
        self.others: dict[str, Adapter] = {}
        with self.as_model():
            self.others = inject_lora(student, adapter.lora, 0)
            load_adapter_tensors(self.others, adapter.tensors, f"distill.teacher: {adapter.place}")
        for module in self.others.values():
            module.requires_grad_(False).eval()

    @contextmanager
    def as_model(self) -> Iterator[Decoder]:
        for name, module in self.own.items():
            self.student.set_submodule(name, module.base)
        for name, module in self.others.items():
            self.student.set_submodule(name, module)
        try:
            yield self.student
        finally:
            for name, module in self.others.items():
                self.student.set_submodule(name, module.base)
            for name, module in self.own.items():
                self.student.set_submodule(name, module)


class Distill(Objective):
    """Generalized knowledge distillation from a teacher with the same vocabulary."""

    unit = "target tokens"
    learns: ClassVar[Learns] = "prompts"
    section = "distill"
    settings: ClassVar[tuple[str, ...]] = tuple(f.name for f in fields(DistillConfig))

    def __init__(self, config: Config, adapters: dict[str, Adapter], prompts: Prompts):
        self.config, self.distill, self.adapters, self.prompts = config, config.distill, adapters, prompts
        self.sampling = Sampling(config.distill.temperature)
        self.teacher: Teacher | OtherAdapter

    @classmethod
    def check(cls, config: Config) -> None:
        if not (name := config.distill.teacher):
            raise UserError("distill.teacher: empty: name a run, an adapter, or a model with the same vocabulary")
        if not find_adapter(name) and not is_run(name):
            find_model(name, "distill.teacher")
        answers = config.distill.max_new_tokens if config.distill.on_policy else 0
        check_answers_fit("distill.max_new_tokens", answers, config.model.max_seq_length)

    def begin(self, model: Decoder, *_: object) -> None:
        name, d = self.distill.teacher, self.distill
        adapter = read_trained_adapter(name) if find_adapter(name) else None
        if adapter is not None and self.shares_base(adapter):
            self.teacher = OtherAdapter(adapter, model, self.adapters)
        else:
            self.teacher = Teacher(name, d.teacher_bits, model)
        theirs = ChatTokenizer(self.teacher.tokenizer).tokenizer.get_vocab()
        if theirs != self.prompts.chat.tokenizer.get_vocab():
            fix = "choose a teacher with the same tokenizer"
            raise UserError(f"distill.teacher: {name}: its vocabulary differs from {self.config.model.name}: {fix}")
        self.prompts.begin(model)

    def shares_base(self, adapter: TrainedAdapter) -> bool:
        """Whether the teacher is an adapter, of linears only, on exactly the student's base weights."""
        base, lora = find_model(self.config.model.reference), adapter.lora
        others = lora.modules_to_save or lora.trainable_token_indices or "lm_head" in lora.target_modules
        is_same = adapter.base.resolve() == base.resolve() and adapter.quantization == quantization_of(self.config)
        return bool(self.adapters) and is_same and not others

    def windows(self, model: Decoder, window: Window, rows: int, stop: StopRequest | None = None) -> list[Window]:
        """On-policy, the student's answers to the prompts of the window."""
        if not self.distill.on_policy:
            return [window]
        records = window.samples.records.tolist()
        answers = self.prompts.sample(model, records, 1, self.sampling, window.position, stop)
        return [replace(window, micro_batches=self.prompts.cut(answers, rows))] if answers else []

    def count(self, window: Window) -> float:
        return window.target_tokens

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """Sum of the divergence over the target tokens of a micro-batch."""
        return self.token_divergence(model, batch).sum()

    def token_divergence(self, model: Decoder, batch: Batch) -> Tensor:
        """The divergence of each target token, (targets,), in chunks whose logits are recomputed in backward."""
        inputs = batch.ids, batch.positions, batch.documents, batch.target_positions
        with torch.no_grad(), self.teacher.as_model() as teacher:
            t_hidden, t_head, t_cap = teacher(*inputs)[0], teacher.head, teacher.config.logit_cap
        s_hidden, s_head, s_cap = model(*inputs)[0], model.head, model.config.logit_cap
        shared, d = min(len(s_head), len(t_head)), self.distill  # rows beyond the vocabulary are padding

        def of_chunk(student: Tensor, teacher: Tensor, s_head: Tensor, t_head: Tensor) -> Tensor:
            s = soft_cap((student @ s_head[:shared].to(student.dtype).T).float(), s_cap) / d.temperature
            t = soft_cap((teacher @ t_head[:shared].to(teacher.dtype).T).float(), t_cap) / d.temperature
            if d.top_k:  # only the teacher's likeliest tokens
                t, likeliest = t.topk(min(d.top_k, shared))
                s = s.gather(-1, likeliest)
            return divergence(s, t, d.beta)

        rows = compared_rows(shared, model.device)
        chunks = zip(s_hidden.split(rows), t_hidden.split(rows), strict=True)
        return torch.cat([checkpoint(of_chunk, s, t, s_head, t_head, use_reentrant=False) for s, t in chunks])

    def longest(self, batches: Batches) -> Batch:
        if not self.distill.on_policy:
            return batches.longest()
        return self.prompts.cut(answers := self.prompts.longest(batches), len(answers))[0]

    @torch.no_grad()
    def evaluate(self, model: Decoder, batches: Iterable[Batch]) -> dict[str, float]:
        """The divergence on the answers of the data; on-policy, on the student's greedy answers."""
        held_out, sums = list(batches), dict[str, Tensor]()
        if self.distill.on_policy:
            records = [record for batch in held_out for record in batch.records]
            answers = self.prompts.sample(model, records, 1, GREEDY, [0, 0])
            held_out = self.prompts.cut(answers, len(held_out[0].ids))
        with evaluating(model), distributed.same_exception(model.device):
            for batch in share_of_rank(held_out):
                add(sums, {"loss": self.token_divergence(model, batch.to(model.device))})
        return means(sums)
