"""Export a model, or an adapter, as a GGUF file for llama.cpp and Ollama.

A GGUF file is a list of metadata and a list of tensors. The metadata must be complete, because llama.cpp silently uses
a default for a missing entry. The tensors are those of the Hugging Face files under other names, but some graphs of
llama.cpp (nanoft/export/gguf_graphs.py), such as that of Llama and Mistral, rotate neighbors (x0, x1), (x2, x3), ...
where Hugging Face rotates (x0, x_{d/2}), (x1, x_{d/2 + 1}), ... So the rows of q and k, and their biases, are permuted.

A Modelfile for Ollama and prompts with expected answers are written next to the file. Ollama does not run the chat
template in a GGUF file: it looks common ones up among its own, and for any other prompts must be sent raw.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export import merge, verify
from nanoft.export.gguf_graphs import GRAPHS, add_shape, architecture, rope_tensors, stacked_name, to_llama_cpp
from nanoft.export.gguf_tokenizer import add_tokenizer
from nanoft.export.merge import EXPORT_DTYPES, Onto
from nanoft.export.model_card import model_card, parity_record
from nanoft.export.streaming import Rows, StreamedDecoder, open_rows
from nanoft.export.verify import TOLERANCE, Proof
from nanoft.io.atomic import new_directory, write_file, write_json
from nanoft.io.bars import track
from nanoft.model import MLP_INPUTS, Decoder, DecoderConfig
from nanoft.models.adapter_files import only_linears
from nanoft.models.families import file_name
from nanoft.models.model_files import ModelFiles, find_model
from nanoft.models.open import LoadedModel, find_adapter, is_run, open_chat_tokenizer, open_model
from nanoft.perplexity import safe_exp

WRITTEN = (*EXPORT_DTYPES, "q8_0", "q5_0", "q4_0")  # by the gguf package
K_QUANTS = {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}  # by llama.cpp: LLAMA_FTYPE_MOSTLY_... of include/llama.h
GGUF_DTYPES = (*WRITTEN, *K_QUANTS)
BLOCK = 32  # values of Q8_0, Q5_0 and Q4_0 with one scale
MEASURED, LONGEST = 1024, 512  # tokens for the perplexity, if there are as many; most tokens of one sample
# Name, shape, format (F32, Q8_0, ...), float32 values, which are those of one expert after another for a stack.
Entry = tuple[str, tuple[int, ...], str, Callable[[], Tensor | Iterator[Tensor]]]
# Largest difference of a quantized model's logits, as a share of their standard deviation. A wrong order of rows
# changes them by several standard deviations; quantization to four bits may change them by one.
QUANTIZED_TOLERANCE = {"q8_0": 0.5}


def write_gguf(opened: LoadedModel, chat: ChatTokenizer, name: str, dtype: str, onto: Onto, out: Path) -> list[str]:
    """Write a model, with its adapter merged, as a new GGUF file in one of GGUF_DTYPES; return notes for the user."""
    if dtype in K_QUANTS:
        return _write_k_quants(opened, chat, name, dtype, onto, out)
    config = opened.model.config
    gguf, writer = _open_writer(out, config, "model")
    notes = add_shape(writer, config, ModelFiles.read(opened.base_directory).fields)
    notes += add_tokenizer(writer, chat, config.vocab_size, name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    if dtype not in EXPORT_DTYPES:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if opened.step is not None and not opened.adapters:  # a checkpoint of full fine-tuning is in memory
        parameters = dict(opened.model.named_parameters())
        shapes = {hf_name: tuple(parameter.shape) for hf_name, parameter in parameters.items()}
    else:
        parameters, weights = {}, replace(merge.weights_of(opened, onto), adapters=opened.adapters)
        shapes = weights.shapes

    def read(hf_name: str, part: int, parts: int) -> Tensor:
        merged = parameters[hf_name].detach().float() if parameters else weights.whole(hf_name)
        return to_llama_cpp(merged, hf_name, config).chunk(parts)[part]

    def read_experts(hf_name: str, part: int, parts: int) -> Iterator[Tensor]:  # of a stack (experts, out, in)
        return (read(stacked_name(hf_name).format(expert), part, parts) for expert in range(experts))

    new_names, entries, experts = tensor_names(config), list[Entry](), config.routing.experts if config.routing else 0
    for hf_name, (height, *inner) in shapes.items():
        names = new_names(hf_name)
        shape = (height // len(names), *inner[-1:])  # without the middle of a convolution's, which is 1
        stack = (experts,) * (".experts." in hf_name)  # one tensor for all of a layer
        for part, name in enumerate(names if not stack or ".experts.0." in hf_name else ()):
            form = _tensor_format(name, shape, dtype, config)
            own = partial(read_experts if stack else read, hf_name, part, len(names))
            entries.append((name, (*stack, *shape), form, own))
    for rope_name, divisors in rope_tensors(config).items():
        entries.append((rope_name, tuple(divisors.shape), "F32", partial(torch.clone, divisors)))
    _write(gguf, writer, entries, out)
    return notes


def _write_k_quants(
    opened: LoadedModel, chat: ChatTokenizer, name: str, dtype: str, onto: Onto, out: Path
) -> list[str]:
    """Write float16 first, which llama.cpp's quantizer then converts, without its output for each tensor."""
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
    except ImportError:
        raise UserError(
            f"--dtype {dtype}: needs llama.cpp's quantizer: pip install llama-cpp-python; "
            f"or write --dtype f16 and run: llama-quantize FILE.gguf OUT.gguf {dtype}"
        ) from None
    unquantized = out.with_name(f"{out.name}.f16")
    notes = write_gguf(opened, chat, name, "f16", onto, unquantized)
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = K_QUANTS[dtype], torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(unquantized).encode(), str(out).encode(), settings) != 0:
        raise UserError(
            f"--out: {out.name}: llama.cpp's quantizer failed: check the free disk space, or use --dtype q8_0"
        )
    with open(out, "rb") as file:
        os.fsync(file.fileno())
    unquantized.unlink()
    return notes


