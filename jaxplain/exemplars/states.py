"""What a run keeps of each layer while it reads, from its config: that of which reductions are made."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jaxplain.configs.extraction import ExemplarsConfig, ExtractConfig, StatisticsConfig
from jaxplain.exemplars.reduction import KINDS
from jaxplain.exemplars.selection import Selection
from jaxplain.exemplars.strata import Stratum, kept_of_draws, plan_strata
from jaxplain.exemplars.token_sums import spread_over_shards


def state_options(
    config: ExtractConfig,
    selection: Selection,
    layer: int,
    *,
    shards: int,
    rows: int | None,
    sampled: int,
    tabled: Mapping[int, Int[np.ndarray, "_"]],
) -> dict[str, Any]:
    """What `reduction.empty_reduction` is told of a layer, but for the mesh, of which `shards` share neurons.

    `rows` is how many sequences can be drawn, `sampled` how many tokens are drawn for quantiles, and `tabled`
    has the numbers of each layer's neurons that get sums by token.
    """
    exemplars, arch = config.exemplars, selection.arch
    experts = {}
    if arch.routed_experts(layer):
        experts = {
            "experts": len(arch.expert_widths(layer)),
            "expert_F": padded(selection.expert_of(layer), shards),
        }
    return {
        "kinds": tuple(kind for kind in KINDS if kind in exemplars.kinds),
        "neurons": len(padded(selection.indices[layer], shards)),
        "k": exemplars.k,
        "tokens": config.corpus.sequence_length,
        "sampled_tokens": sampled,
        "dtype": jnp.dtype(exemplars.activation_dtype),
        "draws": kept_of_draws(strata_of(exemplars, rows)),
        "summed": summed_columns(selection, tabled, layer, shards)[0] if layer in tabled else None,
        "vocabulary": arch.vocabulary,
        **experts,
    }


def strata_of(exemplars: ExemplarsConfig, rows: int | None = None) -> tuple[Stratum, ...]:
    """The strata of kind quantile, none without it; `rows` is how many sequences can be drawn."""
    if "quantile" not in exemplars.kinds:
        return ()
    return plan_strata(exemplars.strata, wanted=exemplars.samples_per_quantile, rows=rows)


def sampled_tokens(config: StatisticsConfig, selection: Selection) -> int:
    """How many tokens to draw for quantiles: on average an expert reads as many as the config says."""
    return config.sampled_tokens * selection.tokens_per_read if config.quantiles else 0


def padded(values_N: Int[np.ndarray, "N"], shards: int) -> Int[np.ndarray, "F"]:
    """The last one repeated until the shards divide them."""
    return np.pad(values_N, (0, -len(values_N) % shards), mode="edge").astype(np.int32)


def summed_columns(
    selection: Selection, tabled: Mapping[int, Int[np.ndarray, "_"]], layer: int, shards: int
) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "N"]]:
    """Where a layer's neurons with a table are summed up; see `token_sums.spread_over_shards`."""
    kept = selection.indices[layer]
    place_N = np.searchsorted(kept, tabled[layer])
    return spread_over_shards(place_N, neurons=len(padded(kept, shards)), shards=shards)
