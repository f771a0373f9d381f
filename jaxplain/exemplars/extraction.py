"""The extraction run: for each split, cut the corpus, stream it through the subject, write what remains."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int

from jaxplain.configs.extraction import ExtractConfig, StatisticsConfig
from jaxplain.corpora.cutting import PADDING
from jaxplain.corpora.tokens import TokenBatch, token_batches
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.draws import Draws, TableBlock, draw
from jaxplain.exemplars.merging import Ranked, merge_partials, merge_top
from jaxplain.exemplars.moments import merge_moments
from jaxplain.exemplars.reduction import KINDS, LayerReduction, Rows, empty_reduction
from jaxplain.exemplars.selection import Selection
from jaxplain.exemplars.step import Reductions, Step
from jaxplain.exemplars.strata import RankedSequences, Stratum, choose, kept_of_draws, plan_strata
from jaxplain.exemplars.token_sample import merge_sample
from jaxplain.exemplars.token_sums import merge_token_sums, spread_over_shards, strongest_tokens
from jaxplain.progress import Progress
from jaxplain.store.quantiles import Tail, lower_tail, quantiles, upper_tail
from jaxplain.store.writer import SplitWriter, StoreWriter

_TAILS = {"max": upper_tail, "min": lower_tail}
_ROWS_PER_BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What every split of a run shares.

    `excluded` are token ids that never count, `vocabulary` how many ids the subject has, and `tabled` the
    numbers of each layer's neurons that get a table of mean activations by token.
    """

    config: ExtractConfig
    mesh: Mesh
    selection: Selection
    step: Step
    weights: Any
    excluded: frozenset[int]
    vocabulary: int
    tabled: dict[int, Int[np.ndarray, "N"]]

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
        drawn = self._draw(table)
        strata = self._strata(drawn.rows)
        batches = token_batches(table, batch_size=config.run.batch_size, seed=config.corpus.seed)
        try:
            with progress(total=rows, desc=f"{split}: read", unit="sequences") as bar:
                reductions = self._reduce(batches, drawn, strata, bar.update)
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
            experts=self.selection.experts,
            shared=self.selection.shared,
            kinds=config.exemplars.kinds,
            k=config.exemplars.k,
            tokens=config.corpus.sequence_length,
            activation_dtype=config.exemplars.activation_dtype,
            quantiles=config.statistics.quantiles,
            strata=config.exemplars.strata,
            samples_per_quantile=config.exemplars.samples_per_quantile,
            chosen=self._tabled_names(),
            chosen_tokens=config.statistics.tokens.count,
        )
        with progress(total=len(reductions), desc=f"{split}: write", unit="layers") as bar:
            self._write(reductions, drawn, strata, out, bar.update)

    def _strata(self, rows: int | None = None) -> tuple[Stratum, ...]:
        """The strata of kind quantile, none without it; `rows` is how many sequences can be drawn."""
        exemplars = self.config.exemplars
        if "quantile" not in exemplars.kinds:
            return ()
        return plan_strata(exemplars.strata, wanted=exemplars.samples_per_quantile, rows=rows)

    def _draw(self, table: dict[str, ts.TensorStore]) -> Draws:
        """What is drawn at random from the split."""
        rows = table["token"].shape[0]

        def block(start: int) -> TableBlock:
            part = slice(start, min(start + _ROWS_PER_BLOCK, rows))
            reads = [table[name][part].read() for name in ("token", "document", "start", "length")]
            token_NT, document_N, start_N, length_N = (np.asarray(read.result()) for read in reads)
            before_N = (token_NT != PADDING).sum(axis=1) - length_N
            return TableBlock(document_N, start_N, self._counted(token_NT, before_N))

        return draw(
            map(block, range(0, rows, _ROWS_PER_BLOCK)),
            seed=self.config.corpus.seed,
            sequences=max((stratum.drawn for stratum in self._strata()), default=0),
            tokens=sampled_tokens(self.config.statistics, self.selection),
        )

    def _reduce(
        self,
        batches: Iterable[TokenBatch],
        drawn: Draws,
        strata: Sequence[Stratum],
        advance: Callable[[int], Any],
    ) -> Reductions:
        neurons = self._padded_neurons()
        exemplars = self.config.exemplars
        reductions = {
            layer: empty_reduction(
                kinds=tuple(kind for kind in KINDS if kind in exemplars.kinds),
                neurons=len(neurons[layer]) if layer in neurons else self.selection.width(layer),
                k=exemplars.k,
                tokens=self.config.corpus.sequence_length,
                sampled_tokens=len(drawn.token_M),
                dtype=jnp.dtype(exemplars.activation_dtype),
                mesh=self.mesh,
                draws=kept_of_draws(strata),
                summed=self._summed(layer)[0] if layer in self.tabled else None,
                vocabulary=self.vocabulary,
                **self._experts(layer),
            )
            for layer in self.selection.indices
        }
        pending = 0
        for batch in batches:
            rows = self._rows(batch, drawn)
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

    def _counted(self, tokens_BT: Int[np.ndarray, "B T"], before_B: Int[np.ndarray, "B"]) -> np.ndarray:
        return counted_tokens(
            tokens_BT,
            excluded=self.excluded,
            first=self.config.corpus.exclude.first,
            before_B=before_B if self.config.corpus.chat_prefix else None,
        )

    def _rows(self, batch: TokenBatch, drawn: Draws) -> Rows:
        sharding = NamedSharding(self.mesh, P("data"))
        counted_BT = self._counted(batch.tokens_BT, batch.before_B)
        drawn_PW, slot_PW = drawn.tokens_of(
            int(batch.sequence_B[0]), batch=len(batch.sequence_B), shards=self.mesh.shape["data"]
        )

        def on_mesh(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, x)

        return Rows(
            tokens_BT=on_mesh(batch.tokens_BT),
            counted_BT=on_mesh(counted_BT),
            sequence_B=on_mesh(batch.sequence_B),
            lottery_B=on_mesh(batch.lottery_B),
            turn_B=on_mesh(drawn.turns(batch.sequence_B)),
            drawn_PW=on_mesh(drawn_PW),
            slot_PW=on_mesh(slot_PW),
        )

    def _padded_neurons(self) -> dict[int, jax.Array]:
        """Indices of layers of which not all neurons are kept, repeated to divide by the mesh."""
        return {
            layer: jnp.asarray(self._padded(indices))
            for layer, indices in self.selection.indices.items()
            if len(indices) < self.selection.width(layer)
        }

    def _experts(self, layer: int) -> dict[str, Any]:
        """What a reduction is told of a layer's experts."""
        if not self.selection.arch.routed_experts(layer):
            return {}
        experts = len(self.selection.arch.expert_widths(layer))
        return {"experts": experts, "expert_F": self._padded(self.selection.expert_of(layer))}

    def _padded(self, values_N: np.ndarray) -> Int[np.ndarray, "N"]:
        """The last one repeated until the mesh divides them."""
        missing = -len(values_N) % self.mesh.shape["model"]
        return np.pad(values_N, (0, missing), mode="edge").astype(np.int32)

    def _summed(self, layer: int) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "N"]]:
        """Where a layer's neurons with a table are summed up; see `token_sums.spread_over_shards`."""
        kept, shards = self.selection.indices[layer], self.mesh.shape["model"]
        place_N = np.searchsorted(kept, self.tabled[layer])
        return spread_over_shards(place_N, neurons=len(kept) + -len(kept) % shards, shards=shards)

    def _tabled_names(self) -> Int[np.ndarray, "C _"] | None:
        """What the neurons with a table are called."""
        names = [
            name for layer, numbers in self.tabled.items() for name in self.selection.names(layer, numbers)
        ]
        return np.array(names, np.int32) if names else None

    def _write(
        self,
        reductions: Reductions,
        drawn: Draws,
        strata: Sequence[Stratum],
        out: SplitWriter,
        advance: Callable[[int], Any],
    ) -> None:
        tables = 0
        for place, layer in enumerate(self.selection.layers):
            reduction = reductions.pop(int(layer))
            columns = self.selection.columns(int(layer))
            kept = slice(len(columns))
            statistics = merge_moments(reduction.moments)
            tails = {}
            for kind, ranked in merge_partials(reduction, self.mesh).items():
                found = _sequences(ranked, kept, sign=-1 if kind == "min" else 1)
                if kind in _TAILS:
                    tails[kind] = _TAILS[kind](found.score_NR, found.activation_NRT)
                out.write_exemplars(kind, place, columns, **found._asdict())
            if strata:
                stratum_NR, found = choose(
                    strata,
                    {
                        count: _sequences(merge_top(top, mesh=self.mesh), kept)
                        for count, top in reduction.draws.items()
                    },
                    drawn.turns,
                    wanted=self.config.exemplars.samples_per_quantile,
                    read={
                        count: np.asarray(read_PF).sum(axis=0, dtype=np.int64)[kept]
                        for count, read_PF in reduction.read.items()
                    },
                )
                out.write_exemplars("quantile", place, columns, **found._asdict(), stratum_NR=stratum_NR)
            if int(layer) in self.tabled:
                self._write_token_table(reduction, int(layer), tables, out)
                tables += len(self.tabled[int(layer)])
            sample_MF = np.asarray(merge_sample(reduction.sample_MF, mesh=self.mesh))
            out.write_statistics(
                place,
                columns,
                quantile=_quantiles(
                    np.array(self.config.statistics.quantiles),
                    statistics.count_F[kept],
                    np.ascontiguousarray(sample_MF[:, kept].T),
                    tails,
                ),
                count=statistics.count_F[kept],
                mean=statistics.mean_F[kept],
                variance=statistics.variance_F[kept],
                skewness=statistics.skewness_F[kept],
                kurtosis=statistics.kurtosis_F[kept],
                fraction_active=statistics.fraction_active_F[kept],
            )
            advance(1)

    def _write_token_table(self, reduction: LayerReduction, layer: int, first: int, out: SplitWriter) -> None:
        config = self.config.statistics.tokens
        assert reduction.token_sums is not None
        table = merge_token_sums(reduction.token_sums, self._summed(layer)[1])
        for sign in ("max", "min"):
            token_NR, mean_NR, count_NR = strongest_tokens(
                table, kept=config.count, min_count=config.min_count, lowest=sign == "min"
            )
            out.write_token_table(sign, first, token_NR=token_NR, mean_NR=mean_NR, count_NR=count_NR)


