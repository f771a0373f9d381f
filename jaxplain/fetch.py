"""python -m jaxplain.fetch: fetch the files of a preset that does not come from the Hugging Face hub."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxplain.commands import PlainParser, run
from jaxplain.corpora.presets import preset, presets
from jaxplain.corpora.zenodo import API, fetch_files
from jaxplain.errors import JaxplainError
from jaxplain.summary import summarised


def main(arguments: Sequence[str]) -> None:
    """Parse, fetch, and say how to go on."""
    fetchable = [name for name, chosen in presets().items() if chosen.zenodo]
    parser = PlainParser("fetch", more=["Files are checked by MD5; what was cut off goes on.", ""])
    parser.add_argument("preset", choices=fetchable)
    parser.add_argument("folder", type=Path, help="where to put the files")
    parser.add_argument(
        "--md5",
        metavar="FILE=MD5",
        action="append",
        default=[],
        help="a checksum that you know, besides those that the record states; may be repeated",
    )
    parser.add_argument("--api", default=API, help="where Zenodo's records are; default: %(default)s")
    options = parser.parse_args(arguments)
    with summarised(options) as summary:
        summary |= _fetch(options)


def _fetch(options: argparse.Namespace) -> dict[str, Any]:
    chosen = preset(options.preset)
    known = {}
    for pair in options.md5:
        name, equals, checksum = pair.partition("=")
        if not equals or name not in chosen.files:
            raise JaxplainError(
                f"--md5 is {pair!r}; give FILE=MD5 with one of the files {', '.join(chosen.files)}."
            )
        known[name] = checksum
    number = chosen.zenodo or 0
    fetched = fetch_files(number, chosen.files, options.folder, md5=known, api=options.api)
    print(f"{options.folder} holds the {len(chosen.files)} files ({len(fetched)} fetched now). In a config:")
    print(f"  corpus: {{sources: [{{preset: {options.preset}}}], {chosen.folder}: {options.folder}}}")
    return {"folder": options.folder, "files": chosen.files, "fetched": fetched}


if __name__ == "__main__":
    run(main)
