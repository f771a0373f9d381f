"""Hand-made stores: any tokens and activations, exemplars and statistics by brute force."""

import numpy as np

import jaxplain
from jaxplain.store.writer import SequenceBlock, StoreWriter
from tests import oracle

KINDS = ("max", "min", "random")


def make_split(
    path,
    token_NT,
    acts_NTF,
    *,
    k,
    words,
    layers=(0,),
    kinds=KINDS,
    counted_NT=None,
    lottery_NF=None,
    held_LF=None,
):
    """A split with the same activations in each layer; `lottery_NF` draws random sequences per neuron.

    Activations are stored in half precision, so give such as it holds exactly.
    """
    sequences, tokens, neurons = acts_NTF.shape
    counted_NT = token_NT >= 0 if counted_NT is None else counted_NT
    if lottery_NF is None:
        lottery_NF = np.random.default_rng(0).random((sequences, 1)).repeat(neurons, 1)
    held_LF = np.ones((len(layers), neurons), bool) if held_LF is None else held_LF
    config = {"exemplars": {"splits": ["train"], "kinds": list(kinds), "k": k}}
    writer = StoreWriter(path, {"config": config, "subject": {"id": "made-up"}, "corpora": ["made-up"]})
    writer.write_vocabulary(words)
    block = SequenceBlock(
        token_NT=token_NT.astype(np.int32),
        corpus_N=np.zeros(sequences, np.int32),
        document_N=np.arange(sequences),
        start_N=np.zeros(sequences, np.int32),
        length_N=(token_NT >= 0).sum(1).astype(np.int32),
    )
    writer.write_sequences("train", [block], tokens=tokens)
    split = writer.create_split(
        "train",
        layers=np.array(layers),
        neurons=np.arange(neurons),
        kinds=list(kinds),
        k=k,
        tokens=tokens,
        activation_dtype="float16",
    )
    names = ("count", "mean", "variance", "skewness", "kurtosis", "fraction_active")
    statistics = oracle.statistics(acts_NTF, counted_NT)
    for place in range(len(layers)):
        columns = np.flatnonzero(held_LF[place])
        for kind in kinds:
            found = [
                oracle.exemplars(acts_NTF[..., [f]], counted_NT, kind, k, lottery_NF[:, f]) for f in columns
            ]
            score, sequence, activation = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
            split.write_exemplars(
                kind, place, columns, score_NR=score, sequence_NR=sequence, activation_NRT=activation
            )
        split.write_statistics(
            place, columns, **{n: v[columns] for n, v in zip(names, statistics, strict=True)}
        )
    writer.finish()
    return jaxplain.open_store(path)["train"]
