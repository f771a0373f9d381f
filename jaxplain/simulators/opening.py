"""From a config to a simulator, and what makes two configs the same simulator."""

import contextlib
import dataclasses
from typing import Any

import jaxplain
from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
from jaxplain.configs.scoring import SimulatorConfig
from jaxplain.simulators.simulation import Simulator
from jaxplain.store.explanations import ExplanationDatabase
from jaxplain.store.reader import Store
from jaxplain.subjects.subject import find_folder, weight_hash

_NOT_IDENTITY = ("concurrency", "timeout_seconds", "retries", "cache", "prices", "budget", "key_variable")


def open_simulator(
    config: SimulatorConfig,
    store: Store,
    *,
    train: str,
    database: ExplanationDatabase,
    stack: contextlib.ExitStack,
) -> Simulator:
    """Load a simulator for a store; `train` is the split that token tables come from.

    What a remote one costs is booked in `database`; `stack` closes what is opened.

    Raises JaxplainError for a missing model, key or client library, and where tokenizers differ.
    """
    match config.kind:
        case "token_table":
            from jaxplain.simulators.token_table import TokenTableSimulator

            return TokenTableSimulator(store[train])
        case "finetuned":
            from jaxplain.simulators.finetuned import FinetunedSimulator

            assert config.model is not None
            return FinetunedSimulator(config.model, config.readout, config.local, store)
        case "prompted":
            from jaxplain.simulators.prompted import PromptedSimulator

            assert config.model is not None
            return PromptedSimulator(config.model, config.prompted, config.local, store.vocabulary)
        case "logprob_free":
            from jaxplain.explainers.models import open_model
            from jaxplain.simulators.logprob_free import LogprobFreeSimulator

            assert config.remote is not None
            recipe = database.recipe(simulator_identity(config), jaxplain.__version__)
            model = open_model(config.remote, config.sampling, database=database, recipe=recipe, stack=stack)
            assert model is not None
            return LogprobFreeSimulator(model, store.vocabulary)


def simulator_identity(config: SimulatorConfig) -> dict[str, Any]:
    """What decides a simulator's predictions; its name does not."""
    whole = dataclasses.asdict(config)
    identity: dict[str, Any] = {"kind": config.kind}
    match config.kind:
        case "finetuned" | "prompted":
            assert config.model is not None
            folder = find_folder(config.model, config.local.revision, field="simulators.model")
            local = {k: v for k, v in whole["local"].items() if k not in ("batch_size", "mesh")}
            identity |= {"model": config.model, "weights": weight_hash(folder), "local": local}
            asked = "readout" if config.kind == "finetuned" else "prompted"
            identity[asked] = whole[asked]
        case "logprob_free":
            assert config.remote is not None
            identity |= remote_identity(config.remote, config.sampling)
    return identity


def remote_identity(config: ExplainerConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """What decides the replies of a model."""
    model = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_IDENTITY}
    model["local"] = {k: v for k, v in model["local"].items() if k not in ("batch_size", "mesh")}
    return {"model": model, "sampling": dataclasses.asdict(sampling)}
