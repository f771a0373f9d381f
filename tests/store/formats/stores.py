"""Made-up runs whose stores are exported: activations of half precision, statistics by brute force."""

import numpy as np

import jaxplain
from jaxplain.progress import progress_bars
from jaxplain.store.explanations import DATABASE_NAME, Sample, open_explanations
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.writer import SequenceBlock, StoreWriter
from tests import oracle

SILENT = progress_bars(enabled=False)
WORDS = [b"<s>", b"<pad>", b" caf", "é".encode()[:1], "é".encode()[1:], b"<script>", b'"', b"\n", b" up", b""]
PAD = 1
LAYERS, NEURONS = (1, 4), (0, 2, 3, 5)
K, TOKENS, SEQUENCES = 4, 5, 9
STRATA = (0.5, 0.75)
LEVELS = (0.25, 0.5, 1.0)
MISSING = (4, 3)
"""A neuron that was not asked for."""


def activations(seed=0, sequences=SEQUENCES):
    """Tokens [N, T], and activations [N, T, L, F]; the first token never counts, nor does padding."""
    rng = np.random.default_rng(seed)
    token_NT = rng.integers(2, len(WORDS), (sequences, TOKENS)).astype(np.int32)
    token_NT[:, 0] = 0
    token_NT[:, 1] = 2 + np.arange(sequences) % (len(WORDS) - 2)
    for row, length in enumerate(rng.integers(2, TOKENS + 1, sequences)):
        token_NT[row, length:] = -1
    acts_NTLF = rng.integers(-40, 41, (sequences, TOKENS, len(LAYERS), len(NEURONS))) / np.float32(8)
    return token_NT, acts_NTLF


def write(
    path,
    *,
    kinds=("max", "min", "random", "quantile"),
    splits=("train",),
    experts=None,
    quantiles=LEVELS,
    seed=0,
):
    """A store; with `experts`, so many of the same activations, which read every token but the last."""
    config = {
        "subject": {"id": "org/Made-Up-Instruct"},
        "corpus": {"sequence_length": TOKENS, "seed": 3},
        "exemplars": {"splits": list(splits), "kinds": list(kinds), "k": K, "activation_dtype": "float16"},
        "statistics": {"quantiles": list(quantiles)},
    }
    attributes = {
        "config": config,
        "subject": {"id": "org/Made-Up-Instruct", "architecture": {"neurons": 7, "layers": 6}},
        "corpora": ["fineweb", "articles"],
        "tokenizer_hash": "abc",
        "jaxplain_version": "0",
    }
    writer = StoreWriter(path, attributes)
    writer.write_vocabulary(WORDS)
    for number, name in enumerate(splits):
        _write_split(writer, name, *activations(seed + number), kinds, experts, quantiles)
    writer.finish()
    return jaxplain.open_store(path)


def _write_split(writer, name, token_NT, acts_NTLF, kinds, experts, quantiles):
    sequences = len(token_NT)
    nth = np.arange(sequences)
    block = SequenceBlock(
        token_NT=token_NT,
        corpus_N=(nth % 2).astype(np.int32),
        document_N=nth + 2**62,
        start_N=(3 * nth).astype(np.int32),
        length_N=(token_NT >= 0).sum(1).astype(np.int32),
    )
    writer.write_sequences(name, [block], tokens=TOKENS)
    split = writer.create_split(
        name,
        layers=np.array(LAYERS),
        neurons=np.array(NEURONS),
        experts=None if experts is None else np.arange(experts),
        shared=None if experts is None else np.zeros((len(LAYERS), experts), bool),
        kinds=kinds,
        k=K,
        tokens=TOKENS,
        activation_dtype="float16",
        quantiles=quantiles,
        strata=STRATA if "quantile" in kinds else (),
        samples_per_quantile=1 if "quantile" in kinds else 0,
    )
    counted_NT = token_NT >= 0
    counted_NT[:, 0] = False
    lottery_N = np.random.default_rng(7).random(sequences).astype(np.float32)
    names = ("count", "mean", "variance", "skewness", "kurtosis", "fraction_active")
    for place, layer in enumerate(LAYERS):
        held = np.array([f for f, index in enumerate(NEURONS) if (layer, index) != MISSING])
        acts_NTF = acts_NTLF[:, :, place][..., held]
        statistics = dict(zip(names, oracle.statistics(acts_NTF, counted_NT), strict=True))
        statistics["quantile"] = np.stack([np.quantile(acts_NTF[counted_NT], q, axis=0) for q in LEVELS], 1)
        columns = np.concatenate([held + e * len(NEURONS) for e in range(experts or 1)])
        times = experts or 1
        for kind in kinds:
            extra = {}
            if kind == "quantile":
                found = oracle.exemplars(acts_NTF, counted_NT, "max", len(STRATA) + 1)
                stratum = np.array([2, 1, 0], np.int32)
                extra = {"stratum_NR": np.tile(stratum, (times * len(held), 1))}
            else:
                found = oracle.exemplars(acts_NTF, counted_NT, kind, K, lottery_N)
            score, sequence, activation = (np.concatenate([array] * times) for array in found)
            split.write_exemplars(
                kind, place, columns, score_NR=score, sequence_NR=sequence, activation_NRT=activation, **extra
            )
        values = {key: np.concatenate([value] * times) for key, value in statistics.items()}
        split.write_statistics(place, columns, **values)


def explain(store, *, experts=False):
    """Put two explanations beside a store: of one neuron, a sign each."""
    name = NeuronId.of(1, 0 if experts else None, 2)
    with open_explanations(
        store.explanations_path.parent / DATABASE_NAME,
        fingerprint=store.fingerprint,
        subject="made-up",
        experts=experts,
    ) as database:
        recipe = database.recipe(
            {"explainer": {"provider": "gemini"}, "prompt": {"style": "highlighted"}}, "0"
        )
        samples = [
            Sample(sign=sign, sample=0, status="explained", text=text, model="some-model")
            for sign, text in (("max", 'words that "rise" <b>'), ("min", "what falls"))
        ]
        database.finish(recipe, name, samples)


def names(split):
    """All neurons of a split."""
    return [name for place in range(len(split.layers)) for name, _ in split.neurons_of(place)]


def counted(split, exemplar):
    """An exemplar's tokens that count, as bytes, and their activations."""
    held = ~np.isnan(exemplar.activations)
    vocabulary = split.store.vocabulary
    return [vocabulary.bytes_of(t) for t in exemplar.tokens[held].tolist()], exemplar.activations[
        held
    ].tolist()
