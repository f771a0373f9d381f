"""Rows in blocks of one size."""

import numpy as np
import pytest

from jaxplain.store.writer import SequenceBlock, blocks_of


def block(first, rows):
    number_N = np.arange(first, first + rows)
    return SequenceBlock(
        token_NT=(number_N[:, None] * 10 + np.arange(3)).astype(np.int32),
        corpus_N=np.zeros(rows, np.int32),
        document_N=number_N + 1000,
        start_N=number_N.astype(np.int32),
        length_N=np.full(rows, 3, np.int32),
    )


@pytest.mark.parametrize("sizes", [[1] * 9, [9], [0, 4, 0, 5], [2, 7], [3, 3, 3], [8, 1, 0]])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_blocks_of_any_size_become_blocks_of_one(sizes, size):
    firsts = np.cumsum([0, *sizes])
    found = list(blocks_of((block(int(f), n) for f, n in zip(firsts, sizes, strict=False)), size))
    assert [len(b) for b in found] == [min(size, 9 - start) for start in range(0, 9, size)]
    whole = block(0, 9)
    for name in ("token_NT", "corpus_N", "document_N", "start_N", "length_N"):
        joined = np.concatenate([getattr(b, name) for b in found])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_no_rows_are_no_blocks():
    assert list(blocks_of([], 4)) == list(blocks_of([block(0, 0)], 4)) == []
