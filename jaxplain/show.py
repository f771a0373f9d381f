"""python -m jaxplain.show RUN --layer L --neuron N: one neuron's exemplars, in the terminal."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from jaxplain.commands import run
from jaxplain.errors import JaxplainError
from jaxplain.store.reader import open_store
from jaxplain.viewer.terminal import print_neuron


def main(arguments: Sequence[str]) -> None:
    """Parse, open, print."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxplain.show",
        description="Show one neuron's exemplars, the activating tokens highlighted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", help="a run's folder, or a store's path or URL")
    parser.add_argument("--layer", type=int, required=True, help="layer, from 0")
    parser.add_argument("--neuron", type=int, required=True, help="neuron of that layer, from 0")
    parser.add_argument("--split", help="split; the store's first one by default")
    parser.add_argument("--kind", default="max", help="max, min, random or quantile")
    parser.add_argument("--limit", type=int, default=10, help="exemplars to show")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    options = parser.parse_args(list(arguments))
    if options.limit < 1:
        raise JaxplainError(f"--limit is {options.limit}; give a positive number.")
    store = open_store(options.run)
    neuron = store[options.split or store.splits[0]].neuron(options.layer, options.neuron)
    print_neuron(neuron, Console(), kind=options.kind, limit=options.limit)


if __name__ == "__main__":
    run(main)
