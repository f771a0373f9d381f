"""Runs to look at, made once."""

import numpy as np
import pytest
from starlette.testclient import TestClient

import jaxplain
from jaxplain.progress import progress_bars
from jaxplain.viewer.app import make_app
from jaxplain.viewer.peaks import build_index, index_folder
from jaxplain.viewer.site import Site
from tests.viewer import runs


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run's folder with an index of tokens."""
    folder = runs.make_run(tmp_path_factory.mktemp("view"))
    store = jaxplain.open_store(folder)
    build_index(store, index_folder(store), progress_bars(enabled=False))
    return folder


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    """The same of a mixture of experts."""
    folder = runs.make_run(tmp_path_factory.mktemp("mixture"), experts=np.array([0, 4]))
    store = jaxplain.open_store(folder)
    build_index(store, index_folder(store), progress_bars(enabled=False))
    return folder


def client_of(folder, **options):
    return TestClient(make_app(Site(jaxplain.open_store(folder), **options)), base_url="http://localhost")


@pytest.fixture(scope="session")
def client(run):
    return client_of(run)


@pytest.fixture(scope="session")
def mixture_client(mixture):
    return client_of(mixture)
