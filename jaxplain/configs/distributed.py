"""How the processes of one run find each other, where nothing on their machines says so."""

import dataclasses
import re

from jaxplain.configs.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the processes of one run find each other; nothing is needed under Slurm, on TPUs and on GKE.

    Args:
        coordinator: HOST:PORT of process 0, where the port is free and every other process reaches it.
        processes: How many processes there are; 1 to run alone, whatever the machine says.
        process: The number of this process, from 0.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        require(
            self.coordinator is None or re.fullmatch(r"\S+:\d+", self.coordinator) is not None,
            "coordinator",
            self.coordinator,
            "give HOST:PORT of process 0",
        )
        require(self.processes is None or self.processes >= 1, "processes", self.processes, "give 1 or more")
        most = (self.processes or 1) - 1
        require(
            self.process is None or self.processes is not None,
            "process",
            self.process,
            "say with processes how many there are, too",
        )
        require(
            self.process is None or 0 <= self.process <= most, "process", self.process, f"give 0 to {most}"
        )
