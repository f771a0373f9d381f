"""Files and arrays at a path or URL (local, gs://, s3://, http(s)://), by tensorstore."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import tensorstore as ts

from jaxplain.errors import JaxplainError, first_line
from jaxplain.store.schema import ArraySpec

_READ_CACHE_BYTES = 2**28
_RETRIES = 5  # each after twice the time of the one before, from a second on


def location(path: str | Path) -> str:
    """The URL of a path; URLs stay as they are."""
    text = str(path)
    url = text if "://" in text else Path(text).expanduser().resolve().as_uri()
    return url.rstrip("/") + "/"


def _kvstore(url: str) -> str | dict[str, str]:
    """What tensorstore opens for a URL. S3 is where AWS's own variables say, such as a MinIO server."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not (endpoint and url.startswith("s3://")):
        return url
    bucket, _, path = url.removeprefix("s3://").partition("/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return {
        "driver": "s3",
        "bucket": bucket,
        "path": unquote(path),
        "endpoint": endpoint,
        **({"aws_region": region} if region else {}),
    }


def _reason(error: BaseException) -> str:
    return re.sub(r"\s*\[.*", "", first_line(error)).rstrip(".")


def partial_name(path: str | Path) -> str:
    """Where a store grows until it is complete."""
    return f"{str(path).rstrip('/')}.partial"


class Files:
    """A folder at a URL. Of what is read from it, `cache_bytes` are kept for the next time."""

    def __init__(self, path: str | Path, *, cache_bytes: int = _READ_CACHE_BYTES):
        self.url = location(path)
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": cache_bytes},
                "http_request_retries": {"max_retries": 3},
                "s3_request_retries": {"max_retries": _RETRIES},
                "gcs_request_retries": {"max_retries": _RETRIES},
            }
        )
        try:
            self._store = ts.KvStore.open(_kvstore(self.url), context=self._context).result()
        except ValueError as error:
            raise JaxplainError(f"{path} is not a path or URL that can be opened: {error}.") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a failure to write within (permissions, a full disk, a lost network) into one sentence."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise JaxplainError(
                f"{self.url} could not be written: {_reason(error)}; make room or choose another "
                "output, and run again."
            ) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn a failure to read within (a torn or damaged store, a lost network) into one sentence."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise JaxplainError(
                f"{self.url} could not be read: {_reason(error)}; the store is damaged or out of reach."
            ) from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file's contents; None where there is no such file."""
        with self._reading():
            result = self._store.read(name).result()
            return json.loads(result.value) if result.state == "value" else None

    def write_json(self, name: str, contents: dict[str, Any]) -> None:
        """Write a JSON file, atomically."""
        with self._writing():
            self._store.write(name, json.dumps(contents, indent=1).encode()).result()

    def is_empty(self) -> bool:
        """Whether the folder holds no files, or is not there."""
        with self._writing():
            return not self._store.list().result()

    def delete_all(self, within: str = "") -> None:
        """Remove every file in the folder, or in one within it."""
        with self._writing():
            if self.is_local:
                # What writers that were killed left behind, tensorstore neither lists nor removes.
                shutil.rmtree(self._local / within, ignore_errors=True)
            prefix = f"{within}/" if within else ""
            keys = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0" if prefix else "")  # "0" follows "/"
            self._store.delete_range(keys).result()

    def delete_locks(self) -> None:
        """Remove what writers that were killed left of files that they had begun."""
        if self.is_local:
            for lock in self._local.rglob("*.__lock"):
                lock.unlink(missing_ok=True)

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a local disk."""
        return self.url.startswith("file://")

    @property
    def _local(self) -> Path:
        return Path(unquote(self.url[len("file://") : -1]))

    def rename_to(self, other: "Files") -> None:
        """Give a local folder another one's name, and remove that one last of all."""
        with self._writing():
            source, target = self._local, other._local
            replaced = target.with_name(f"{target.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            if target.exists():
                target.rename(replaced)
            source.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)

    def create_array(self, name: str, spec: ArraySpec) -> ts.TensorStore:
        """Make an array, in place of any of that name."""
        with self._writing():
            return self._open(name, metadata=spec.metadata(), create=True, delete_existing=True)

    def resize_array(self, array: ts.TensorStore, rows: int) -> ts.TensorStore:
        """The array with another length of its first axis."""
        with self._writing():
            return array.resize(exclusive_max=[rows, *array.shape[1:]]).result()

    def write(self, *targets: tuple[ts.TensorStore, np.ndarray]) -> None:
        """Write values to (parts of) arrays, all at once, and wait for them."""
        with self._writing():
            for future in [array.write(values) for array, values in targets]:
                future.result()

    def open_array(self, name: str, *, write: bool = False) -> ts.TensorStore:
        """Open an array for reading, or for writing too."""
        with self._reading():
            return self._open(
                name, read=True, write=write, recheck_cached_data="open", recheck_cached_metadata="open"
            )

    def read(self, *parts: ts.TensorStore) -> list[np.ndarray]:
        """The values of (parts of) arrays, read all at once."""
        with self._reading():
            return [np.asarray(future.result()) for future in [part.read() for part in parts]]

    def _open(self, name: str, **options: Any) -> ts.TensorStore:
        spec: dict[str, Any] = {"driver": "zarr3", "kvstore": _kvstore(f"{self.url}{name}/")}
        for key in ("metadata", "recheck_cached_data", "recheck_cached_metadata"):
            if key in options:
                spec[key] = options.pop(key)
        return ts.open(spec, context=self._context, **options).result()
