"""python -m jaxplain.merge OUT STORE STORE ...: one store of stores of slices of a corpus."""

import argparse
from collections.abc import Sequence

from jaxplain.commands import TRACEBACK, run
from jaxplain.progress import ByteBar, progress_bars
from jaxplain.store.merging import merge_stores
from jaxplain.store.schema import STORE_NAME


def main(arguments: Sequence[str]) -> None:
    """Parse, merge, and say what became of it."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxplain.merge",
        description="Merge stores of runs over slices of a corpus into that of a run over all of it.",
    )
    parser.add_argument("out", help="the folder that gets the merged store, as exemplars.zarr")
    parser.add_argument("stores", nargs="+", metavar="store", help="a run's folder, or its store")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the store that OUT holds, at the end"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    parser.add_argument(TRACEBACK, action="store_true", help="show where an error came from")
    options = parser.parse_intermixed_args(list(arguments))
    merged = merge_stores(
        options.out,
        options.stores,
        progress_bars(enabled=not options.no_progress, kind=ByteBar),
        overwrite=options.overwrite,
    )
    for split in merged:
        print(f"{split.name}: {split.sequences:,} sequences")
        if split.repeated:
            print(
                f"{split.name}: {split.repeated:,} more are in an earlier store too; they are once among the "
                "exemplars, but count in the statistics as often as they were read"
            )
    print(f"The store is {options.out.rstrip('/')}/{STORE_NAME}.")


if __name__ == "__main__":
    run(main)
