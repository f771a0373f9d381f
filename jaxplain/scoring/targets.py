"""The real activations that explanations of a neuron are scored on."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxplain.configs.explanation import Sign
from jaxplain.simulators.levels import rectified
from jaxplain.store.exemplar import Exemplar
from jaxplain.store.reader import Neuron


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Sequences of a split, and what a neuron does there.

    Attributes:
        sequences: Rows of the split's token table, the strongest first, then the random ones.
        top: How many of them are the strongest.
        tokens: The tokens of each sequence.
        truth_N: Activations of the explained sign, that of the other as 0, over all tokens of all
            sequences, float32; NaN where a token does not count.
        document_N: The document in which each token's sequence begins.
        place_N: Each token's sequence, by its place in `sequences`.
    """

    sequences: list[int]
    top: int
    tokens: list[Int[np.ndarray, "_"]]
    truth_N: Float[np.ndarray, "N"]
    document_N: Int[np.ndarray, "N"]
    place_N: Int[np.ndarray, "N"]

    def subset(self, name: str) -> Bool[np.ndarray, "N"]:
        """The tokens of the top sequences, the random ones, or both (`top+random`)."""
        in_top_N = self.place_N < self.top
        return {"top+random": np.ones_like(in_top_N), "top": in_top_N, "random": ~in_top_N}[name]


def subsets(top: int, random: int) -> list[str]:
    """The subsets that a score is given for, where that many sequences are taken."""
    return ["top+random", "top", "random"] if top and random else ["top" if top else "random"]


def target_of(neuron: Neuron, sign: Sign, *, top: int, random: int) -> Target:
    """A neuron's strongest sequences in a split, and random ones that are not among them."""
    strongest = neuron.exemplars(sign, limit=top) if top else []
    rest: list[Exemplar] = []
    if random:
        taken = {exemplar.sequence for exemplar in strongest}
        # The stored ones are the same for every neuron; scores of many should not hang on a few of them.
        stored = neuron.exemplars("random")
        order = np.random.default_rng((*neuron.id, sign == "min")).permutation(len(stored))
        rest = [stored[place] for place in order if stored[place].sequence not in taken]
    exemplars = [*strongest, *rest[:random]]
    lengths = [len(exemplar.tokens) for exemplar in exemplars]
    documents = np.array([exemplar.document for exemplar in exemplars], np.int64)
    acts = [np.zeros(0, np.float32), *(exemplar.activations for exemplar in exemplars)]
    return Target(
        sequences=[exemplar.sequence for exemplar in exemplars],
        top=len(strongest),
        tokens=[exemplar.tokens for exemplar in exemplars],
        truth_N=rectified(np.concatenate(acts), sign),
        document_N=np.repeat(documents, lengths),
        place_N=np.repeat(np.arange(len(exemplars)), lengths),
    )
