"""Synthetic runs: activations made up from each window, and the store that a run over some windows leaves."""

import json
import shutil
from collections import Counter

import numpy as np

from jaxplain.configs.extraction import (
    CorpusConfig,
    ExemplarsConfig,
    ExtractConfig,
    SourceConfig,
    StatisticsConfig,
    SubjectConfig,
    recorded,
)
from jaxplain.corpora.hashing import lottery, token_lottery
from jaxplain.store.files import Files
from jaxplain.store.quantiles import lower_tail, quantiles, upper_tail
from jaxplain.store.schema import STATISTICS
from jaxplain.store.writer import SequenceBlock, StoreWriter
from tests import oracle

K, TOKENS, SAMPLED = 3, 4, 6
LAYERS, NEURONS = np.array([1, 4]), np.array([0, 2, 3, 7, 9])
LEVELS = (0.0, 0.1, 0.5, 0.9, 1.0)
KINDS = ("max", "min", "random")
SEED = 3
WORDS = [b"<s>", b"a", b"b", b"c", b"d", b"e"]


def config(**blocks):
    """What a run's config would be; `blocks` are changes such as `exemplars={"k": 5}`."""
    fields = {
        "corpus": {
            "sources": (SourceConfig(dataset="json", data_files="made-up.jsonl"),),
            "sequence_length": TOKENS,
            "max_sequences": 0,
            "splits": {"train": 1.0},
            "seed": SEED,
        },
        "exemplars": {"splits": ["train"], "kinds": list(KINDS), "k": K},
        "statistics": {"quantiles": list(LEVELS), "sampled_tokens": SAMPLED},
    }
    fields = {name: values | blocks.get(name, {}) for name, values in fields.items()}
    return ExtractConfig(
        subject=SubjectConfig(id="made-up"),
        corpus=CorpusConfig(**fields["corpus"]),
        exemplars=ExemplarsConfig(**fields["exemplars"]),
        statistics=StatisticsConfig(**fields["statistics"]),
        output="somewhere",
    )


def window(document, start, variant):
    """Tokens (-1 is padding), and activations [T, L, F] of few levels, so that many are equal."""
    rng = np.random.default_rng([document, start, variant])
    tokens_T = rng.integers(1, len(WORDS), TOKENS, np.int32)
    tokens_T[0] = 0
    tokens_T[TOKENS - int(rng.integers(0, TOKENS - 1)) :] = -1
    acts_TLF = rng.integers(-4, 5, (TOKENS, len(LAYERS), len(NEURONS))).astype(np.float32) / 4
    acts_TLF[:, 0, 1] = 0.25
    return tokens_T, acts_TLF


def of_all(*slices):
    """The windows of all slices, each as often as in the slice that has it most often."""
    found, most = [], Counter()
    for windows in slices:
        here = Counter()
        for key in windows:
            here[key] += 1
            if here[key] > most[key]:
                found.append(key)
        most |= here
    return found


