"""A finetuning run: from a store and its explanations to a simulator in a Hugging Face folder."""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax

import jaxplain
from jaxplain.checkpoints import Checkpoints
from jaxplain.configs.finetuning import FinetuneConfig
from jaxplain.configs.simulation import ReadoutConfig
from jaxplain.errors import JaxplainError
from jaxplain.mesh import make_mesh
from jaxplain.progress import progress_bars
from jaxplain.resuming import require_same
from jaxplain.simulators.finetuned import SIMULATOR_NAME
from jaxplain.simulators.model_card import write_model_card
from jaxplain.simulators.pairs import Dataset, evaluation_batches, make_dataset, training_batches
from jaxplain.simulators.readout import Readout, require_tokenizer_of
from jaxplain.simulators.records import CURVES_NAME, METRICS_NAME, TENSORBOARD_NAME, Metrics, draw_curves
from jaxplain.simulators.training import Evaluation, Trainer, TrainState
from jaxplain.store.explanations import open_explanations
from jaxplain.store.reader import Split, Store, open_store
from jaxplain.subjects.resizing import as_whole_model, grow_vocabulary
from jaxplain.subjects.saving import save_decoder
from jaxplain.subjects.subject import Subject, open_subject
from jaxplain.subjects.tokenizers import remapped_special_tokens, with_added_tokens

_RUN_NAME, _MODEL_NAME, _CHECKPOINTS_NAME = "run.json", "model", "checkpoints"
_NOT_COMPARED = ("output", "mesh", "progress", "store", "explanations")
_NOT_COMPARED_IN_TRAINING = ("accumulate", "remat", "checkpoint_every")


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What a run knows besides the state: the lowest held-out loss, when it was, and how long ago."""

    best_loss: float = float("inf")
    best_step: int = -1
    evaluations_since: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a run ended with.

    Attributes:
        folder: The simulator, as a Hugging Face folder.
        step: The step that it is from, the one with the lowest loss on what is held out.
        evaluation: Of that step, on what is held out.
        dataset: What it was trained and evaluated on.
    """

    folder: Path
    step: int
    evaluation: Evaluation
    dataset: Dataset


def finetune(config: FinetuneConfig, *, overwrite: bool = False) -> Finetuned:
    """Run a finetuning run; one that was interrupted goes on from its newest checkpoint.

    Raises JaxplainError for anything in the config that does not fit the store, the model or what the
    output folder holds already.
    """
    store = open_store(config.store)
    split = store[config.split]
    subject, readout_config = _subject(config, store)
    readout = Readout(readout_config, subject.tokenizer)
    dataset = _dataset(config, store, split, readout, subject)
    output = _output(config, store, overwrite=overwrite)

    mesh = make_mesh(
        config.mesh,
        batch_size=config.training.batch_size // config.training.accumulate,
        mlp_width=subject.arch.neurons,
    )
    if (config.depth or 0) > subject.arch.layers:
        raise JaxplainError(f"depth is {config.depth}, but the model has {subject.arch.layers} layers.")
    decoder = as_whole_model(subject.load(mesh, depth=config.depth, with_head=True))
    names = readout_config.remapped
    ids = {_id(subject, new): _id(subject, old) for old, new in names.items()}
    added = [_id(subject, name) for name in readout_config.added_tokens]
    if added:
        rows = max(subject.arch.vocabulary, max(added) + 1)
        decoder = grow_vocabulary(decoder, rows, like=ids)
    training = config.training
    if training.reset_readout is None:
        is_simulator = (subject.folder / SIMULATOR_NAME).exists()
        training = dataclasses.replace(training, reset_readout=not is_simulator)
    trainer = Trainer(decoder, training, readout.level_ids, mesh)
    del decoder
    kept = output / _CHECKPOINTS_NAME
    with Checkpoints(kept / "newest") as newest, Checkpoints(kept / "best", keep=1) as best:
        state = _train(config, trainer, dataset, newest, best, output)
        found = best.restore(lambda _: {"trained": state.trained, "step": state.step})
        state = state if found is None else state._replace(**found.state)
    evaluation = trainer.evaluate(state, _held_out(config, dataset))
    step = int(state.step)
    folder = output / _MODEL_NAME
    save_decoder(trainer.decoder(state), subject, folder, tokenizer=subject.tokenizer, overwrite=True)
    about = {
        "jaxplain_version": jaxplain.__version__,
        "readout": dataclasses.asdict(readout_config),
        "pairs": dataclasses.asdict(config.pairs),
        "store": {"fingerprint": store.fingerprint, "split": config.split},
        "step": step,
        "held_out": dataclasses.asdict(evaluation),
    }
    (folder / SIMULATOR_NAME).write_text(json.dumps(about, indent=1) + "\n")
    curves = draw_curves(output)
    shutil.copy(curves, folder / curves.name)
    write_model_card(folder, config, store, dataset, evaluation, step=step)
    return Finetuned(folder=folder, step=step, evaluation=evaluation, dataset=dataset)


def _subject(config: FinetuneConfig, store: Store) -> tuple[Subject, ReadoutConfig]:
    """The model to start from, with the tokenizer grown by what the readout asks for."""
    subject = open_subject(config.model, field="model.id")
    require_tokenizer_of(store, subject.tokenizer, what="model.id")
    readout = config.readout
    if readout.special_tokens == "remap":
        remapped = remapped_special_tokens(subject.tokenizer)
        readout = dataclasses.replace(
            readout, special_tokens="keep", remapped=remapped, added_tokens=list(remapped.values())
        )
    if readout.added_tokens:
        subject = dataclasses.replace(
            subject, tokenizer=with_added_tokens(subject.tokenizer, readout.added_tokens)
        )
    return subject, readout


