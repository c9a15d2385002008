"""LoRA fine-tuning on one page: data, model, adapters, loss, training, answers, merging.

A language model gives every token of a text a probability, p(token | tokens before it). Fine-tuning changes its weights
until the answers of a data set are likely. It minimizes, by gradient descent,

    loss = sum over target tokens of -log p(token | tokens before it)  /  number of target tokens

LoRA (Hu et al. 2021) leaves every weight matrix W unchanged and learns a correction of low rank r:

    y = W x + (alpha / r) B A x        W: (out, in), frozen        A: (r, in), random        B: (out, r), zero at first

Here a model of a million parameters, which knows a small language but has never seen a chat, learns to answer requests
with tool calls. Run `python nanoft/nano.py`: about a minute on two cores. The rest of nanoft computes the same for many
models, with less memory, and recovers from faults; docs/tour.md starts here and shows how each part develops.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

DEMO = Path(__file__).resolve().parents[1] / "configs" / "tiny"
RANK, ALPHA, EPOCHS, PEAK_RATE, WARMUP, MAX_NORM = 16, 256.0, 3, 5e-4, 0.05, 1.0  # WARMUP: share of the steps
WINDOW, MICRO_BATCH = 32, 16  # sequences of an optimizer step, and of one forward pass
Chat = list[dict[str, str]]  # [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]
Sample = tuple[Tensor, Tensor]  # token ids, and which of them are targets, (s,) each


def encode(chat: Chat, tokenizer: Tokenizer) -> Sample:
    """Mistral's chat template. Targets are the assistant's text and </s>, which ends a turn; never the prompt."""
    ids, is_target, opening = list[int](), list[bool](), "<s>[INST]"
    for message in chat:
        if message["role"] == "system":
            opening += message["content"] + "\n\n"
            continue
        is_answer = message["role"] == "assistant"
        text = message["content"] + "</s>" if is_answer else opening + message["content"] + "[/INST]"
        turn, opening = tokenizer.encode(text, add_special_tokens=False).ids, "[INST]"
        ids, is_target = ids + turn, is_target + [is_answer] * len(turn)
    return torch.tensor(ids), torch.tensor(is_target)


def prompt_hash(chat: Chat) -> str:
    """The chats with the smallest hashes are held out, so that the split does not depend on the order of the file."""
    return hashlib.sha256(("0\0" + "\n".join(message["content"] for message in chat[:-1])).encode()).hexdigest()


class Model:
    """A Mistral decoder: weights by their names in the file, adapters (A, B) by the name of their linear."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = {name: w.float() for name, w in load_file(directory / "model.safetensors").items()}
        self.adapters: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        """From token ids of b sequences with s positions, (b, s), to logits of each next token, (b, s, vocab)."""
        x = self.weights["model.embed_tokens.weight"][ids]  # (b, s, hidden)
        for block in (f"model.layers.{layer}" for layer in range(self.config["num_hidden_layers"])):
            x = x + self.attention(f"{block}.self_attn", self.norm(f"{block}.input_layernorm", x))
            h = self.norm(f"{block}.post_attention_layernorm", x)
            gate, up = self.linear(f"{block}.mlp.gate_proj", h), self.linear(f"{block}.mlp.up_proj", h)
            x = x + self.linear(f"{block}.mlp.down_proj", F.silu(gate) * up)  # x + W_down (silu(W_gate h) * (W_up h))
        return self.linear("lm_head", self.norm("model.norm", x))

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T  # W x
        if name in self.adapters:
            A, B = self.adapters[name]
            y = y + ALPHA / RANK * (x @ A.T) @ B.T  # + (alpha / r) B A x
        return y

    def norm(self, name: str, x: Tensor) -> Tensor:  # x / sqrt(mean(x^2) + eps) * g
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def attention(self, name: str, x: Tensor) -> Tensor:
        """W_o softmax(q k^T / sqrt(d)) v: each position averages the values of earlier positions and its own."""
        d = self.config["head_dim"]  # with h query heads and g key/value heads, q is (b, h, s, d), k and v (b, g, s, d)
        q, k, v = (self.linear(f"{name}.{p}_proj", x).unflatten(-1, (-1, d)).transpose(1, 2) for p in "qkv")
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))  # h / g queries share a key
        scores = self.rotate(q) @ self.rotate(k).transpose(2, 3) / math.sqrt(d)  # (b, h, s, s)
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -math.inf)  # no future
        return self.linear(f"{name}.o_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor) -> Tensor:
        """Turn (x_i, x_{i + d/2}) by the angle t theta^(-2i/d) at position t: q k^T then depends on the distance."""
        s, d = x.shape[-2:]
        angle = torch.arange(s)[:, None] * self.config["rope_theta"] ** (-torch.arange(0, d, 2) / d)  # (s, d/2)
        (x1, x2), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def add_adapters(model: Model) -> list[Tensor]:
    """Add A and B to each matrix of the blocks. Returns the trained parameters: r (in + out) instead of in * out."""
    for name in [name for name in model.weights if name.endswith("_proj.weight")]:
        rows, columns = model.weights[name].shape
        A, B = torch.empty(RANK, columns).uniform_(-1, 1) / math.sqrt(columns), torch.zeros(rows, RANK)
        model.adapters[name.removesuffix(".weight")] = A.requires_grad_(), B.requires_grad_()
    return [factor for pair in model.adapters.values() for factor in pair]


def nll(model: Model, samples: list[Sample]) -> Tensor:
    """-log p of each target token, (n,). Padding is on the right, where no token attends to it."""
    ids, is_target = (pad_sequence(list(part), batch_first=True) for part in zip(*samples, strict=True))  # (b, s)
    wanted = is_target[:, 1:]  # the logits at one position predict the token at the next
    return F.cross_entropy(model(ids)[:, :-1][wanted], ids[:, 1:][wanted], reduction="none")


def accumulate(model: Model, window: list[Sample]) -> float:
    """The loss of a window. The gradients of its micro-batches add up, all divided by the window's target tokens."""
    loss, targets = 0.0, sum(int(is_target.sum()) for _, is_target in window)  # every token has the same weight
    for start in range(0, len(window), MICRO_BATCH):
        part = nll(model, window[start : start + MICRO_BATCH]).sum() / targets
        part.backward()
        loss += part.item()
    return loss


def learning_rate(step: int, steps: int) -> float:
    """A linear rise, while AdamW's averages are over few gradients, then half a cosine down to 0."""
    warmup = round(WARMUP * steps)
    t = max(0, step - warmup) / (steps - warmup)
    return PEAK_RATE * min(1, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * t)) / 2


