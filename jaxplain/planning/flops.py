"""Floating-point operations of an extraction, counted from the shapes of the subject's parameters.

A product of an [A, B] with a [B, C] matrix counts 2 A B C. Only products count: what else there is, of norms,
softmax, statistics and top-k, is a few hundredths of them in a model of ordinary width.
"""

import jax

from jaxplain.planning.demand import Demand


def flops_per_sequence(demand: Demand) -> int:
    """Of one sequence through the step. What nobody reads in the last layer is not computed."""
    arch, depth, tokens = demand.arch, demand.selection.depth, demand.tokens
    matrices = sum(
        2 * tokens * shape.size
        for name, shape in demand.weights.items()
        if _is_matrix(name) and demand.is_read(name)
    )
    # Logits and the sum of values, of every position with every other, the later ones too.
    attention = 4 * tokens * tokens * arch.query_heads * arch.head_width
    layers = depth if demand.reads_last_attention else depth - 1
    return matrices + attention * layers


def total_flops(demand: Demand) -> int:
    """Of the whole run."""
    return flops_per_sequence(demand) * sum(demand.sequences.values())


def parameters(shapes: dict[str, jax.ShapeDtypeStruct]) -> int:
    """How many numbers parameters hold."""
    return sum(shape.size for shape in shapes.values())


def _is_matrix(name: str) -> bool:
    """Whether activations are multiplied by a parameter, rather than scaled, shifted or looked up."""
    kind, _, letters = name.rsplit(".", 1)[-1].rpartition("_")
    return name.startswith("layers.") and len(letters) > 1 and "bias" not in kind and kind != "scale"
