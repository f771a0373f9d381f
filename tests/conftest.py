"""Strict JAX on eight fake devices, with types and shapes of public signatures enforced."""

import contextlib
import signal
import ssl

import jax
import jaxtyping
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("jaxplain", "beartype.beartype")

# Processes that tests interrupt would ignore it, as this one does where a shell started it in the background.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each is mapped into memory in several pieces, of which Linux allows a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def explained(tmp_path_factory):
    """A folder with a tiny model, a store of its neurons and explanations of them; see `tests.workspace`."""
    from tests import workspace

    return workspace.make(tmp_path_factory.mktemp("explained"))


@pytest.fixture(params=["openai", "gemini"])
def provider(request):
    """Each kind of server that a model may be on."""
    return request.param


@pytest.fixture
def remote_environment(monkeypatch, tmp_path):
    """No keys, a cache of the test's own, and short waits."""
    from jaxplain.explainers import gemini_batches, remote
    from tests.explainers.remote_runs import KEYS

    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAXPLAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.002)
    monkeypatch.setattr(gemini_batches, "_FIRST_POLL", 0.01)
    # Certificates, which take longer to read than all else here, serve no purpose over http.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


@pytest.fixture
def opened(remote_environment, tmp_path):
    """Opens a model of a provider on a local server: `opened(provider, server, **explainer)`."""
    from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
    from jaxplain.explainers.models import open_model
    from jaxplain.store.explanations import open_explanations

    with contextlib.ExitStack() as stack:

        def make(provider, server, **explainer):
            database = stack.enter_context(
                open_explanations(tmp_path / "explanations.sqlite", fingerprint="f", subject="s")
            )
            config = ExplainerConfig(
                **{"provider": provider, "model": "m", "base_url": server.url, "retries": 1} | explainer
            )
            model = open_model(
                config, SamplingConfig(), database=database, recipe=database.recipe({}, ""), stack=stack
            )
            assert model is not None
            return model

        yield make
