"""The tiny tokenizer that texts are cut with, and blocks so small that every test crosses some."""

import pytest
from transformers import AutoTokenizer

from jaxplain.corpora import records
from tests import tiny


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(records, "BLOCK", 7)
