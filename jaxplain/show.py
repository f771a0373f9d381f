"""python -m jaxplain.show RUN --layer L [--expert E] --neuron N: one neuron's exemplars, in the terminal."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxplain.commands import PlainParser, run
from jaxplain.errors import JaxplainError
from jaxplain.store.reader import Neuron, open_store
from jaxplain.summary import summarised
from jaxplain.viewer.terminal import print_neuron

_OF_EXEMPLARS = ("rank", "score", "sequence", "corpus", "start", "text", "token_strings", "activations")


def main(arguments: Sequence[str]) -> None:
    """Parse, open, print."""
    parser = PlainParser("show")
    parser.add_argument("run", help="a run's folder, or a store's path or URL")
    parser.add_argument("--layer", type=int, required=True, help="layer, from 0")
    parser.add_argument("--expert", type=int, help="of a mixture of experts, the layer's expert, from 0")
    parser.add_argument("--neuron", type=int, required=True, help="neuron of that layer or expert, from 0")
    parser.add_argument("--split", help="split; the store's first one by default")
    parser.add_argument("--kind", default="max", help="max (default), min, random or quantile")
    parser.add_argument("--limit", type=int, default=10, help="exemplars to show; default: %(default)s")
    options = parser.parse_args(list(arguments))
    if options.limit < 1:
        raise JaxplainError(f"--limit is {options.limit}; give a positive number.")
    store = open_store(options.run)
    split = store[options.split or store.splits[0]]
    neuron = split.neuron(options.layer, options.neuron, expert=options.expert)
    with summarised(options) as summary:
        print_neuron(neuron, Console(), kind=options.kind, limit=options.limit)
        summary |= _contents(neuron, options.kind, options.limit)


def _contents(neuron: Neuron, kind: str, limit: int) -> dict[str, Any]:
    """What is shown, with whole sequences."""
    place = {"layer": neuron.layer, "index": neuron.index}
    return {
        "split": neuron.split.name,
        **place,
        **({} if neuron.expert is None else {"expert": neuron.expert}),
        "statistics": dataclasses.asdict(neuron.stats),
        "kind": kind,
        "exemplars": [
            {
                **{name: getattr(exemplar, name) for name in _OF_EXEMPLARS},
                "document": f"{exemplar.document:016x}",
            }
            for exemplar in neuron.exemplars(kind, limit=limit)
        ],
    }


if __name__ == "__main__":
    run(main)