def write_gguf_lora(opened: LoadedModel, name: str, dtype: str, out: Path) -> None:
    """Write only the adapter, which llama.cpp adds to a GGUF file of its base: y = W x + (alpha / r) B A x.

    A file has one alpha: rsLoRA's scaling s becomes alpha = s r; if it differs between linears, B is rescaled.
    """
    adapters = only_linears(opened.adapters, "--format gguf-lora: llama.cpp", "use --format gguf")
    for place, adapter in adapters.items():
        if ".experts." in place or place.endswith("per_layer_model_projection"):
            raise UserError(f"--format gguf-lora: {place}: llama.cpp applies no adapter there: use --format gguf")
        if adapter.lora_magnitude_vector is not None:
            raise UserError(f"--format gguf-lora: {place}: llama.cpp does not support DoRA adapters: use --format gguf")
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"--dtype: {dtype}: adapters are not quantized: choose one of {', '.join(EXPORT_DTYPES)}")
    config = opened.model.config
    gguf, writer = _open_writer(out, config, "adapter")
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alphas = {place: adapter.scaling * len(adapter.factors()[0]) for place, adapter in adapters.items()}
    alpha = next(iter(alphas.values()))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    new_names, entries = tensor_names(config), list[Entry]()
    for place, adapter in adapters.items():
        names = new_names(f"{place}.weight")
        a, b = (factor.detach().float() for factor in adapter.factors())  # (r, in), (out, r)
        b = b * (alphas[place] / alpha)
        if place.endswith("linear_attn.out_proj"):  # its inputs have another order
            a = to_llama_cpp(a, f"{place}.weight", config)
        else:
            b = to_llama_cpp(b, f"{place}.weight", config)
        for new_name, rows in zip(names, b.chunk(len(names)), strict=True):
            for part, tensor in (("lora_a", a), ("lora_b", rows)):
                read = partial(torch.clone, tensor)
                entries.append((f"{new_name}.{part}", tuple(tensor.shape), dtype.upper(), read))
    _write(gguf, writer, entries, out)


