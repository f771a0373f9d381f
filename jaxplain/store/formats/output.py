"""Folders and files that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxplain.errors import JaxplainError
from jaxplain.store.files import Files, partial_name
from jaxplain.store.reader import Store


@contextlib.contextmanager
def new_folder(out: Path, *, sources: Sequence[str | Path], overwrite: bool) -> Iterator[Path]:
    """A folder to write in that gets the name `out` at the end, and is removed where that is not reached.

    Raises JaxplainError where `out` is there and is not to be replaced, holds one of the `sources` that is
    read, or cannot be written.
    """
    require_new(out, sources=sources, overwrite=overwrite)
    out = out.absolute()
    partial = Path(partial_name(out))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        Files(partial).rename_to(Files(out))
    except OSError as error:
        raise JaxplainError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A path to write to that gets the name `out` at the end.

    Raises JaxplainError where that name is taken and not to be replaced, or it cannot be written.
    """
    require_no_file(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.partial")
    try:
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise JaxplainError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def require_no_file(out: Path, *, overwrite: bool) -> None:
    """Raise JaxplainError where something has the name `out` and is not to be replaced."""
    if out.exists() and not overwrite:
        raise JaxplainError(f"{out} exists already; choose another name, or replace it with --overwrite.")


def require_new(out: Path, *, sources: Sequence[str | Path], overwrite: bool) -> None:
    """Raise JaxplainError unless `out` is free, or may be replaced without losing a source."""
    for source in sources:
        if "://" not in str(source) and Path(source).resolve().is_relative_to(out.resolve()):
            raise JaxplainError(f"{out} holds {source}, which is read; choose another folder for the result.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise JaxplainError(f"{out} exists already; choose another name, or replace it with --overwrite.")
    if not out.is_dir():
        raise JaxplainError(f"{out} is a file; choose another name for the folder.")


def require_no_experts(store: Store, form: str, instead: str) -> None:
    """Raise JaxplainError where the subject is a mixture of experts."""
    if store[store.splits[0]].experts is not None:
        raise JaxplainError(
            f"{store.attributes['subject']['id']} is a mixture of experts, and {form} has no place for an "
            f"expert; use {instead}."
        )
