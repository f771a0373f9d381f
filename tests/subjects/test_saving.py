"""Decoders written as Hugging Face folders: what is in them, who can read them, and what is refused."""

import contextlib
import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects import saving
from jaxplain.subjects.resizing import as_whole_model, grow_vocabulary
from jaxplain.subjects.saving import save_decoder
from jaxplain.subjects.subject import open_subject
from jaxplain.subjects.tokenizers import remapped_special_tokens, with_added_tokens
from tests import tiny
from tests.subjects import reference
from tests.subjects.test_decoder import make_mesh


def opened(folder, *, mesh=None, dtype="float32"):
    """A subject, and its decoder with the head."""
    subject = open_subject(SubjectConfig(id=str(folder), dtype=dtype))
    return subject, subject.load(mesh or make_mesh(), with_head=True)


def assert_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def parameters(decoder):
    flat = nnx.to_flat_state(nnx.state(decoder))
    return {".".join(map(str, path)): np.asarray(value.get_value()) for path, value in flat}


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_every_variant_is_written_as_it_was_read(variant, tmp_path):
    config = tiny.VARIANTS[variant]
    subject, decoder = opened(tiny.write_model(tmp_path / "source", config))
    save_decoder(decoder, subject, tmp_path / "saved")
    assert_tensors(load_file(tmp_path / "saved" / "model.safetensors"), tiny.tensors(config))
    again, loaded = opened(tmp_path / "saved")
    assert_tensors(parameters(loaded), parameters(decoder))
    assert again.arch == subject.arch
    assert again.tokenizer_hash() == subject.tokenizer_hash()
    assert again.weight_hash() == subject.weight_hash()
    assert not (tmp_path / "saved.partial").exists()


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8), (8, 1)])
def test_a_decoder_on_a_mesh_is_written_whole(shape, tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"), mesh=make_mesh(*shape))
    save_decoder(decoder, subject, tmp_path / "saved")
    assert_tensors(load_file(tmp_path / "saved" / "model.safetensors"), tiny.tensors(tiny.LLAMA))


def test_large_models_go_into_several_files(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    save_decoder(decoder, subject, tmp_path / "saved", max_file_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    contents = {file: load_file(tmp_path / "saved" / file) for file in files}
    for tensors in contents.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 30_000
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, part in contents.items() for name in part}
    expected = tiny.tensors(tiny.LLAMA)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert_tensors({name: t for part in contents.values() for name, t in part.items()}, expected)
    assert_tensors(parameters(opened(tmp_path / "saved")[1]), parameters(decoder))


def test_bfloat16_is_rounded_once_and_read_back(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    save_decoder(decoder, subject, tmp_path / "saved", dtype="bfloat16")
    loaded = parameters(opened(tmp_path / "saved", dtype="bfloat16")[1])
    expected = {name: np.asarray(jnp.bfloat16(value)) for name, value in parameters(decoder).items()}
    assert_tensors(loaded, expected)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    half = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert half == pytest.approx((tmp_path / "source" / "model.safetensors").stat().st_size / 2, rel=0.05)


def test_config_keeps_what_has_not_changed(tmp_path):
    config = tiny.LLAMA | {"torch_dtype": "float16", "_name_or_path": "someone/tiny", "bos_token_id": 0}
    folder = tiny.write_model(tmp_path / "source", config)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    subject, decoder = opened(folder)
    save_decoder(grow_vocabulary(decoder, 400, like={}), subject, tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert found == config | {"vocab_size": 400, "torch_dtype": "float32", "dtype": "float32"}
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {"eos_token_id": [1, 3]}


def with_remapped_tokens(subject, decoder):
    """A decoder and tokenizer with a token for each special one, and which stands for which."""
    names = remapped_special_tokens(subject.tokenizer)
    fillers = [f"<|{n}|>" for n in range(10)]  # so that the names get ids beyond the subject's rows
    tokenizer = with_added_tokens(subject.tokenizer, [*fillers, *names.values()])
    ids = tokenizer.convert_tokens_to_ids
    like = {ids(new): ids(old) for old, new in names.items()}
    return grow_vocabulary(decoder, 400, like=like), tokenizer, like


def test_a_model_of_fewer_layers_is_saved_as_one(tmp_path):
    subject, _ = opened(tiny.write_model(tmp_path / "source"))
    decoder = as_whole_model(subject.load(make_mesh(), depth=2, with_head=True))
    save_decoder(decoder, subject, tmp_path / "saved")
    again, loaded = opened(tmp_path / "saved")
    assert again.arch.layers == 2
    assert_tensors(parameters(loaded), parameters(decoder))


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mqa-tied"])
def test_added_tokens_are_saved_with_their_rows(variant, tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source", tiny.VARIANTS[variant]))
    grown, tokenizer, like = with_remapped_tokens(subject, decoder)
    save_decoder(grown, subject, tmp_path / "saved", tokenizer=tokenizer)
    again, loaded = opened(tmp_path / "saved")
    assert_tensors(parameters(loaded), parameters(grown))
    assert again.arch.vocabulary == grown.arch.vocabulary == 400
    assert min(like) >= subject.arch.vocabulary
    assert again.tokenizer.encode("<||end||><|end|>") == [next(n for n in like if like[n] == 1), 1]
    # A model reads the new tokens as those that they stand for, and finds them as likely.
    found = np.asarray(loaded.logits(jnp.array([[*like, 50]])))
    expected = np.asarray(decoder.logits(jnp.array([[*like.values(), 50]])))
    kept = [n for n in range(subject.arch.vocabulary) if n not in like]
    np.testing.assert_allclose(found[..., kept], expected[..., kept], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        found[..., list(like)], expected[..., list(like.values())], rtol=1e-5, atol=1e-5
    )


def test_overwriting_leaves_nothing_of_the_old_model(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    save_decoder(decoder, subject, tmp_path / "saved", max_file_bytes=30_000)
    with pytest.raises(JaxplainError, match=r"saved exists already; choose another folder"):
        save_decoder(decoder, subject, tmp_path / "saved")
    save_decoder(decoder, subject, tmp_path / "saved", overwrite=True)
    assert [path.name for path in (tmp_path / "saved").glob("model*")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]


def test_a_model_may_overwrite_its_own_source(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    save_decoder(decoder, subject, tmp_path / "source", overwrite=True)
    assert_tensors(load_file(tmp_path / "source" / "model.safetensors"), tiny.tensors(tiny.LLAMA))


def test_only_models_are_overwritten(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(JaxplainError, match=r"thesis is to be overwritten, but holds no model"):
        save_decoder(decoder, subject, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_refuses_tokens_without_a_row(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    tokenizer = with_added_tokens(subject.tokenizer, [f"<|new {n}|>" for n in range(400)])
    with pytest.raises(JaxplainError, match=r"last token is 7\d\d, but .* only 384 rows .* grow its"):
        save_decoder(decoder, subject, tmp_path / "saved", tokenizer=tokenizer)
    assert not (tmp_path / "saved").exists()


def test_refuses_what_is_not_the_whole_subject(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    with pytest.raises(ValueError, match="with all layers and with_head=True"):
        save_decoder(subject.load(make_mesh()), subject, tmp_path / "saved")
    other, _ = opened(tiny.write_model(tmp_path / "other", tiny.VARIANTS["llama-mha"]))
    with pytest.raises(ValueError, match="architecture is not the subject's"):
        save_decoder(decoder, other, tmp_path / "saved")


def test_an_unwritable_place_is_one_sentence(tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxplainError, match=r"saved as .*/file/saved: .*Not a directory.*; make room"):
        save_decoder(decoder, subject, tmp_path / "file" / "saved")


@contextlib.contextmanager
def room_for(size):
    """No file may grow beyond `size` bytes; writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("file", "part"), [("tokenizer.json", 0.5), ("model.safetensors", 0.9)])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(file, part, tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    size = (tmp_path / "source" / file).stat().st_size
    message = r"saved as .*/saved: .*File too large.*; make room"
    with room_for(int(part * size)), pytest.raises(JaxplainError, match=message) as caught:
        save_decoder(decoder, subject, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_write_leaves_no_torn_folder(overwrite, tmp_path, monkeypatch):
    subject, decoder = opened(tiny.write_model(tmp_path / "source"))
    folder = tmp_path / "saved"
    if overwrite:
        tiny.write_model(folder, seed=5)

    def interrupted(array):
        if array.ndim == 1:
            raise KeyboardInterrupt
        return np.asarray(array)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_on_host", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_decoder(decoder, subject, folder, overwrite=overwrite)
    assert (tmp_path / "saved.partial" / "model.safetensors").exists(), "it was in the midst of the weights"
    assert folder.exists() == overwrite
    if overwrite:
        assert_tensors(load_file(folder / "model.safetensors"), tiny.tensors(tiny.LLAMA, 5))
    save_decoder(decoder, subject, folder, overwrite=overwrite)
    assert_tensors(load_file(folder / "model.safetensors"), tiny.tensors(tiny.LLAMA))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]


@pytest.mark.parity
def test_torch_reads_a_model_of_fewer_layers(tmp_path):
    folder = tiny.write_model(tmp_path / "source", seed=3)
    subject, _ = opened(folder)
    decoder = as_whole_model(subject.load(make_mesh(), depth=2, with_head=True))
    save_decoder(decoder, subject, tmp_path / "saved")
    _, expected = reference.torch_activations(tmp_path / "saved", reference.TOKENS_BT)
    found = np.asarray(decoder.logits(jnp.asarray(reference.TOKENS_BT, jnp.int32)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_torch_reads_what_is_saved(variant, tmp_path):
    subject, decoder = opened(tiny.write_model(tmp_path / "source", tiny.VARIANTS[variant], seed=3))
    save_decoder(decoder, subject, tmp_path / "saved", max_file_bytes=100_000)
    _, expected = reference.torch_activations(tmp_path / "saved", reference.TOKENS_BT)
    found = np.asarray(decoder.logits(jnp.asarray(reference.TOKENS_BT, jnp.int32)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mqa-tied"])
def test_torch_reads_added_tokens(variant, tmp_path):
    from transformers import AutoTokenizer

    subject, decoder = opened(tiny.write_model(tmp_path / "source", tiny.VARIANTS[variant], seed=3))
    grown, tokenizer, like = with_remapped_tokens(subject, decoder)
    save_decoder(grown, subject, tmp_path / "saved", tokenizer=tokenizer)
    text = "".join(f"{token} the cat sees " for token in tokenizer.convert_ids_to_tokens(list(like)))
    tokens_BT = np.array([AutoTokenizer.from_pretrained(tmp_path / "saved").encode(text)])
    assert set(like) < set(tokens_BT[0].tolist())
    _, expected = reference.torch_activations(tmp_path / "saved", tokens_BT)
    assert expected.shape[-1] == grown.arch.vocabulary
    found = np.asarray(grown.logits(jnp.asarray(tokens_BT, jnp.int32)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