def run(windows, *, repeated=()):
    """All arrays that a run over windows stores, by name; statistics count the repeated ones too."""
    tokens_NT, acts_NTLF = (np.stack(parts) for parts in zip(*(window(*key) for key in windows), strict=True))
    document_N = np.array([2**62 + document for document, _, _ in windows])
    start_N = np.array([start for _, start, _ in windows], np.int32)
    counted_NT = tokens_NT > 0
    arrays = {
        "sequences/token": tokens_NT,
        "sequences/document": document_N,
        "sequences/start": start_N,
        "sequences/length": counted_NT.sum(1).astype(np.int32),
    }
    drawn_N = lottery(SEED, document_N, start_N)
    for kind in KINDS:
        layers = [
            oracle.exemplars(acts_NTLF[:, :, layer], counted_NT, kind, K, drawn_N)
            for layer in range(len(LAYERS))
        ]
        for name, values in zip(("score", "sequence", "activation"), zip(*layers, strict=True), strict=True):
            arrays[f"{kind}/{name}"] = np.stack(values)

    drawn_NT = np.where(counted_NT, token_lottery(SEED, document_N, start_N, TOKENS), -np.inf)
    order = np.argsort(-drawn_NT.ravel(), kind="stable")[: min(SAMPLED, counted_NT.sum())]
    missing = (0, SAMPLED - len(order))
    arrays["sample/lottery"] = np.pad(
        drawn_NT.ravel()[order].astype(np.float32), missing, constant_values=np.nan
    )
    arrays["sample/sequence"] = np.pad(order // TOKENS, missing, constant_values=-1).astype(np.int32)
    sample_MLF = acts_NTLF.reshape((-1, len(LAYERS), len(NEURONS)))[order]
    arrays["sample/activation"] = np.pad(
        sample_MLF.transpose((1, 2, 0)).astype(np.float16), ((0, 0), (0, 0), missing), constant_values=np.nan
    )

    everything = [window(*key) for key in [*windows, *repeated]]
    all_acts_NTLF = np.stack([acts for _, acts in everything])
    all_counted_NT = np.stack([tokens for tokens, _ in everything]) > 0
    found = [oracle.statistics(all_acts_NTLF[:, :, layer], all_counted_NT) for layer in range(len(LAYERS))]
    for name, values in zip(STATISTICS, zip(*found, strict=True), strict=True):
        arrays[f"stats/{name}"] = np.stack(values)
    arrays["stats/quantile"] = np.stack(
        [
            quantiles(
                np.array(LEVELS),
                int(all_counted_NT.sum()),
                arrays["sample/activation"][layer],
                upper=upper_tail(arrays["max/score"][layer], arrays["max/activation"][layer]),
                lower=lower_tail(arrays["min/score"][layer], arrays["min/activation"][layer]),
            )
            for layer in range(len(LAYERS))
        ]
    )
    return arrays


def write(path, arrays, *, corpora=("one",), corpus_N=None, changes=None, asked=None, words=WORDS):
    """A store of a run's arrays. `asked` are the places of the neurons that were extracted, per layer."""
    attributes = {
        "config": json.loads(json.dumps(recorded(changes or config()))),
        "subject": {"id": "made-up", "weight_hash": "abc", "architecture": {"layers": 5}},
        "tokenizer_hash": "def",
        "corpora": list(corpora),
        "jaxplain_version": "0",
    }
    exemplars = attributes["config"]["exemplars"]
    writer = StoreWriter(path, attributes)
    writer.write_vocabulary(words)
    rows = len(arrays["sequences/token"])
    block = SequenceBlock(
        token_NT=arrays["sequences/token"],
        corpus_N=np.zeros(rows, np.int32) if corpus_N is None else corpus_N,
        document_N=arrays["sequences/document"],
        start_N=arrays["sequences/start"],
        length_N=arrays["sequences/length"],
    )
    writer.write_sequences("train", [block], tokens=TOKENS)
    levels = attributes["config"]["statistics"]["quantiles"]
    split = writer.create_split(
        "train",
        layers=LAYERS,
        neurons=NEURONS,
        kinds=exemplars["kinds"],
        k=K,
        tokens=TOKENS,
        activation_dtype="float16",
        quantiles=levels,
        sampled_tokens=SAMPLED if levels else 0,
    )
    for layer in range(len(LAYERS)):
        columns = np.arange(len(NEURONS)) if asked is None else np.array(asked[layer])
        for kind in exemplars["kinds"]:
            split.write_exemplars(
                kind,
                layer,
                columns,
                score_NR=arrays[f"{kind}/score"][layer, columns],
                sequence_NR=arrays[f"{kind}/sequence"][layer, columns],
                activation_NRT=arrays[f"{kind}/activation"][layer, columns],
            )
        names = (*STATISTICS, "quantile")
        split.write_statistics(
            layer, columns, **{name: arrays[f"stats/{name}"][layer, columns] for name in names}
        )
        if levels:
            split.write_sample(layer, columns, arrays["sample/activation"][layer, columns])
    if levels:
        split.write_draws(lottery_M=arrays["sample/lottery"], sequence_M=arrays["sample/sequence"])
    writer.finish()
    return path


def read(path, names, split="train"):
    """Arrays of a store, by name."""
    files = Files(path)
    return dict(zip(names, files.read(*(files.open_array(f"{split}/{name}") for name in names)), strict=True))


def changed(path, copy, field, value):
    """A copy of a store whose attribute at a dotted path is another, or has gone where it is None."""
    shutil.copytree(path, copy)
    root = json.loads((copy / "zarr.json").read_text())
    *blocks, name = field.split(".")
    place = root["attributes"]
    for block in blocks:
        place = place[block]
    if value is None:
        del place[name]
    else:
        place[name] = value
    (copy / "zarr.json").write_text(json.dumps(root))
    return copy
