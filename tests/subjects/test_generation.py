"""Sampling with a cache against the plain forward pass, numpy, and the reference's own `generate`."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxplain.configs.explanation import LocalModelConfig, SamplingConfig
from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.local import LocalModel
from jaxplain.explainers.prompts import Message
from jaxplain.subjects import generation
from jaxplain.subjects.generation import Completion, Generator, Sampling, nucleus
from jaxplain.subjects.subject import open_subject
from tests import tiny
from tests.subjects import reference
from tests.subjects.test_decoder import make_mesh

LONG_SIZE = {"max_position_embeddings": 512, "num_hidden_layers": 2}
LONG = tiny.LLAMA | LONG_SIZE
LONG_WINDOW = tiny.MISTRAL | LONG_SIZE | {"sliding_window": 100}
SHARED = 150
NEW = 8
GREEDY = Sampling(temperature=0.0, max_tokens=NEW)


def prompts_of(*lengths, shared=0, seed=0):
    """Random prompts, which begin with the same tokens where that is asked for."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(4, 384, shared).tolist()
    return [prefix + rng.integers(4, 384, length).tolist() for length in lengths]


# More than a batch of eight, not sorted, one that takes two pieces to read, and one of a single token.
APART = prompts_of(9, 17, 1, 130, 26, 3, 40, 17, 5)
TOGETHER = prompts_of(9, 17, 1, 130, 26, 3, 40, 17, 5, shared=SHARED, seed=1)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Gives the decoder with a config's random weights on a mesh."""

    @functools.cache
    def written(text):
        return tiny.write_model(tmp_path_factory.mktemp("model"), json.loads(text))

    def load(config, mesh=None, dtype="float32"):
        subject = open_subject(SubjectConfig(id=str(written(json.dumps(config))), dtype=dtype))
        return subject.load(mesh or make_mesh(), with_head=True)

    return load


@pytest.fixture(scope="module")
def plain(load):
    """Gives the plain pass's logits for rows of tokens, [len(row), V] each."""

    @functools.cache
    def forward(text):
        graph, weights = nnx.split(load(json.loads(text)))
        return jax.jit(lambda tokens_BT: nnx.merge(graph, weights).logits(tokens_BT))

    def logits(rows, config=LONG, width=320):
        tokens_BT = np.zeros((len(rows), width), np.int32)
        for row, tokens in zip(tokens_BT, rows, strict=True):
            row[: len(tokens)] = tokens
        found = np.asarray(forward(json.dumps(config))(tokens_BT))
        return [values[: len(tokens)] for values, tokens in zip(found, rows, strict=True)]

    return logits


@pytest.fixture(scope="module")
def naive(plain):
    """Gives what argmax after argmax of the plain pass's logits makes of prompts."""

    def decode(prompts, config=LONG):
        rows = [list(prompt) for prompt in prompts]
        for _ in range(NEW):
            for row, logits in zip(rows, plain(rows, config), strict=True):
                second, first = np.sort(logits[-1])[-2:]
                assert first - second > 1e-3, "a near tie proves nothing; take another seed"
                row.append(int(logits[-1].argmax()))
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]

    return decode


@pytest.fixture(scope="module")
def naive_of(naive):
    return {id(prompts): naive(prompts) for prompts in (APART, TOGETHER)}


def completions(generator, prompts, sampling, seeds=None):
    found = dict(generator.generate(prompts, sampling, seeds or [0] * len(prompts)))
    assert sorted(found) == list(range(len(prompts)))
    return [found[number] for number in range(len(prompts))]


def tokens_of(*arguments, **keywords):
    return [completion.tokens for completion in completions(*arguments, **keywords)]


PLAIN = nnx.jit(lambda decoder, tokens_BT: decoder(tokens_BT))
EXTEND = nnx.jit(lambda decoder, *arguments: decoder.extend(*arguments))


