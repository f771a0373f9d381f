"""python -m jaxplain.plan: what an extraction will cost, before anything is spent."""

from collections.abc import Sequence

import jax

from jaxplain.commands import add_flag, config_parser, parse_config, run
from jaxplain.configs.extraction import ExtractConfig
from jaxplain.planning.hardware import CHIPS, target_of
from jaxplain.planning.planner import make_plan
from jaxplain.planning.report import report
from jaxplain.summary import summarised


def main(arguments: Sequence[str]) -> None:
    """Parse, plan, and print the plan. No device but the CPU is touched, and no weights are read."""
    parser = config_parser(ExtractConfig, "plan")
    parser.add_argument(
        "--topology",
        type=str | None,
        default=None,
        help=f"The devices: {', '.join(CHIPS)}, with a shape or number, such as v5e:4x4 or h100:8.",
    )
    parser.add_argument(
        "--devices", type=int | None, default=None, help="How many devices, of any other kind."
    )
    parser.add_argument(
        "--memory", type=str | None, default=None, help="What a program may have of each, such as 80GiB."
    )
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="The share of the peak FLOP/s that is expected."
    )
    add_flag(parser, "--analytic", "Do not compile for TPUs, which takes a minute for a large model.")
    config, options = parse_config(parser, ExtractConfig, arguments)
    target = target_of(topology=options.topology, devices=options.devices, memory=options.memory)
    jax.config.update("jax_platforms", "cpu")
    with summarised(options) as summary:
        plan = make_plan(config, target, utilisation=options.utilisation, compiling=not options.analytic)
        summary |= plan.to_json()
        print(report(plan))


if __name__ == "__main__":
    run(main)
