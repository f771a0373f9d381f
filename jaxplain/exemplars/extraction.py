"""The extraction run: for each split, cut the corpus, stream it through the subject, write what remains."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from jaxplain.configs.extraction import ExtractConfig
from jaxplain.corpora.tokens import TokenBatch, token_batches
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.merging import merge_partials, merge_sample
from jaxplain.exemplars.moments import merge_moments
from jaxplain.exemplars.quantiles import lower_tail, quantiles, upper_tail
from jaxplain.exemplars.reduction import LayerReduction, Rows, empty_reduction
from jaxplain.exemplars.selection import Selection
from jaxplain.exemplars.step import Reductions, Step
from jaxplain.progress import Progress
from jaxplain.store.writer import SplitWriter, StoreWriter

_TAILS = {"max": upper_tail, "min": lower_tail}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What every split of a run shares. `excluded` are token ids that never count."""

    config: ExtractConfig
    mesh: Mesh
    selection: Selection
    step: Step
    weights: Any
    excluded: frozenset[int]
    mlp_width: int

    def run_split(self, writer: StoreWriter, split: str, progress: Progress) -> None:
        """Extract a split whose token table is written already."""
        config = self.config
        table = writer.read_sequences(split)
        rows, tokens = table["token"].shape
        if rows * tokens // self.mesh.shape["data"] >= 2**32:
            raise JaxplainError(
                f"split {split!r} has {rows * tokens:.1e} tokens, more than the 4.3e9 per data shard "
                "that can be counted; lower corpus.max_sequences or spread over more devices."
            )
        batches = token_batches(table, batch_size=config.run.batch_size, seed=config.corpus.seed)
        try:
            with progress(total=rows, desc=f"{split}: read", unit="sequences") as bar:
                reductions = self._reduce(batches, bar.update)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise JaxplainError(
                f"the devices have too little memory for exemplars.k {config.exemplars.k}, "
                f"corpus.sequence_length {tokens} and run.batch_size {config.run.batch_size} over "
                f"{sum(map(len, self.selection.indices.values()))} neurons; lower one of them, choose "
                "fewer neurons, or use more devices."
            ) from error
        out = writer.create_split(
            split,
            layers=self.selection.layers,
            neurons=self.selection.neurons,
            kinds=config.exemplars.kinds,
            k=config.exemplars.k,
            tokens=config.corpus.sequence_length,
            activation_dtype=config.exemplars.activation_dtype,
            quantiles=config.statistics.quantiles,
            sampled_tokens=config.statistics.sampled_tokens if config.statistics.quantiles else 0,
        )
        with progress(total=len(reductions), desc=f"{split}: write", unit="layers") as bar:
            self._write(reductions, out, bar.update)

    def _reduce(self, batches: Iterable[TokenBatch], advance: Callable[[int], Any]) -> Reductions:
        neurons = self._padded_neurons()
        exemplars = self.config.exemplars
        reductions = {
            layer: empty_reduction(
                kinds=tuple(exemplars.kinds),
                neurons=len(neurons[layer]) if layer in neurons else self.mlp_width,
                k=exemplars.k,
                tokens=self.config.corpus.sequence_length,
                sampled_tokens=self.config.statistics.sampled_tokens,
                dtype=jnp.dtype(exemplars.activation_dtype),
                mesh=self.mesh,
            )
            for layer in self.selection.indices
        }
        pending = 0
        for batch in batches:
            rows = self._rows(batch)
            # Rows are made ready while the step before runs; waiting for it keeps progress honest.
            jax.block_until_ready(reductions)
            advance(pending)
            reductions = self.step(reductions, self.weights, rows, neurons)
            if pending == 0:
                self._require_finite(reductions)
            pending = batch.rows
        jax.block_until_ready(reductions)
        advance(pending)
        self._require_finite(reductions)
        return reductions

    def _require_finite(self, reductions: Reductions) -> None:
        dtype = self.config.subject.dtype
        remedy = "check the weights" if dtype == "float32" else "try subject.dtype float32"
        for layer, reduction in sorted(reductions.items()):
            if not np.isfinite(reduction.moments.mean_F).all():
                raise JaxplainError(
                    f"layer {layer} has activations that are not finite numbers in {dtype}; {remedy}."
                )

    def _rows(self, batch: TokenBatch) -> Rows:
        sharding = NamedSharding(self.mesh, P("data"))
        counted_BT = counted_tokens(
            batch.tokens_BT,
            excluded=self.excluded,
            first=self.config.corpus.exclude.first,
            before_B=batch.before_B if self.config.corpus.chat_prefix else None,
        )

        def on_mesh(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, x)

        return Rows(
            tokens_BT=on_mesh(batch.tokens_BT),
            counted_BT=on_mesh(counted_BT),
            sequence_B=on_mesh(batch.sequence_B),
            lottery_B=on_mesh(batch.lottery_B),
            token_lottery_BT=on_mesh(batch.token_lottery_BT),
        )

    def _padded_neurons(self) -> dict[int, jax.Array]:
        """Indices of layers of which not all neurons are kept, repeated to divide by the mesh."""
        size = self.mesh.shape["model"]
        return {
            layer: jnp.asarray(np.pad(indices, (0, -len(indices) % size), mode="edge"), jnp.int32)
            for layer, indices in self.selection.indices.items()
            if len(indices) < self.mlp_width
        }

    def _write(self, reductions: Reductions, out: SplitWriter, advance: Callable[[int], Any]) -> None:
        for place, layer in enumerate(self.selection.layers):
            reduction = reductions.pop(int(layer))
            columns = self.selection.columns(int(layer))
            kept = slice(len(columns))
            statistics = merge_moments(reduction.moments)
            tails = {}
            for kind, ranked in merge_partials(reduction, self.mesh).items():
                priority_NR = np.asarray(ranked.priority_FR)[kept]
                sign = -1 if kind == "min" else 1
                score_NR = np.where(np.isfinite(priority_NR), sign * priority_NR, np.nan)
                activation_NRT = np.asarray(ranked.activation_FRT)[kept]
                if kind in _TAILS:
                    tails[kind] = _TAILS[kind](score_NR, activation_NRT)
                out.write_exemplars(
                    kind,
                    place,
                    columns,
                    score_NR=score_NR,
                    sequence_NR=np.asarray(ranked.sequence_FR)[kept],
                    activation_NRT=activation_NRT,
                )
            sample_NM = self._write_sample(reduction, out, place, columns)
            out.write_statistics(
                place,
                columns,
                quantile=quantiles(
                    np.array(self.config.statistics.quantiles),
                    int(statistics.count_F[0]),
                    sample_NM,
                    upper=tails.get("max"),
                    lower=tails.get("min"),
                ),
                count=statistics.count_F[kept],
                mean=statistics.mean_F[kept],
                variance=statistics.variance_F[kept],
                skewness=statistics.skewness_F[kept],
                kurtosis=statistics.kurtosis_F[kept],
                fraction_active=statistics.fraction_active_F[kept],
            )
            advance(1)

    def _write_sample(
        self, reduction: LayerReduction, out: SplitWriter, place: int, columns: Int[np.ndarray, "N"]
    ) -> Float[np.ndarray, "N M"]:
        """Write a layer's sampled tokens, for which quantiles are known, and give their activations."""
        ranked = merge_sample(reduction, self.mesh)
        sample_NM = np.asarray(ranked.activation_FRT)[: len(columns), :, 0]
        if self.config.statistics.quantiles:
            lottery_M = np.asarray(ranked.priority_FR[0])
            if place == 0:
                out.write_draws(
                    lottery_M=np.where(np.isfinite(lottery_M), lottery_M, np.nan),
                    sequence_M=np.asarray(ranked.sequence_FR[0]),
                )
            out.write_sample(place, columns, sample_NM)
        return sample_NM


def counted_tokens(
    tokens_BT: Int[np.ndarray, "B T"],
    *,
    excluded: frozenset[int],
    first: int,
    before_B: Int[np.ndarray, "B"] | None = None,
) -> Bool[np.ndarray, "B T"]:
    """Which tokens count: not padding, not excluded, nor the `first` (or `before_B`) of a sequence."""
    counted_BT = (tokens_BT >= 0) & ~np.isin(tokens_BT, list(excluded))
    counted_BT[:, :first] = False
    if before_B is not None:
        counted_BT &= np.arange(tokens_BT.shape[1])[None] >= before_B[:, None]
    return counted_BT
