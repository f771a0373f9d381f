"""The extraction run: for each split, cut the corpus, stream it through the subject, write what remains."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int

from jaxplain.configs.extraction import ExtractConfig
from jaxplain.corpora.cutting import PADDING
from jaxplain.corpora.tokens import TokenBatch, token_batches
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.checkpointing import SplitCheckpoints
from jaxplain.exemplars.clock import InputClock
from jaxplain.exemplars.draws import Draws, TableBlock, draw
from jaxplain.exemplars.merging import Ranked, merge_partials, merge_top
from jaxplain.exemplars.moments import merge_moments
from jaxplain.exemplars.reduction import Rows, empty_reduction
from jaxplain.exemplars.selection import Selection
from jaxplain.exemplars.states import padded, sampled_tokens, state_options, strata_of, summed_columns
from jaxplain.exemplars.step import Reductions, Step
from jaxplain.exemplars.strata import RankedSequences, Stratum, choose
from jaxplain.exemplars.token_sample import merge_sample
from jaxplain.exemplars.token_sums import TokenSums, merge_token_sums, strongest_tokens
from jaxplain.processes import gathered, leads, require_agreement, wait_for_others
from jaxplain.progress import Progress
from jaxplain.stopping import StopRequest
from jaxplain.store.quantiles import TAILS, quantiles_by_count
from jaxplain.store.writer import SplitWriter, StoreWriter

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

    def run_split(
        self, writer: StoreWriter, split: str, progress: Progress, *, folder: str | None, stop: StopRequest
    ) -> InputClock:
        """Extract a split whose token table is written already; how long reading it took.

        `folder` is for its checkpoints, if any.

        Raises Stopped where `stop` is requested.
        """
        config = self.config
        table = writer.read_sequences(split)
        rows, tokens = table["token"].shape
        require_agreement({f"the number of sequences of {split}": rows})
        if rows * tokens // self.mesh.shape["data"] >= 2**32:
            raise JaxplainError(
                f"split {split!r} has {rows * tokens:.1e} tokens, more than the 4.3e9 per data shard "
                "that can be counted; lower corpus.max_sequences or spread over more devices."
            )
        drawn = self._draw(table)
        strata = strata_of(config.exemplars, drawn.rows)
        checkpoints = SplitCheckpoints(
            folder,
            split=split,
            begun=writer.begun,
            run=config.run,
            kept={layer: len(indices) for layer, indices in self.selection.indices.items()},
            summed={layer: self._summed(layer) for layer in self.tabled},
            mesh=self.mesh,
            stop=stop,
        )
        clock = InputClock()
        try:
            with checkpoints:
                first, reductions = self._start(checkpoints, drawn, rows=rows)
                batches = token_batches(
                    table,
                    batch_size=config.run.batch_size,
                    seed=config.corpus.seed,
                    first=first,
                    part=self._rows_held(),
                )
                bar = progress(total=rows, initial=first, desc=f"{split}: read", unit="sequences")
                with bar, clock:
                    reductions = self._reduce(reductions, batches, drawn, bar.update, checkpoints, clock)
                self._write_split(writer, split, reductions, drawn, strata, progress, checkpoints)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise JaxplainError(
                f"the devices have too little memory for exemplars.k {config.exemplars.k}, "
                f"corpus.sequence_length {tokens} and run.batch_size {config.run.batch_size} over "
                f"{sum(map(len, self.selection.indices.values()))} neurons; lower one of them, choose "
                "fewer neurons, or use more devices."
            ) from error
        return clock

    def _write_split(
        self,
        writer: StoreWriter,
        split: str,
        reductions: Reductions,
        drawn: Draws,
        strata: Sequence[Stratum],
        progress: Progress,
        checkpoints: SplitCheckpoints,
    ) -> None:
        config = self.config
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
            sampled_tokens=sampled_tokens(config.statistics, self.selection),
            strata=config.exemplars.strata,
            samples_per_quantile=config.exemplars.samples_per_quantile,
            chosen=self._tabled_names(),
            chosen_tokens=config.statistics.tokens.count,
        )
        wait_for_others(f"the arrays of {split}")
        if config.statistics.quantiles and leads():
            out.write_draws(
                lottery_M=drawn.lottery_M[drawn.falling],
                sequence_M=(drawn.token_M // drawn.tokens)[drawn.falling].astype(np.int32),
            )
        with progress(total=len(reductions), desc=f"{split}: write", unit="layers") as bar:
            self._write(reductions, drawn, strata, out, bar.update, checkpoints)
        wait_for_others(f"the exemplars of {split}")
        writer.finish_split(split)

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
            sequences=max((stratum.drawn for stratum in strata_of(self.config.exemplars)), default=0),
            tokens=sampled_tokens(self.config.statistics, self.selection),
        )

    def _start(self, checkpoints: SplitCheckpoints, drawn: Draws, *, rows: int) -> tuple[int, Reductions]:
        """The first row to read, and the reductions of those before."""
        tokens = self.config.corpus.sequence_length

        def empty() -> Reductions:
            return {
                layer: empty_reduction(
                    **state_options(
                        self.config,
                        self.selection,
                        layer,
                        shards=self.mesh.shape["model"],
                        rows=drawn.rows,
                        sampled=len(drawn.token_M),
                        tabled=self.tabled,
                    ),
                    mesh=self.mesh,
                )
                for layer in self.selection.indices
            }

        return checkpoints.restore(jax.eval_shape(empty), rows=rows, tokens=tokens) or (0, empty())

    def _reduce(
        self,
        reductions: Reductions,
        batches: Iterable[TokenBatch],
        drawn: Draws,
        advance: Callable[[int], Any],
        checkpoints: SplitCheckpoints,
        clock: InputClock,
    ) -> Reductions:
        neurons = self._padded_neurons()
        pending = 0

        def idle() -> bool:
            return jax.tree.leaves(reductions)[-1].is_ready()

        # Rows are made ready while the step before runs; waiting for it then keeps progress honest.
        ready = ((batch, self._rows(batch, drawn)) for batch in batches)
        for batch, rows in clock.over(ready, idle=idle):
            jax.block_until_ready(reductions)
            advance(pending)
            checkpoints.before_step(batch.first, reductions)
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
            shards = reduction.moments.mean_F.addressable_shards
            if not all(np.isfinite(shard.data).all() for shard in shards):
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
            batch.first, batch=self.config.run.batch_size, shards=self.mesh.shape["data"]
        )
        start, size = self._rows_held().start, self.config.run.batch_size

        def on_mesh(x: np.ndarray) -> jax.Array:
            def held(index: Any) -> np.ndarray:
                first, last, _ = index[0].indices(size)
                return x[first - start : last - start]

            return jax.make_array_from_callback((size, *x.shape[1:]), sharding, held)

        def of_shards(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return Rows(
            tokens_BT=on_mesh(batch.tokens_BT),
            counted_BT=on_mesh(counted_BT),
            sequence_B=on_mesh(batch.sequence_B),
            lottery_B=on_mesh(batch.lottery_B),
            turn_B=on_mesh(drawn.turns(batch.sequence_B)),
            drawn_PW=of_shards(drawn_PW),
            slot_PW=of_shards(slot_PW),
        )

    def _rows_held(self) -> slice:
        """Which rows of a batch this process needs, those of its own devices."""
        size = self.config.run.batch_size
        places = NamedSharding(self.mesh, P("data")).addressable_devices_indices_map((size,))
        ends = [index[0].indices(size) for index in places.values() if index is not None]
        return slice(min(first for first, _, _ in ends), max(last for _, last, _ in ends))

    def _padded_neurons(self) -> dict[int, jax.Array]:
        """Indices of layers of which not all neurons are kept, repeated to divide by the mesh."""

        def on_mesh(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(
                x.shape, NamedSharding(self.mesh, P()), lambda index: x[index]
            )

        return {
            layer: on_mesh(padded(indices, self.mesh.shape["model"]))
            for layer, indices in self.selection.indices.items()
            if len(indices) < self.selection.width(layer)
        }

    def _summed(self, layer: int) -> tuple[Int[np.ndarray, "C"], Int[np.ndarray, "N"]]:
        return summed_columns(self.selection, self.tabled, layer, self.mesh.shape["model"])

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
        checkpoints: SplitCheckpoints,
    ) -> None:
        tables = 0
        for place, layer in enumerate(self.selection.layers):
            checkpoints.stop_if_asked()
            reduction = reductions.pop(int(layer))
            columns = self.selection.columns(int(layer))
            kept = slice(len(columns))
            merged, strongest, read, sample_MF, parts, sums = gathered(
                (
                    merge_partials(reduction, self.mesh),
                    {count: merge_top(top, mesh=self.mesh) for count, top in reduction.draws.items()},
                    reduction.read,
                    merge_sample(reduction.sample_MF, mesh=self.mesh),
                    reduction.moments,
                    reduction.token_sums,
                )
            )
            # Tables of all layers are in one file, which one process writes.
            if sums is not None and leads():
                self._write_token_table(sums, int(layer), tables, out)
            tables += len(self.tabled.get(int(layer), ()))
            if place % jax.process_count() != jax.process_index():
                advance(1)
                continue
            statistics = merge_moments(parts)
            tails = {}
            for kind, ranked in merged.items():
                found = _sequences(ranked, kept, sign=-1 if kind == "min" else 1)
                if kind in TAILS:
                    tails[kind] = TAILS[kind](found.score_NR, found.activation_NRT)
                out.write_exemplars(kind, place, columns, **found._asdict())
            if strata:
                stratum_NR, found = choose(
                    strata,
                    {count: _sequences(ranked, kept) for count, ranked in strongest.items()},
                    drawn.turns,
                    wanted=self.config.exemplars.samples_per_quantile,
                    read={
                        count: np.asarray(read_PF).sum(axis=0, dtype=np.int64)[kept]
                        for count, read_PF in read.items()
                    },
                )
                out.write_exemplars("quantile", place, columns, **found._asdict(), stratum_NR=stratum_NR)
            sample_NM = np.ascontiguousarray(np.asarray(sample_MF)[drawn.falling, kept].T)
            if self.config.statistics.quantiles:
                out.write_sample(place, columns, sample_NM)
            out.write_statistics(
                place,
                columns,
                quantile=quantiles_by_count(
                    np.array(self.config.statistics.quantiles),
                    statistics.count_F[kept],
                    sample_NM,
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

    def _write_token_table(self, sums: TokenSums, layer: int, first: int, out: SplitWriter) -> None:
        config = self.config.statistics.tokens
        table = merge_token_sums(sums, self._summed(layer)[1])
        for sign in ("max", "min"):
            token_NR, mean_NR, count_NR = strongest_tokens(
                table, kept=config.count, min_count=config.min_count, lowest=sign == "min"
            )
            out.write_token_table(sign, first, token_NR=token_NR, mean_NR=mean_NR, count_NR=count_NR)


def _sequences(ranked: Ranked, kept: slice, *, sign: int = 1) -> RankedSequences:
    """What the store keeps of ranked sequences: extremes for priorities, NaN where there are none."""
    priority_NR = np.asarray(ranked.priority_FR)[kept]
    return RankedSequences(
        score_NR=np.where(np.isfinite(priority_NR), sign * priority_NR, np.float32(np.nan)),
        sequence_NR=np.asarray(ranked.sequence_FR)[kept],
        activation_NRT=np.asarray(ranked.activation_FRT)[kept],
    )


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
