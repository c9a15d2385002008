"""Log-probabilities of whole answers under the policy and its reference, with one copy of the weights.

    log p(y|x) = sum over the tokens of y of log p(token | x, tokens before it)

The reference is the policy at step 0. A fresh adapter changes nothing, so without it the model is the reference. An
adapter that training continues (lora.start_from) is swapped for a copy of its initial values. In full training, the
log-probabilities under the reference are computed once, before the first step, and saved in the run, and so are its
hidden states of held-out answers and its head, from which all logits follow; the logits would be far larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from nanoft.attention import soft_cap
from nanoft.batches import Array, Batch, TokenDataset, collate, eval_batches
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.io.atomic import replace_file
from nanoft.io.tensor_files import load_tensors
from nanoft.lora import disabled
from nanoft.loss import chunk_rows, token_nll
from nanoft.model import Decoder
from nanoft.runtime import distributed

FILE = "reference.safetensors"  # in the run directory
Form = Callable[[TokenDataset], TokenDataset]  # maps each sample to the sample that is measured instead


def answer_states(model: Decoder, batch: Batch) -> Tensor:
    """The final hidden states from which the targets are predicted, (targets, hidden)."""
    states: Tensor = model(batch.ids, batch.positions, batch.documents, batch.target_positions)
    return states[0]


def sequence_logps(model: Decoder, batch: Batch) -> Tensor:
    """log p(y|x) of each of the s samples of a batch, in nats, (s,); differentiable, and never holds all logits."""
    logps = -token_nll(answer_states(model, batch), model.head, batch.targets, cap=model.config.logit_cap)  # (targets,)
    return logps.new_zeros(len(batch.samples)).index_add(0, batch.sequence, logps)


def answer_tokens(batch: Batch) -> Tensor:
    """|y|: the target tokens of each sample, (s,)."""
    counts = batch.sequence.new_zeros(len(batch.samples))  # bincount would make the CPU wait for a GPU
    return counts.index_add(0, batch.sequence, torch.ones_like(batch.sequence))


def compared_rows(vocab: int, device: torch.device) -> int:
    """Rows of two tensors of logits to compare at once, which needs several temporary tensors of their size."""
    return max(16, chunk_rows(vocab, device) // 8)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p | q) = sum of p (log p - log q) of each row, (n,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Reference:
    """The policy at step 0; built before the first step."""

    def __init__(self, config: Config, adapters: dict[str, Adapter]):
        self.adapters = adapters
        trained = [p for adapter in adapters.values() for p in adapter.parameters() if p.requires_grad]
        self.start = [(p, p.detach().clone()) for p in trained] if config.lora.start_from else []
        # in full training: form -> log p_ref of every sample, (n,); sample -> its hidden states; the head
        self.known = dict[str, Tensor]()

    @torch.no_grad()
    def logps(self, model: Decoder, batch: Batch, form: str = "logps", made_of: Array | None = None) -> Tensor:
        """log p_ref(y|x) of each of the s samples of a batch, (s,).

        Args:
            made_of: if the batch has another form of the data's samples, the numbers of those, (s,).
        """
        if not self.adapters:
            return self.known[form][batch.samples.chosen if made_of is None else made_of].to(batch.targets.device)
        with self.weights():
            return sequence_logps(model, batch)

    @torch.no_grad()
    def kl_divergence(self, model: Decoder, batch: Batch) -> Tensor:
        """KL(policy | reference) of the next token at each target position of a batch, in nats, exact, (targets,)."""
        policy, head = answer_states(model, batch), model.head  # (targets, hidden), (vocab, hidden)
        if self.adapters:
            with self.weights():
                reference = answer_states(model, batch)
                reference_head = model.head.clone() if self.start else model.head
        else:
            kept = [policy[:0], *(self.known[str(sample)].to(policy) for sample in batch.samples.chosen)]
            reference, reference_head = torch.cat(kept), self.known["head"].to(head)
        found, cap = [], model.config.logit_cap
        rows = compared_rows(len(head), head.device)
        for now, before in zip(policy.split(rows), reference.split(rows), strict=True):
            pairs = ((now, head), (before, reference_head))
            found.append(kl_divergence(*(soft_cap((h @ w.T).float(), cap).log_softmax(-1) for h, w in pairs)))
        return torch.cat(found)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The model as at step 0, for the duration of a `with` block."""
        now = [p.detach().clone() for p, _ in self.start]
        self._set([before for _, before in self.start])
        try:
            with nullcontext() if self.start else disabled(self.adapters):
                yield
        finally:
            self._set(now)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for (p, _), value in zip(self.start, values, strict=True):
            p.copy_(value)
        for adapter in self.adapters.values() if self.start else ():
            adapter.train(adapter.training)  # clears DoRA's cached norms

    @torch.no_grad()
    def precompute(
        self, model: Decoder, sides: Sequence[TokenDataset], directory: Path | None, batch_size: int,
        forms: Mapping[str, Form],
    ) -> None:  # fmt: skip
        """For full training: load or compute log p_ref of all samples, and hidden states of the held-out ones.

        They come from the file of an earlier session or from the model before training; the second side is held out.
        """
        if directory is not None and (directory / FILE).is_file():
            self.known = load_tensors(directory / FILE)
            return
        found: dict[int, list[float]] = {}  # of a sample, in each form
        pieces = [batch.samples for samples in sides for batch in eval_batches(samples, batch_size, 0)]
        with distributed.same_exception(model.device):
            for at in distributed.split_work(range(len(pieces))):
                units = np.arange(len(pieces[at])).reshape(-1, pieces[at].unit_size)
                batches = [collate(form(pieces[at]), list(units), 0).to(model.device) for form in forms.values()]
                logps = torch.stack([sequence_logps(model, batch) for batch in batches], dim=1)
                found |= zip(pieces[at].chosen.tolist(), logps.tolist(), strict=True)
        found = distributed.all_gather_dict(found)
        known = torch.full((len(forms), max(found) + 1), torch.nan)
        known[:, list(found)] = torch.tensor(list(found.values())).T
        self.known = dict(zip(forms, known, strict=True))
        for batch in (batch for samples in sides[1:] for batch in eval_batches(samples, batch_size, 0)):
            states = answer_states(model, batch.to(model.device)).cpu().split(answer_tokens(batch).tolist())
            self.known |= zip(map(str, batch.samples.chosen), states, strict=True)
        if len(self.known) > len(forms):
            self.known["head"] = model.head.cpu().clone()
        if directory is not None and not distributed.process_rank():
            replace_file(directory / FILE, save(self.known))
