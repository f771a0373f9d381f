"""Strict JAX on eight fake devices, with types and shapes of public signatures enforced."""

import jax
import jaxtyping

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("jaxplain", "beartype.beartype")
