"""What an extraction takes: bytes on disk and on devices, and time at a stated share of their peak.

python benchmarks/estimate.py configs/extract/pythia-1.4b.yaml --peak 312e12
python benchmarks/estimate.py my_run.yaml --model-config path/to/config.json --peak 989e12 --devices 8

Without --model-config the model's config.json is read from the hub, or from the subject's folder.
"""

import argparse
from pathlib import Path

from transformers import AutoConfig

from jaxplain.commands import config_parser, parse_config
from jaxplain.configs.extraction import ExtractConfig
from jaxplain.exemplars.estimates import estimate
from jaxplain.subjects.families import architecture_of


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--model-config", help="A folder or config.json; default: the subject's.")
    parser.add_argument("--peak", type=float, required=True, help="FLOP/s of one device in the dtype.")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--utilisation", type=float, default=0.4)
    options = parser.parse_args()
    config, _ = parse_config(
        config_parser(ExtractConfig, prog="estimate"), ExtractConfig, ["--config", str(options.config)]
    )
    place = options.model_config or config.subject.id
    arch = architecture_of(AutoConfig.from_pretrained(place, trust_remote_code=False))
    found = estimate(config, arch)
    hours = found.hours(peak=options.peak * options.devices, utilisation=options.utilisation)
    print(f"store {found.store_bytes / 1e9:.1f} GB before compression")
    weights, reductions = found.weight_bytes / 1e9, found.reduction_bytes / 1e9
    print(f"devices {weights:.1f} GB of weights, {reductions:.1f} GB of reductions")
    print(f"time {hours:.2f} hours: {found.flops:.2g} FLOPs at {options.utilisation:.0%} of the peak")


if __name__ == "__main__":
    main()