def _import_gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError("--format gguf: needs the package gguf: pip install -e '.[gguf]'") from None


def _open_writer(out: Path, config: DecoderConfig, kind: str) -> tuple[Any, Any]:
    """The gguf package and its writer of a model or an adapter."""
    gguf = _import_gguf()
    writer = gguf.GGUFWriter(out, architecture(config))
    writer.add_type(kind)
    return gguf, writer


def _write(gguf: Any, writer: Any, entries: list[Entry], out: Path) -> None:
    """Write metadata, tensor list and the tensors one by one; they are on disk when this returns."""
    total = 0
    for name, shape, form, _ in entries:
        kind = gguf.GGMLQuantizationType[form]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]  # values per block
        size_bytes = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size_bytes, kind)
        total += size_bytes
    merge.check_room(out.parent, total)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, form, read in track(entries, f"writing {out.name}", "tensors"):
            found = read()
            stack = [_encode(gguf, name, one, form) for one in ([found] if isinstance(found, Tensor) else found)]
            writer.write_tensor_data(np.stack(stack) if stack[1:] else stack[0])
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()


# ---- Tensors


def tensor_names(config: DecoderConfig) -> Callable[[str], list[str]]:
    """A function from the decoder's tensor names to GGUF's: two if the graph has one tensor per half of the rows."""
    gguf = _import_gguf()
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(numbers[architecture(config)], config.num_layers)
    gated = ("gate_up_proj",) if GRAPHS[architecture(config)].fused else MLP_INPUTS["gated"]

    def new_names(name: str) -> list[str]:
        parts = [name.replace("gate_up_proj", part) for part in gated] if ".gate_up_proj." in name else [name]
        parts = [f"{part}.weight" if part.endswith((".layer_scalar", ".sinks")) else part for part in parts]
        parts = [part.replace(".dt_bias", ".dt_proj.bias") for part in parts]
        parts = [re.sub(r"\.experts\.\d+\.", ".experts.", part) for part in parts]
        parts = [part.replace("router.scale", "router.proj.scale") for part in parts]
        parts = [part.replace("router.per_expert_scale", "experts.down_proj.scale") for part in parts]
        spelled, ends = [(file_name(config.family, part), part) for part in parts], (".weight", ".bias", ".scale")
        return [next(new for own in names if (new := known.get_name(own, ends))) for names in spelled]

    return new_names


def _tensor_format(name: str, shape: tuple[int, ...], dtype: str, config: DecoderConfig) -> str:
    """The number format of one tensor: float32 for vectors, float16 for rows that are not multiples of 32."""
    whole = ("position_embd.weight", "shortconv.conv.weight", "ssm_conv1d.weight")
    if len(shape) == 1 or name.endswith(whole):
        return "F32"
    if dtype not in EXPORT_DTYPES and shape[-1] % BLOCK:
        return "F16"
    is_head = name == ("token_embd.weight" if config.tied else "output.weight")  # its errors affect logits directly
    return "Q8_0" if is_head and dtype not in EXPORT_DTYPES else dtype.upper()


def _encode(gguf: Any, name: str, tensor: Tensor, form: str) -> Any:
    """Convert a float32 tensor to a number format; returns an array of bytes."""
    if form.lower() not in EXPORT_DTYPES:
        return gguf.quants.quantize(tensor.contiguous().numpy(), gguf.GGMLQuantizationType[form])
    rounded = tensor.to(EXPORT_DTYPES[form.lower()]).contiguous()
    if form == "F16" and not rounded.isfinite().all():
        raise UserError(f"--dtype: {name} has values that overflow float16: use --dtype bf16 or f32")
    return rounded.view(torch.uint8).numpy()


