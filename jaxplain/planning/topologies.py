"""The real extraction step, compiled for TPUs that are not there.

libtpu holds the compiler, and needs no TPU to run it. Nothing is allocated: weights and state are shapes.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxplain.errors import JaxplainError, first_line
from jaxplain.exemplars.reduction import Rows, partition_specs
from jaxplain.exemplars.step import make_step
from jaxplain.mesh import mesh_over
from jaxplain.planning.collectives import collectives
from jaxplain.planning.demand import Demand
from jaxplain.planning.memory import weight_bytes
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.loading import partition, spread_over_data

_USED = re.compile(  # as several versions of the compiler put it
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"
    r"|HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of one step on one device.

    Attributes:
        arguments: Bytes of weights, state and batch, as they lie in memory.
        unread: Bytes of weights that are loaded besides, which this step does not read.
        temporaries: Bytes that the step needs besides.
        outputs: Bytes of results that do not take an argument's place.
        program: Bytes of the program itself.
        flops: Of one step, where a loop's body counts once.
        collectives: How many of each kind there are, over axis `model` alone and over `data`.
        seconds: What compiling took.
        compiler: Its name and version.
    """

    data: int
    model: int
    batch: int
    arguments: int
    unread: int
    temporaries: int
    outputs: int
    program: int
    flops: float
    collectives: dict[str, dict[str, int]]
    seconds: float
    compiler: str

    @property
    def total(self) -> int:
        """Bytes of memory while a step runs."""
        return self.arguments + self.unread + self.temporaries + self.outputs + self.program


class TooLargeError(Exception):
    """The compiler found no way to fit the step into the memory; `used` and `limit` are bytes."""

    def __init__(self, used: int, limit: int):
        super().__init__(f"{used} of {limit} bytes")
        self.used, self.limit = used, limit


def can_compile() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_for_topology(demand: Demand, topology: str, *, data: int, model: int, batch: int) -> Compiled:
    """Compile a step for a mesh of `data` x `model` TPUs.

    Raises TooLargeError where it does not fit, and JaxplainError for a topology that libtpu does not know.
    """
    mesh = _mesh(topology, data, model)
    started = time.monotonic()
    lowered = lower_step(demand, mesh, batch=batch)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (used := _USED.search(str(error))) is None:
            raise
        size, unit, limit, unit_of_limit = (found for found in used.groups() if found)
        amounts = int(float(size) * _UNITS[unit]), int(float(limit) * _UNITS[unit_of_limit])
        raise TooLargeError(*amounts) from error
    seconds = time.monotonic() - started
    try:
        text = program.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        version = importlib.metadata.version("libtpu")
        raise JaxplainError(
            f"jax {jax.__version__} cannot read the programs of libtpu {version}; install the libtpu that "
            "belongs to it (pip install 'jaxplain[plan]'), or plan with --analytic."
        ) from error
    loaded = weight_bytes(demand, data=data, model=model, tiled=True)
    analysis: Any = program.memory_analysis()
    costs: Any = program.cost_analysis()
    return Compiled(
        data=data,
        model=model,
        batch=batch,
        arguments=analysis.argument_size_in_bytes,
        unread=loaded - weight_bytes(demand, data=data, model=model, tiled=True, unread=False),
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        program=analysis.generated_code_size_in_bytes,
        flops=costs["flops"],
        collectives=collectives(text, mesh),
        seconds=seconds,
        compiler=f"libtpu {importlib.metadata.version('libtpu')}",
    )


def lower_step(demand: Demand, mesh: Mesh, *, batch: int) -> jax.stages.Lowered:
    """The step that a run takes, for shapes in place of values; the mesh may be of devices not there."""

    def on_mesh(shape: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    def rows(dtype: str, *tail: int) -> jax.ShapeDtypeStruct:
        return on_mesh(jax.ShapeDtypeStruct((batch, *tail), np.dtype(dtype)), P("data"))

    subject = nnx.eval_shape(
        lambda: Decoder(demand.arch, rngs=nnx.Rngs(0), dtype=demand.dtype, depth=demand.selection.depth)
    )
    over_data = demand.config.run.shard_weights
    step, weights = make_step(
        subject, mesh, active_above=demand.config.statistics.active_above, gather=over_data
    )
    for path, variable in nnx.to_flat_state(weights):
        value = variable.get_value()
        spec = partition(str(path[-1]), value.shape, mesh)
        variable.set_value(on_mesh(value, spread_over_data(spec, value.shape, mesh) if over_data else spec))
    parts = mesh.shape["data"]
    state = demand.state(parts=parts, model=mesh.shape["model"])
    drawn = on_mesh(
        jax.ShapeDtypeStruct((parts, batch // parts * demand.tokens), np.dtype("int32")), P("data")
    )
    reductions = {
        layer: jax.tree.map(on_mesh, reduction, partition_specs(reduction))
        for layer, reduction in state.items()
    }
    shapes_of_rows: Any = Rows  # shapes in place of its arrays
    batch_of_rows = shapes_of_rows(
        tokens_BT=rows("int32", demand.tokens),
        counted_BT=rows("bool", demand.tokens),
        sequence_B=rows("int32"),
        lottery_B=rows("float32"),
        turn_B=rows("int32"),
        drawn_PW=drawn,
        slot_PW=drawn,
    )
    chosen = {
        layer: on_mesh(
            jax.ShapeDtypeStruct((demand.padded_neurons(layer, mesh.shape["model"]),), np.dtype("int32")), P()
        )
        for layer, indices in demand.selection.indices.items()
        if len(indices) < demand.selection.width(layer)
    }
    step_of_shapes: Any = step
    return step_of_shapes.lower(reductions, weights, batch_of_rows, chosen)


def _mesh(topology: str, data: int, model: int) -> Mesh:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or libtpu asks a server that only Google's clouds have
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # or one process at a time may compile
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ValueError) as error:
        raise JaxplainError(
            f"--topology is {topology!r}, for which libtpu does not compile: {first_line(error)}."
        ) from error
    return mesh_over(devices, data, model)
