"""python -m jaxplain.finetune: train a simulator on a store and its explanations."""

from collections.abc import Sequence
from typing import Any

from jaxplain.commands import add_flag, config_parser, parse_config, require_plots, run
from jaxplain.configs.finetuning import FinetuneConfig
from jaxplain.simulators.finetuning import finetune
from jaxplain.summary import summarised


def main(arguments: Sequence[str]) -> None:
    """Parse, train, and say how well it went."""
    parser = config_parser(FinetuneConfig, "finetune")
    add_flag(parser, "--overwrite", "Start anew, and lose the checkpoints that output holds.")
    config, options = parse_config(parser, FinetuneConfig, arguments)
    require_plots()
    with summarised(options) as summary:
        summary |= _finetune(config, overwrite=options.overwrite)


def _finetune(config: FinetuneConfig, *, overwrite: bool) -> dict[str, Any]:
    done = finetune(config, overwrite=overwrite)
    dataset, held_out = done.dataset, done.evaluation
    if dataset.too_long:
        print(f"{dataset.too_long} explanations are longer than pairs.longest_prompt and were left out")
    print(
        f"{len(dataset.train):,} explanations of {dataset.neurons[0]:,} neurons trained on, "
        f"{len(dataset.held_out):,} of {dataset.neurons[1]:,} neurons held out"
    )
    print(
        f"held out, step {done.step}: cross-entropy {held_out.loss:.4f} (best constant prediction "
        f"{held_out.constant_loss:.4f}), correlation {held_out.correlation:.3f}"
    )
    print(f"The simulator is {done.folder}; score with it: python -m jaxplain.score --config CONFIG")
    return {
        "simulator": done.folder,
        "step": done.step,
        "trained_on": {"explanations": len(dataset.train), "neurons": dataset.neurons[0]},
        "held_out": {
            "explanations": len(dataset.held_out),
            "neurons": dataset.neurons[1],
            "loss": held_out.loss,
            "constant_loss": held_out.constant_loss,
            "correlation": held_out.correlation,
        },
        "too_long": dataset.too_long,
    }


if __name__ == "__main__":
    run(main)
