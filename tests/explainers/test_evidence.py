"""What prompts show of a neuron: on a hand-made store, against the plain arithmetic on all activations."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxplain.configs.explanation import ExplainConfig, ExplainerConfig, PromptConfig, SamplingConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.evidence import gather, marked_evidence, solved_examples, token_names
from jaxplain.explainers.token_means import token_means
from jaxplain.ranges import parse_range
from tests.explainers.stores import make_split

SEQUENCES, TOKENS, K = 40, 12, 20
BOTH, SILENT, RARE, NEVER = 0, 1, 2, 3  # neurons; the others are as the first
WORDS = [b" w%d" % i for i in range(30)] + [b"", b"\xe2\x82"]


def population():
    rng = np.random.default_rng(3)
    token_NT = rng.integers(0, len(WORDS), (SEQUENCES, TOKENS))
    token_NT[5, 7:] = -1
    acts_NTF = (rng.standard_normal((SEQUENCES, TOKENS, 12)) ** 3).astype(np.float16).astype(np.float64)
    acts_NTF[..., SILENT] = -np.abs(acts_NTF[..., SILENT])
    acts_NTF[..., RARE] = -np.abs(acts_NTF[..., RARE])
    acts_NTF[7, 2:4, RARE] = [0.5, 0.25]
    acts_NTF[9, 0, RARE] = 0.125
    acts_NTF[..., NEVER] = 0
    return token_NT, acts_NTF


TOKEN_NT, ACTS_NTF = population()
COUNTED_NT = TOKEN_NT >= 0
COUNTED_NT[:, 0] = False
COUNTED_NT[9, 0] = True


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    path = tmp_path_factory.mktemp("evidence") / "exemplars.zarr"
    return make_split(path, TOKEN_NT, ACTS_NTF, k=K, words=WORDS, counted_NT=COUNTED_NT)


def config(*, seed=0, **prompt):
    return ExplainConfig(
        store="",
        explainer=ExplainerConfig(provider="token_table"),
        prompt=PromptConfig(**prompt),
        sampling=SamplingConfig(seed=seed),
    )


def shown_rows(split, neuron, sign="max", sample=0, **options):
    return gather(split.neuron(0, neuron), sign, sample, config(**options)).sequences[sign]


def ranked_rows(split, neuron, kind="max"):
    return [e.sequence for e in split.neuron(0, neuron).exemplars(kind)]


@pytest.mark.parametrize("sign", ["max", "min"])
def test_the_strongest_ranks_in_order(split, sign):
    ranked = ranked_rows(split, BOTH, sign)
    assert shown_rows(split, BOTH, sign, exemplars=4) == ranked[:4]
    assert shown_rows(split, BOTH, sign, exemplars=4, ranks="2:8") == ranked[2:6]
    assert shown_rows(split, BOTH, sign, exemplars=4, ranks="::-3") == ranked[::-3][:4]
    assert shown_rows(split, BOTH, sign, exemplars=100, ranks=":") == ranked


def test_excerpts_are_those_of_the_rows(split):
    evidence = gather(split.neuron(0, BOTH), "max", 0, config(exemplars=3))
    for row, excerpt in zip(evidence.sequences["max"], evidence.shown.excerpts, strict=True):
        tokens = [t for t in TOKEN_NT[row] if t >= 0]
        spelled = b"".join(WORDS[t] or b"<token %d>" % t for t in tokens)
        assert "".join(excerpt.pieces).encode("utf-8", "surrogateescape") == spelled
        strongest = np.where(COUNTED_NT, ACTS_NTF[..., BOTH], -np.inf)[row].max()
        assert excerpt.strengths.max() == strongest
    assert evidence.shown.scale == ACTS_NTF[..., BOTH][COUNTED_NT].max()


def test_number_of_exemplars_is_drawn_from_the_range(split):
    numbers = {len(shown_rows(split, n, exemplars=[2, 5])) for n in (0, 4, 5, 6, 7, 8, 9, 10, 11)}
    assert numbers <= {2, 3, 4, 5}
    assert len(numbers) >= 3
    drawn = {len(shown_rows(split, 0, seed=s, exemplars=[2, 5])) for s in range(40)}
    assert drawn == {2, 3, 4, 5}


def test_permuted_exemplars_are_a_draw_from_the_ranks(split):
    ranked = ranked_rows(split, BOTH)
    draws = [shown_rows(split, BOTH, seed=s, exemplars=4, ranks="1:9", permute=True) for s in range(40)]
    assert all(len(set(draw)) == 4 for draw in draws)
    assert set(itertools.chain(*draws)) == set(ranked[1:9])
    assert any(draw != sorted(draw, key=ranked.index) for draw in draws)


def test_draws_of_seeds_samples_neurons_and_signs(split):
    options = {"exemplars": [2, 6], "permute": True}
    once = shown_rows(split, BOTH, **options)
    assert shown_rows(split, BOTH, **options) == once
    assert shown_rows(split, BOTH, sample=3, **options) == once
    assert len({tuple(shown_rows(split, BOTH, seed=s, **options)) for s in range(8)}) > 4
    again = options | {"resample_exemplars": True}
    assert shown_rows(split, BOTH, sample=0, **again) == once
    samples = [shown_rows(split, BOTH, sample=s, **again) for s in range(8)]
    assert len({tuple(rows) for rows in samples}) > 4
    assert samples == [shown_rows(split, BOTH, sample=s, **again) for s in range(8)]

    def ranks(neuron, sign):
        ranked = ranked_rows(split, neuron, sign)
        return [ranked.index(row) for row in shown_rows(split, neuron, sign, **options)]

    assert len({tuple(ranks(n, s)) for n in (0, 4, 5, 6) for s in ("max", "min")}) > 6


@pytest.mark.parametrize("context", [0, 2])
def test_context(split, context):
    whole = gather(split.neuron(0, BOTH), "max", 0, config()).shown
    cut = gather(split.neuron(0, BOTH), "max", 0, config(context=context)).shown
    for before, after in zip(whole.excerpts, cut.excerpts, strict=True):
        assert len(after.pieces) <= 2 * context + 1
        assert "".join(after.pieces) in "".join(before.pieces)
        assert after.strengths.max() == before.strengths.max()


def test_ranks_that_the_store_does_not_hold(split):
    with pytest.raises(JaxplainError, match=r"prompt\.ranks is '20:40', but the store holds 20 exemplars"):
        gather(split.neuron(0, BOTH), "max", 0, config(ranks="20:40"))


# Thresholds.


@pytest.mark.parametrize("sign", ["max", "min"])
@pytest.mark.parametrize("place", [3, 8, 14])
def test_threshold_is_the_quantile_of_all_activations(split, sign, place):
    neuron = split.neuron(0, BOTH)
    signed = ACTS_NTF[COUNTED_NT, BOTH] * (1 if sign == "max" else -1)
    quantile = 1 - place / len(signed)
    expected = np.quantile(signed, quantile, method="higher")
    assert (signed >= expected).sum() == place
    last = neuron.exemplars(sign)[-1].score * (1 if sign == "max" else -1)
    assert last < expected, "the store holds that much of the tail"
    shown = gather(neuron, sign, 0, config(quantile=quantile, exemplars=20)).shown
    assert shown.threshold == expected
    assert sum((e.strengths >= shown.threshold).sum() for e in shown.excerpts) == place


def test_threshold_is_loosened_until_three_tokens_show(split):
    neuron = split.neuron(0, BOTH)
    descending = np.sort(ACTS_NTF[COUNTED_NT, BOTH])[::-1]
    shown = gather(neuron, "max", 0, config(quantile=1 - 1e-9)).shown
    assert shown.threshold == descending[3], "from 1 to 2 to 4 of all tokens"
    weaker = gather(neuron, "max", 0, config(quantile=1 - 1e-9, exemplars=3, ranks="12:20")).shown
    stored = np.concatenate([e.activations for e in neuron.exemplars("max")])
    (place,) = np.flatnonzero(np.sort(stored[stored > 0])[::-1] == weaker.threshold) + 1
    assert place in (8, 16, 32, 64)
    stricter = np.sort(stored[stored > 0])[-place // 2]
    counts = [sum((e.strengths >= t).sum() for e in weaker.excerpts) for t in (stricter, weaker.threshold)]
    assert counts[0] < 3 <= counts[1]
    lone = gather(neuron, "max", 0, config(exemplars=1, context=0)).shown
    assert lone.threshold == stored[stored > 0].min(), "as far as it goes, and never to 0"


@pytest.mark.parametrize("sign", ["max", "min"])
@pytest.mark.parametrize("quantile", [0.001, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("style", ["highlighted", "highlighted_both_signs", "contrastive"])
def test_thresholds_are_positive_and_met(split, sign, quantile, style):
    for neuron in range(12):
        both = style == "highlighted_both_signs"
        found = gather(
            split.neuron(0, neuron), "max" if both else sign, 0, config(style=style, quantile=quantile)
        )
        if found is None:
            continue
        shown = found.shown
        assert shown.threshold > 0
        assert both or (shown.excerpts[0].strengths >= shown.threshold).any()
        assert shown.scale > 0
        if both:
            assert shown.negative_threshold > 0


def test_a_rare_neuron_shows_only_what_drives_it(split):
    found = gather(split.neuron(0, RARE), "max", 0, config())
    assert found.sequences == {"max": [7, 9]}
    assert found.shown.threshold == 0.125, "there are but three"
    assert gather(split.neuron(0, RARE), "max", 0, config(ranks="2:20")) is None


@pytest.mark.parametrize(
    "style", ["token_activation_pairs", "highlighted", "contrastive", "token_list", "activation_values"]
)
def test_silent_neurons_give_nothing(split, style):
    silent, never = split.neuron(0, SILENT), split.neuron(0, NEVER)
    assert gather(silent, "max", 0, config(style=style)) is None
    assert gather(silent, "min", 0, config(style=style)) is not None
    assert gather(never, "max", 0, config(style=style)) is None
    assert gather(never, "min", 0, config(style=style)) is None


# Styles.


@pytest.mark.parametrize(("exemplars", "positive", "negative"), [(6, 3, 3), (5, 3, 2), (1, 1, 1)])
def test_both_signs_take_turns(split, exemplars, positive, negative):
    both = config(style="highlighted_both_signs", exemplars=exemplars)
    found = gather(split.neuron(0, BOTH), "max", 0, both)
    assert found.sequences == {
        "max": ranked_rows(split, BOTH)[:positive],
        "min": ranked_rows(split, BOTH, "min")[:negative],
    }
    up, down = found.shown.excerpts[::2], found.shown.excerpts[1::2]
    acts_NT = np.where(COUNTED_NT, ACTS_NTF[..., BOTH], np.nan)
    assert [e.strengths.max() for e in up] == [np.nanmax(acts_NT[r]) for r in found.sequences["max"]]
    assert [e.opposite().strengths.max() for e in down] == [
        -np.nanmin(acts_NT[r]) for r in found.sequences["min"]
    ]


def test_both_signs_of_neurons_with_one_or_none(split):
    both = config(style="highlighted_both_signs")
    found = gather(split.neuron(0, SILENT), "max", 0, both)
    assert found.sequences["max"] == []
    assert len(found.sequences["min"]) == 5
    assert found.shown.threshold == np.inf
    assert not any(e.strengths.any() for e in found.shown.excerpts)
    assert gather(split.neuron(0, NEVER), "max", 0, both) is None


@pytest.mark.parametrize("sign", ["max", "min"])
def test_counterexamples_are_random_and_silent(split, sign):
    contrast = config(style="contrastive", counterexamples=3, quantile=0.9)
    found = gather(split.neuron(0, BOTH), sign, 0, contrast)
    signed_NT = np.where(COUNTED_NT, ACTS_NTF[..., BOTH], np.nan) * (1 if sign == "max" else -1)
    silent = [
        r for r in ranked_rows(split, BOTH, "random") if np.nanmax(signed_NT[r]) < found.shown.threshold
    ]
    assert found.sequences["random"] == silent[:3]
    assert silent != ranked_rows(split, BOTH, "random"), "some are not"
    assert len(found.shown.counterexamples) == 3
    for row, excerpt in zip(silent, found.shown.counterexamples, strict=False):
        assert excerpt.strengths.max() == max(np.nanmax(signed_NT[row]), 0)
    short = gather(split.neuron(0, BOTH), sign, 0, config(style="contrastive", context=1)).shown
    assert all(len(e.pieces) <= 3 for e in short.counterexamples)


@pytest.mark.parametrize("style", ["token_list", "activation_values"])
@pytest.mark.parametrize("sign", ["max", "min"])
def test_token_styles_show_the_strongest_means(split, style, sign):
    neuron = split.neuron(0, BOTH)
    found = gather(neuron, sign, 0, config(style=style, tokens=4))
    means = token_means(neuron, sign)
    names = [WORDS[t].decode("utf-8", "surrogateescape") or f"<token {t}>" for t in means.tokens[:4]]
    assert [name for name, _ in found.shown.tokens] == names
    assert [mean for _, mean in found.shown.tokens] == means.means[:4].tolist()
    assert found.shown.scale == means.means[0]
    assert found.sequences == {}


def test_tokens_that_do_not_drive_a_neuron_are_not_named(split):
    means = token_means(split.neuron(0, BOTH), "max")
    names = token_names(means, split.store.vocabulary, 1000)
    assert len(names) == (means.means > 0).sum() < len(means.means)
    all_positive = dataclasses.replace(means, means=means.means + 100)
    named = {name for name, _ in token_names(all_positive, split.store.vocabulary, 1000)}
    assert named == {*(f" w{i}" for i in range(30)), "<token 30>", "\udce2\udc82"}


# Few-shot examples.


def explained(*draw, **prompt):
    return [example.explanation for example in solved_examples(PromptConfig(**prompt), *draw)]


def test_few_shot_examples_are_fixed_or_drawn():
    whole = explained(few_shot_count=8)
    assert len(set(whole)) == 8
    assert explained(few_shot_count=3) == explained(1, 2, few_shot_count=3) == whole[:3]
    drawn = [explained(0, n, few_shot_count=3, resample_few_shot=True) for n in range(30)]
    assert drawn == [explained(0, n, few_shot_count=3, resample_few_shot=True) for n in range(30)]
    assert set(itertools.chain(*drawn)) == set(whole)
    assert all(len(set(one)) == 3 for one in drawn)
    assert len({tuple(one) for one in drawn}) > 20
    assert explained(few_shot="none", few_shot_count=99) == []


def test_too_many_few_shot_examples():
    with pytest.raises(JaxplainError, match="few_shot_count is 9, but there are 8 examples"):
        explained(few_shot_count=9)


def test_few_shot_examples_suit_every_style():
    for example in solved_examples(PromptConfig(few_shot_count=8)):
        shown = example.shown
        assert all((e.strengths >= shown.threshold).any() for e in shown.excerpts)
        assert not any(e.opposite().strengths.any() for e in shown.excerpts)
        assert shown.counterexamples
        assert not any(e.activations.any() for e in shown.counterexamples)
        assert len(shown.tokens) >= 2
        assert example.explanation
        assert example.reasoning
    for example in solved_examples(PromptConfig(few_shot_count=8, style="highlighted_both_signs")):
        shown = example.shown
        assert any((e.strengths >= shown.threshold).any() for e in shown.excerpts)
        assert any((e.opposite().strengths >= shown.negative_threshold).any() for e in shown.excerpts)
        assert example.negative_explanation
        assert example.negative_reasoning


def test_evidence_marked_by_hand():
    shown = marked_evidence(["a{{ b|8}}{{ c|2}}{{ b|6}} d", "{{ e|9}}{{ f|-9}}"], ["silent"])
    assert shown.tokens == [(" e", 9.0), (" b", 7.0), (" c", 2.0)]
    assert [(e.strengths >= shown.threshold).tolist() for e in shown.excerpts] == [
        [False, True, False, True, False],
        [True, False],
    ]
    assert shown.scale == 10.0


# Ranges.


@given(*[st.none() | st.integers(-30, 30)] * 2, st.none() | st.integers(-5, 5), st.integers(0, 20))
def test_ranges_are_slices(start, stop, step, length):
    text = ":".join("" if part is None else str(part) for part in (start, stop))
    text += "" if step is None else f":{step}"
    if step == 0:
        with pytest.raises(JaxplainError, match=r"neurons\.layers is '.*'; write a range"):
            parse_range(text, "neurons.layers", length)
    else:
        expected = list(range(length))[start:stop:step]
        assert list(parse_range(f" {text} ", "neurons.layers", length)) == expected


@pytest.mark.parametrize(
    "text", ["", "all", "a:b", "1:2:3:4", "1.5:2", "1-2", "0:9:0", "0:9:00", "0:9:-0", "1:2\n3", ": :"]
)
def test_what_is_no_range(text):
    with pytest.raises(JaxplainError, match=r"prompt\.ranks is .*; write a range as start:stop"):
        parse_range(text, "prompt.ranks", 10)
