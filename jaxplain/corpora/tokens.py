"""The token table: windows written once, numbered by row, and read by row ever after."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from jaxplain.configs.extraction import CorpusConfig
from jaxplain.corpora.cutting import PADDING
from jaxplain.corpora.hashing import lottery
from jaxplain.corpora.sources import Source
from jaxplain.corpora.windows import windows_of_split
from jaxplain.corpora.workers import Work
from jaxplain.errors import JaxplainError
from jaxplain.progress import Progress
from jaxplain.store.writer import SequenceBlock, StoreWriter, blocks_of

_ROWS_PER_WRITE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTable:
    """What was written: how many rows. Which sources ran out, and how many repeated windows were left out.

    `seconds` is how long it took.
    """

    rows: int
    exhausted: tuple[str, ...]
    repeated: int
    seconds: float


def write_token_table(
    writer: StoreWriter,
    sources: Sequence[Source],
    config: CorpusConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    *,
    vocabulary: int,
    work: Work | None = None,
) -> TokenTable:
    """Cut the split's windows, by `work` as `windows_of_split` has it, and write them.

    Raises JaxplainError where the sources give not a single window, or the tokenizer a token id that
    is not below `vocabulary`, the number of tokens that the subject has embeddings of.
    """
    started = time.perf_counter()
    windows = windows_of_split(sources, config, split, tokenizer, work)
    total = config.max_sequences or config.expected_sequences
    with progress(total=total, desc=f"{split}: cut", unit="sequences") as bar:

        def checked() -> Iterator[SequenceBlock]:
            for block in windows:
                if (largest := int(block.token_NT.max())) >= vocabulary:
                    raise JaxplainError(
                        f"the tokenizer gives token {largest}, but the subject has embeddings of "
                        f"{vocabulary} tokens only; its folder mixes files of different models."
                    )
                bar.update(len(block))
                yield block

        blocks = blocks_of(checked(), _ROWS_PER_WRITE)
        rows = writer.write_sequences(split, blocks, tokens=config.sequence_length)
    if rows == 0:
        raise JaxplainError(
            f"the corpus is empty: no source gave a sequence for split {split!r}; "
            "check the text columns, or give the split a larger share in corpus.splits."
        )
    return TokenTable(
        rows=rows,
        exhausted=tuple(sources[number].name for number in sorted(windows.exhausted)),
        repeated=windows.repeated,
        seconds=time.perf_counter() - started,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Consecutive rows of a token table, padded to the batch size with rows of -1, or a part of such a batch.

    `rows` counts the rows of the whole batch that are no padding, `first` is the number of its first row.
    `before_B` counts the tokens before each row's text (BOS, or the chat prefix); `sequence_B` are the row
    numbers, and `lottery_B` each row's number in the draw for random exemplars.
    """

    tokens_BT: Int[np.ndarray, "B T"]
    before_B: Int[np.ndarray, "B"]
    sequence_B: Int[np.ndarray, "B"]
    lottery_B: Float[np.ndarray, "B"]
    rows: int
    first: int


def token_batches(
    table: dict[str, ts.TensorStore],
    *,
    batch_size: int,
    seed: int,
    first: int = 0,
    part: slice | None = None,
) -> Iterator[TokenBatch]:
    """All rows in order, from number `first` on, read ahead by Grain; of each batch a `part`, if given."""
    rows = table["token"].shape[0]
    skipped, size, _ = slice(None).indices(batch_size) if part is None else part.indices(batch_size)
    size -= skipped

    def read(batch: int) -> TokenBatch:
        start = min(batch + skipped, rows)
        stop = min(start + size, rows)
        padding = [(0, size - (stop - start))]
        read_rows = [table[name][start:stop].read() for name in ("token", "document", "start", "length")]
        tokens_NT, document_N, start_N, length_N = (np.asarray(future.result()) for future in read_rows)
        return TokenBatch(
            tokens_BT=np.pad(tokens_NT, [*padding, (0, 0)], constant_values=PADDING),
            before_B=np.pad((tokens_NT != PADDING).sum(1) - length_N, padding).astype(np.int32),
            # Padding rows take the numbers that follow; they have no token that counts.
            sequence_B=np.arange(batch + skipped, batch + skipped + size, dtype=np.int32),
            lottery_B=np.pad(lottery(seed, document_N, start_N), padding),
            rows=min(batch + batch_size, rows) - batch,
            first=batch,
        )

    batches = grain.MapDataset.range(first, rows, batch_size).map(read)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
