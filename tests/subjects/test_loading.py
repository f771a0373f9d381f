"""Checkpoints and configs: what is read, how it is laid out, and what is refused."""

import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects.subject import open_subject
from jaxplain.subjects.vocabulary import token_bytes
from tests import tiny
from tests.subjects.test_decoder import make_mesh, sown_activations


def load(folder, **options):
    return open_subject(SubjectConfig(id=str(folder))).load(make_mesh(), **options)


def test_sharded_checkpoint_equals_single_file(tmp_path):
    tokens_BT = np.arange(10)[None]
    single, _ = sown_activations(tiny.write_model(tmp_path / "a"), tokens_BT, make_mesh())
    sharded, _ = sown_activations(tiny.write_model(tmp_path / "b", shards=3), tokens_BT, make_mesh())
    np.testing.assert_array_equal(single, sharded)


def test_weights_are_spread_over_the_model_axis(tmp_path):
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path))))
    state = nnx.state(subject.load(make_mesh(2, 4)))
    query = state["layers"][0]["attention"]["query_DHC"].get_value()
    up = state["layers"][0]["mlp"]["up_DF"].get_value()
    key = state["layers"][0]["attention"]["key_DKC"].get_value()
    assert query.addressable_shards[0].data.shape == (32, 1, 8)
    assert up.addressable_shards[0].data.shape == (32, 12)
    assert key.sharding.is_fully_replicated, "two heads do not divide by four"


def test_only_the_layers_asked_for_are_loaded(tmp_path):
    model = load(tiny.write_model(tmp_path), depth=2)
    assert len(model.layers) == 2
    assert model.head is None


def test_head_needs_all_layers(tmp_path):
    with pytest.raises(ValueError, match="all layers"):
        load(tiny.write_model(tmp_path), depth=2, with_head=True).logits(jnp.zeros((1, 2), jnp.int32))


def test_every_byte_of_a_document_is_in_the_vocabulary(tmp_path):
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path))))
    text = "a naïve 東京 \t\n🙂<|end|>"
    table = token_bytes(subject.tokenizer, subject.arch.vocabulary)
    ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in ids) == text.encode()
    assert len(table) == subject.arch.vocabulary


def test_sentencepiece_bytes_and_spaces(tmp_path):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<unk>": 0, "\u2581the": 1, "<0xE6>": 2, "s": 3}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_bytes(tokenizer, 5) == [b"<unk>", b" the", b"\xe6", b"s", b""]


