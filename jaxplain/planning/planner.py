"""A plan: what a run is, what it costs, and how it fits onto devices."""

import dataclasses
from typing import Any

from jaxplain.configs.extraction import ExtractConfig
from jaxplain.errors import JaxplainError
from jaxplain.exemplars.selection import select_neurons
from jaxplain.mesh import mesh_shape, undivided_width
from jaxplain.planning.demand import Demand, demand_of, parameter_shapes, read_architecture
from jaxplain.planning.disk import Disk, checkpoint_size, store_size
from jaxplain.planning.fitting import Choice, Runs, chosen, largest_batch, propose_runs
from jaxplain.planning.flops import flops_per_sequence, parameters, total_flops
from jaxplain.planning.hardware import Target
from jaxplain.planning.topologies import Compiled, TooLargeError, can_compile, compile_for_topology

_BYTES_PER_TOKEN_READ = 4
_BYTES_PER_ROW_READ = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a plan says.

    Attributes:
        parameters: Of the whole model.
        loaded_parameters: Of what the run loads: layers up to the last one asked for, and no head.
        flops_per_sequence: Of products, in all parts of the run together.
        flops: The same of the whole run.
        configured: The config's own mesh and batch; None where they do not suit the devices.
        misfit: Why they do not.
        largest_batch: The most sequences per step that fit on the config's mesh; None where none do.
        proposal: The mesh that fits, with as few runs over parts of the layers as need be; None where none
            does.
        compiled: What libtpu says of a step: of the config's mesh and batch where they fit, else of the
            proposal.
        compiled_layers: The layers that this step keeps.
        not_compiled: Why there is nothing of that.
        too_large: Whether that is so because the compiler needs more memory than there is for any batch.
        hours: None where the devices' speed is not known.
        sequences_per_second: That the devices can read, in the shallowest part; None likewise.
        checkpoint_size: Bytes of a checkpoint, on the mesh that the run would have.
    """

    target: Target
    subject: str
    layers: int
    neurons: int
    tokens: int
    sequences: dict[str, int]
    parameters: int
    loaded_parameters: int
    flops_per_sequence: int
    flops: int
    configured: Choice | None
    misfit: str | None
    largest_batch: int | None
    proposal: Runs | None
    compiled: Compiled | None
    compiled_layers: list[int]
    not_compiled: str | None
    too_large: bool
    utilisation: float
    hours: float | None
    sequences_per_second: float | None
    checkpoint_size: int
    store: Disk

    @property
    def fits(self) -> bool:
        """Whether the config's own mesh and batch fit, by what is known of the compiler's needs too."""
        own, compiled = self.configured, self.compiled
        if own is None or own.memory.total > self.target.memory or self.too_large:
            return False
        return compiled is None or compiled.batch >= own.batch

    @property
    def largest_batch_compiled(self) -> int | None:
        """The most sequences per step on the compiled step's mesh, if temporaries grow in proportion."""
        if self.compiled is None:
            return None
        step = self.compiled
        left = self.target.memory - (step.total - step.temporaries)
        rows = left * step.batch // max(step.temporaries, 1) // step.data
        return max(rows * step.data, step.batch)

    @property
    def bytes_per_sequence(self) -> int:
        """What a host reads of the token table for each sequence."""
        return self.tokens * _BYTES_PER_TOKEN_READ + _BYTES_PER_ROW_READ

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        more = ("fits", "largest_batch_compiled", "bytes_per_sequence")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in more}