def train(model: Model, parameters: list[Tensor], samples: list[Sample]) -> None:
    """AdamW: m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, w <- w - lr m' / (sqrt(v') + eps); m', v' unbiased."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    windows = [picked for _ in range(EPOCHS) for picked in torch.randperm(len(samples)).split(WINDOW)]
    for step, picked in enumerate(windows):
        window = sorted((samples[i] for i in picked), key=lambda sample: len(sample[0]))  # saves padding
        loss = accumulate(model, window)
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)  # g <- g min(1, MAX_NORM / |g|)
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(windows))
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3} of {len(windows)}: loss {loss:.4f}, gradient norm {norm:.3f}", flush=True)


@torch.no_grad()
def perplexity(model: Model, samples: list[Sample]) -> float:
    """exp(mean of -log p over all target tokens): 1 means certainty, the size of the vocabulary a blind guess."""
    nats = torch.cat([nll(model, samples[at : at + MICRO_BATCH]) for at in range(0, len(samples), MICRO_BATCH)])
    return nats.mean().exp().item()


@torch.no_grad()
def answer(model: Model, prompt: Chat, tokenizer: Tokenizer, limit: int = 64) -> str:
    """Greedy: append the most likely token, until it is </s>."""
    ids, said = encode(prompt, tokenizer)[0].tolist(), list[int]()
    while len(said) < limit and tokenizer.token_to_id("</s>") not in said:
        said.append(int(model(torch.tensor([ids + said]))[0, -1].argmax()))
    return tokenizer.decode(said)


def merge(model: Model) -> None:
    """W <- W + (alpha / r) B A: the same answers without adapters, in every program that reads the weights."""
    for name, (A, B) in model.adapters.items():
        model.weights[f"{name}.weight"] += ALPHA / RANK * (B @ A).detach()
    model.adapters = {}


def show(model: Model, held_out: list[Chat], tokenizer: Tokenizer) -> None:
    print(f"perplexity {perplexity(model, [encode(chat, tokenizer) for chat in held_out]):.4g}; answers:")
    for chat in held_out[:3]:
        print(f"  {chat[-2]['content']} -> {answer(model, chat[:-1], tokenizer)}")


if __name__ == "__main__":
    torch.manual_seed(0)
    tokenizer, model = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json")), Model(DEMO / "base")
    lines = (DEMO / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    chats = sorted((json.loads(line)["messages"] for line in lines), key=prompt_hash)
    held_out, training = chats[: len(chats) // 10], chats[len(chats) // 10 :]
    show(model, held_out, tokenizer)
    train(model, add_adapters(model), [encode(chat, tokenizer) for chat in training])
    merge(model)
    show(model, held_out, tokenizer)
    shutil.copytree(DEMO / "base", "runs/nano", dirs_exist_ok=True)  # with the merged weights, any program can load it
    save_file({name: w.bfloat16() for name, w in model.weights.items()}, "runs/nano/model.safetensors")
