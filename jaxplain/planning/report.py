"""A plan as people read it."""

from collections.abc import Iterator

from jaxplain.planning.fitting import Choice
from jaxplain.planning.hardware import GIB
from jaxplain.planning.planner import Plan


def report(plan: Plan) -> str:
    """All of a plan, a line for each thing."""
    return "\n".join(f"{name:<12} {text}" for name, text in _lines(plan))


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    target, sequences = plan.target, sum(plan.sequences.values())
    yield (
        "subject",
        f"{plan.subject}: {_count(plan.parameters)} parameters, of which {_count(plan.loaded_parameters)} "
        f"are loaded; {plan.neurons:,} neurons of {plan.layers} layers are kept",
    )
    yield (
        "corpus",
        f"{sequences:,} sequences of {plan.tokens} tokens, in {', '.join(plan.sequences)}",
    )
    yield "work", f"{_flops(plan.flops_per_sequence)} per sequence, {_flops(plan.flops)} in all"
    yield "time", _time(plan)
    if plan.sequences_per_second is not None:
        rate = plan.sequences_per_second / target.hosts
        hosts = "the host" if target.hosts == 1 else f"each of {target.hosts} hosts"
        yield (
            "input",
            f"{hosts} reads up to {rate:,.0f} sequences/s ({rate * plan.tokens:,.0f} tokens/s, "
            f"{rate * plan.bytes_per_sequence / 1e6:,.1f} MB/s)",
        )
    yield (
        "disk",
        f"store {_disk(plan.store.total)} before compression (exemplars {_disk(plan.store.exemplars)}, token "
        f"tables {_disk(plan.store.sequences)}); a checkpoint {_disk(plan.checkpoint_size)}",
    )
    yield "devices", f"{target.name}, {_memory(target.memory)} each for programs"
    yield "configured", plan.misfit or _configured(plan)
    yield "proposed", _proposed(plan)
    yield from _compiled(plan)


def _configured(plan: Plan) -> str:
    assert plan.configured is not None
    text = f"{_mesh(plan.configured)}: {_memory_of(plan.configured)}, which "
    if plan.fits:
        return f"{text}fits; the largest batch that does is {plan.largest_batch}"
    if plan.configured.memory.total <= plan.target.memory:
        return f"{text}fits by this estimate, but not by the compiler's count below"
    if plan.largest_batch is None:
        return f"{text}does not fit, nor does any batch on this mesh"
    return f"{text}does not fit; the largest batch that does is {plan.largest_batch}"


def _proposed(plan: Plan) -> str:
    if plan.proposal is None:
        return "nothing fits, not even a layer by itself; lower exemplars.k, or use more devices"
    choice = plan.proposal.choice
    text = f"{_mesh(choice)}: {_memory_of(choice)}"
    runs = plan.proposal.layers
    if len(runs) == 1:
        return text
    parts = ", ".join(f"{layers[0]}-{layers[-1]}" for layers in runs)
    return f"{len(runs)} runs over layers {parts}, since no mesh holds all; each with {text}"


def _compiled(plan: Plan) -> Iterator[tuple[str, str]]:
    step = plan.compiled
    if step is None:
        yield "compiled", str(plan.not_compiled)
        return
    layers = plan.compiled_layers
    yield (
        "compiled",
        f"data {step.data} x model {step.model}, batch {step.batch}, layers {layers[0]}-{layers[-1]}: "
        f"arguments {_memory(step.arguments + step.unread)} + temporaries {_memory(step.temporaries)} + "
        f"program {_memory(step.program)} = {_memory(step.total)} per device; {step.flops:.3g} FLOP a step "
        f"and device; the largest batch that fits is about {plan.largest_batch_compiled} ({step.compiler}, "
        f"{step.seconds:.0f} s)",
    )
    counts = {axis: sum(kinds.values()) for axis, kinds in step.collectives.items()}
    kinds = ", ".join(f"{count} {kind}" for kind, count in step.collectives["model"].items())
    over_model = f"{counts['model']} ({kinds})" if kinds else "none"
    yield "talk", f"collectives in a step: {over_model} over model, {counts['data'] or 'none'} over data"


def _time(plan: Plan) -> str:
    if plan.hours is None:
        return "not known, since the devices' speed is not; name them with --topology, such as h100:8"
    return (
        f"{_duration(plan.hours)} at {plan.utilisation:.0%} of the devices' peak, besides reading and writing"
    )


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return "less than a minute"
    if hours < 2:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:,.1f} hours"


def _mesh(choice: Choice) -> str:
    return f"run.mesh data {choice.data} x model {choice.model}, run.batch_size {choice.batch}"


def _memory_of(choice: Choice) -> str:
    found = choice.memory
    saving = f" (or {_memory(found.snapshot)} while a checkpoint is taken)" if found.snapshot else ""
    return (
        f"weights {_memory(found.weights)} + state {_memory(found.state)} + temporaries about "
        f"{_memory(found.temporaries)}{saving} = {_memory(found.total)} per device"
    )


def _memory(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def _disk(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _count(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,}"


def _flops(number: int) -> str:
    for name, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= size:
            return f"{number / size:,.2f} {name}FLOP"
    return f"{number / 1e6:,.2f} MFLOP"
