"""The devices as a mesh of `data` x `model`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxplain.configs.extraction import MeshConfig
from jaxplain.errors import JaxplainError
from jaxplain.subjects.architecture import Architecture


def make_mesh(config: MeshConfig, *, batch_size: int, mlp_width: int) -> Mesh:
    """A mesh over all devices. Raises JaxplainError where devices, batch or neurons do not divide."""
    shape = mesh_shape(config, jax.device_count(), batch_size=batch_size, mlp_width=mlp_width)
    return mesh_over(jax.devices(), *shape)


def mesh_over(devices: Sequence[Any], data: int, model: int) -> Mesh:
    """A mesh of given devices, of which there are `data` x `model`; they need not be attached."""
    grid = device_grid(devices, data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def device_grid(devices: Sequence[Any], data: int, model: int) -> np.ndarray:
    """The devices in the order in which neighbours along `model`, which talk most, are close.

    Slices of TPUs, and hosts of GPUs that a slow network joins, lie along `data`, over which nothing is said.

    Raises JaxplainError where they cannot.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh((data, model), devices, allow_split_physical_axes=True)
    if data % slices:
        raise JaxplainError(
            f"run.mesh.data is {data}, over which the {slices} slices that the devices are of cannot be "
            f"spread; choose a multiple of {slices}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, model), (slices, 1), devices, allow_split_physical_axes=True
    )


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


def undivided_width(arch: Architecture, parts: int) -> int:
    """The neurons of a layer that does not divide into parts, where there is one; else those of any."""
    widths = [sum(arch.expert_widths(layer)) for layer in range(arch.layers)]
    return next((width for width in widths if parts < 1 or width % parts), widths[0])
