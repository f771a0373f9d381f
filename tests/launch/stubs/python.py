"""Stands in for the interpreter: notes what commands of jaxplain are called with, and runs the rest.

Calls go as lines of JSON to $CALLS. They end with the statuses in $STATUSES, one after another, then with 0.
`slow` among them stands for a run that ends with 75 when it is told to stop, `short` for one that takes 3
seconds and ends with 75, and with 9 if it is told to stop. Commands named in $REAL are run.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

arguments = sys.argv[1:]
command = arguments[1] if arguments[:1] == ["-m"] else ""
if not command.startswith("jaxplain.") or command in os.environ.get("REAL", "").split():
    os.execv(sys.executable, [sys.executable, *arguments])

stopped = 75 if "slow" in os.environ.get("STATUSES", "") else 9
signal.signal(signal.SIGTERM, lambda *_: sys.exit(stopped))
with Path(os.environ["CALLS"]).open("a+") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.seek(0)
    before = len(calls.readlines())
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SRUN_", "CUDA_"))
    }
    calls.write(
        json.dumps({"command": command, "arguments": arguments[2:], "environment": environment}) + "\n"
    )
statuses = os.environ.get("STATUSES", "").split()
status = statuses[before] if before < len(statuses) else "0"
if status == "slow":
    time.sleep(60)
    sys.exit(1)
if status == "short":
    time.sleep(3)
    sys.exit(75)
sys.exit(int(status))
