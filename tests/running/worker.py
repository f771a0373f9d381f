"""One process of a run: python -m tests.running.worker PORT PROCESSES PROCESS DEVICES ARGUMENTS..."""

import sys

import jax

from jaxplain import commands, extract, processes


def main():
    port, count, process, devices, *arguments = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if int(count) > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            int(count),
            int(process),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=20,
        )
    sys.argv[1:] = arguments
    commands.run(extract.main, leave=processes.leave)


if __name__ == "__main__":
    main()
