"""What a reduction must give, computed the plain way: all activations in memory, then sort."""

import numpy as np


def exemplars(acts_NTF, counted_NT, kind, k, lottery_N=None):
    """Score, sequence and activation of every neuron's k best sequences, as the store keeps them."""
    sequences, tokens, neurons = acts_NTF.shape
    score = np.full((neurons, k), np.nan, np.float32)
    sequence = np.full((neurons, k), -1, np.int32)
    activation = np.full((neurons, k, tokens), np.nan, np.float16)
    for f in range(neurons):
        entries = []
        for n in range(sequences):
            counted = acts_NTF[n, counted_NT[n], f]
            if counted.size == 0:
                continue
            value = {"max": counted.max, "min": counted.min, "random": lambda n=n: lottery_N[n]}[kind]()
            entries.append((value if kind == "min" else -value, n, value))
        for rank, (_, n, value) in enumerate(sorted(entries)[:k]):
            score[f, rank], sequence[f, rank] = value, n
            activation[f, rank] = np.where(counted_NT[n], acts_NTF[n, :, f], np.nan)
    return score, sequence, activation


def statistics(acts_NTF, counted_NT):
    """Count, mean, variance, skewness, kurtosis and fraction active of every neuron, in float64."""
    counted = acts_NTF[counted_NT].astype(np.float64)
    if not len(counted):
        nan = np.full(acts_NTF.shape[2], np.nan)
        return np.zeros(acts_NTF.shape[2]), nan, nan, nan, nan, nan
    variance = counted.var(0)
    deviation = np.where(variance > 0, variance, np.nan) ** 0.5
    return (
        np.full(acts_NTF.shape[2], len(counted)),
        counted.mean(0),
        variance,
        *(((counted - counted.mean(0)) ** power).mean(0) / deviation**power for power in (3, 4)),
        (counted > 0).mean(0),
    )
