"""What a neuron is called."""

from typing import Protocol, runtime_checkable


class NeuronId(tuple[int, ...]):
    """A layer and an index, and between them the expert where the subject is a mixture of experts."""

    __slots__ = ()

    @classmethod
    def of(cls, layer: int, expert: int | None, index: int) -> "NeuronId":
        """The name of a neuron; `expert` is None where the subject has none."""
        return cls((layer, index) if expert is None else (layer, expert, index))

    @property
    def layer(self) -> int:
        """The layer, from 0."""
        return self[0]

    @property
    def expert(self) -> int | None:
        """The expert of that layer, from 0; None where the subject has none."""
        return self[1] if len(self) == 3 else None

    @property
    def index(self) -> int:  # type: ignore[override]
        """The neuron of that layer or expert, from 0."""
        return self[-1]

    def __str__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"layer {self.layer}{expert}, neuron {self.index}"


@runtime_checkable
class AboutNeuron(Protocol):
    """What is about one neuron."""

    @property
    def layer(self) -> int: ...  # noqa: D102

    @property
    def expert(self) -> int | None: ...  # noqa: D102

    @property
    def index(self) -> int: ...  # noqa: D102


def neuron_of(something: AboutNeuron) -> NeuronId:
    """The neuron that something is about."""
    return NeuronId.of(something.layer, something.expert, something.index)
