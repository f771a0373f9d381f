"""Plans of large runs on TPUs, compiled ahead of time: a million sequences of 95 tokens, all kinds, k = 100.

    python benchmarks/plans.py --out benchmarks/plans.json

Needs the extra `plan`, and some 10 GB of memory; every plan takes minutes. Subjects are the configs in
benchmarks/subjects, whose weights nobody reads. `--only v5e:4x4` makes one plan.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNS = (
    ("llama-3.1-8b", "v5e:2x4"),
    ("llama-3.1-8b", "v5e:4x4"),
    ("llama-3.1-8b", "v5e:16x16"),
    ("llama-3.1-8b", "v5p:2x2x2"),
    ("llama-3.1-8b", "v6e:2x4"),
    ("llama-3.1-70b", "v5p:4x4x4"),
)
SUBJECTS = Path(__file__).parent / "subjects"


def plan(subject, topology):
    """One plan as JSON, made in a process of its own."""
    arguments = [
        *("--subject.id", str(SUBJECTS / subject), "--subject.dtype", "bfloat16"),
        *("--corpus.sources", '[{"preset": "fineweb"}]', "--corpus.sequence_length", "95"),
        *("--corpus.max_sequences", "1000000", "--exemplars.splits", '["train"]', "--exemplars.k", "100"),
        *("--run.batch_size", "256", "--output", "out", "--topology", topology, "--json"),
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "jaxplain.plan", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(ended.stdout)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file, to which plans are added")
    parser.add_argument("--only", help="the topology of the one plan to make")
    options = parser.parse_args()
    plans: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"plans": {}}
    for subject, topology in RUNS:
        if options.only in (None, topology):
            made = plan(subject, topology)
            made["subject"] = subject
            plans["plans"][f"{subject} on {topology}"] = made
            plans["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
            options.out.write_text(json.dumps(plans, indent=1) + "\n")
            print(f"{subject} on {topology}: done", flush=True)


if __name__ == "__main__":
    main()