def edited(tmp_path, *, drop=(), add=None, **config):
    """A tiny model with tensors dropped or replaced, or config attributes changed."""
    weights = {name: w for name, w in tiny.tensors(tiny.LLAMA).items() if name not in drop}
    return tiny.write_model(tmp_path, tiny.LLAMA | config, weights=weights | (add or {}))


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": [GATE]}, rf"lacks the tensor {GATE}"),
        (
            {"add": {"model.extra": np.zeros(3, np.float32)}},
            "tensor model.extra that the model has no",
        ),
        (
            {"add": {GATE.replace("weight", "bias"): np.zeros(48, np.float32)}},
            "gate_proj.bias that the model has no place",
        ),
        ({"add": {GATE: np.zeros((47, 32), np.float32)}}, r"shape \(47, 32\) where .* \(48, 32\)"),
        (
            {"model_type": "bloom"},
            "architecture 'bloom' is not supported; supported are cohere, ",
        ),
        ({"model_type": "zebra"}, "describes no supported model: .*zebra"),
        ({"num_attention_heads": "four"}, "describes no supported model"),
        ({"hidden_act": "tanh"}, "hidden_act = 'tanh' .* known are silu"),
        ({"clip_qkv": 8.0}, "attribute clip_qkv = 8.0 .* no known meaning"),
        ({"quantization_config": {"bits": 4}}, "attribute quantization_config"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters .* rope_type is 'yarn'; known are default",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_what_it_would_get_wrong(change, message, tmp_path):
    with pytest.raises(JaxplainError, match=message):
        load(edited(tmp_path, **change))


def test_refuses_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(JaxplainError, match=r"holds no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.filterwarnings("ignore")
def test_refuses_broken_files_in_one_sentence(file, tmp_path):
    (tiny.write_model(tmp_path) / file).write_text('{"version": ')
    with pytest.raises(JaxplainError, match=r"describes no supported model|no tokenizer") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_refuses_missing_and_corrupt_weights(tmp_path):
    folder = tiny.write_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(JaxplainError, match="not a readable safetensors file"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(JaxplainError, match="needs its weights as safetensors"):
        load(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_reason_and_the_remedy(file, tmp_path):
    folder = tiny.write_model(tmp_path)
    (folder / "model.safetensors").rename(folder / file)
    for place in (folder, folder / file):
        with pytest.raises(
            JaxplainError, match=r"is pickled, .* can run any code .* convert .*\.save_pretrained"
        ) as caught:
            load(place)
        assert str(folder / file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_never_run(tmp_path, monkeypatch):
    """Neither is a user asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name, config, tokenizer in (
        ("config", {"model_type": "own"}, {}),
        ("tokenizer", {}, {"tokenizer_class": "OwnTokenizer"}),
        ("both", {}, {}),
    ):
        folder = tmp_path / name
        own = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
        tiny.write_model(folder)
        (folder / "config.json").write_text(json.dumps(tiny.LLAMA | config | {"auto_map": own}))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokenizer | {"auto_map": own}))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        if name == "both":  # what is known does not need the code
            assert open_subject(SubjectConfig(id=str(folder))).arch.layers == 3
        else:
            with pytest.raises(JaxplainError, match=r"describes no supported model|no tokenizer") as caught:
                load(folder)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine in place of the hub, which has no model and no revision."""

    class NothingThere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            missing = "Revision" if "/someone/tiny/" in self.path else "Repo"
            self.send_response(404)
            self.send_header("X-Error-Code", f"{missing}NotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NothingThere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield address
        server.shutdown()
        thread.join()


def test_a_revision_that_the_hub_lacks_is_one_sentence(hub):
    with pytest.raises(
        JaxplainError, match=r"hub's someone/tiny \(subject\.id\) has no revision 'v9'; give a branch, tag or"
    ) as caught:
        open_subject(SubjectConfig(id="someone/tiny", revision="v9"))
    assert "\n" not in str(caught.value)
    with pytest.raises(JaxplainError, match=r"'someone/else', which is no packaged .* at revision 'v9': 404"):
        open_subject(SubjectConfig(id="someone/else", revision="v9"))


def test_only_models_of_the_hub_have_revisions(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tiny.write_model(tmp_path / "snapshots" / commit)
    (tmp_path / "m.gguf").touch()
    for subject in (str(folder), str(tmp_path / "m.gguf"), "smollm2-135m-instruct"):
        with pytest.raises(
            JaxplainError, match=rf"revision 'v9' is given for subject.id '{subject}', but only"
        ):
            open_subject(SubjectConfig(id=subject, revision="v9"))
    # A store knows its subject by both.
    assert open_subject(SubjectConfig(id=str(folder), revision=commit)).revision == commit


def test_unknown_subject_names_the_choices(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(JaxplainError, match=r"'nobody/nothing', which is no packaged subject \(smollm2"):
        open_subject(SubjectConfig(id="nobody/nothing"))


def test_hub_snapshot_is_used_and_its_commit_recorded(tmp_path, monkeypatch):
    """The hub's own client, reading its own cache layout."""
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    tiny.write_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    subject = open_subject(SubjectConfig(id="someone/tiny"))
    assert subject.revision == commit
    assert subject.arch.layers == 3


def test_weight_hash_sees_one_changed_tensor(tmp_path):
    subject = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path / "a"))))
    weights = tiny.tensors(tiny.LLAMA)
    weights[GATE][0, 0] += 1
    other = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path / "b", weights=weights))))
    assert subject.weight_hash() != other.weight_hash()
    assert subject.tokenizer_hash() == other.tokenizer_hash()


def test_rope_parameters_of_both_spellings(tmp_path):
    new = {k: v for k, v in tiny.LLAMA.items() if k != "rope_theta"}
    new |= {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
    old = tiny.VARIANTS["llama-rope-linear"]
    a = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path / "a", new)))).arch
    b = open_subject(SubjectConfig(id=str(tiny.write_model(tmp_path / "b", old)))).arch
    assert a == b
    assert json.dumps(a.rotary.factor) == "4.0"


def test_llama_8b_fits_without_making_it():
    """Shapes alone: a large model's parameters are described, not allocated."""

    from jaxplain.subjects.architecture import Architecture
    from jaxplain.subjects.decoder import Decoder

    arch = Architecture(
        vocabulary=128256,
        layers=32,
        width=4096,
        neurons=14336,
        query_heads=32,
        key_value_heads=8,
        head_width=128,
        max_positions=131072,
    )
    model = nnx.eval_shape(
        lambda: Decoder(arch, rngs=nnx.Rngs(0), dtype=jnp.dtype("bfloat16"), with_head=True)
    )
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert count == 8_030_261_248
