"""What `python -m jaxplain.finetune` is told."""

import dataclasses
import math
from typing import Literal

from jaxplain.configs.checks import require
from jaxplain.configs.explanation import Sign
from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.configs.simulation import ReadoutConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Which explanations and sequences to learn from.

    Args:
        signs: Explanations of what drives neurons up (max), down (min), or both.
        providers: Explanations by these alone (token_table, local, gemini, openai); all where empty.
        top: The strongest sequences to take per explanation.
        random: Random sequences to take per explanation.
        held_out_neurons: Share of the neurons that are never trained on.
        held_out_documents: Share of the documents that are never trained on.
        longest_prompt: Tokens of the prompt before the sequence, at most; explanations that need more
            are left out, and counted.
        seed: Of the choice of neurons and documents to hold out, and of the order.
    """

    signs: list[Sign] = dataclasses.field(default_factory=lambda: ["max", "min"])
    providers: list[str] = dataclasses.field(default_factory=list)
    top: int = 5
    random: int = 5
    held_out_neurons: float = 0.1
    held_out_documents: float = 0.1
    longest_prompt: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            bool(self.signs) and len(set(self.signs)) == len(self.signs),
            "pairs.signs",
            self.signs,
            "name max, min or both, and none twice",
        )
        for field in ("top", "random"):
            require(getattr(self, field) >= 0, f"pairs.{field}", getattr(self, field), "give 0 or more")
        require(self.top + self.random >= 1, "pairs.top", self.top, "take some top or random sequences")
        for field in ("held_out_neurons", "held_out_documents"):
            value = getattr(self, field)
            require(0 < value < 1, f"pairs.{field}", value, "give a share between 0 and 1")
        require(self.longest_prompt >= 1, "pairs.longest_prompt", self.longest_prompt, "give 1 or more")
        require(self.seed >= 0, "pairs.seed", self.seed, "give a number from 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of every matrix of the layers (Hu et al., 2022).

    Args:
        rank: Of each update.
        alpha: The update is scaled by alpha / rank.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        require(self.rank >= 1, "training.lora.rank", self.rank, "give 1 or more")
        require(self.alpha > 0, "training.lora.alpha", self.alpha, "give a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Args:
        steps: Optimiser steps, at most.
        batch_size: Explanations per optimiser step, each with its `pairs.top` and `pairs.random` sequences.
        accumulate: Pieces that a batch is cut into, one after the other, to save memory.
        learning_rate: At its highest, after `warmup`; it falls to a tenth along a cosine.
        warmup: Steps until then.
        weight_decay: AdamW's (Loshchilov & Hutter, 2019); norms and biases have none.
        clip: The gradient's norm, at most.
        parts: What is trained: everything (full), the last `last_layers` layers, or low-rank updates
            of all layers (lora). The readout's rows of the unembedding are trained in any case.
        reset_readout: Start with the readout's rows at zero, so that they are fitted before anything
            else moves (Kumar et al., 2022). By default so unless the model is a simulator already.
        readout_rate: The learning rate of the readout's rows, as a multiple of `learning_rate`.
        last_layers: For `parts: last_layers`.
        lora: For `parts: lora`.
        compute_dtype: Of the arithmetic; weights and optimiser stay float32.
        remat: Compute the layers' activations again in the backward pass instead of keeping them.
        evaluate_every: Steps between evaluations on what is held out.
        evaluate_on: Explanations held out to evaluate on, drawn once; all where there are no more.
        patience: Evaluations without a lower held-out loss after which to stop; 0 never does.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines in metrics.jsonl.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    parts: Literal["full", "last_layers", "lora"] = "full"
    last_layers: int = 8
    reset_readout: bool | None = None
    readout_rate: float = 10.0
    lora: LoraConfig = LoraConfig()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = True
    evaluate_every: int = 100
    evaluate_on: int = 200
    patience: int = 5
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self) -> None:
        for field in (
            "steps",
            "batch_size",
            "accumulate",
            "last_layers",
            "evaluate_every",
            "evaluate_on",
            "checkpoint_every",
            "log_every",
        ):
            require(getattr(self, field) >= 1, f"training.{field}", getattr(self, field), "give 1 or more")
        for field in ("learning_rate", "readout_rate", "clip"):
            value = getattr(self, field)
            require(math.isfinite(value) and value > 0, f"training.{field}", value, "give a positive number")
        for field in ("warmup", "weight_decay", "patience"):
            require(getattr(self, field) >= 0, f"training.{field}", getattr(self, field), "give 0 or more")
        require(
            self.batch_size % self.accumulate == 0,
            "training.accumulate",
            self.accumulate,
            f"choose a divisor of training.batch_size {self.batch_size}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Train a simulator: a model that predicts a neuron's activations from its explanation.

    Args:
        store: The run's folder, or the store's path or URL.
        model: What to start from: the subject itself, or a model with the same tokenizer.
        output: Folder for the simulator, its checkpoints, metrics and model card.
        depth: Keep the model's first layers alone, that many; all where null. What tells that a token is one
            of which the explanation speaks is plainest halfway up, and a shallow simulator is faster.
        explanations: Folder of explanations.sqlite, or the file, if not beside the store.
        split: Which split's exemplars to learn from.
        pairs: Which explanations and sequences to learn from.
        readout: How the simulator is asked, and where its answer stands.
        training: How to train.
        mesh: The devices.
        progress: Show a progress bar.
    """

    store: str
    model: SubjectConfig
    output: str
    depth: int | None = None
    explanations: str | None = None
    split: str = "train"
    pairs: PairsConfig = PairsConfig()
    readout: ReadoutConfig = ReadoutConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.depth is None or self.depth >= 1, "depth", self.depth, "give 1 or more, or null")
        require(bool(self.output), "output", self.output, "name a folder for the simulator")
        require(
            self.model.dtype == "float32",
            "model.dtype",
            self.model.dtype,
            "weights are trained in float32; training.compute_dtype is that of the arithmetic",
        )
