"""gcloud for one TPU slice of two workers, as far as launch/tpu_pod.sh uses it.

The slice is the folder $GCLOUD_STUB: its `state` is that file's contents, its workers are folders. What a
worker is told to run is run there for real, except for the installation. Every call is noted in `calls`.
`preemptions` there counts how many extractions still lose the slice in their midst; the first $FULL requests
for a slice are not granted.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SLICE = Path(os.environ["GCLOUD_STUB"])
WORKERS = 2


def options(words):
    return dict(word.removeprefix("--").partition("=")[::2] for word in words if word.startswith("--"))


def create(words):
    assert not (SLICE / "state").exists()
    if (SLICE / "calls").read_text().count("create") <= int(os.environ.get("FULL", "0")):
        sys.exit("RESOURCE_EXHAUSTED")
    assert {"zone", "accelerator-type", "version"} <= options(words).keys()
    (SLICE / "state").write_text("READY")
    for worker in range(WORKERS):
        (SLICE / f"worker-{worker}").mkdir()


def delete(words):
    (SLICE / "state").unlink()


def describe(words):
    if not (SLICE / "state").exists():
        sys.exit("NOT_FOUND")
    print((SLICE / "state").read_text())


def ready():
    if not (SLICE / "state").exists() or (SLICE / "state").read_text() != "READY":
        sys.exit(255)


def scp(words):
    ready()
    assert options(words)["worker"] == "all"
    for worker in range(WORKERS):
        for file in words[:-3]:
            assert Path(file).stat().st_size, file
            shutil.copy(file, SLICE / f"worker-{worker}")


def ssh(words):
    ready()
    given = options(words)
    if "pip install" in given["command"]:
        if "NO_PYTHON" in os.environ:
            sys.exit(1)
        for worker in range(WORKERS):
            python = SLICE / f"worker-{worker}" / "venv/bin/python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text(Path(os.environ["FAKE_PYTHON"]).read_text())
            python.chmod(0o755)
        return
    preemptions = int((SLICE / "preemptions").read_text())
    if preemptions and "jaxplain.extract" in given["command"]:
        (SLICE / "preemptions").write_text(str(preemptions - 1))
        (SLICE / "state").write_text("PREEMPTED")
        for worker in range(WORKERS):
            shutil.rmtree(SLICE / f"worker-{worker}")
        sys.exit(255)
    workers = range(WORKERS) if given["worker"] == "all" else [int(given["worker"])]
    codes = [
        subprocess.run(["bash", "-c", given["command"]], cwd=SLICE / f"worker-{w}", check=False).returncode
        for w in workers
    ]
    sys.exit(1 if any(codes) else 0)  # one status of its own, whatever the workers' are


if __name__ == "__main__":
    assert sys.argv[1:4] == ["compute", "tpus", "tpu-vm"], sys.argv
    verb, rest = sys.argv[4], sys.argv[5:]
    with (SLICE / "calls").open("a") as calls:
        calls.write(verb + "\n")
    {"create": create, "delete": delete, "describe": describe, "scp": scp, "ssh": ssh}[verb](rest)
