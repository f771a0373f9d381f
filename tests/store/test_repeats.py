"""Which windows several token tables hold, against counting them one by one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplain.store import repeats
from jaxplain.store.repeats import repeated_rows

WINDOW = st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1))
"""Document, start and tokens, each of few, so that any two may be equal."""


def table(windows):
    document_N, start_N, token_N = np.array(windows, np.int64).reshape((-1, 3)).T
    return {
        "document": document_N + 2**62,
        "start": start_N.astype(np.int32),
        "token": np.stack([token_N, token_N], axis=1).astype(np.int32),
    }


def read(*arrays):
    return list(arrays)


def expected(tables):
    most, found = Counter(), []
    for windows in tables:
        here, rows = Counter(), []
        for row, window in enumerate(windows):
            here[window] += 1
            if here[window] <= most[window]:
                rows.append(row)
        most |= here
        found.append(rows)
    return found


@settings(deadline=None, max_examples=300)
@given(
    tables=st.lists(st.lists(WINDOW, max_size=12), min_size=1, max_size=4),
    rows_per_pass=st.sampled_from([1, 4, 1000]),
    tokens_per_read=st.sampled_from([8, 24, 1000]),
)
def test_repeated_rows(tables, rows_per_pass, tokens_per_read):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "ROWS_PER_PASS", rows_per_pass)
        patch.setattr(repeats, "_ROWS_PER_READ", 5)
        patch.setattr(repeats, "_TOKEN_BYTES_PER_READ", tokens_per_read)
        found = repeated_rows([table(windows) for windows in tables], read)
    assert [rows.tolist() for rows in found] == expected(tables)


def test_tables_that_share_nothing_are_not_read_for_tokens():
    tables = [table([(0, 0, 0), (0, 0, 0), (0, 1, 0)]), table([(1, 0, 0), (1, 1, 0)])]
    for part in tables:
        part["token"] = None
    assert [len(rows) for rows in repeated_rows(tables, read)] == [0, 0]


def test_a_pass_holds_few_rows(monkeypatch):
    """As many as `ROWS_PER_PASS`, but for chance."""
    monkeypatch.setattr(repeats, "ROWS_PER_PASS", 100)
    held = []
    origins = repeats._origins

    def recorded(*arguments):
        found = origins(*arguments)
        held.append(len(found[0]))
        return found

    monkeypatch.setattr(repeats, "_origins", recorded)
    documents = np.random.default_rng(0).integers(0, 2**40, 1000)
    windows = [(document, 0, 0) for document in documents.tolist()]
    found = repeated_rows([table(windows[:600]), table(windows[500:])], read)
    assert found[1].tolist() == list(range(100))
    assert len(held) == 11
    assert max(held) < 200