def sampled_tokens(config: StatisticsConfig, selection: Selection) -> int:
    """How many tokens to draw for quantiles: on average an expert reads as many as the config says."""
    return config.sampled_tokens * selection.tokens_per_read if config.quantiles else 0


def _sequences(ranked: Ranked, kept: slice, *, sign: int = 1) -> RankedSequences:
    """What the store keeps of ranked sequences: extremes for priorities, NaN where there are none."""
    priority_NR = np.asarray(ranked.priority_FR)[kept]
    return RankedSequences(
        score_NR=np.where(np.isfinite(priority_NR), sign * priority_NR, np.float32(np.nan)),
        sequence_NR=np.asarray(ranked.sequence_FR)[kept],
        activation_NRT=np.asarray(ranked.activation_FRT)[kept],
    )


def _quantiles(
    levels: np.ndarray, count_N: np.ndarray, sample_NM: np.ndarray, tails: Mapping[str, Tail]
) -> np.ndarray:
    """Quantiles of neurons whose tokens may be of different numbers, as those of several experts are."""
    found_NQ = np.empty((len(count_N), len(levels)), np.float32)
    for count in np.unique(count_N):
        alike_N = count_N == count
        upper, lower = (
            Tail(*(values[alike_N] for values in tails[kind])) if kind in tails else None
            for kind in ("max", "min")
        )
        found_NQ[alike_N] = quantiles(levels, int(count), sample_NM[alike_N], upper=upper, lower=lower)
    return found_NQ


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
