"""Strict JAX on eight fake devices, with types and shapes of public signatures enforced."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("jaxplain", "beartype.beartype")


@pytest.fixture(scope="session")
def explained(tmp_path_factory):
    """A folder with a tiny model, a store of its neurons and explanations of them; see `tests.workspace`."""
    from tests import workspace

    return workspace.make(tmp_path_factory.mktemp("explained"))
