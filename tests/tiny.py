"""Tiny models, tokenizers and corpora, made from a seed, for tests to run on."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import families

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
)

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "head_dim": 8,
    "sliding_window": None,
}

LLAMA_VARIANTS = {
    "llama-mha": LLAMA | {"num_key_value_heads": 4},
    "llama-gqa": LLAMA,
    "llama-mqa-tied": LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama-rope-linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-rope-llama3": LLAMA
    | {
        "max_position_embeddings": 128,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral-sliding-window": MISTRAL | {"sliding_window": 5},
    "mistral-wide-heads": MISTRAL | {"head_dim": 16, "num_key_value_heads": 1},
}
"""Every part of the Llama family's arithmetic, each in some variant."""

VARIANTS = LLAMA_VARIANTS | families.VARIANTS


def tensors(config, seed=0):
    """Random weights of a model, under their Hugging Face names."""
    if config["model_type"] not in ("llama", "mistral"):
        return families.tensors(config, seed)
    rng = np.random.default_rng(seed)
    d, f, h, k = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
    )
    c = config.get("head_dim") or d // h
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        linear = {
            "self_attn.q_proj": (h * c, d),
            "self_attn.k_proj": (k * c, d),
            "self_attn.v_proj": (k * c, d),
            "self_attn.o_proj": (d, h * c),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        for name, shape in linear.items():
            shapes[f"{at}{name}.weight"] = shape
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes[f"{at}{name}.bias"] = shape[:1]
        shapes[f"{at}input_layernorm.weight"] = (d,)
        shapes[f"{at}post_attention_layernorm.weight"] = (d,)
    made = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        made[name] = 1 + 0.1 * values if "norm" in name else values * (0.3 if len(shape) > 1 else 0.1)
    return made


def write_model(folder: Path, config=LLAMA, *, seed=0, shards=1, weights=None, chat=True):
    """A Hugging Face folder with config, weights in one or more files, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = tensors(config, seed) if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(weights)}
        for file in set(weight_map.values()):
            part = {name: weights[name] for name, place in weight_map.items() if place == file}
            save_file(part, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, chat=chat)
    return folder


def write_tokenizer(folder: Path, *, chat=True):
    """A byte-level BPE tokenizer of 384 tokens at most, with special tokens 0 to 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(60), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "additional_special_tokens": special[2:],
    }
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "river",
    "blue",
    "seven",
    "walks",
    "sees",
    "under",
    "over",
    "quickly",
    "naïve",
    "déjà",
    "東京",
    "and",
]


def documents(count, *, seed=0):
    """Made-up sentences of different lengths."""
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(_WORDS, int(rng.integers(5, 60)))) + "." for i in range(count)]


def write_corpus(path: Path, count=60, *, seed=0):
    """A JSON-lines file with a text column and a chat column."""
    with path.open("w", encoding="utf-8") as file:
        for text in documents(count, seed=seed):
            half = len(text) // 2
            chat = [
                {"role": "user", "content": text[:half]},
                {"role": "assistant", "content": text[half:]},
            ]
            file.write(json.dumps({"text": text, "messages": chat}) + "\n")
    return path
