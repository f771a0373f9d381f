"""Fixtures of the tests of remote models."""

import pytest

from jaxplain.configs.explanation import (
    ChosenNeuronsConfig,
    ExplainConfig,
    ExplainerConfig,
    PromptConfig,
)
from tests.explainers.remote_runs import write_neurons


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return write_neurons(tmp_path_factory.mktemp("store") / "exemplars.zarr", 40)


@pytest.fixture
def config(store, tmp_path, remote_environment):
    """A config for some neurons, to be changed by keywords of the explainer's block and of the whole."""

    def make(provider, server, *, neurons=1, signs=("max",), output="out", **changes):
        whole = {name: changes.pop(name) for name in ("prompt", "sampling", "store") if name in changes}
        explainer = {"model": "m", "base_url": server and server.url, "timeout_seconds": 20.0, "retries": 2}
        return ExplainConfig(
            **{"store": str(store), "prompt": PromptConfig(few_shot="none")} | whole,
            explainer=ExplainerConfig(provider=provider, **explainer | changes),
            neurons=ChosenNeuronsConfig(indices=f"0:{neurons}"),
            signs=list(signs),
            output=str(tmp_path / output),
            progress=False,
        )

    return make
