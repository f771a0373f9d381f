"""Accelerators, as far as a plan must know them, and how a user names some of them."""

import dataclasses
import math
import os
import re

from jaxplain.errors import JaxplainError

GIB = 2**30
_UNITS = {"": 1, "B": 1, "GB": 10**9, "GIB": GIB, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    Attributes:
        memory: Bytes of HBM.
        usable: Bytes of it that a program may have.
        bfloat16: Peak FLOP/s of matrix products in bfloat16, without sparsity.
        float32: The same in float32: of a TPU a sixth, since each product takes six passes in bfloat16.
        per_host: How many one host has, where there are several hosts.
        largest_host: The largest slice that one host has alone.
        platform: What libtpu calls it; None where it does not know it.
        source: Where the figures are from.
    """

    memory: int
    usable: int
    bfloat16: float
    float32: float
    per_host: int
    largest_host: int
    platform: str | None = None
    source: str


def _tpu(platform: str, *, memory: float, usable: float, peak: float, largest_host: int, page: str) -> Chip:
    return Chip(
        memory=int(memory * GIB),
        usable=int(usable * GIB),
        bfloat16=peak,
        float32=peak / 6,
        per_host=4,
        largest_host=largest_host,
        platform=platform,
        source=f"cloud.google.com/tpu/docs/{page}; usable memory: the limit of libtpu's compiler",
    )


def _gpu(*, memory: int, bfloat16: float, float32: float, sheet: str) -> Chip:
    # What JAX takes of a GPU's memory when it starts.
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    return Chip(
        memory=memory * 10**9,
        usable=int(share * memory * 10**9),
        bfloat16=bfloat16,
        float32=float32,
        per_host=8,
        largest_host=8,
        source=f"NVIDIA's data sheet of the {sheet}; usable memory: JAX's share of it",
    )


CHIPS = {
    "v4": _tpu("v4", memory=32.0, usable=30.75, peak=275e12, largest_host=4, page="v4"),
    "v5e": _tpu("v5e", memory=16.0, usable=15.75, peak=197e12, largest_host=8, page="v5e"),
    "v5p": _tpu("v5p", memory=95.0, usable=95.74, peak=459e12, largest_host=4, page="v5p"),
    "v6e": _tpu("v6e", memory=32.0, usable=31.25, peak=918e12, largest_host=8, page="v6e"),
    "a100": _gpu(memory=80, bfloat16=312e12, float32=19.5e12, sheet="A100 80GB SXM"),
    "h100": _gpu(memory=80, bfloat16=989.4e12, float32=67e12, sheet="H100 SXM"),
    "h200": _gpu(memory=141, bfloat16=989.4e12, float32=67e12, sheet="H200 SXM"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The devices that a plan is made for.

    Attributes:
        name: How reports call them.
        memory: Bytes that a program may have on each device.
        topology: What libtpu compiles for, such as v5e:4x4; None where there is no such compiler.
        peaks: Peak FLOP/s of a device by the dtype of weights; empty where nothing is known.
    """

    name: str
    devices: int
    hosts: int
    memory: int
    topology: str | None
    peaks: dict[str, float]

    @property
    def tiled(self) -> bool:
        """Whether arrays lie in memory in a TPU's tiles."""
        return self.topology is not None


def target_of(*, topology: str | None, devices: int | None, memory: str | None) -> Target:
    """What the command's options name. Raises JaxplainError where they name nothing, or too much."""
    if topology is None:
        if devices is None or memory is None:
            raise JaxplainError(
                "no devices are named; give --topology, such as v5e:4x4 or h100:8, or --devices 8 and "
                "--memory 80GiB."
            )
        if devices < 1:
            raise JaxplainError(f"--devices is {devices}; give 1 or more.")
        return Target(
            name=f"{devices} devices with {memory}",
            devices=devices,
            hosts=math.ceil(devices / 8),
            memory=parse_bytes(memory),
            topology=None,
            peaks={},
        )
    if devices is not None:
        raise JaxplainError(
            f"--devices is {devices}; --topology {topology} says that already, so leave it out."
        )
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if match is None or match[1] not in CHIPS:
        raise JaxplainError(
            f"--topology is {topology!r}; give one of {', '.join(CHIPS)} and a shape or number, such as "
            "v5e:4x4 or h100:8."
        )
    chip = CHIPS[match[1]]
    shape = [int(side) for side in match[2].split("x")]
    count = math.prod(shape)
    if count < 1:
        raise JaxplainError(f"--topology is {topology!r}; give 1 or more devices.")
    return Target(
        name=topology,
        devices=count,
        hosts=1 if count <= chip.largest_host else math.ceil(count / chip.per_host),
        memory=chip.usable if memory is None else parse_bytes(memory),
        topology=chip.platform and f"{chip.platform}:{match[2]}",
        peaks={"bfloat16": chip.bfloat16, "float32": chip.float32},
    )


def parse_bytes(text: str) -> int:
    """Bytes, as in 80GiB or 16 GB. Raises JaxplainError where it is no amount of memory."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise JaxplainError(f"--memory is {text!r}; give an amount such as 80GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])
