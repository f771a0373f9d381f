"""Fetching the files of a Zenodo record: checked by the record's own checksums, resumed where cut off."""

import hashlib
import http.client
import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxplain.errors import JaxplainError, first_line

API = "https://zenodo.org/api/records"

_CHUNK = 2**20


def fetch_files(
    record: int,
    names: Sequence[str],
    folder: Path,
    *,
    md5: Mapping[str, str],
    api: str = API,
) -> list[Path]:
    """Fetch files of a record into a folder; the paths of those that were not there yet.

    A file has its name only when it is whole; before, it is `NAME.part`, and the next call goes on with that.
    What is there already is checked, and not fetched again. The record states size and MD5 of each file (of a
    published record they never change); `md5` gives checksums of your own, which must agree too.

    Raises JaxplainError where the record or a file cannot be had, or is not as its checksum says.
    """
    stated = _stated_files(f"{api.rstrip('/')}/{record}", names)
    folder.mkdir(parents=True, exist_ok=True)
    fetched = []
    for name in names:
        size, checksum, url = stated[name]
        if md5.get(name, checksum).lower() != checksum:
            raise JaxplainError(
                f"the MD5 given for {name} is {md5[name]}, but record {record} states {checksum}; "
                "check which version of the record you want."
            )
        whole = folder / name
        if whole.exists():
            _check(whole, checksum, remedy="move it away, and run this again")
            continue
        part = folder / f"{name}.part"
        _download(url, part, size)
        try:
            _check(part, checksum, remedy="nothing was kept, so run this again")
        except JaxplainError:
            part.unlink()
            raise
        part.rename(whole)
        fetched.append(whole)
    return fetched


def _stated_files(url: str, names: Sequence[str]) -> dict[str, tuple[int, str, str]]:
    """Size, MD5 and address of each file, as the record states them."""
    try:
        with _open(url) as response:
            files = {file["key"]: file for file in json.load(response)["files"]}
        stated = {
            name: (int(file["size"]), _md5_of(file["checksum"]), str(file["links"]["self"]))
            for name, file in files.items()
            if name in names
        }
    except (KeyError, TypeError, ValueError) as error:
        raise JaxplainError(
            f"{url} does not answer like a Zenodo record ({type(error).__name__}: {first_line(error)}); "
            "fetch the files with a browser."
        ) from error
    missing = [name for name in names if name not in stated]
    if missing:
        raise JaxplainError(f"{url} has no file {', '.join(missing)}; check the record's number.")
    return stated


def _md5_of(checksum: str) -> str:
    algorithm, _, digest = checksum.partition(":")
    if algorithm != "md5":
        raise ValueError(f"checksum {checksum}")
    return digest.lower()


def _download(url: str, part: Path, size: int) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have < size:
        headers = {"Range": f"bytes={have}-"} if have else {}
        with _open(url, headers) as response, part.open("ab") as file:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                file.truncate(0)  # the server sends it all again
            while chunk := _next_chunk(response):
                file.write(chunk)
        have = part.stat().st_size
    if have < size:
        raise JaxplainError(
            f"the download of {part.name.removesuffix('.part')} was cut off after {have} of {size} bytes; "
            "run this again, and it goes on from there."
        )


def _next_chunk(response: Any) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException):
        return b""  # what came before is kept, and the size tells


def _check(path: Path, checksum: str, *, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != checksum:
        raise JaxplainError(f"{path} has MD5 {found} where {checksum} is stated; {remedy}.")


def _open(url: str, headers: Mapping[str, str] | None = None) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=60)
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        raise JaxplainError(f"{url} could not be fetched: {first_line(error)}. Check the network.") from error