class GGUFWeights(Rows):
    """Reads the weights of an exported file back, in the form of Hugging Face files and in float32."""

    def __init__(self, path: Path, config: DecoderConfig):
        self.config, self.gguf, self.latest = config, _import_gguf(), ("", torch.empty(0))  # its name, its numbers
        with torch.device("meta"):
            blank = Decoder(config)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in blank.named_parameters()}
        stored, names = {tensor.name: tensor for tensor in self.gguf.GGUFReader(path).tensors}, tensor_names(config)
        self.tensors = {name: [stored[part] for part in names(name)] for name in self.shapes}

    def read(self, name: str, rows: slice) -> Tensor:
        if self.latest[0] != name:  # a tensor is read whole, because llama.cpp's order of rows may be another
            expert = re.search(r"\.experts\.(\d+)\.", name)
            parts = [(t.data[int(expert[1])] if expert else t.data, t.tensor_type) for t in self.tensors[name]]
            whole = torch.from_numpy(np.concatenate([self.gguf.quants.dequantize(*part) for part in parts]))
            self.latest = name, to_llama_cpp(whole, name, self.config, back=True)
        return self.latest[1][rows]


def verify_gguf(opened: LoadedModel, path: Path, prompts: Sequence[list[int]], dtype: str) -> Proof:
    """Compare the logits of the file, read back, with those of base and adapter, in float32; see `prove`."""
    share = TOLERANCE[EXPORT_DTYPES[dtype]] if dtype in EXPORT_DTYPES else QUANTIZED_TOLERANCE.get(dtype, math.inf)
    return verify.prove(opened, GGUFWeights(path, opened.model.config), prompts, share)


@torch.no_grad()
def perplexity_in_llama_cpp(opened: LoadedModel, path: Path, samples: Sequence[Sample]) -> tuple[str, dict[str, Any]]:
    """The perplexity of the file by llama.cpp, and of base + adapter in float32, on the same held-out target tokens.

    Returns a line to print, which gives the reason if nothing was measured; and the figures.
    """
    before = np.cumsum([0, *(min(len(sample.ids), LONGEST) for sample in samples)])
    used = [sample for sample, tokens in zip(samples, before, strict=False) if tokens < MEASURED]
    sequences = [sample.ids[-LONGEST:].tolist() for sample in used]
    targets = verify.next_tokens(sequences, [sample.is_target[-LONGEST:].tolist() for sample in used])
    if not (count := int((targets >= 0).sum())):
        return "perplexity in llama.cpp: not measured: it needs a run with held-out samples", {}
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
        llama = llama_cpp.Llama(str(path), n_ctx=LONGEST, logits_all=True, verbose=False)
    except ImportError:
        return "perplexity in llama.cpp: not measured: pip install llama-cpp-python", {}
    except (OSError, RuntimeError, ValueError) as error:  # the library is broken, or too old for the architecture
        return f"warning: llama.cpp {llama_cpp.__version__} cannot load the file: {error}", {}
    nats = 0.0
    for ids, following in zip(sequences, targets.split([len(ids) for ids in sequences]), strict=True):
        llama.reset()
        llama.eval(ids)
        logits = torch.from_numpy(llama.scores[: len(ids)]).double()
        nats += F.cross_entropy(logits, following, ignore_index=-1, reduction="sum").item()
    hidden = verify.hidden_states(opened.model, sequences)
    own = verify.compare(opened.model, hidden, opened.model, hidden, targets).perplexity
    figures = {"llama.cpp": safe_exp(nats / count), "nanoft": own, "target_tokens": count}
    said = f"{figures['llama.cpp']:.5g} in llama.cpp, {own:.5g} of base + adapter in float32"
    return f"perplexity on {count:,} held-out tokens: {said}", {"perplexity": figures}


