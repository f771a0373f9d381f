"""Slurm on one machine, as far as jaxplain's scripts use it: jobs run at once, in order, for real.

Called by the name sbatch, srun or scontrol (links to this file). Jobs, logs and requeues are kept in the
folder $SLURM_STUB. What real Slurm would not understand is refused.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["SLURM_STUB"])
SWITCHES = {"--parsable", "--requeue"}
VALUES = {
    "sbatch": {
        *(
            "--array",
            "--dependency",
            "--kill-on-invalid-dep",
            "--wrap",
            "--job-name",
            "--output",
            "--open-mode",
        ),
        *("--signal", "--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--time", "--partition"),
    },
    "srun": {"--kill-on-bad-exit", "--wait"},
}
MOST_RESTARTS = 5


def parse(program, words):
    """Options and what follows them."""
    options, words = {}, list(words)
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).partition("=")
        if name in SWITCHES and program == "sbatch":
            options[name] = True
        elif name in VALUES[program]:
            options[name] = value if equals else words.pop(0)
        else:
            sys.exit(f"{program}: unrecognized option '{name}'")
    return options, words


def sbatch(words):
    options, rest = parse("sbatch", words)
    STATE.mkdir(exist_ok=True)
    job = 100 + len(list(STATE.glob("job-*")))
    folder = STATE / f"job-{job}"
    folder.mkdir()
    script = folder / "slurm_script"  # as Slurm does, the job runs a copy
    if "--wrap" in options:
        script.write_text(f"#!/bin/sh\n{options['--wrap']}\n")
    else:
        shutil.copy(rest[0], script)
        lines = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
        options = parse("sbatch", [word for line in lines for word in line.split()])[0] | options
    print(job if "--parsable" in options else f"Submitted batch job {job}", flush=True)
    if not dependency_holds(options.get("--dependency")):
        if options.get("--kill-on-invalid-dep") != "yes":
            sys.exit("the job would wait for ever")
        (folder / "status").write_text("never")
        return
    first, _, last = options.get("--array", "none").partition("-")
    tasks = [None] if first == "none" else range(int(first), int(last) + 1)
    codes = [run_task(job, folder, options, rest[1:], task) for task in tasks]
    (folder / "status").write_text(str(max(codes)))


def dependency_holds(dependency):
    if dependency is None:
        return True
    kind, _, number = dependency.partition(":")
    assert kind == "afterok", kind
    return (STATE / f"job-{int(number)}" / "status").read_text() == "0"


def run_task(job, folder, options, arguments, task):
    # One task of an array has the array's own number; requeueing that would requeue every task.
    number = job if task in (None, 0) else 1000 * job + task
    name = str(job) if task is None else f"{job}_{task}"
    environment = os.environ | {
        "SLURM_JOB_ID": str(number),
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_NTASKS": str(int(options.get("--nodes", 1)) * int(options.get("--ntasks-per-node", 1))),
    }
    if task is not None:
        environment |= {"SLURM_ARRAY_JOB_ID": str(job), "SLURM_ARRAY_TASK_ID": str(task)}
    for restart in range(MOST_RESTARTS):
        command = ["bash", str(folder / "slurm_script"), *arguments]
        with (STATE / f"log-{number}").open("a") as log:
            code = subprocess.run(
                command,
                env=environment | {"SLURM_RESTART_COUNT": str(restart)},
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        requeued = STATE / f"requeued-{name}"
        if not requeued.exists():
            return code
        requeued.unlink()
    return code


def srun(words):
    _, command = parse("srun", words)
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": str(number),
                "SLURM_STEP_NODELIST": "localhost",
            },
        )
        for number in range(int(os.environ["SLURM_NTASKS"]))
    ]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    sys.exit(max(task.wait() for task in tasks))


def scontrol(words):
    assert words[0] == "requeue", words
    (STATE / f"requeued-{words[1]}").touch()


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:])
