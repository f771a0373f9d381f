"""Commands of clusters that run on this machine, and an interpreter that notes what it is called with."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
STUBS = Path(__file__).parent / "stubs"
_OVERRIDES = ("MODEL_ID", "DATASET_", "VALUEEVAL_", "LAYER_INDICES", "ALL_", "MAX_SEQUENCES", "OUTPUT_DIR")


@dataclasses.dataclass
class Cluster:
    """Where scripts run, with what environment."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command, **environment):
        """A command's end, its output and its errors."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def start(self, *command, **environment):
        """A command in a process group of its own."""
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environment | environment,
            start_new_session=True,
        )

    def calls(self, command="jaxplain.extract"):
        """The arguments of every call of one of jaxplain's commands, in order."""
        return [call["arguments"] for call in self.records() if call["command"] == command]

    def records(self):
        """Everything that is known of every call."""
        file = Path(self.environment["CALLS"])
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def cluster(tmp_path):
    """A folder with a config, and a PATH on which the stubs come first."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stubs = {"python": "python", "gcloud": "gcloud", "sbatch": "slurm", "srun": "slurm", "scontrol": "slurm"}
    for name, stub in stubs.items():
        script = bin_folder / name
        script.write_text(f"#!{sys.executable} -S\n{(STUBS / f'{stub}.py').read_text()}")
        script.chmod(0o755)
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "subject": {"id": "model"},
                "corpus": {"sources": [{"dataset": "d", "config": "c"}], "max_sequences": 10},
                "output": "runs/whole",
            }
        )
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OVERRIDES)}
    environment = inherited | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SLURM_STUB": str(tmp_path / "slurm"),
        "JAXPLAIN_HOME": str(ROOT),
        "CALLS": str(tmp_path / "calls"),
        "FAKE_PYTHON": str(bin_folder / "python"),
    }
    return Cluster(tmp_path, environment)
