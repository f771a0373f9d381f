"""What is drawn from a token table: the highest numbers, whatever the blocks, batches and shards."""

import numpy as np
import pytest

from jaxplain.corpora.hashing import lottery, token_lottery
from jaxplain.exemplars.draws import NEVER, TableBlock, draw

ROWS, TOKENS, SEED = 301, 7, 3


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    counted_NT = rng.random((ROWS, TOKENS)) < 0.6
    counted_NT[5] = False
    return TableBlock(rng.integers(0, 2**62, ROWS), rng.integers(0, 100, ROWS), counted_NT)


def blocks(table, size):
    return [TableBlock(*(array[i : i + size] for array in table)) for i in range(0, ROWS, size)]


@pytest.mark.parametrize("size", [ROWS, 100, 7])
@pytest.mark.parametrize(("sequences", "tokens"), [(40, 50), (1, 1), (1000, 10_000), (0, 0)])
def test_the_highest_numbers_are_drawn(table, size, sequences, tokens):
    drawn = draw(blocks(table, size), seed=SEED, sequences=sequences, tokens=tokens)
    document_N, start_N, counted_NT = table
    rows = int(counted_NT.any(1).sum())
    assert drawn.rows == rows == ROWS - 1
    lottery_N = np.where(counted_NT.any(1), lottery(SEED, document_N, start_N), -1)
    first = np.argsort(-lottery_N, kind="stable")[: min(sequences, rows)]
    np.testing.assert_array_equal(drawn.turns(first), np.arange(len(first)))
    others = np.setdiff1d(np.arange(ROWS), first)
    assert (drawn.turns(others) == NEVER).all()
    lottery_NT = np.where(counted_NT, token_lottery(SEED, document_N, start_N, TOKENS), -np.inf)
    best = np.argsort(-lottery_NT.ravel(), kind="stable")[: min(tokens, counted_NT.sum())]
    np.testing.assert_array_equal(drawn.token_M, np.sort(best))
    np.testing.assert_array_equal(drawn.token_M[drawn.falling], best)
    np.testing.assert_array_equal(drawn.lottery_M, lottery_NT.ravel()[np.sort(best)])


def test_the_seed_draws_anew(table):
    a, b = (draw(blocks(table, 100), seed=seed, sequences=40, tokens=50) for seed in (0, 1))
    assert len(np.intersect1d(a.sequence_D, b.sequence_D)) < 20
    assert len(np.intersect1d(a.token_M, b.token_M)) < 25


def test_draws_of_two_slices_are_those_of_both(table):
    """Cut to the highest numbers: what is drawn from the whole was drawn from the slice that it is in."""
    whole = draw(blocks(table, 100), seed=SEED, sequences=40, tokens=50)
    halves = (TableBlock(*(array[part] for array in table)) for part in (slice(150), slice(150, None)))
    first, second = (draw([half], seed=SEED, sequences=40, tokens=50) for half in halves)
    assert np.isin(whole.sequence_D, np.concatenate([first.sequence_D, second.sequence_D + 150])).all()
    assert np.isin(whole.token_M, np.concatenate([first.token_M, second.token_M + 150 * TOKENS])).all()


@pytest.mark.parametrize(("batch", "shards"), [(16, 4), (32, 1), (8, 8), (400, 2)])
def test_every_drawn_token_is_found_in_its_batch_and_shard(table, batch, shards):
    drawn = draw(blocks(table, 100), seed=SEED, sequences=0, tokens=50)
    found = {}
    for first in range(0, ROWS, batch):
        drawn_PW, slot_PW = drawn.tokens_of(first, batch=batch, shards=shards)
        assert drawn_PW.shape == slot_PW.shape == (shards, batch // shards * TOKENS)
        for shard in range(shards):
            count = int((drawn_PW[shard] >= 0).sum())
            assert (drawn_PW[shard, :count] >= 0).all(), "they come first"
            start = (first + shard * (batch // shards)) * TOKENS
            found |= dict(
                zip(slot_PW[shard, :count].tolist(), (start + drawn_PW[shard]).tolist(), strict=False)
            )
    assert [found[slot] for slot in range(50)] == drawn.token_M.tolist()
    assert len(found) == 50
