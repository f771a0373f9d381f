"""python -m jaxplain.merge OUT STORE STORE ...: one store of stores of slices of a corpus."""

import dataclasses
from collections.abc import Sequence

from jaxplain.commands import PlainParser, run
from jaxplain.progress import ByteBar, progress_bars
from jaxplain.store.merging import merge_stores
from jaxplain.store.schema import STORE_NAME
from jaxplain.summary import summarised


def main(arguments: Sequence[str]) -> None:
    """Parse, merge, and say what became of it."""
    parser = PlainParser("merge")
    parser.add_argument("out", help="the folder that gets the merged store, as exemplars.zarr")
    parser.add_argument("stores", nargs="+", metavar="store", help="a run's folder, or its store")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the store that OUT holds, at the end"
    )
    options = parser.parse_intermixed_args(list(arguments))
    with summarised(options) as summary:
        merged = merge_stores(
            options.out,
            options.stores,
            progress_bars(enabled=not options.quiet, kind=ByteBar),
            overwrite=options.overwrite,
        )
        for split in merged:
            print(f"{split.name}: {split.sequences:,} sequences")
            if split.repeated:
                print(
                    f"{split.name}: {split.repeated:,} more are in an earlier store too; they are once among "
                    "the exemplars, but count in the statistics as often as they were read"
                )
        path = f"{options.out.rstrip('/')}/{STORE_NAME}"
        print(f"The store is {path}.")
        summary |= {"store": path, "splits": [dataclasses.asdict(split) for split in merged]}


if __name__ == "__main__":
    run(main)
