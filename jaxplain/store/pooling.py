"""Statistics of the tokens of several stores together, from those of each.

Moments about the parts' means are moved to the mean of all, in float64, by the rule of Pébay (2008). But
stores hold them in float32, so that the result differs from that of one run over all tokens in the seventh
digit, and by more where the mean is many times the deviation.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Statistics = Mapping[str, np.ndarray]
"""Arrays [F] by their names in `schema.STATISTICS`."""


def pooled_statistics(parts: Sequence[Statistics]) -> dict[str, np.ndarray]:
    """The statistics of all parts' tokens; float64, and counts int64.

    Neurons that were not asked for, whose count is negative, keep a count of -1, and NaN elsewhere. The
    number of active tokens is rounded to a whole one, and so is exact below some eight million.
    """
    asked_F = parts[0]["count"] >= 0
    count_PF = np.stack([part["count"] for part in parts]).astype(np.float64)
    mean_PF, variance_PF, skewness_PF, kurtosis_PF, active_PF = (
        # A part without tokens has no moments, and one that does not vary none of the higher ones.
        np.nan_to_num(np.stack([part[name] for part in parts]).astype(np.float64))
        for name in ("mean", "variance", "skewness", "kurtosis", "fraction_active")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        count_F = count_PF.sum(axis=0)
        # About one of the means, so that equal ones give just that, and no variance of rounding.
        centre_F = mean_PF[np.argmax(count_PF, axis=0), np.arange(len(asked_F))]
        mean_F = centre_F + (count_PF * (mean_PF - centre_F)).sum(axis=0) / count_F
        shift_PF = np.where(count_PF > 0, mean_PF - mean_F, 0)
        second_PF = variance_PF + shift_PF**2
        third_PF = skewness_PF * variance_PF**1.5 + shift_PF * (3 * variance_PF + shift_PF**2)
        fourth_PF = (
            kurtosis_PF * variance_PF**2
            + 4 * shift_PF * skewness_PF * variance_PF**1.5
            + shift_PF**2 * (6 * variance_PF + shift_PF**2)
        )
        variance_F, third_F, fourth_F = (
            (count_PF * power_PF).sum(axis=0) / count_F for power_PF in (second_PF, third_PF, fourth_PF)
        )
        deviation_F = np.sqrt(np.where(variance_F > 0, variance_F, np.nan))
        pooled = {
            "mean": mean_F,
            "variance": variance_F,
            "skewness": third_F / deviation_F**3,
            "kurtosis": fourth_F / deviation_F**4,
            "fraction_active": np.rint(count_PF * active_PF).sum(axis=0) / count_F,
        }
    pooled = {name: np.where(asked_F, values_F, np.nan) for name, values_F in pooled.items()}
    counts_F = np.sum([part["count"] for part in parts], axis=0, dtype=np.int64)
    return {"count": np.where(asked_F, counts_F, -1)} | pooled