def read_in_pieces(decoder, rows, position, width, prefix=None):
    """The residual stream of rows padded on the left to `width`, read 13 at a time, and the cache."""
    tokens_BT = np.zeros((len(rows), width), np.int32)
    positions_BT = np.full((len(rows), width), -1, np.int32)
    for row, tokens in enumerate(rows):
        tokens_BT[row, width - len(tokens) :] = tokens
        positions_BT[row, width - len(tokens) :] = position + np.arange(len(tokens))
    cache, outputs = decoder.empty_cache(len(rows), width + 3), []
    for start in range(0, width, 13):
        piece = (jnp.asarray(array[:, start : start + 13]) for array in (tokens_BT, positions_BT))
        x_BTD, cache = EXTEND(decoder, *piece, cache, prefix)
        outputs.append(x_BTD)
    assert int(cache.used) == width
    return np.asarray(jnp.concatenate(outputs, axis=1)), cache


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_reading_in_pieces_equals_the_plain_pass(variant, load):
    decoder = load(tiny.VARIANTS[variant] | {"num_hidden_layers": 2})
    lengths, shared, width = (39, 34, 25), 9, 39
    rows_BT = np.random.default_rng(3).integers(0, 384, (3, shared + width))
    rows_BT[:, :shared] = rows_BT[0, :shared]
    expected_BTD = np.asarray(PLAIN(decoder, jnp.asarray(rows_BT)))
    _, prefix = read_in_pieces(decoder, rows_BT[:1, :shared], 0, 13)
    for position, before in ((0, None), (shared, prefix)):
        rows = [row[position : position + length] for row, length in zip(rows_BT, lengths, strict=True)]
        found_BTD, _ = read_in_pieces(decoder, rows, position, width, before)
        for row, length in enumerate(lengths):
            found, expected = (
                found_BTD[row, width - length :],
                expected_BTD[row, position : position + length],
            )
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected_BTD).max())


# Two key/value heads divide by 2, but not by 4 or 8; then every device holds them all.
@pytest.mark.parametrize(
    ("shape", "prompts"),
    [((1, 1), APART), ((2, 4), APART)]
    + [(shape, TOGETHER) for shape in [(1, 1), (8, 1), (4, 2), (2, 4), (1, 8)]],
    ids=lambda value: "apart" if value is APART else "together" if value is TOGETHER else str(value),
)
def test_greedy_equals_naive_decoding(shape, prompts, load, naive_of):
    mesh = make_mesh(*shape)
    generator = Generator(load(LONG, mesh), mesh, batch_size=8)
    assert tokens_of(generator, prompts, GREEDY) == naive_of[id(prompts)]


def test_greedy_within_a_sliding_window_equals_naive_decoding(load, naive):
    """The prefix is seen in part, and by the longest prompt not at all."""
    prompts = prompts_of(3, 140, 20, shared=SHARED, seed=2)
    generator = Generator(load(LONG_WINDOW), make_mesh(), batch_size=2)
    assert tokens_of(generator, prompts, GREEDY) == naive(prompts, LONG_WINDOW)


def test_a_batch_of_one_and_prompts_that_are_the_same(load, naive):
    generator = Generator(load(LONG), make_mesh(), batch_size=1)
    prompts = prompts_of(5, shared=SHARED, seed=4) * 2
    assert tokens_of(generator, prompts, GREEDY) == naive(prompts[:1]) * 2
    assert tokens_of(generator, [], GREEDY) == []


def test_long_prompts_come_first(load):
    generator = Generator(load(LONG), make_mesh(), batch_size=2)
    numbers = [number for number, _ in generator.generate(prompts_of(3, 9, 5, 1), GREEDY, [0] * 4)]
    assert numbers == [1, 2, 0, 3]