def make_plan(config: ExtractConfig, target: Target, *, utilisation: float, compiling: bool = True) -> Plan:
    """Plan a run: `utilisation` is the share of the peak FLOP/s that it is expected to reach.

    With `compiling`, and where libtpu is installed, a step is compiled for a target of TPUs.

    Raises JaxplainError for anything in the config that does not fit the subject.
    """
    if not 0 < utilisation <= 1:
        raise JaxplainError(f"--utilisation is {utilisation}; give a share above 0 and up to 1, such as 0.4.")
    arch = read_architecture(config.subject)
    if config.corpus.sequence_length > arch.max_positions:
        raise JaxplainError(
            f"corpus.sequence_length is {config.corpus.sequence_length}, but {config.subject.id} reads at "
            f"most {arch.max_positions} tokens."
        )
    demand = demand_of(config, select_neurons(config.neurons, arch))
    configured, misfit, largest = _configured(demand, target)
    runs = propose_runs(demand, target)
    parts = [demand] if runs is None else [demand.of_layers(layers) for layers in runs.layers]
    compiled, layers, why_not = None, [], _why_not(target, compiling)
    too_large = False
    if why_not is None:
        try:
            compiled, layers = _compile(demand, target, configured, runs)
        except TooLargeError as error:
            too_large = True
            gib = [amount / 2**30 for amount in (error.used, error.limit)]
            why_not = f"the step does not fit: the compiler counts {gib[0]:.2f} GiB of {gib[1]:.2f} GiB."
    mesh = configured if configured is not None or runs is None else runs.choice
    speed = target.devices * target.peaks.get(config.subject.dtype, 0.0) * utilisation
    per_sequence = [flops_per_sequence(part) for part in parts]
    flops = sum(map(total_flops, parts))
    return Plan(
        target=target,
        subject=config.subject.id,
        layers=len(demand.selection.layers),
        neurons=demand.neurons,
        tokens=demand.tokens,
        sequences=demand.sequences,
        parameters=parameters(parameter_shapes(arch, demand.dtype, with_head=True)),
        loaded_parameters=parameters(demand.weights),
        flops_per_sequence=sum(per_sequence),
        flops=flops,
        configured=configured,
        misfit=misfit,
        largest_batch=largest,
        proposal=runs,
        compiled=compiled,
        compiled_layers=layers,
        not_compiled=why_not,
        too_large=too_large,
        utilisation=utilisation,
        hours=flops / speed / 3600 if speed else None,
        sequences_per_second=speed / min(per_sequence) if speed else None,
        checkpoint_size=checkpoint_size(demand, data=mesh.data if mesh else 1),
        store=store_size(demand),
    )


def _configured(demand: Demand, target: Target) -> tuple[Choice | None, str | None, int | None]:
    run = demand.config.run
    try:
        data, model = mesh_shape(
            run.mesh,
            target.devices,
            batch_size=run.batch_size,
            mlp_width=undivided_width(demand.arch, run.mesh.model),
        )
    except JaxplainError as error:
        return None, str(error), None
    largest = largest_batch(demand, target, data=data, model=model)
    choice = chosen(demand, target, data=data, model=model, batch=run.batch_size)
    return choice, None, largest and largest.batch


def _why_not(target: Target, compiling: bool) -> str | None:
    if target.topology is None:
        return "memory is computed from shapes, and temporaries are estimated: only TPUs are compiled for."
    if not compiling:
        return "memory is computed from shapes, and temporaries are estimated, as --analytic asks."
    if not can_compile():
        return (
            "memory is computed from shapes, and temporaries are estimated: libtpu, whose compiler would say "
            "more, is not installed (pip install 'jaxplain[plan]')."
        )
    return None


def _compile(
    demand: Demand, target: Target, configured: Choice | None, runs: Runs | None
) -> tuple[Compiled, list[int]]:
    """The step of the config where it fits, else of what is hardest in the proposal's runs.

    Batches are halved where the compiler needs more than was estimated. Raises TooLargeError where that does
    not help.
    """
    choice = configured
    if choice is None or choice.memory.total > target.memory:
        choice = runs.choice if runs is not None else choice
        demand = demand.of_layers(runs.hardest) if runs is not None else demand
    if choice is None:
        raise JaxplainError(
            f"no mesh over {target.name} divides the subject's {max(demand.widths)} neurons per layer."
        )
    assert target.topology is not None
    most = choice.batch // choice.data
    for rows in dict.fromkeys((most, most // 2, most // 4, 1)):
        batch = rows * choice.data
        try:
            found = compile_for_topology(
                demand, target.topology, data=choice.data, model=choice.model, batch=batch
            )
        except TooLargeError:
            if rows <= 1:
                raise
        else:
            return found, [int(layer) for layer in demand.selection.layers]
    raise AssertionError("the smallest batch either fits or is too large")
