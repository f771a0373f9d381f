"""The packaged corpora, by the tokenizer of the packaged subject."""

import pytest
from transformers import AutoTokenizer

from jaxplain.configs.extraction import SourceConfig
from jaxplain.corpora.sources import open_source
from jaxplain.corpora.windows import tokenise
from jaxplain.subjects.packaged import packaged_folder
from tests.corpora.makers import documents_of_rows


@pytest.mark.packaged
@pytest.mark.parametrize(("preset", "rows"), [("wikipedia-leads", 500), ("chitchat", 40)])
def test_texts_are_tokenised_together_as_they_are_alone(preset, rows, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(packaged_folder("smollm2-135m-instruct"))
    opened = open_source(SourceConfig(preset=preset), tokenizer)
    texts = [document.text for document in documents_of_rows(opened, tokenizer, range(rows))]
    assert len(texts) == rows
    monkeypatch.setattr("jaxplain.corpora.windows._CHARACTERS", 5000)
    together = [ids.tolist() for ids in tokenise(texts, tokenizer)]
    assert together == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
