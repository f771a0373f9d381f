"""Families' tables: real models' sizes, what is refused, older names, and parts of fused tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoConfig

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects import generation
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import FAMILIES, Weight, architecture_of
from jaxplain.subjects.generation import Generator
from jaxplain.subjects.layouts import read_parameter, source_shape, write_parameter
from jaxplain.subjects.resizing import as_whole_model, grow_vocabulary
from jaxplain.subjects.saving import save_decoder
from jaxplain.subjects.subject import open_subject
from tests import families, tiny
from tests.subjects import reference
from tests.subjects.test_decoder import assert_close_in_every_layer, make_mesh, sown_activations

# The attributes of published config.json files that say something about sizes, and what is odd in them.
PUBLISHED = {
    "Qwen2.5-7B": (
        7_615_616_512,
        {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
        | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "use_mrope": False}
        | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
        | {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        | {"tie_word_embeddings": True, "rope_scaling": None, "attention_bias": False},
    ),
    "OLMo-2-1124-7B": (
        7_298_617_344,
        {"model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    ),
    "Phi-3-mini-4k-instruct": (
        3_821_079_552,
        {"model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {
            "rope_scaling": None,
            "sliding_window": 2047,
            "auto_map": {"AutoConfig": "x.X"},
            "embd_pdrop": 0.0,
        },
    ),
    "gemma-2b": (
        2_506_172_416,
        {"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384}
        | {"num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
        | {"hidden_act": "gelu", "hidden_activation": None},
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216}
        | {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
        | {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    ),
    "gemma-3-1b-it": (
        999_885_952,
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912}
        | {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "cache_implementation": "hybrid"},
    ),
    "gpt2": (
        124_439_808,
        {
            "model_type": "gpt2",
            "n_ctx": 1024,
            "task_specific_params": {"text-generation": {"max_length": 50}},
        },
    ),
    "pythia-1.4b": (
        1_414_647_808,
        {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 24, "num_attention_heads": 16, "rotary_pct": 0.25, "rotary_emb_base": 10000},
    ),
    "gpt-j-6b": (
        6_050_882_784,
        {"model_type": "gptj", "rotary": True, "gradient_checkpointing": False, "scale_attn_weights": True},
    ),
    "opt-125m": (125_239_296, {"model_type": "opt", "prefix": "</s>", "activation_dropout": 0.0}),
    "falcon-7b": (
        6_921_720_704,
        {"model_type": "falcon", "apply_residual_connection_post_layernorm": False},
    ),
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {"model_type": "mixtral", "router_aux_loss_coef": 0.02, "output_router_logits": False},
    ),
    "Qwen1.5-MoE-A2.7B": (
        14_315_784_192,
        {"model_type": "qwen2_moe", "max_window_layers": 21, "use_sliding_window": False}
        | {"sliding_window": 32768, "norm_topk_prob": False, "decoder_sparse_step": 1},
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128, "num_experts": 128}
        | {"max_window_layers": 48, "mlp_only_layers": [], "norm_topk_prob": True, "rope_scaling": None},
    ),
    "c4ai-command-r-v01": (
        34_980_831_232,
        {"model_type": "cohere", "model_max_length": 131072, "rope_theta": 8e6},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_number_of_parameters(name):
    count, config = PUBLISHED[name]
    arch = architecture_of(AutoConfig.for_model(**config))
    model = nnx.eval_shape(
        lambda: Decoder(arch, rngs=nnx.Rngs(0), dtype=jnp.dtype("bfloat16"), with_head=True)
    )
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == count


def test_every_family_has_a_variant():
    assert {config["model_type"] for config in tiny.VARIANTS.values()} == FAMILIES.keys()


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("qwen2", {"use_mrope": True}, "use_mrope = True .* only False is"),
        (
            "qwen2",
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types .* 'chunked_attention' is no known",
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0 .* no known meaning"),
        (
            "phi3",
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            "rope_type is 'longrope'",
        ),
        ("phi3", {"attention_bias": True}, "attention_bias = True .* only False is"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True .* only False"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation = 'relu' .* only 'gelu_pytorch_tanh'"),
        ("gemma2", {"hidden_activation": "gelu_10"}, "hidden_activation = 'gelu_10' .* known are silu"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 .* only None is"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gptj", {"rotary": False}, "rotary = False .* only True is"),
        ("neox", {"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 .* only hidden_size, 32, is"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ("falcon-multi-query", {"alibi": True}, "alibi = True"),
        ("falcon-grouped", {"parallel_attn": False}, "parallel_attn = False"),
        ("falcon-multi-query", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2"),
        ("cohere", {"layer_norm_bias": True}, "layer_norm_bias = True .* no known meaning"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_attributes_that_it_does_not_honour(variant, change, message, tmp_path):
    config = tiny.VARIANTS[variant]
    folder = tiny.write_model(tmp_path, config | change, weights=tiny.tensors(config))
    with pytest.raises(JaxplainError, match=rf"config attribute .*{message}"):
        open_subject(SubjectConfig(id=str(folder)))


@pytest.mark.parametrize(
    ("variant", "tensor", "shape"),
    [
        ("qwen2", "model.layers.0.self_attn.o_proj.bias", (32,)),
        ("neox-sequential", "gpt_neox.layers.2.attention.query_key_value.bias", (96,)),
        ("opt-no-bias", "model.decoder.layers.1.fc1.bias", (24,)),
        ("falcon-grouped", "transformer.h.0.input_layernorm.weight", (32,)),
        ("cohere", "model.layers.0.self_attn.q_norm.weight", (4, 8)),
    ],
)
def test_refuses_tensors_that_the_config_denies(variant, tensor, shape, tmp_path):
    config = tiny.VARIANTS[variant]
    weights = tiny.tensors(config) | {tensor: np.zeros(shape, np.float32)}
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path, config, weights=weights))))
    with pytest.raises(JaxplainError, match=rf"tensor {tensor} that the model has no place for"):
        subject.load(make_mesh())


@pytest.mark.parametrize(
    ("variant", "tensor"),
    [
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("neox", "gpt_neox.layers.0.attention.query_key_value.bias"),
        ("gptj", "lm_head.bias"),
        ("gemma3", "model.layers.2.self_attn.k_norm.weight"),
    ],
)
def test_refuses_a_checkpoint_without_a_tensor_or_with_another_shape(variant, tensor, tmp_path):
    config = tiny.VARIANTS[variant]
    weights = tiny.tensors(config)
    shape = weights[tensor].shape
    larger = weights | {tensor: np.zeros((shape[0] + 1, *shape[1:]), np.float32)}
    del weights[tensor]
    for folder, there, message in (("a", weights, "lacks the tensor"), ("b", larger, "has shape")):
        written = tiny.write_model(tmp_path / folder, config, weights=there)
        subject = open_subject(SubjectConfig(id=str(written)))
        with pytest.raises(JaxplainError, match=message):
            subject.load(make_mesh(), with_head=True)


@pytest.mark.parametrize(
    ("variant", "rename", "masks"),
    [
        ("gpt2", ("transformer.", ""), ["h.0.attn.bias", "h.2.attn.masked_bias"]),
        ("neox", ("embed_out.", "lm_head."), ["gpt_neox.layers.1.attention.bias"]),
        ("opt", ("model.decoder.", "decoder."), []),
    ],
)
def test_older_names_of_tensors_are_known(variant, rename, masks, tmp_path):
    golden = np.load(reference.GOLDEN / f"{variant}.npz")
    config = tiny.VARIANTS[variant]
    weights = {name.replace(*rename): value for name, value in tiny.tensors(config).items()}
    assert weights.keys() != tiny.tensors(config).keys()
    weights |= {name: np.zeros(3, np.float32) for name in masks}
    folder = tiny.write_model(tmp_path, config, weights=weights)
    acts, logits = sown_activations(folder, reference.tokens_of(variant), make_mesh())
    assert_close_in_every_layer(acts, golden["acts"])
    np.testing.assert_allclose(logits[:, -3:], golden["logits"], atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize(
    "variant",
    ["olmo2", "phi3", "gemma3", "gpt2", "neox", "falcon-grouped", "mixtral", "qwen2-moe", "qwen3-moe"],
)
def test_families_equal_the_reference_on_a_mesh(variant, tmp_path):
    """Four query heads over four devices, so that a key head's queries and fused tensors are cut."""
    golden = np.load(reference.GOLDEN / f"{variant}.npz")
    folder = tiny.write_model(tmp_path, tiny.VARIANTS[variant])
    tokens_BT = np.repeat(reference.tokens_of(variant), 2, axis=0)
    acts, logits = sown_activations(folder, tokens_BT, make_mesh(2, 4))
    assert_close_in_every_layer(acts[:, :1], golden["acts"])
    np.testing.assert_allclose(logits[:1, -3:], golden["logits"], atol=1e-4 * np.abs(logits).max())


