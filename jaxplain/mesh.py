"""The devices as a mesh of `data` x `model`."""

import jax
from jax.sharding import AxisType, Mesh

from jaxplain.configs.extraction import MeshConfig
from jaxplain.errors import JaxplainError


def make_mesh(config: MeshConfig, *, batch_size: int, mlp_width: int) -> Mesh:
    """A mesh over all devices. Raises JaxplainError where devices, batch or neurons do not divide."""
    shape = mesh_shape(config, jax.device_count(), batch_size=batch_size, mlp_width=mlp_width)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def mesh_shape(config: MeshConfig, devices: int, *, batch_size: int, mlp_width: int) -> tuple[int, int]:
    """The sizes of both axes over that many devices. Raises JaxplainError where something does not divide."""
    model = config.model
    data = devices // model if config.data == -1 and model >= 1 else config.data
    if data < 1 or model < 1 or data * model != devices:
        raise JaxplainError(
            f"run.mesh is data {config.data} x model {config.model}, which does not make the "
            f"{devices} devices present; choose two factors of {devices}."
        )
    if batch_size % data:
        raise JaxplainError(
            f"run.batch_size is {batch_size}, which the {data} devices of run.mesh.data do not "
            f"divide; choose a multiple of {data}."
        )
    if mlp_width % model:
        raise JaxplainError(
            f"run.mesh.model is {model}, which does not divide the subject's {mlp_width} neurons "
            "per layer; choose a divisor."
        )
    return data, model