# ---- The command, and the companions of the file


def export_gguf(args: argparse.Namespace) -> list[str]:
    """A GGUF file of the merged model (or of a model without an adapter), or of the adapter; returns lines to print."""
    source, out = args.sources[0], Path(args.out)
    kind, default = ("model", "f16") if args.format == "gguf" else ("adapter", "f32")
    dtype, name = args.dtype or default, Path(source).resolve().name
    with new_directory(out) as staging:
        path = staging / f"{kind}-{dtype}.gguf"
        opened = _open(args)
        if opened.model.config.has_score:
            raise UserError(f"--format {args.format}: {source} is a reward model: use --format hf or --format peft")
        chat = open_chat_tokenizer(source, opened, as_trained=True)
        samples, prompts = verify.held_out(source, chat)
        if kind == "model":
            notes = write_gguf(opened, chat, name, dtype, args.base, path)
            proof = verify_gguf(opened, path, verify.proof_prompts(chat, samples), dtype)
            said = f"read back and compared: {proof}"
            if not proof.holds:
                raise UserError(f"{out}: {said}: nothing was kept: try --dtype f32")
            measured, facts = perplexity_in_llama_cpp(opened, path, samples)
            recipe, notes = modelfile(path.name, chat), [measured, *(f"note: {note}" for note in notes)]
        else:
            write_gguf_lora(opened, name, dtype, path)
            facts, notes, said = {}, [], f"the adapter as GGUF, for a GGUF file of {opened.base_directory}"
            recipe = modelfile(path.name, chat, str(opened.base_directory))
        weights = verify.describe_weights(opened, kind == "model", args.base)
        card = model_card(args.format, opened, source, [said, *notes], file=path.name)
        write_file(staging / "README.md", [card.encode()])
        write_file(staging / "Modelfile", [recipe.encode()])
        parity = parity_record(opened.model, chat, prompts, args.parity_tokens, weights)
        write_json(staging / "parity.json", parity | facts)
    return [f"{out}: {said}", *notes]


def _open(args: argparse.Namespace) -> LoadedModel:
    """The adapter on its base, or a model without one; the weights stay on disk unless it is a checkpoint."""
    source = args.sources[0]
    if find_adapter(source) is None and not merge.is_lora_run(source):
        given = {"--only": args.only, "--weights": args.weights, "--base": args.base != "original"}
        if unused := [*(flag for flag, value in given.items() if value), *args.sources[1:]]:
            raise UserError(f"{unused[0]}: {source} has no adapter: remove it")
        result = Path(source) / "model" if is_run(source) else find_model(source, "RUN|MODEL")
        if not result.is_dir():
            return open_model(source, torch.device("cpu"), torch.float32)
        return LoadedModel(StreamedDecoder(open_rows(result)), {}, result, result)
    adapter, _ = merge.choose_adapter(args)
    opened = merge.open_adapter(adapter, args.base)
    if not args.any_base:
        merge.require_same_base(adapter)
    return opened


def modelfile(file: str, chat: ChatTokenizer, adapter_of: str | None = None) -> str:
    """A Modelfile for Ollama: weights, stop strings; adapter_of: the base of an adapter file."""
    lines = ["# ollama create NAME -f THIS_FILE"]
    if adapter_of is None:
        lines.append(f"FROM ./{file}")
    else:
        lines += [f"# The base as GGUF: {adapter_of}", "FROM ./base.gguf", f"ADAPTER ./{file}"]
    stops = [text for number in chat.stop_ids if (text := chat.tokenizer.id_to_token(number))]
    lines += [f'PARAMETER stop """{text}"""' if '"' in text else f'PARAMETER stop "{text}"' for text in stops]
    lines.append("# Ollama looks the chat template of the file up among those that it knows. If its answers are not")
    lines.append('# those in parity.json, send rendered prompts, with "raw": true.')
    return "\n".join(lines) + "\n"