def test_stop_tokens_end_a_row_and_are_left_out(load, naive_of):
    whole = naive_of[id(APART)]
    stop = (whole[0][0], whole[1][4], whole[2][NEW - 1])
    expected = [
        Completion(
            tokens=list(itertools.takewhile(lambda token: token not in stop, row)),
            finished=any(token in stop for token in row),
        )
        for row in whole
    ]
    assert {(c.finished, len(c.tokens) > 0) for c in expected} == {(True, False), (True, True), (False, True)}
    generator = Generator(load(LONG), make_mesh(), batch_size=8)
    sampling = Sampling(temperature=0.0, max_tokens=NEW, stop=stop)
    assert completions(generator, APART, sampling) == expected
    # Where all rows of a batch stop at once, none decodes on.
    alone = Sampling(temperature=0.0, max_tokens=NEW, stop=(whole[0][0],))
    assert completions(generator, APART[:1], alone) == [Completion(tokens=[], finished=True)]


@pytest.mark.parametrize("limit", [1, 4])
def test_max_tokens_cut_a_row_short(limit, load, naive_of):
    generator = Generator(load(LONG), make_mesh(), batch_size=8)
    found = completions(generator, APART[:3], Sampling(temperature=0.0, max_tokens=limit))
    assert [c.tokens for c in found] == [row[:limit] for row in naive_of[id(APART)][:3]]
    assert not any(c.finished for c in found)


def test_a_sample_depends_on_its_seed_alone(load):
    generator = Generator(load(LONG), make_mesh(), batch_size=4)
    sampling = Sampling(temperature=1.0, max_tokens=NEW)
    prompt, *others = prompts_of(9, 3, 20, 12, 9)
    [expected] = tokens_of(generator, [prompt], sampling, [5])
    assert tokens_of(generator, [prompt], sampling, [5]) == [expected]
    # Between, before and after others; with another batch's padding; beside rows of the same prompt.
    for before in range(len(others) + 1):
        prompts = [*others[:before], prompt, *others[before:]]
        seeds = [7 + number for number in range(len(prompts))]
        seeds[before] = 5
        assert tokens_of(generator, prompts, sampling, seeds)[before] == expected
    beside = tokens_of(generator, [prompt] * 6, sampling, [6, 5, 2**32 - 1, 5, 2**31, 0])
    assert beside[1] == beside[3] == expected
    assert len({tuple(tokens) for tokens in beside}) == 5


def test_a_sample_is_the_same_on_a_mesh(load):
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=NEW)
    seeds = list(range(len(APART)))
    found = []
    for shape in [(1, 1), (2, 2)]:
        mesh = make_mesh(*shape)
        found.append(tokens_of(Generator(load(LONG, mesh), mesh, batch_size=8), APART, sampling, seeds))
    assert found[0] == found[1]


def chances_of(logits, temperature, top_p):
    """Softmax of logits divided by temperature, within the nucleus."""
    chances = np.exp(np.float64(logits - logits.max()) / temperature)
    chances /= chances.sum()
    chances = np.where(sorted_nucleus(chances, top_p), chances, 0)
    return chances / chances.sum()


def sorted_nucleus(chances, top_p):
    falling = np.sort(chances)[::-1]
    last = min(np.searchsorted(np.cumsum(falling), top_p), len(falling) - 1)
    return chances >= falling[last]


def assert_drawn_from(drawn, chances):
    """By a chi-square statistic within four standard deviations; rare tokens count as one."""
    counts = np.bincount(drawn, minlength=len(chances))
    assert not counts[chances == 0].any()
    expected = chances * len(drawn)
    often = expected >= 5
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert freedom >= 3
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (statistic, freedom)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.5)])
def test_samples_follow_the_distribution(temperature, top_p, load, plain, monkeypatch):
    """The first token's, and the second's after the most frequent first."""
    monkeypatch.setattr(generation, "_TOKENS_PER_READ", 8)
    monkeypatch.setattr(generation, "_SLOTS_PER_STEP", 8)
    generator = Generator(load(LONG), make_mesh(), batch_size=500)
    [prompt] = prompts_of(6, seed=8)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=2)
    drawn_N2 = np.array(tokens_of(generator, [prompt] * 2000, sampling, list(range(2000))))
    assert_drawn_from(drawn_N2[:, 0], chances_of(plain([prompt])[0][-1], temperature, top_p))
    first = int(np.bincount(drawn_N2[:, 0]).argmax())
    second = drawn_N2[drawn_N2[:, 0] == first, 1]
    assert_drawn_from(second, chances_of(plain([[*prompt, first]])[0][-1], temperature, top_p))


