"""Hand-made runs for the viewer: stores with hostile text, and explanations with scores and simulations."""

import numpy as np

import jaxplain
from jaxplain.store.explanations import Sample, open_explanations
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.schema import STATISTICS
from jaxplain.store.scores import Score, ScoreDatabase, StoredSimulation
from jaxplain.store.writer import SequenceBlock, StoreWriter

TOKENS, K, SEQUENCES = 48, 4, 12
LAYERS, NEURONS = np.array([0, 3]), np.array([1, 2, 5, 7, 8])
LEVELS = (0.1, 0.9)
KINDS = ("max", "min", "random")
CORPORA = ["plain", "<script>window.hacked = 1</script>"]
LONG = b"w" * 100_000
HOSTILE = [
    b"<script>window.hacked = 1</script>",
    b'"><img src=x onerror="window.hacked = 1">',
    b"' onmouseover='window.hacked = 1",
    b"</title></style></textarea><b>",
    "\u202egnp.exe\u202c".encode(),
    b"nul\0nul\x1b[31m",
    b"{{ 7 * 7 }}{% raw %}",
    b"\xff\xfe",
    LONG,
]
WORDS = [b"<s>", b" the", b" cat", b" Cats", b" dog", b"\n", "é".encode()[:1], "é".encode()[1:], *HOSTILE]
HOSTILE_TEXT = 'say "<script>window.hacked = 1</script>" & <b>\u202eleft</b> \0 ' + "v" * 30_000
SEED = 7


def neurons(experts=None):
    """The names of all neurons that are held, in order; neuron 7 of layer 3 was not asked for."""
    named = [(None, e) for e in (experts if experts is not None else [None])]
    found = [
        NeuronId.of(int(layer), None if e is None else int(e), int(index))
        for layer in LAYERS
        for _, e in named
        for index in NEURONS
    ]
    return [n for n in found if (n.layer, n.index) != (3, 7)]


def activations(place, *, experts=1):
    """Activations of a layer at all tokens, float16 [N, T, F], of which the first of each sequence is NaN."""
    rng = np.random.default_rng([SEED, place])
    acts_NTF = rng.normal(0, 1, (SEQUENCES, TOKENS, experts * len(NEURONS))).astype(np.float16)
    acts_NTF[:, 0] = np.nan
    return acts_NTF


def tokens():
    """The token table, int32 [N, T]; every token of the vocabulary is in it; the last rows are shorter."""
    rng = np.random.default_rng(SEED)
    token_NT = rng.integers(1, 6, (SEQUENCES, TOKENS), np.int32)
    token_NT[:, 0] = 0
    token_NT[:, 20] = np.arange(SEQUENCES) % len(WORDS)
    for word in range(len(WORDS)):
        token_NT[word % 4, 21 + word] = word
    token_NT[-2:, 40:] = -1
    return token_NT


def write_store(path, *, experts=None, splits=("train", "valid"), corpora=CORPORA, strata=()):
    """A store of both splits, which hold the same; with `strata` of kind quantile too. Gives its path."""
    kinds = [*KINDS, *(["quantile"] if strata else [])]
    config = {
        "corpus": {"sources": [{"weight": 0.5}, {"weight": 0.5}]},
        "exemplars": {"splits": list(splits), "kinds": kinds, "k": K},
        "statistics": {"quantiles": list(LEVELS), "active_above": 0.0},
    }
    subject = {"id": "made-up <b>model</b>", "revision": None, "weight_hash": "abc"}
    writer = StoreWriter(path, {"config": config, "subject": subject, "corpora": list(corpora)})
    writer.write_vocabulary(WORDS)
    token_NT = tokens()
    for split in splits:
        block = SequenceBlock(
            token_NT=token_NT,
            corpus_N=(np.arange(SEQUENCES) % 2).astype(np.int32),
            document_N=np.arange(SEQUENCES) - 5,
            start_N=np.full(SEQUENCES, 96, np.int32),
            length_N=(token_NT >= 0).sum(1).astype(np.int32),
        )
        writer.write_sequences(split, [block], tokens=TOKENS)
        out = writer.create_split(
            split,
            layers=LAYERS,
            neurons=NEURONS,
            kinds=kinds,
            strata=strata,
            samples_per_quantile=2,
            k=K,
            tokens=TOKENS,
            activation_dtype="float16",
            quantiles=LEVELS,
            experts=experts,
            shared=None if experts is None else np.ones((len(LAYERS), len(experts)), bool),
        )
        for place, layer in enumerate(LAYERS):
            _write_layer(out, place, int(layer), token_NT, 1 if experts is None else len(experts), kinds)
    writer.finish()
    return path


