"""python -m jaxplain.view RUN: a run's neurons as pages, on this machine or as plain files."""

import argparse
import contextlib
import importlib.util
import socket
from collections.abc import Sequence
from pathlib import Path

from jaxplain.commands import run
from jaxplain.errors import JaxplainError
from jaxplain.progress import progress_bars
from jaxplain.ranges import parse_range
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Store, open_store
from jaxplain.viewer.explained import explained_neurons
from jaxplain.viewer.pages import SHOWN
from jaxplain.viewer.peaks import build_index
from jaxplain.viewer.site import Site
from jaxplain.viewer.static_site import write_site

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MANY_PAGES = 5000


def main(arguments: Sequence[str]) -> None:
    """Parse; then write pages, or serve them."""
    options = _parser().parse_args(list(arguments))
    if options.exemplars < 1:
        raise JaxplainError(f"--exemplars is {options.exemplars}; give a positive number.")
    if not 0 <= options.port < 2**16:
        raise JaxplainError(f"--port is {options.port}; give a number from 0 to 65535.")
    store = open_store(options.run)
    site = Site(store, explanations=options.explanations, index=options.index_folder)
    progress = progress_bars(enabled=not options.no_progress)
    if options.index:
        if site.index is None:
            raise JaxplainError("the store is not on a local disk; name a folder with --index-folder.")
        build_index(store, site.index, progress)
        print(f"the index of tokens is in {site.index}")
    if options.static is None:
        _serve(site, options.host, options.port)
        return
    chosen = _chosen(site, options)
    files, size = write_site(
        Site(store, explanations=options.explanations, chosen=chosen),
        options.static,
        shown=options.exemplars,
        progress=progress,
        overwrite=options.overwrite,
    )
    print(f"{files:,} files, {size / 1e6:,.1f} MB; open {options.static / 'index.html'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxplain.view",
        description="Look at a run's neurons in a browser: serve pages to this machine alone, or write them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", help="a run's folder, or a store's path or URL")
    parser.add_argument(
        "--explanations", type=Path, metavar="PATH", help="explanations.sqlite, or its folder, if elsewhere"
    )
    parser.add_argument("--index", action="store_true", help="first make the index for searches by token")
    parser.add_argument("--index-folder", type=Path, metavar="FOLDER", help="where that is, if elsewhere")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    served = parser.add_argument_group("serving")
    served.add_argument("--host", default="127.0.0.1", help="address to listen on; others may then look too")
    served.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    static = parser.add_argument_group("writing files")
    static.add_argument("--static", type=Path, metavar="OUT", help="write the pages to this folder instead")
    static.add_argument("--layers", default=":", help="layers to write, such as 0:30:3")
    static.add_argument(
        "--indices", default=":", help="neurons of each layer or expert to write, such as 0:100"
    )
    static.add_argument("--explained", action="store_true", help="only neurons that have an explanation")
    static.add_argument("--exemplars", type=int, default=SHOWN, help="exemplars of each kind on a page")
    static.add_argument("--all", action="store_true", help=f"even where there are over {_MANY_PAGES:,} pages")
    static.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    return parser


def _chosen(site: Site, options: argparse.Namespace) -> list[NeuronId]:
    """The neurons to write, of all splits."""
    store = site.store
    first = site.catalogue(store.splits[0])
    split = first.split
    layers = parse_range(options.layers, "--layers", int(split.layers[-1]) + 1)
    indices = parse_range(options.indices, "--indices", int(split.neurons[-1]) + 1)
    found = [n for n in map(first.neuron, range(len(first))) if n.layer in layers and n.index in indices]
    if options.explained:
        with site.database() as database:
            explained = set(explained_neurons(database)) if database else set()
        found = [neuron for neuron in found if neuron in explained]
    if not found:
        raise JaxplainError("none of the chosen neurons is in the store; choose others.")
    pages = len(found) * len(store.splits)
    if pages > _MANY_PAGES and not options.all:
        raise JaxplainError(
            f"these are {pages:,} pages, about {pages * _page_bytes(store) / 1e9:.1f} GB; choose fewer with "
            "--layers, --indices or --explained, or give --all."
        )
    return found


def _page_bytes(store: Store) -> float:
    """About how large a neuron's page is."""
    split = store[store.splits[0]]
    return 60.0 * SHOWN * len(split.kinds) * split.sequence_length


def _serve(site: Site, host: str, port: int) -> None:
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise JaxplainError(
                f"serving pages needs the package {package}; install it with pip install 'jaxplain[view]'."
            )
    import uvicorn

    from jaxplain.viewer.app import make_app

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JaxplainError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port."
        ) from error
    is_private = host in _LOOPBACK
    app = make_app(site) if is_private else make_app(site, hosts=["*"])
    at = f"[{host}]" if ":" in host else host
    with contextlib.closing(listening):
        print(f"http://{at}:{listening.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
        if not is_private:
            print("Whoever can reach this machine can read these pages.", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


if __name__ == "__main__":
    run(main)