NUCLEUS = jax.jit(nucleus, static_argnums=1)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    # Steps of an eighth: equal or far apart, so that rounding decides nothing but where the sum ends.
    eighths_BV=st.lists(st.lists(st.integers(-60, 60), min_size=9, max_size=9), min_size=2, max_size=2),
    top_p=st.sampled_from([0.01, 0.2, 0.5, 0.9, 0.99]),
)
def test_nucleus_equals_sorting(eighths_BV, top_p):
    logits_BV = np.array(eighths_BV, np.float32) / 8
    found_BV = np.asarray(NUCLEUS(jnp.asarray(logits_BV), top_p))
    for logits, found in zip(logits_BV, found_BV, strict=True):
        chances = np.exp(np.float64(logits))
        chances /= chances.sum()
        assert (found >= sorted_nucleus(chances, top_p - 1e-6)).all()
        assert (found <= sorted_nucleus(chances, top_p + 1e-6)).all()


@pytest.mark.parametrize(
    ("chances", "top_p", "expected"),
    [
        ([0.4, 0.3, 0.2, 0.1], 0.69, [1, 1, 0, 0]),
        ([0.4, 0.3, 0.2, 0.1], 0.71, [1, 1, 1, 0]),
        ([0.1, 0.2, 0.3, 0.4], 1e-6, [0, 0, 0, 1]),
        ([0.1, 0.35, 0.2, 0.35], 0.3, [0, 1, 0, 1]),  # ties with the last stay
        ([0.4, 0.2, 0.2, 0.2], 0.5, [1, 1, 1, 1]),
        ([0.25, 0.25, 0.25, 0.25], 0.1, [1, 1, 1, 1]),
        ([0, 1, 0, 0], 0.999, [0, 1, 0, 0]),
    ],
)
def test_nucleus(chances, top_p, expected):
    with np.errstate(divide="ignore"):
        logits_BV = jnp.asarray(np.log(np.array([chances], np.float32)))
    assert np.asarray(NUCLEUS(logits_BV, top_p))[0].astype(int).tolist() == expected


@pytest.mark.parametrize("top_p", [1e-3, 0.9, 0.9999])
def test_nucleus_of_a_whole_vocabulary(top_p):
    assert NUCLEUS(jnp.zeros((1, 50_000)), top_p).all()
    rare = jnp.full((1, 50_000), -40.0).at[0, 123].set(0)
    assert np.flatnonzero(NUCLEUS(rare, top_p)).tolist() == [123]


