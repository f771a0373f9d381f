"""The tiny tokenizer that texts are cut with."""

import pytest
from transformers import AutoTokenizer

from tests import tiny


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)
