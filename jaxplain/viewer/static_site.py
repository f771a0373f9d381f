"""The same pages as plain files, for a disk or a bucket; a script searches what the server would."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxplain.progress import Progress
from jaxplain.store.formats.output import new_folder
from jaxplain.store.reader import Neuron
from jaxplain.viewer.excerpts import LONGEST_TOKEN, peak_of, visible
from jaxplain.viewer.pages import Pages, asset, file_of
from jaxplain.viewer.peaks import KINDS, RANKS
from jaxplain.viewer.searching import Query
from jaxplain.viewer.site import Site

_ASSETS = ("style.css", "view.js", "search.js")
_LONGEST_EXPLANATION = 2000


def write_site(
    site: Site, out: Path, *, shown: int, progress: Progress, overwrite: bool = False
) -> tuple[int, int]:
    """Write the pages of a site to a folder; the numbers of files and bytes.

    Raises JaxplainError where the folder is there already, holds the store or its explanations, or cannot be
    written. It appears whole or not at all.
    """
    read = [path for path in (site.store.zarr_path, site.explanations, site.index) if path is not None]
    files = size = 0
    with new_folder(out, sources=read, overwrite=overwrite) as partial:
        for name, text in _files(site, shown, progress):
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = text.encode("utf-8", "replace")
            path.write_bytes(data)
            files, size = files + 1, size + len(data)
    return files, size


def _files(site: Site, shown: int, progress: Progress) -> Iterator[tuple[str, str]]:
    pages, splits = Pages(site, is_static=True, shown=shown), site.store.splits
    for name in _ASSETS:
        yield f"assets/{name}", asset(name)
    yield "index.html", pages.overview(splits[0], root="")
    yield "search.html", pages.search(Query(split=splits[0]), None, root="")
    labels: dict[str, str] = {}
    for split in splits:
        yield f"overview/{split}.html", pages.overview(split, root="../")
        labels |= site.labels(split)
    columns, rows = list(labels), []
    for split in splits:
        catalogue = site.catalogue(split)
        known = site.labels(split)
        values = {name: site.column(split, name) for name in columns if name in known}
        with progress(total=len(catalogue), desc=f"pages of {split}", unit="neurons") as bar:
            for row in bar.over(range(len(catalogue))):
                neuron = catalogue.neuron(row)
                yield f"neuron/{split}/{file_of(neuron)}", pages.neuron(split, neuron, root="../../")
                rows.append(
                    {
                        "split": split,
                        "name": list(neuron),
                        "title": str(neuron),
                        "values": [
                            _number(values[name][row]) if name in values else None for name in columns
                        ],
                        "tokens": _peak_tokens(site.store[split].neuron_called(neuron)),
                        "explanations": _explanations(site, neuron),
                    }
                )
    found = {"columns": columns, "labels": labels, "rows": rows}
    yield "assets/neurons.js", f"window.jaxplainNeurons = {json.dumps(found, allow_nan=False)};\n"


def _number(value: Any) -> float | None:
    """Seven digits, which is all that the store has; None for what is not a number."""
    value = float(value)
    return float(f"{value:.9g}") if abs(value) < float("inf") else None


def _peak_tokens(neuron: Neuron) -> dict[str, list[str]]:
    """The tokens at which the first exemplars peak, as they are searched for."""
    found: dict[str, list[str]] = {}
    for kind in (kind for kind in KINDS if kind in neuron.split.kinds):
        tokens = []
        for exemplar in neuron.exemplars(kind, limit=RANKS):
            if len(exemplar.tokens):
                token = exemplar.vocabulary.bytes_of(int(exemplar.tokens[peak_of(exemplar, kind)]))
                tokens.append(token.decode("utf-8", "replace").strip().casefold()[:LONGEST_TOKEN])
        found[kind] = list(dict.fromkeys(tokens))
    return found


def _explanations(site: Site, neuron: Any) -> list[tuple[str, str]]:
    with site.database() as database:
        if database is None:
            return []
        found = database.explanations(neuron.layer, neuron.index, neuron.expert)
    return [(e.sign, visible(e.text, longest=_LONGEST_EXPLANATION)) for e in found]
