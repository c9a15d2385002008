"""Decoding with a cache: one more token for every sequence, without another pass over the earlier tokens.

The prompts are read packed, as in training, and each layer's keys and values are kept. After that a step is one
position per sequence. Both run the blocks of nanoft/model.py; only their context differs.

    k, v of the new position go into the cache;  y = softmax(q K^T / sqrt(d)) V  over the cache

All sequences end in the same slot of the cache, so that their next tokens share a slot; the slots before a shorter
sequence are empty and masked. Sequences whose answer has ended leave, and new prompts take their places. If prompts
that join together are equal, these stand apart from the answers, once each (nanoft/generation/shared_prompts.py).

Notation in comments: b sequences, h query heads, g key/value heads, d head size, n hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import kernels
from nanoft.attention import AttentionLayer, CacheContext, Documents, SequenceContext, soft_cap
from nanoft.blocks import per_layer
from nanoft.blocks.recurrence import Kept
from nanoft.generation.shared_prompts import SharedPromptContext, SharedPrompts
from nanoft.kernels import sharding
from nanoft.kernels.decode import FastCacheContext, choose_build, prepacked, twin
from nanoft.model import Decoder

# Bytes of copies, in a layer, from which a prompt is kept once for all of its sequences: on a CPU about what a step
# reads in the time of the operations that this adds to it.
WORTH_SHARING = 2 << 20


class PromptContext(SequenceContext):
    """A pass over prompts that keeps keys, values and states; `context` does rotation and attention."""

    kept: Kept

    def __init__(self, context: SequenceContext, keep: Callable[[int, Tensor, Tensor], None]):
        self.context, self.keep, self.tensors = context, keep, context.tensors
        self.documents, self.rule, self.kept = context.documents, context.rule, {}

    def rotate(self, q: Tensor, k: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor]:
        return self.context.rotate(q, k, layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: AttentionLayer) -> Tensor:
        if layer.source == layer.index:
            self.keep(layer.index, k, v)
        return self.context.attend(q, k, v, layer)


class Decoding:
    """A batch of growing sequences, with keys and values in buffers of their final size, and recurrent states."""

    def __init__(self, model: Decoder):
        self.model, self.device = model, model.device
        self.length = self.slots = 0  # slots in use, and allocated
        self.empty: list[int] = []  # slots before the first token of each sequence
        self.shared = SharedPrompts(self.device)
        self.keys, self.values = dict[int, Tensor](), dict[int, Tensor]()  # by layer, (b, g, slots, d)
        self.kept: Kept = {}  # of layers without attention, (b, ...)
        self.ropes = [rope for rope in model.config.distinct_ropes if rope.depends_on_length]
        self.read: list[list[int]] = []  # the tokens of each sequence, for these ropes
        sharding.gather_outside(model)
        self.is_fast = kernels.is_applied(model)
        self.in_turn = hasattr(model.model.layers[0], "unshard")  # weights of blocks come and go
        self.build = choose_build(model) if self.is_fast and not self.in_turn else None
        self.head = prepacked(model.head.to(model.dtype), None) if self.build is prepacked else None
        self.context_class = FastCacheContext if self.is_fast else CacheContext
        self._functions = [] if self.in_turn else list(map(self._function, model.model.layers))

    def _function(self, block: nn.Module) -> Callable[..., Tensor]:
        """A block's twin or its `forward`, as calling a compiled block would compile it again for these shapes."""
        return twin(block, self.build) if self.is_fast else block.forward

    def blocks(self) -> Iterable[Callable[..., Tensor]]:
        """The blocks as functions; of weights that come and go one after the other, each while they are there."""
        return sharding.in_turn(self.model.model.layers, self._function) if self.in_turn else self._functions

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden @ head^T in float32, (b, vocab), with the model's cap if it has one."""
        if self.head is None:
            return self.model.logits(hidden)
        return soft_cap(self.head(hidden).float(), self.model.config.logit_cap)

    def join(self, prompts: Sequence[Sequence[int]], more: int) -> Tensor:
        """Add prompts, none of them empty, to the batch, so that they end in the same slot as its sequences.

        At most `more` tokens may follow each sequence. A prompt that occurs several times is read once; if its copies
        would be large, it is also kept once, apart from its sequences. Returns the last hidden state of each prompt,
        (prompts, n).
        """
        numbers = dict[tuple[int, ...], int]()  # of the distinct prompts
        copies = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
        own, distinct = [len(prompt) for prompt in prompts], list(numbers)
        chosen = torch.tensor(copies, device=self.device)
        hidden, keys, values, states = self._read(distinct)
        of_all = sum(part.nbytes for cache in (keys, values) for part in cache.values())
        if of_all / len(distinct) * (len(prompts) - len(distinct)) > WORTH_SHARING * len(keys):
            self.shared.add(keys, values, [len(prompt) for prompt in distinct], copies)
            keys, values = ({layer: part[:, :, :0] for layer, part in cache.items()} for cache in (keys, values))
            own = [0] * len(prompts)
        else:
            self.shared.prompts += [-1] * len(prompts)
        length = max(self.length, *own)
        before = length - self.length  # slots by which the sequences in the batch move

        def append(old: Tensor, new: Tensor) -> Tensor:
            both = new.new_zeros(len(old) + len(copies), new.shape[1], length + more, new.shape[3])
            both[: len(old), :, before:length] = old[:, :, : self.length]
            both[len(old) :, :, length - new.shape[2] : length] = new[chosen]
            return both

        for cache, read in ((self.keys, keys), (self.values, values)):
            cache |= {layer: append(cache.get(layer, new[:0]), new) for layer, new in read.items()}
        self.kept |= {key: torch.cat((self.kept.get(key, new[:0]), new[chosen])) for key, new in states.items()}
        self.empty = [empty + before for empty in self.empty] + [length - tokens for tokens in own]
        self.length, self.slots = length, length + more
        self.read += [list(prompt) for prompt in prompts]
        self._prepare_slots()
        return hidden[chosen]

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor], Kept]:
        """Last hidden states, (b, n), keys and values by layer, (b, g, longest, d), ending in the same slot, states."""
        lengths = [len(prompt) for prompt in prompts]
        longest, ends = max(lengths), torch.tensor(lengths).cumsum(0)
        ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=self.device)  # (1, tokens)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        documents = None
        if len(lengths) > 1:
            documents = Documents(tuple(lengths), F.pad(ends, (1, 0)).to(self.device, torch.int32))
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(self.device)
        slots = positions + (longest - torch.tensor(lengths, device=self.device))[sequences]
        keys, values = dict[int, Tensor](), dict[int, Tensor]()

        def keep(layer: int, k: Tensor, v: Tensor) -> None:  # (1, tokens, g, d) each
            for part, cache in ((k[0], keys), (v[0], values)):
                cache[layer] = part.new_zeros(len(lengths), part.shape[1], longest, part.shape[2])
                cache[layer][sequences, :, slots] = part

        trunk = self.model.model
        x = self.model.embed(ids, positions[None])
        context = PromptContext(self.model.context(positions[None], x.dtype, documents), keep)
        context.tensors |= per_layer.embeddings(trunk, ids, x)
        last = len(trunk.layers) - 1
        for index, block in enumerate(self.blocks()):
            x = block(x, context, (ends - 1).to(self.device) if index == last else None)
        return self.model.finish(x)[0], keys, values, context.kept

    def _prepare_slots(self) -> None:
        """For every slot of every sequence, its rotation and whether it holds a token."""
        slots, empty = torch.arange(self.slots), torch.tensor(self.empty)[:, None]
        first = torch.tensor(self.shared.prefix_lengths)[:, None] - empty  # the position of slot 0
        most = self.model.config.positions  # learned ones: a finished answer may grow for a few more steps
        self.positions = (first + slots).clamp(0, most - 1 if most else None).to(self.device)  # (b, slots)
        dtype = next(iter(self.values.values()), self.model.head).dtype
        rotations = self.model.rotations(self.positions, dtype, (first + self.length).to(self.device))
        self.tables = self.context_class.tables(rotations, (slots >= empty).to(self.device))
        if self.shared.lengths:
            self.shared.prepare(self.empty)

    def step(self, newest: Tensor) -> Tensor:
        """Append one token to each sequence, (b,); the new hidden states, (b, n).

        When a sequence outgrows the context of pre-training, its rope may change the rotation of all positions, also
        of those in the cache; then all sequences are read again.
        """
        if self.ropes:
            self.read = [[*tokens, new] for tokens, new in zip(self.read, newest.tolist(), strict=True)]
            if any(rope.changes_at(len(tokens)) for rope in self.ropes for tokens in self.read):
                sequences, more = self.read, self.slots - self.length - 1
                self.keep([])
                return self.join(sequences, more)
        cache = self.context_class(self.tables, self.keys, self.values, self.length, max(self.empty), self.kept)
        context = SharedPromptContext(cache, self.shared) if self.shared.lengths else cache
        x: Any = self.model.embed(newest[:, None], self.positions[:, self.length : self.length + 1])  # (b, 1, n)
        context.tensors |= per_layer.embeddings(self.model.model, newest[:, None], x)
        self.length += 1
        for block in self.blocks():
            x = block(x, context)
        return self.model.finish(x)[:, 0]

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop the other sequences, and the slots that are empty in all that remain."""
        chosen = torch.tensor(sequences, dtype=torch.long, device=self.device)
        cut = min((self.empty[sequence] for sequence in sequences), default=self.length)
        for cache in (self.keys, self.values):
            cache |= {layer: part[chosen, :, cut:] for layer, part in cache.items()}
        self.kept = {key: state[chosen] for key, state in self.kept.items()}
        self.shared.keep(sequences)
        self.empty = [self.empty[sequence] - cut for sequence in sequences]
        self.read = [self.read[sequence] for sequence in sequences]
        self.length, self.slots = self.length - cut, self.slots - cut
        self._prepare_slots()
