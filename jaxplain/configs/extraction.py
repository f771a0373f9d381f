"""What `python -m jaxplain.extract` is told, and the blocks that other commands share with it."""

import dataclasses
import math
import re
from typing import Literal

from jaxplain.configs.checks import require

ExemplarKind = Literal["max", "min", "random", "quantile"]

# Stores leave these fields out of the config that they record while they have their defaults, so that a
# config from before there were such fields still makes the same store, and explanations still know it.
_LATER = {"recorded": "unless default"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """The model whose neurons are looked at.

    Args:
        id: A packaged subject (smollm2-135m-instruct), a Hugging Face hub id, a local folder, or a local
            .gguf file.
        revision: Branch, tag or commit of a hub id.
        tokenizer: The folder or hub id of the tokenizer, where it is not to be the model's own; for a .gguf
            file whose tokenizer is of a kind that is not read.
        dtype: Of weights and arithmetic; norms, softmax and rotary angles are float32 in any case.
    """

    id: str
    revision: str | None = None
    tokenizer: str | None = dataclasses.field(default=None, metadata=_LATER)
    dtype: Literal["float32", "bfloat16"] = "float32"


_PRESET_FIELDS = ("config", "data_files", "text_column", "chat_column")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text. Give either a preset, or a dataset.

    Args:
        preset: A named source: wikipedia-leads, chitchat, fineweb, lmsys-chat-1m, ultrachat, openwebtext or
            valueeval. Their files in jaxplain/corpora/presets say what each one is.
        dataset: A Hugging Face dataset's name, a local folder in the form of one, or json, csv, parquet or
            text for local data_files. In a text file every line is a document.
        config: The dataset's configuration name, where it has several.
        revision: Branch, tag or commit of the dataset.
        split: Which part of the dataset to read; a preset's own part where this is train. Slices count
            records, train[1000:2000], or percent, train[10%:20%], and are joined by +. A percent slice of a
            stream needs a dataset that states how many records it has.
        streaming: Read the records as they arrive instead of downloading the dataset first. By default
            false, or what the preset says. Every split of the corpus reads the stream from its start.
        shuffle_buffer: A stream's documents are shuffled among this many records at a time (otherwise all
            documents are); 0 leaves them in order.
        data_files: Local files (globs allowed) for json, csv, parquet and text, each of which may be
            compressed (.gz, .zst, .bz2, .xz). TSV is csv with a tab.
        delimiter: What separates the fields of a csv file.
        text_column: The column with plain text; `text` where neither column is given.
        chat_column: The column with a list of {role, content}, laid out by the subject's chat template.
        weight: Share of the sequences, relative to the other sources' weights, and honoured to a hundredth of
            the smallest of them.
    """

    preset: str | None = None
    dataset: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    streaming: bool | None = dataclasses.field(default=None, metadata=_LATER)
    shuffle_buffer: int = dataclasses.field(default=10_000, metadata=_LATER)
    data_files: str | list[str] | None = None
    delimiter: str = ","
    text_column: str | None = None
    chat_column: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(
            (self.preset is None) != (self.dataset is None),
            "corpus.sources",
            self.preset or self.dataset,
            "every source needs either a preset or a dataset, and not both",
        )
        require(
            math.isfinite(self.weight) and self.weight > 0,
            "corpus.sources.weight",
            self.weight,
            "give a positive number",
        )
        require(
            self.shuffle_buffer >= 0,
            "corpus.sources.shuffle_buffer",
            self.shuffle_buffer,
            "give 0 for no shuffling, or a positive number",
        )
        taken = [name for name in _PRESET_FIELDS if getattr(self, name) is not None]
        require(
            self.preset is None or not taken,
            "corpus.sources.preset",
            self.preset,
            f"it sets {', '.join(taken)} itself, so leave that out",
        )
        require(
            self.text_column is None or self.chat_column is None,
            "corpus.sources.chat_column",
            self.chat_column,
            "give a text_column or a chat_column, not both",
        )

    @property
    def name(self) -> str:
        """What provenance calls this source."""
        if self.preset:
            return self.preset
        if self.data_files:
            return self.data_files if isinstance(self.data_files, str) else self.data_files[0]
        return f"{self.dataset}/{self.config}" if self.config else str(self.dataset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExcludeConfig:
    """Tokens that are read by the model but never count for a neuron.

    Args:
        special: Exclude the tokenizer's special tokens.
        first: Exclude this many tokens at the start of every sequence (attention sinks live there).
        tokens: Exclude these token ids.
    """

    special: bool = True
    first: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What the subject reads.

    Args:
        sources: The sources, mixed by weight at every point of the way.
        when_exhausted: When a source runs out, stop, so that the weights hold to the end; or continue with
            the other sources in the ratio of their weights, until all have run out.
        sequence_length: Tokens per sequence, a BOS token included where the subject expects one.
        windows: packed joins documents end to end and cuts them into sequences; head takes the first tokens
            of every document; random takes one piece of every document, drawn by seed and document, the same
            in any run. The rest of a sequence is padding.
        stride: Tokens from the start of one packed sequence to the start of the next; by default no overlap.
        separator: Put the tokenizer's EOS token after every document of packed sequences.
        chat_prefix: Begin sequences of plain text with what the subject's chat template puts before a user's
            first message. Then no token before a sequence's text counts.
        deduplicate: Leave out a sequence whose tokens are exactly those of an earlier one of the split, so
            that it counts once for exemplars and statistics. Takes about 100 bytes of memory per sequence.
        max_sequences: Sequences per split; 0 means all, until the sources run out as when_exhausted says.
        expected_sequences: How many sequences a split is expected to have where max_sequences is 0, for the
            estimate of the time that is left; nothing else depends on it.
        valueeval_dir: The folder with the files of the preset valueeval.
        splits: Share of the documents in each split; a document is in one split only, by its hash.
        exclude: Tokens that never count.
        seed: Of the order of documents and of the draw for random exemplars.
    """

    sources: tuple[SourceConfig, ...]
    when_exhausted: Literal["stop", "continue"] = dataclasses.field(default="stop", metadata=_LATER)
    sequence_length: int = 96
    windows: Literal["packed", "head", "random"] = dataclasses.field(default="packed", metadata=_LATER)
    stride: int | None = None
    separator: bool = True
    chat_prefix: bool = dataclasses.field(default=False, metadata=_LATER)
    deduplicate: bool = dataclasses.field(default=False, metadata=_LATER)
    max_sequences: int = 1000
    expected_sequences: int | None = dataclasses.field(default=None, metadata=_LATER)
    valueeval_dir: str | None = dataclasses.field(default=None, metadata=_LATER)
    splits: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"train": 0.5, "valid": 0.25, "test": 0.25}
    )
    exclude: ExcludeConfig = ExcludeConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.sources), "corpus.sources", self.sources, "give at least one source")
        require(
            self.sequence_length >= 2,
            "corpus.sequence_length",
            self.sequence_length,
            "give 2 or more tokens",
        )
        require(
            self.stride is None or 1 <= self.stride <= self.sequence_length,
            "corpus.stride",
            self.stride,
            f"give 1 to {self.sequence_length} tokens",
        )
        require(
            self.stride is None or self.windows == "packed",
            "corpus.stride",
            self.stride,
            f"{self.windows} windows are one per document, so leave it out, or set corpus.windows to packed",
        )
        require(
            self.expected_sequences is None or self.expected_sequences >= 1,
            "corpus.expected_sequences",
            self.expected_sequences,
            "give a positive number, or leave it out",
        )
        require(
            self.expected_sequences is None or self.max_sequences == 0,
            "corpus.expected_sequences",
            self.expected_sequences,
            f"corpus.max_sequences {self.max_sequences} is expected already, so leave one of them out",
        )
        require(
            self.valueeval_dir is None or any(source.preset == "valueeval" for source in self.sources),
            "corpus.valueeval_dir",
            self.valueeval_dir,
            "no source has the preset valueeval, so leave it out",
        )
        require(
            self.max_sequences >= 0,
            "corpus.max_sequences",
            self.max_sequences,
            "give 0 for no limit, or a positive number",
        )
        require(0 <= self.seed < 2**32, "corpus.seed", self.seed, "give a number from 0")
        for name in self.splits:
            require(
                re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None and name != "vocabulary",
                "corpus.splits",
                name,
                "name splits with letters, digits, - and _ (vocabulary is taken)",
            )
        require(
            0 <= self.exclude.first < self.sequence_length,
            "corpus.exclude.first",
            self.exclude.first,
            f"give 0 to {self.sequence_length - 1} tokens",
        )
        shares = self.splits.values()
        require(
            bool(shares) and min(shares) > 0 and sum(shares) <= 1 + 1e-9,
            "corpus.splits",
            self.splits,
            "shares must be positive and sum to at most 1",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronsConfig:
    """Which neurons to keep exemplars of.

    Args:
        layers: A list of layers by number from 0; all; or a range start:stop:step such as 0:30:3.
        indices: Neurons of each layer, or of each of the experts, given in the same ways.
        experts: Of a mixture of experts, the experts of each layer, given in the same ways; where indices are
            given, experts must be. Layers and experts that lack one of the numbers are passed over.
        file: A .npy of (layer, neuron) pairs, integers [N, 2], in place of the others; for a mixture of
            experts of (layer, expert, neuron), [N, 3].
    """

    layers: list[int] | str = "all"
    indices: list[int] | str = "all"
    experts: list[int] | str | None = dataclasses.field(default=None, metadata=_LATER)
    file: str | None = None

    def __post_init__(self) -> None:
        require(
            self.file is None or (self.layers == "all" and self.indices == "all" and self.experts is None),
            "neurons.file",
            self.file,
            "it takes the place of neurons.layers, neurons.experts and neurons.indices, so leave those out",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExemplarsConfig:
    """What to keep for every neuron.

    Args:
        splits: Which of the corpus's splits to read.
        kinds: max keeps the sequences with the highest activations, min those with the lowest, random a
            fair sample, and quantile a fair sample of each part of the distribution of their maxima.
        k: Sequences per neuron, split and kind; kind quantile has its own number.
        activation_dtype: Of the stored per-token activations; scores are float32 in any case.
        samples_per_quantile: Sequences per neuron, split and stratum, for kind quantile.
        strata: Levels between 0 and 1, ascending, that part the strata of kind quantile. The first stratum
            has sequences whose maximum is below the first level of all maxima, the last those above the last.
    """

    splits: list[str] = dataclasses.field(default_factory=lambda: ["train", "valid"])
    kinds: list[ExemplarKind] = dataclasses.field(default_factory=lambda: ["max", "min", "random"])
    k: int = 100
    activation_dtype: Literal["float16", "float32"] = "float16"
    samples_per_quantile: int = dataclasses.field(default=5, metadata=_LATER)
    strata: tuple[float, ...] = dataclasses.field(default=(0.25, 0.5, 0.75, 0.9, 0.99), metadata=_LATER)

    def __post_init__(self) -> None:
        for field in ("splits", "kinds"):
            values = getattr(self, field)
            unique = bool(values) and len(set(values)) == len(values)
            require(unique, f"exemplars.{field}", values, "name at least one, and none twice")
        require(self.k >= 1, "exemplars.k", self.k, "give a positive number of sequences")
        require(
            self.samples_per_quantile >= 1,
            "exemplars.samples_per_quantile",
            self.samples_per_quantile,
            "give a positive number of sequences",
        )
        levels = list(self.strata)
        require(
            all(0 < level < 1 for level in levels) and sorted(set(levels)) == levels,
            "exemplars.strata",
            levels,
            "give numbers between 0 and 1 that ascend",
        )


QUANTILES = (
    *(1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5),
    *(0.75, 0.9, 0.95, 0.99, 1 - 1e-3, 1 - 1e-4, 1 - 1e-5, 1 - 1e-6, 1 - 1e-7),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTableConfig:
    """Mean activation of every vocabulary token over all tokens that count, for chosen neurons.

    Args:
        neurons: The neurons, as a list of [layer, neuron], or [layer, expert, neuron] for a mixture of
            experts; or how many to draw from those extracted. Each takes 8 bytes of memory per vocabulary
            token (12 in a layer of experts), for every share of the sequences (run.mesh.data).
        count: Vocabulary tokens to keep per neuron, with the highest means and again with the lowest.
        min_count: Leave out vocabulary tokens that count less often than this.
    """

    neurons: int | list[list[int]] = 0
    count: int = 50
    min_count: int = 5

    def __post_init__(self) -> None:
        chosen = self.neurons
        require(
            all(len(name) in (2, 3) for name in chosen) and bool(chosen)
            if isinstance(chosen, list)
            else chosen >= 0,
            "statistics.tokens.neurons",
            chosen,
            "give pairs such as [[10, 42]] (or [[10, 3, 42]], with an expert), or a number of neurons",
        )
        for name in ("count", "min_count"):
            value = getattr(self, name)
            require(value >= 1, f"statistics.tokens.{name}", value, "give 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """What to know of every neuron besides its exemplars, over all tokens that count.

    Args:
        active_above: A neuron is active at a token where its activation is above this.
        quantiles: Levels from 0 to 1, ascending. Those in the tails are exact where kinds max and min are
            kept.
        sampled_tokens: Tokens drawn at random for quantiles between the tails; with 2,048 their rank is off
            by more than 3% of all tokens once in twenty times, with four times as many by half of that. (A
            rate, such as one token in a thousand, would let memory grow with the corpus, and the error depend
            on the corpus; the rate is this number over stats.count.) In a mixture of experts this is how many
            of the drawn tokens a routed expert reads on average: as many times more are drawn, and take
            memory for every neuron, as there are experts for one that reads a token.
        tokens: Which neurons get a table of mean activations by vocabulary token.
    """

    active_above: float = 0.0
    quantiles: list[float] = dataclasses.field(default_factory=lambda: list(QUANTILES))
    sampled_tokens: int = 2048
    tokens: TokenTableConfig = dataclasses.field(default=TokenTableConfig(), metadata=_LATER)

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.active_above), "statistics.active_above", self.active_above, "give a number"
        )
        levels = self.quantiles
        require(
            all(0 <= level <= 1 for level in levels) and sorted(set(levels)) == list(levels),
            "statistics.quantiles",
            levels,
            "give numbers from 0 to 1 that ascend",
        )
        require(self.sampled_tokens >= 1, "statistics.sampled_tokens", self.sampled_tokens, "give 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are arranged.

    Args:
        data: Devices over which sequences are spread; -1 means all that `model` leaves.
        model: Devices over which neurons and weights are spread.
    """

    data: int = -1
    model: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How to run.

    Args:
        batch_size: Sequences per step, over all devices.
        mesh: How devices are arranged.
        shard_weights: Spread the weights over `mesh.data` too, and gather each layer's when it is used. For
            models that `mesh.model` alone does not make small enough; it costs communication in every step.
        checkpoint_minutes: Save what is found so far after so many minutes, to go on from after an
            interruption; 0 is never.
        checkpoint_steps: Save it after so many steps; 0 leaves it to the minutes. SIGTERM saves it anyway.
        checkpoint_folder: Where to, a folder that all processes share; by default beside the store where
            that is on a local disk, and otherwise nowhere.
        check_memory: Refuse to start where the plan, which is in part an estimate, exceeds the memory.
        input_workers: Processes that tokenise the corpus and cut it into sequences, which are the same for
            any number of them; 0 does it in the run's own process. Each process of a run of several has so
            many. By default one per core, 8 at most, for 20,000 sequences or more (or documents, where all
            are read; or a stream of them), otherwise 0.
        progress: Show progress bars.
    """

    batch_size: int = 32
    mesh: MeshConfig = MeshConfig()
    shard_weights: bool = dataclasses.field(default=False, metadata=_LATER)
    checkpoint_minutes: float = dataclasses.field(default=15.0, metadata=_LATER)
    checkpoint_steps: int = dataclasses.field(default=0, metadata=_LATER)
    checkpoint_folder: str | None = dataclasses.field(default=None, metadata=_LATER)
    check_memory: bool = dataclasses.field(default=True, metadata=_LATER)
    input_workers: int | None = dataclasses.field(default=None, metadata=_LATER)
    progress: bool = True

    def __post_init__(self) -> None:
        require(
            self.batch_size >= 1,
            "run.batch_size",
            self.batch_size,
            "give a positive number of sequences",
        )
        for field in ("checkpoint_minutes", "checkpoint_steps"):
            value = getattr(self, field)
            require(math.isfinite(value) and value >= 0, f"run.{field}", value, "give 0 or more")
        require(
            self.checkpoint_folder is None or bool(self.checkpoint_folder.strip()),
            "run.checkpoint_folder",
            self.checkpoint_folder,
            "name a folder, or leave it out",
        )
        require(
            self.input_workers is None or self.input_workers >= 0,
            "run.input_workers",
            self.input_workers,
            "give 0 for none, a positive number, or leave it out",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Find the exemplars of every neuron: one pass over a corpus, into a Zarr store.

    Args:
        subject: The model whose neurons are looked at.
        corpus: What the subject reads.
        output: The run's folder; the store becomes exemplars.zarr in it.
        neurons: Which neurons to keep exemplars of.
        exemplars: What to keep for every neuron.
        statistics: What to know of every neuron besides.
        run: How to run.
    """

    subject: SubjectConfig
    corpus: CorpusConfig
    output: str
    neurons: NeuronsConfig = NeuronsConfig()
    exemplars: ExemplarsConfig = ExemplarsConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        require(bool(self.output.strip()), "output", self.output, "name a folder")
        for split in self.exemplars.splits:
            require(
                split in self.corpus.splits,
                "exemplars.splits",
                split,
                f"corpus.splits has {', '.join(self.corpus.splits)}",
            )

    @property
    def saves_in(self) -> str | None:
        """The folder under which checkpoints are saved; None where none are."""
        return self.run.checkpoint_folder or (None if "://" in self.output else self.output)


def recorded(config: object) -> dict[str, object]:
    """A config as stores record it: a mapping of all its fields, but for later ones at their defaults."""
    values = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.metadata != _LATER or value != field.default:
            values[field.name] = _recorded_value(value)
    return values


def _recorded_value(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return recorded(value)
    return tuple(map(_recorded_value, value)) if isinstance(value, tuple) else value
