"""One extraction as independent Slurm jobs over slices of its corpus, and a job that merges their stores.

    python launch/slurm_slices.py 8 --config my_run.yaml --sbatch '--gpus-per-node 8 --ntasks-per-node 8'

Slice i of 8 reads `split[a%:b%]` of every source and its share of corpus.max_sequences, and leaves its store
in OUTPUT/slices/i; the merged store lies in OUTPUT. What differs between slices is written as configs to
OUTPUT/slices/i.yaml. The variables of launch/overrides.py override the config here too. Run it from the
checkout of jaxplain. With --dry-run it prints a shell script that does the same.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from overrides import PRESETS, SOURCE_VARIABLES, refuse, sources, uses_valueeval

LAUNCH = Path(__file__).resolve().parent
# These become part of the slices' configs, and would otherwise override them.
_CONSUMED = (*SOURCE_VARIABLES, "MAX_SEQUENCES", "OUTPUT_DIR")
_MOST_SLICES = 100


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write the slices' configs and submit both jobs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slices", type=int, help=f"how many, 2 to {_MOST_SLICES}")
    parser.add_argument("--config", required=True, help="the config of the whole run")
    parser.add_argument("--sbatch", default="", help="options of sbatch for the slices' jobs")
    parser.add_argument("--merge-sbatch", default="", help="options of sbatch for the job that merges")
    parser.add_argument("--folder", help="where the slices' configs go, if the output is no local folder")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done as a shell script")
    options = parser.parse_args(arguments)
    if not 2 <= options.slices <= _MOST_SLICES:
        refuse("slices", options.slices, f"give 2 to {_MOST_SLICES}")
    if not Path(options.config).is_file():
        refuse("--config", options.config, "there is no such file")
    config = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))
    output = environment.get("OUTPUT_DIR") or config.get("output")
    if not output:
        refuse("output", output, "name a folder in the config or in OUTPUT_DIR")
    _require_mergeable(config)
    output = output.rstrip("/")
    if "://" in output and not options.folder:
        refuse("output", output, "it is no local folder, so name one for the slices' configs with --folder")
    folder = Path(options.folder or f"{output}/slices").absolute()
    parts = [slice_config(config, environment, i, options.slices, output) for i in range(options.slices)]
    submit, merge = commands(options, environment, folder, output)
    if options.dry_run:
        print(_script(folder, parts, submit, merge))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        (folder / f"{number}.yaml").write_text(json.dumps(part, indent=1), encoding="utf-8")
    job = _run(submit).split(";")[0]
    print(f"slices are job {job}, and job {_run([word.replace('$job', job) for word in merge])} merges them")


def _require_mergeable(config: Mapping[str, Any]) -> None:
    """Refuse before the slices are extracted what would be refused when they are merged."""
    kinds = config.get("exemplars", {}).get("kinds", [])
    if "quantile" in kinds:
        refuse("exemplars.kinds", kinds, "stores with quantile cannot be merged, so leave it out")
    tables = config.get("statistics", {}).get("tokens", {}).get("neurons")
    if tables:
        refuse(
            "statistics.tokens.neurons", tables, "stores with token tables cannot be merged, so leave it out"
        )


def slice_config(
    config: Mapping[str, Any], environment: Mapping[str, str], number: int, slices: int, output: str
) -> dict[str, Any]:
    """What the config of a slice changes. JSON, which is YAML too."""
    corpus = config.get("corpus", {})
    chosen = sources(environment) or corpus.get("sources")
    if not chosen:
        refuse("corpus.sources", chosen, "name a source in the config or in DATASET_NAME")
    whole = environment.get("MAX_SEQUENCES") or corpus.get("max_sequences")
    if whole is None or not str(whole).isdecimal():
        refuse("corpus.max_sequences", whole, "give the number of all slices together, 0 for everything")
    changed: dict[str, Any] = {
        "sources": [_sliced(source, number, slices) for source in chosen],
        "max_sequences": math.ceil(int(str(whole)) / slices),
    }
    if not uses_valueeval(chosen):
        changed["valueeval_dir"] = None
    elif environment.get("VALUEEVAL_DIR"):
        changed["valueeval_dir"] = environment["VALUEEVAL_DIR"]
    return {"corpus": changed, "output": f"{output}/slices/{number}"}


def commands(
    options: argparse.Namespace, environment: Mapping[str, str], folder: Path, output: str
) -> tuple[list[str], list[str]]:
    """The commands that submit the slices and what merges them; the latter has $job for the number."""
    unset = [word for name in _CONSUMED if environment.get(name) for word in ("-u", name)]
    submit = ["env", *unset, f"JAXPLAIN_SLICES={folder}", "sbatch", "--parsable"]
    submit += [f"--array=0-{options.slices - 1}", *shlex.split(options.sbatch)]
    submit += [str(LAUNCH / "slurm.sbatch"), "--config", str(Path(options.config).absolute())]
    stores = [f"{output}/slices/{number}" for number in range(options.slices)]
    python = environment.get("PYTHON") or "python"
    merge = [
        "sbatch",
        "--parsable",
        "--job-name=jaxplain-merge",
        "--dependency=afterok:$job",
        *shlex.split(options.merge_sbatch),
    ]
    # Without this the job would wait for ever for a slice that failed.
    merge += ["--kill-on-invalid-dep=yes", "--wrap"]
    return submit, [*merge, shlex.join([python, "-m", "jaxplain.merge", output, *stores])]


def _sliced(source: Mapping[str, Any], number: int, slices: int) -> dict[str, Any]:
    split = str(source.get("split") or "train")
    if split == "train":
        split = _preset_split(source) or split  # as an extraction takes it
    if not re.fullmatch(r"[\w.-]+(\s*\+\s*[\w.-]+)*", split):
        refuse("corpus.sources.split", split, "it is a slice already; give whole splits, joined by +")
    start, stop = (round(100 * end / slices) for end in (number, number + 1))
    parts = [f"{part.strip()}[{start}%:{stop}%]" for part in split.split("+")]
    return {**source, "split": "+".join(parts)}


def _preset_split(source: Mapping[str, Any]) -> str | None:
    if "preset" not in source or not (file := PRESETS / f"{source['preset']}.yaml").exists():
        return None
    return yaml.safe_load(file.read_text(encoding="utf-8"))["source"].get("split")


def _script(folder: Path, parts: Sequence[dict[str, Any]], submit: list[str], merge: list[str]) -> str:
    lines = ["set -e", shlex.join(["mkdir", "-p", str(folder)])]
    for number, part in enumerate(parts):
        lines.append(f"printf %s {shlex.quote(json.dumps(part))} > {shlex.quote(f'{folder}/{number}.yaml')}")
    lines.append(f"job=$({shlex.join(submit)})")
    words = ['"--dependency=afterok:${job%%;*}"' if "$job" in word else shlex.quote(word) for word in merge]
    return "\n".join([*lines, " ".join(words)])


def _run(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    except FileNotFoundError:
        refuse("the command", command[0], "it is not there; run this where Slurm is")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