def _write_layer(out, place, layer, token_NT, experts, kinds):
    acts_NTF = np.where(token_NT[..., None] >= 0, activations(place, experts=experts), np.float16(np.nan))
    columns = np.array([c for c in range(acts_NTF.shape[2]) if (layer, NEURONS[c % len(NEURONS)]) != (3, 7)])
    for kind in kinds:
        priority_NF = {
            "quantile": -np.nanmax(acts_NTF, 1),
            "max": -np.nanmax(acts_NTF, 1),
            "min": np.nanmin(acts_NTF, 1),
        }.get(kind)
        if priority_NF is None:
            priority_NF = np.random.default_rng(SEED).random((SEQUENCES, 1)).repeat(acts_NTF.shape[2], 1)
        sequence_FR = np.argsort(priority_NF, axis=0, kind="stable")[:K].T[columns]
        score_FR = np.take_along_axis(priority_NF.T[columns], sequence_FR, 1) * (
            -1 if kind in ("max", "quantile") else 1
        )
        out.write_exemplars(
            kind,
            place,
            columns,
            score_NR=score_FR.astype(np.float32),
            sequence_NR=sequence_FR.astype(np.int32),
            activation_NRT=acts_NTF[sequence_FR, :, columns[:, None]],
            stratum_NR=np.tile([1, 1, 0, 0], (len(columns), 1)) if kind == "quantile" else None,
        )
    values = statistics(place, experts=experts)
    out.write_statistics(place, columns, **{name: array[columns] for name, array in values.items()})


def statistics(place, *, experts=1):
    """Statistics of a layer's neurons [F], made up; one has no kurtosis."""
    count = experts * len(NEURONS)
    rng = np.random.default_rng([SEED, place, 1])
    values = {name: rng.random(count).astype(np.float32) for name in STATISTICS}
    values["count"] = np.full(count, 500)
    values["kurtosis"] = (3 + 20 * values["kurtosis"] ** 2).astype(np.float32)
    values["kurtosis"][2] = np.nan
    values["quantile"] = np.sort(rng.normal(size=(count, len(LEVELS))).astype(np.float32), axis=1)
    return values


TEXTS = {
    0: "names of cats and other small animals",
    1: "dogs, or a cat that barks",
    2: HOSTILE_TEXT,
    3: "café closing times",
}


def write_explanations(path):
    """Explanations of the first four neurons of a store, scores of the first two, and simulations."""
    store = jaxplain.open_store(path)
    split = store["train"]
    experts = split.experts
    names = neurons(experts)
    with open_explanations(
        path.parent / "explanations.sqlite",
        fingerprint=store.fingerprint,
        subject="made-up",
        experts=experts is not None,
    ) as database:
        recipe = database.recipe(
            {"explainer": {"provider": "gemini"}, "prompt": {"style": "<i>style</i>"}}, "0"
        )
        for number, text in TEXTS.items():
            sign = "min" if number == 1 else "max"
            sample = Sample(sign=sign, sample=0, status="explained", text=text, model="model '\"")
            database.finish(recipe, names[number], [sample])
        database.finish(recipe, names[4], [Sample(sign="max", sample=0, status="refused", detail="no")])
        scores = ScoreDatabase(database)
        simulator = scores.simulator({"kind": "made-up"})
        for number, value in ((0, 0.75), (1, float("nan"))):
            explanation = database.explanations(*_asked(names[number]))[0]
            found = split.neuron_called(names[number]).exemplars(explanation.sign)
            expected = np.linspace(0, 10, len(found[0].tokens)).astype(np.float32)
            simulations = {
                found[0].sequence: StoredSimulation(expected=expected),
                found[1].sequence: StoredSimulation(expected=None, detail="the reply <b>broke</b> off"),
            }
            scores.add_simulations(simulator, explanation.id, "train", simulations)
            one = Score(
                explanation=explanation.id,
                sign=explanation.sign,
                simulator="sim <b>",
                split="train",
                sequences="top+random",
                metric="correlation",
                calibration="none",
                value=value,
                reason=None if value == value else "all <i>equal</i>",
                low=0.5 if value == value else float("nan"),
                high=0.9 if value == value else float("nan"),
            )
            scores.add_scores(simulator, [one], top=2, random=2)


def _asked(neuron):
    return neuron.layer, neuron.index, neuron.expert


def make_run(folder, *, experts=None):
    """A run's folder, with a store and explanations."""
    write_store(folder / "exemplars.zarr", experts=experts)
    write_explanations(folder / "exemplars.zarr")
    return folder
