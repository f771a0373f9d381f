"""Replies on disk, by what was asked of whom: the same request is never paid for twice."""

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxplain.errors import JaxplainError, first_line
from jaxplain.explainers.replies import Reply


class ReplyCache:
    """A SQLite file that several processes may use at once; use as a context manager."""

    def __init__(self, path: Path, *, fresh: bool = False):
        """With `fresh`, replies are kept, but none is given."""
        self._fresh = fresh
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, created REAL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise JaxplainError(
                f"the cache of replies at {path} cannot be used: {first_line(error)}."
            ) from error

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, key: str) -> Reply | None:
        """The reply to an earlier request, at no cost."""
        if self._fresh:
            return None
        # A damaged row, or one of another version, is as good as none.
        with contextlib.suppress(sqlite3.Error, ValueError, TypeError):
            row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return Reply(**json.loads(row[0]) | {"cached": True, "cost_usd": 0.0})
        return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        with contextlib.suppress(sqlite3.Error):  # a full disk costs money later, but no work now
            self._connection.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?)",
                (key, json.dumps(dataclasses.asdict(reply)), time.time()),
            )


def cache_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a reply: provider, model, parameters and messages."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