PIECEWISE = [
    "qwen2-sliding-window",
    "olmo2",
    "phi3-partial-window",
    "gemma2",
    "gemma3",
    "gpt2",
    "neox",
    "gptj",
    "opt",
    "falcon-grouped",
    "qwen2-moe-plain-layers",
    "cohere-qk-norm",
]
"""Every part of the arithmetic that reading with a cache repeats in its own way, each in some variant."""


@pytest.mark.parametrize("variant", PIECEWISE)
def test_reading_piece_by_piece_equals_the_plain_pass(variant, tmp_path, monkeypatch):
    """A common prefix, prompts in pieces after it, and replies: longer than the windows, and left-padded."""
    monkeypatch.setattr(generation, "_TOKENS_PER_READ", 8)
    monkeypatch.setattr(generation, "_TOKENS_PER_STEP", 8)
    monkeypatch.setattr(generation, "_SLOTS_PER_STEP", 8)
    rng = np.random.default_rng(3)
    prefix = rng.integers(4, 384, 11).tolist()
    prompts = [prefix + rng.integers(4, 384, length).tolist() for length in (9, 1, 17)]
    replies = [rng.integers(4, 384, length).tolist() for length in (7, 12, 1)]
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path, tiny.VARIANTS[variant]))))
    decoder = subject.load(make_mesh(), with_head=True)
    rows_BT = np.zeros((3, 36), np.int32)
    for row, prompt, reply in zip(rows_BT, prompts, replies, strict=True):
        row[: len(prompt) + len(reply)] = prompt + reply
    graph, weights = nnx.split(decoder)
    logits_BTV = jax.jit(lambda tokens_BT: nnx.merge(graph, weights).logits(tokens_BT))(rows_BT)
    log_chances_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    expected = [
        row[len(prompt) - 1 : len(prompt) + len(reply) - 1][np.arange(len(reply)), reply].sum()
        for row, prompt, reply in zip(log_chances_BTV, prompts, replies, strict=True)
    ]
    found = Generator(decoder, make_mesh(), batch_size=2).log_likelihoods(prompts, replies)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_fewer_layers_of_a_model_with_local_ones_are_saved_as_one(tmp_path):
    """What layers are is listed, in the config too."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = tiny.VARIANTS["gemma3"] | {"layer_types": kinds}
    folder = tiny.write_model(tmp_path / "source", config)
    subject = open_subject(SubjectConfig(id=str(folder)))
    save_decoder(
        as_whole_model(subject.load(make_mesh(), depth=2, with_head=True)), subject, tmp_path / "saved"
    )
    again = open_subject(SubjectConfig(id=str(tmp_path / "saved")))
    assert again.arch.local_layers == (False, True)
    tokens_BT = reference.TOKENS_BT[:1, :32]
    found, _ = sown_activations(tmp_path / "saved", tokens_BT, make_mesh())
    whole, _ = sown_activations(folder, tokens_BT, make_mesh())
    np.testing.assert_array_equal(found, whole[:2])


def test_an_unembedding_with_a_bias_grows(tmp_path):
    config = tiny.VARIANTS["gptj"]
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path / "source", config))))
    grown = grow_vocabulary(subject.load(make_mesh(), with_head=True), 390, like={385: 7})
    save_decoder(grown, subject, tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")["lm_head.bias"]
    given = tiny.tensors(config)["lm_head.bias"]
    np.testing.assert_array_equal(found[:384], given)
    assert found[385] == given[7]
    np.testing.assert_allclose(found[386], given.mean(), rtol=1e-5)


ARCH = architecture_of(AutoConfig.for_model(**families.FALCON, new_decoder_architecture=True, num_kv_heads=2))
"""Four query heads, two key heads, each eight wide, 32 wide, 24 neurons."""


class Recorded:
    """A tensor that remembers how much of it was read."""

    def __init__(self, values):
        self.values, self.read = values, 0

    def __getitem__(self, index):
        part = self.values[index]
        self.read += part.size
        return part


QUERY, KEY, VALUE = (
    np.random.default_rng(n).standard_normal((heads, 8, 32)) for n, heads in enumerate((4, 2, 2))
)
FUSED_BY_KIND = np.concatenate([part.reshape(-1, 32) for part in (QUERY, KEY, VALUE)])
FUSED_BY_KEY_HEAD = np.concatenate(
    [part.reshape(-1, 32) for k in range(2) for part in (QUERY[2 * k], QUERY[2 * k + 1], KEY[k], VALUE[k])]
)


@pytest.mark.parametrize(
    ("tensor", "axes", "rows_of_a_key_head", "rows_of_a_query_head"),
    [
        (FUSED_BY_KIND, "(H+K+K C) D", 8, 8),
        (FUSED_BY_KIND.T, "D (H+K+K C)", 8, 8),
        (FUSED_BY_KEY_HEAD, "(K G+1+1 C) D", 8, 8),
    ],
)
def test_parts_of_fused_tensors_are_read_and_written(tensor, axes, rows_of_a_key_head, rows_of_a_query_head):
    weights = [
        Weight(source="x", target=target, axes=axes, part=part)
        for part, target in enumerate(("query_DHC", "key_DKC", "value_DKC"))
    ]
    assert source_shape(weights[0], ARCH) == tensor.shape
    everything = (slice(None),) * 3
    written = np.full(tensor.shape, np.nan)
    for weight, part_HCD in zip(weights, (QUERY, KEY, VALUE), strict=True):
        expected = part_HCD.transpose(2, 0, 1)
        np.testing.assert_array_equal(read_parameter(tensor, weight, ARCH, everything), expected)
        one = (slice(0, 32, None), slice(1, 2, None), slice(None))
        recorded = Recorded(tensor)
        np.testing.assert_array_equal(read_parameter(recorded, weight, ARCH, one), expected[one])
        rows = rows_of_a_query_head if weight is weights[0] else rows_of_a_key_head
        assert recorded.read == rows * 32, "more was read than is needed"
        write_parameter(written, weight, ARCH, expected)
    np.testing.assert_array_equal(written, tensor)


def test_queries_of_two_key_heads_are_read_across_what_lies_between():
    weight = Weight(source="x", target="query_DHC", axes="(K G+1+1 C) D")
    part = (slice(None), slice(1, 3), slice(2, 8))
    found = read_parameter(FUSED_BY_KEY_HEAD, weight, ARCH, part)
    np.testing.assert_array_equal(found, QUERY.transpose(2, 0, 1)[part])
