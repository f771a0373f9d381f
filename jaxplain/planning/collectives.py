"""Which devices a compiled program lets talk to each other, read from its text."""

import collections
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(?:-start)?\("
)
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def collectives(text: str, mesh: Mesh) -> dict[str, dict[str, int]]:
    """How many collectives of which kind the program has, over axis `model` alone and over `data`.

    `text` is an XLA program as it prints itself; its devices are numbered as they stand in the mesh.
    """
    found: dict[str, collections.Counter[str]] = {
        "model": collections.Counter(),
        "data": collections.Counter(),
    }
    for kind, line in _collective_lines(text):
        found["data" if _is_over_data(line, mesh) else "model"][kind] += 1
    return {axis: dict(counts) for axis, counts in found.items()}


def lines_over_data(text: str, mesh: Mesh) -> list[str]:
    """The collectives that join devices of different data shards."""
    return [line.strip()[:250] for _, line in _collective_lines(text) if _is_over_data(line, mesh)]


def _collective_lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            yield match[1], line


def _is_over_data(line: str, mesh: Mesh) -> bool:
    model = mesh.shape["model"]
    return any(len({device // model for device in group}) > 1 for group in device_groups(line, mesh.size))


def device_groups(line: str, count: int) -> list[list[int]]:
    """The groups of devices that a collective joins, from any of the notations that XLA prints."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", line):
        return _arranged(iota[2], iota[3], count).reshape(_numbers(iota[1])).tolist()
    if axes := re.search(rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*?)\}}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        joined = re.findall(r"'(\w+)'", axes[4])
        devices = _arranged(axes[2] or str(count), axes[3], count).reshape(list(sizes.values()))
        last = [list(sizes).index(name) for name in joined]
        devices = np.moveaxis(devices, last, range(-len(last), 0))
        return devices.reshape(-1, int(np.prod([sizes[name] for name in joined]))).tolist()
    return [list(range(count))]


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _arranged(shape: str, order: str | None, count: int) -> np.ndarray:
    """Device numbers in XLA's notation: counted up in a shape, then transposed, then flattened."""
    devices = np.arange(count).reshape(_numbers(shape))
    return (devices.transpose(_numbers(order)) if order else devices).ravel()
