"""How devices become a mesh."""

import types

import jax
import numpy as np
import pytest

from jaxplain.errors import JaxplainError
from jaxplain.mesh import device_grid, mesh_over


def devices(slices, per_slice):
    """GPUs of several hosts, in no order."""
    made = [
        types.SimpleNamespace(
            slice_index=s, id=10 * s + i, platform="gpu", device_kind="GPU", process_index=s
        )
        for i in range(per_slice)
        for s in range(slices)
    ]
    return made[::-1]


def ids(grid):
    return np.vectorize(lambda device: device.id)(grid).tolist()


def test_slices_lie_along_data():
    assert ids(device_grid(devices(2, 4), 4, 2)) == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert ids(device_grid(devices(2, 4), 8, 1)) == [[0], [1], [2], [3], [10], [11], [12], [13]]


def test_one_slice_is_in_order():
    assert ids(device_grid(devices(1, 4), 2, 2)) == [[0, 1], [2, 3]]


def test_slices_that_do_not_divide_data_are_refused():
    with pytest.raises(JaxplainError) as error:
        device_grid(devices(2, 4), 1, 8)
    assert str(error.value) == (
        "run.mesh.data is 1, over which the 2 slices that the devices are of cannot be spread; choose a "
        "multiple of 2."
    )


def test_the_mesh_of_attached_devices():
    mesh = mesh_over(jax.devices(), 2, 4)
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    assert mesh.devices.ravel().tolist() == jax.devices()