@pytest.mark.parametrize(("shape", "shared"), [((1, 1), 0), ((1, 1), SHARED), ((2, 4), SHARED)], ids=str)
def test_log_likelihoods_equal_the_plain_pass(shape, shared, load, plain):
    prompts = prompts_of(9, 1, 30, 130, 4, shared=shared, seed=5)
    replies = prompts_of(7, 12, 1, 5, 0, seed=6)
    expected = []
    for prompt, reply, logits in zip(
        prompts, replies, plain([p + r for p, r in zip(prompts, replies, strict=True)]), strict=True
    ):
        logits_TV = np.float64(logits[len(prompt) - 1 : len(prompt) + len(reply) - 1])
        log_chances_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        expected.append(log_chances_TV[np.arange(len(reply)), reply].sum())
    mesh = make_mesh(*shape)
    found = Generator(load(LONG, mesh), mesh, batch_size=4).log_likelihoods(prompts, replies)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near(load):
    prompts, replies = prompts_of(9, 1, 30), prompts_of(7, 12, 1, seed=6)
    exact, rough = (
        Generator(load(LONG, dtype=dtype), make_mesh(), batch_size=4) for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(
        rough.log_likelihoods(prompts, replies), exact.log_likelihoods(prompts, replies), rtol=0.02
    )
    assert [len(tokens) for tokens in tokens_of(rough, prompts, GREEDY)] == [NEW] * 3


def test_what_the_model_cannot_read_is_refused(load, plain):
    generator = Generator(load(tiny.LLAMA), make_mesh(), batch_size=2)
    prompts = prompts_of(3, 55)
    ten = Sampling(temperature=0.0, max_tokens=10)
    with pytest.raises(JaxplainError, match="prompt of 55 tokens with 10 to come is longer than the 64"):
        list(generator.generate(prompts, ten, [0, 0]))
    with pytest.raises(JaxplainError, match="prompt of 55 tokens with 10 to come is longer than the 64"):
        generator.log_likelihoods(prompts, prompts_of(10, 1))
    fitting = prompts_of(3, 54)
    [_, found] = tokens_of(generator, fitting, ten)
    [logits] = plain([fitting[1] + found], tiny.LLAMA, 64)
    assert found == logits[53:63].argmax(-1).tolist()
    with pytest.raises(ValueError, match="needs a token"):
        list(generator.generate([[5], []], GREEDY, [0, 0]))


@pytest.mark.parametrize("variant", reference.GREEDY_VARIANTS)
def test_greedy_equals_the_reference(variant, load):
    golden = np.load(reference.GOLDEN / "greedy.npz")
    generator = Generator(load(tiny.VARIANTS[variant]), make_mesh(), batch_size=4)
    sampling = Sampling(temperature=0.0, max_tokens=reference.GREEDY_TOKENS)
    assert tokens_of(generator, reference.GREEDY_PROMPTS, sampling) == golden[variant].tolist()


@pytest.mark.parity
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_greedy_equals_live_torch(variant, tmp_path):
    folder = tiny.write_model(tmp_path, tiny.VARIANTS[variant], seed=11)
    expected = reference.torch_greedy(folder, reference.GREEDY_PROMPTS, reference.GREEDY_TOKENS)
    decoder = open_subject(SubjectConfig(id=str(folder))).load(make_mesh(), with_head=True)
    generator = Generator(decoder, make_mesh(), batch_size=4)
    sampling = Sampling(temperature=0.0, max_tokens=reference.GREEDY_TOKENS)
    assert tokens_of(generator, reference.GREEDY_PROMPTS, sampling) == expected


@pytest.mark.parity
@pytest.mark.packaged
def test_packaged_smollm2_answers_a_chat_like_live_torch():
    from jaxplain.subjects.packaged import packaged_folder

    name = "smollm2-135m-instruct"
    sampling = SamplingConfig(temperature=0.0, max_tokens=reference.GREEDY_TOKENS)
    model = LocalModel(name, LocalModelConfig(mesh=MeshConfig(data=2, model=4)), sampling)
    chats = [
        [Message(role="user", content="Why is the sky blue?")],
        [
            Message(role="system", content="You answer in one short sentence."),
            Message(role="user", content="What is the capital of France, and which river runs through it?"),
        ],
    ]
    prompts = [model.chat.tokens(chat) for chat in chats]
    expected = reference.torch_greedy(packaged_folder(name), prompts, reference.GREEDY_TOKENS)
    subject = open_subject(SubjectConfig(id=name))
    generator = Generator(subject.load(make_mesh(), with_head=True), make_mesh(), batch_size=2)
    greedy = Sampling(temperature=0.0, max_tokens=reference.GREEDY_TOKENS)
    assert tokens_of(generator, prompts, greedy) == expected
