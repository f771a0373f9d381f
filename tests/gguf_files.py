"""GGUF files as llama.cpp's converter writes them, and what their blocks hold, worked out value by value."""

import json
from pathlib import Path

import gguf
import numpy as np

from tests import tiny

KIND = gguf.GGMLQuantizationType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Rows are whole blocks of every quantisation, which hold up to 256 values.
LLAMA = tiny.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def keys(config):
    """The metadata that say what a Hugging Face config says."""
    arch = config["model_type"].replace("mistral", "llama")
    stated = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
    }
    if "head_dim" in config:
        stated |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if arch == "llama":
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        stated |= {"vocab_size": config["vocab_size"], "rope.dimension_count": width}
    return {f"{arch}.{name}": value for name, value in stated.items()}


def write(path, config, weights, *, tokenizer=None, architecture=None, extra=None, **changes):
    """A file with the weights, arrays in Hugging Face's layout or (raw rows of blocks, type).

    `changes` are metadata that replace others or are added, with __ for dots; None takes one out.
    """
    arch = architecture or config["model_type"].replace("mistral", "llama")
    writer = gguf.GGUFWriter(path, arch)
    metadata = keys(config) | (tokenizer or {})
    for name, value in changes.items():
        metadata[name.replace("__", ".")] = value
    for name, value in metadata.items():
        if value is not None:
            writer.add_key_value(name, *_typed(value))
    for name, values in (weights | (extra or {})).items():
        raw, kind = values if isinstance(values, tuple) else (values, None)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            halves = raw.reshape(heads, 2, -1, *raw.shape[1:])
            raw = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(raw.shape)
        writer.add_tensor(_name(name), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name):
    """llama.cpp's name of a tensor."""
    for long, short in _NAMES.items():
        name = name.replace(long, short)
    return name


def _typed(value):
    kind = gguf.GGUFValueType
    if isinstance(value, bool):
        return value, kind.BOOL
    if isinstance(value, int):
        return value, kind.UINT32
    if isinstance(value, float):
        return value, kind.FLOAT32
    if isinstance(value, str):
        return value, kind.STRING
    return value, kind.ARRAY


def byte_level(folder: Path, config, *, pre="gpt-2", **changes):
    """The metadata of the tokenizer in a folder written by `tiny.write_tokenizer`."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocab = sorted(definition["model"]["vocab"].items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in vocab]
    padding = config["vocab_size"] - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{number}]" for number in range(padding)],
        "tokenizer.ggml.token_type": [
            *(CONTROL if token.startswith("<|") else NORMAL for token in tokens),
            *[UNUSED] * padding,
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in definition["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tiny.CHAT_TEMPLATE,
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def write_beside(folder: Path, config, *, weights=None, **options):
    """A Hugging Face folder, and the same model as a GGUF file in it; gives the file."""
    weights = tiny.tensors(config) if weights is None else weights
    tiny.write_model(folder, config, weights=weights)
    return write(folder / "model.gguf", config, weights, tokenizer=byte_level(folder, config), **options)


def quantised(values, kind, rng):
    """Rows of blocks of a type, made of the values where the package gguf can, else at random."""
    if kind in (KIND.Q4_K, KIND.Q6_K):
        blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // 256, _BYTES[kind]), np.uint8)
        for place in _SCALES[kind]:
            scale = np.float16(rng.uniform(0.5, 1.0, blocks.shape[:-1]) * _SIZE[kind])
            blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
        return blocks.reshape(*values.shape[:-1], -1)
    return gguf.quants.quantize(values, kind)


_BYTES = {KIND.Q4_K: 144, KIND.Q6_K: 210}
_SCALES = {KIND.Q4_K: (0, 2), KIND.Q6_K: (208,)}
_SIZE = {KIND.Q4_K: 3e-4, KIND.Q6_K: 3e-5}


def values_of(rows, kind):
    """What rows of blocks stand for, float32, by the formats' definition in ggml's C code."""
    if kind == KIND.F32:
        return rows
    if kind == KIND.F16:
        return rows.astype(np.float32)
    if kind == KIND.BF16:
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    decode, size = {
        KIND.Q8_0: (_q8_0, 34),
        KIND.Q4_0: (_q4_0, 18),
        KIND.Q4_1: (_q4_1, 20),
        KIND.Q4_K: (_q4_k, 144),
        KIND.Q6_K: (_q6_k, 210),
    }[kind]
    blocks = rows.reshape(-1, size)
    return decode(blocks).astype(np.float32).reshape(*rows.shape[:-1], -1)


def _half(blocks, place):
    return np.ascontiguousarray(blocks[:, place : place + 2]).view(np.float16).astype(np.float32)


def _nibbles(data):
    return np.concatenate([data & 15, data >> 4], axis=1).astype(np.float32)


def _q8_0(blocks):
    return _half(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def _q4_0(blocks):
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks):
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _q4_k(blocks):
    packed, data, made = blocks[:, 4:16].astype(int), blocks[:, 16:], []
    for part in range(8):
        if part < 4:
            scale, least = packed[:, part] & 63, packed[:, part + 4] & 63
        else:
            scale = packed[:, part + 4] & 15 | packed[:, part - 4] >> 6 << 4
            least = packed[:, part + 4] >> 4 | packed[:, part] >> 6 << 4
        pair = data[:, part // 2 * 32 : part // 2 * 32 + 32]
        digits = pair >> 4 if part % 2 else pair & 15
        made.append(_half(blocks, 0) * scale[:, None] * digits - _half(blocks, 2) * least[:, None])
    return np.concatenate(made, axis=1)


def _q6_k(blocks):
    low, high = blocks[:, :128].astype(int), blocks[:, 128:192].astype(int)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    made = np.zeros((len(blocks), 256))
    for place in range(256):
        half, quarter, within = place // 128, place % 128 // 32, place % 32
        byte = low[:, 64 * half + 32 * (quarter % 2) + within]
        digit = byte & 15 if quarter < 2 else byte >> 4
        digit = digit | (high[:, 32 * half + within] >> 2 * quarter & 3) << 4
        scale = scales[:, 8 * half + 2 * quarter + within // 16]
        made[:, place] = _half(blocks, 208)[:, 0] * scale * (digit - 32)
    return made