def _dataset(
    config: FinetuneConfig, store: Store, split: Split, readout: Readout, subject: Subject
) -> Dataset:
    path = store.database_path(config.explanations)
    if path is None:
        raise JaxplainError(f"the store {config.store} is not on a local disk; name explanations.")
    with open_explanations(path, fingerprint=store.fingerprint) as database:
        explanations = list(database.each_explanation())
    make = progress_bars(enabled=config.progress)
    with make(total=len(explanations), desc="read pairs", unit="explanations") as bar:
        return make_dataset(
            bar.over(explanations), split, config.pairs, readout, longest_row=subject.arch.max_positions
        )


def _output(config: FinetuneConfig, store: Store, *, overwrite: bool) -> Path:
    """The run's folder, new or with the same run in it."""
    output = Path(config.output)
    run = {"config": _compared(config), "store": store.fingerprint, "split": config.split}
    try:
        output.mkdir(parents=True, exist_ok=True)
        path = output / _RUN_NAME
        if overwrite:
            for name in (_CHECKPOINTS_NAME, TENSORBOARD_NAME, _MODEL_NAME):
                shutil.rmtree(output / name, ignore_errors=True)
            for name in (_RUN_NAME, METRICS_NAME, CURVES_NAME):
                (output / name).unlink(missing_ok=True)
        if path.exists():
            require_same(json.loads(path.read_text()), run, output)
        elif any(output.iterdir()):
            raise JaxplainError(f"output {output} holds something else; name another folder.")
        path.write_text(json.dumps(run, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise JaxplainError(
            f"output is {config.output!r}, which cannot be used: {error.strerror}."
        ) from error
    except json.JSONDecodeError as error:
        raise JaxplainError(f"{output / _RUN_NAME} is damaged; start anew with --overwrite.") from error
    return output


def _compared(config: FinetuneConfig) -> dict[str, Any]:
    """What decides the weights that come out."""
    whole = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_COMPARED}
    whole["training"] = {k: v for k, v in whole["training"].items() if k not in _NOT_COMPARED_IN_TRAINING}
    return json.loads(json.dumps(whole))


def _held_out(config: FinetuneConfig, dataset: Dataset) -> Any:
    training = config.training
    return evaluation_batches(
        dataset.held_out,
        batch_size=training.batch_size // training.accumulate,
        most=training.evaluate_on,
        seed=config.pairs.seed,
    )


def _train(
    config: FinetuneConfig,
    trainer: Trainer,
    dataset: Dataset,
    newest: Checkpoints,
    best: Checkpoints,
    output: Path,
) -> TrainState:
    """Steps until the last one, or until the held-out loss no longer falls."""
    training = config.training
    state, progress = trainer.start(), Progress()
    restored = newest.restore(lambda _: state)
    if restored is not None:
        state, progress = restored.state, Progress(**restored.about)
        for problem in restored.unreadable:
            print(f"{problem}; going on from step {int(state.step)}", file=sys.stderr)
    first = int(state.step)
    batches = training_batches(
        dataset.train, batch_size=training.batch_size, seed=config.pairs.seed, start=first
    )
    make = progress_bars(enabled=config.progress)
    with (
        Metrics(output, start=first) as metrics,
        make(total=training.steps, initial=first, desc="finetune", unit="steps") as bar,
    ):
        if first == 0:
            _evaluate(trainer, state, config, dataset, metrics, best, progress)
        started = time.perf_counter()
        for step in range(first, training.steps):
            if _stale(training.patience, progress):
                break
            state, measured = trainer.step(state, next(batches))
            if (step + 1) % training.log_every == 0:
                values = {name: float(value) for name, value in measured._asdict().items()}
                seconds = (time.perf_counter() - started) / training.log_every
                metrics.add(step + 1, {f"train/{k}": v for k, v in values.items()} | {"seconds": seconds})
                bar.set_postfix_str(f"loss {values['loss']:.3f}, held out {progress.best_loss:.3f}")
                started = time.perf_counter()
            jax.block_until_ready(measured)
            bar.update()
            last = step + 1 == training.steps
            if (step + 1) % training.evaluate_every == 0 or last:
                _evaluate(trainer, state, config, dataset, metrics, best, progress)
            if (step + 1) % training.checkpoint_every == 0 or last:
                newest.save(step + 1, state, dataclasses.asdict(progress))
    return state


def _stale(patience: int, progress: Progress) -> bool:
    return patience > 0 and progress.evaluations_since >= patience


def _evaluate(
    trainer: Trainer,
    state: TrainState,
    config: FinetuneConfig,
    dataset: Dataset,
    metrics: Metrics,
    best: Checkpoints,
    progress: Progress,
) -> None:
    step = int(state.step)
    evaluation = trainer.evaluate(state, _held_out(config, dataset))
    metrics.add(step, {f"held_out/{k}": v for k, v in dataclasses.asdict(evaluation).items()})
    if evaluation.loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.evaluations_since = evaluation.loss, step, 0
        best.save(step, {"trained": state.trained, "step": state.step}, {})
    else:
        progress.evaluations_since += 1


def _id(subject: Subject, name: str) -> int:
    found = subject.tokenizer.convert_tokens_to_ids(name)
    assert isinstance(found, int)
    return found
