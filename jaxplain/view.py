"""python -m jaxplain.view RUN: a run's neurons as pages, on this machine or as plain files."""

import argparse
import contextlib
import importlib.util
import ipaddress
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxplain.commands import PlainParser, run
from jaxplain.errors import JaxplainError
from jaxplain.progress import progress_bars
from jaxplain.ranges import parse_range
from jaxplain.store.neuron_id import NeuronId
from jaxplain.store.reader import Store, open_store
from jaxplain.summary import summarised
from jaxplain.viewer.explained import explained_neurons
from jaxplain.viewer.pages import SHOWN
from jaxplain.viewer.peaks import build_index
from jaxplain.viewer.site import Site
from jaxplain.viewer.static_site import write_site

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
    with summarised(options) as summary:
        if options.index:
            _make_index(site, options)
        if options.static is not None:
            summary |= _write(site, options)
            return
        listening = _listen(options.host, options.port)
        at = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{at}:{listening.getsockname()[1]}/"
        is_private = _is_loopback(options.host)
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if not is_private:
            print("Whoever can reach this machine can read these pages.", file=sys.stderr, flush=True)
        summary["address"] = address
    _serve(site, listening, host=options.host, is_private=is_private)


def _make_index(site: Site, options: argparse.Namespace) -> None:
    if site.index is None:
        raise JaxplainError("the store is not on a local disk; name a folder with --index-folder.")
    build_index(site.store, site.index, progress_bars(enabled=not options.quiet))
    print(f"the index of tokens is in {site.index}")


def _write(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    chosen = _chosen(site, options)
    files, size = write_site(
        Site(site.store, explanations=options.explanations, chosen=chosen),
        options.static,
        shown=options.exemplars,
        progress=progress_bars(enabled=not options.quiet),
        overwrite=options.overwrite,
    )
    print(f"{files:,} files, {size / 1e6:,.1f} MB; open {options.static / 'index.html'}")
    return {"folder": options.static, "files": files, "bytes": size}


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser("view")
    parser.add_argument("run", help="a run's folder, or a store's path or URL")
    parser.add_argument(
        "--explanations", type=Path, metavar="PATH", help="explanations.sqlite, or its folder, if elsewhere"
    )
    parser.add_argument("--index", action="store_true", help="first make the index for searches by token")
    parser.add_argument("--index-folder", type=Path, metavar="FOLDER", help="where that is, if elsewhere")
    served = parser.add_argument_group("serving")
    served.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on, %(default)s by default; others may then look",
    )
    served.add_argument("--port", type=int, default=8000, help="0 for any that is free; default: %(default)s")
    static = parser.add_argument_group("writing files")
    static.add_argument("--static", type=Path, metavar="OUT", help="write the pages to this folder instead")
    static.add_argument("--layers", default=":", help="layers to write, such as 0:30:3; all by default")
    static.add_argument(
        "--indices",
        default=":",
        help="neurons of each layer or expert to write, such as 0:100; all by default",
    )
    static.add_argument("--explained", action="store_true", help="only neurons that have an explanation")
    static.add_argument(
        "--exemplars", type=int, default=SHOWN, help="exemplars of each kind on a page; default: %(default)s"
    )
    static.add_argument("--all", action="store_true", help=f"even where there are over {_MANY_PAGES:,} pages")
    static.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    return parser


def _chosen(site: Site, options: argparse.Namespace) -> list[NeuronId]:
    """The neurons to write, of all splits."""
    store = site.store
    splits = [store[name] for name in store.splits]
    layers = parse_range(options.layers, "--layers", max(int(split.layers.max()) for split in splits) + 1)
    indices = parse_range(options.indices, "--indices", max(int(split.neurons.max()) for split in splits) + 1)
    explained = None
    if options.explained:
        with site.database() as database:
            explained = set(explained_neurons(database)) if database else set()
    pages: Counter[NeuronId] = Counter()
    for name in store.splits:
        catalogue = site.catalogue(name)
        pages.update(
            neuron
            for neuron in map(catalogue.neuron, range(len(catalogue)))
            if neuron.layer in layers
            and neuron.index in indices
            and (explained is None or neuron in explained)
        )
    if not pages:
        raise JaxplainError("none of the chosen neurons is in the store; choose others.")
    if pages.total() > _MANY_PAGES and not options.all:
        raise JaxplainError(
            f"these are {pages.total():,} pages, about {pages.total() * _page_bytes(store) / 1e9:.1f} GB; "
            "choose fewer with --layers, --indices or --explained, or give --all."
        )
    return list(pages)


def _page_bytes(store: Store) -> float:
    """About how large a neuron's page is."""
    split = store[store.splits[0]]
    return 60.0 * SHOWN * len(split.kinds) * split.sequence_length


def _listen(host: str, port: int) -> socket.socket:
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise JaxplainError(
                f"serving pages needs the package {package}; install it with pip install 'jaxplain[view]'."
            )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JaxplainError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port."
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _serve(site: Site, listening: socket.socket, *, host: str, is_private: bool) -> None:
    import uvicorn

    from jaxplain.viewer.app import LOOPBACK, make_app

    app = make_app(site, hosts=[*LOOPBACK, host] if is_private else ["*"])
    with contextlib.closing(listening):
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


if __name__ == "__main__":
    run(main)
