"""A simulator that was trained to predict activations: ours, or another in the form of Choi et al. (2024)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxplain.configs.explanation import LocalModelConfig
from jaxplain.configs.extraction import SubjectConfig
from jaxplain.configs.simulation import ReadoutConfig
from jaxplain.errors import JaxplainError
from jaxplain.mesh import make_mesh
from jaxplain.simulators.level_reader import Asked, LevelReader
from jaxplain.simulators.readout import Readout, expected_levels, require_tokenizer_of
from jaxplain.simulators.simulation import Failure, Job, Simulation
from jaxplain.store.reader import Store
from jaxplain.subjects.subject import open_subject
from jaxplain.subjects.tokenizers import with_added_tokens

SIMULATOR_NAME = "simulator.json"
"""Beside the weights: the readout, and which neurons were held out."""


class FinetunedSimulator:
    """Expected levels and their distribution at every token, from one pass."""

    def __init__(self, model: str, readout: ReadoutConfig, local: LocalModelConfig, store: Store):
        """Load the model.

        A folder that jaxplain made knows its readout, and `readout` is not read.

        Raises JaxplainError where its tokenizer is not that of the store.
        """
        subject = open_subject(
            SubjectConfig(id=model, revision=local.revision, dtype=local.dtype), field="simulator.model"
        )
        about = about_simulator(subject.folder)
        if about is not None:
            readout = ReadoutConfig(**about["readout"])
        tokenizer = subject.tokenizer
        missing = [name for name in readout.added_tokens if name not in tokenizer.get_vocab()]
        if missing:
            tokenizer = with_added_tokens(tokenizer, missing)
        if len(tokenizer) > subject.arch.vocabulary:
            raise JaxplainError(
                f"readout.added_tokens makes {len(tokenizer)} tokens, but {model} has embeddings of "
                f"{subject.arch.vocabulary}; leave out what the model was not finetuned with."
            )
        require_tokenizer_of(store, tokenizer, what="simulator.model")
        mesh = make_mesh(local.mesh, batch_size=local.batch_size, mlp_width=subject.arch.neurons)
        self._readout = Readout(readout, tokenizer)
        self._reader = LevelReader(
            subject.load(mesh, with_head=True), mesh, self._readout.level_ids, batch_size=local.batch_size
        )

    def simulate(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, list[Simulation | Failure]]]:
        """Jobs with their simulations, some batches at a time."""
        readout = self._readout
        asked = (
            Asked(job, readout.prompt(job.explanation), [readout.sequence(s) for s in job.sequences])
            for job in jobs
        )
        for job, probabilities in self._reader.read(asked):
            yield (
                job,
                [Simulation(expected=expected_levels(p_TL), probabilities=p_TL) for p_TL in probabilities],
            )


def about_simulator(folder: Path) -> dict[str, Any] | None:
    """What a finetuning run wrote down about the simulator in a folder; None for one made elsewhere."""
    path = folder / SIMULATOR_NAME
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise JaxplainError(f"{path} is damaged; fetch or finetune the simulator again.") from error
