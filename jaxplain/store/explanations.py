"""explanations.sqlite, beside a store: every sample asked for, what came of it, and who is at work.

    store(fingerprint)                the store that the neurons belong to
    recipes(...)                      one row for every config that explanations were made by, and what
                                      it has cost so far
    work(recipe, layer, neuron, ...)  which neurons are done, and which are claimed by a running process
    samples(recipe, layer, neuron, sign, sample, ...)
                                      an explanation, or why there is none: status explained, silent,
                                      refused, unparsable or failed; with prompt, reply, tokens, cost
    messages(...)                     the texts that prompts are made of, each once
    batches(...)                      jobs at a provider's batch API
    explanations_text                 full-text index (FTS5) of explanations
    explanations, failures            views of samples

Where the subject is a mixture of experts, tables and views have a column `expert` before `neuron`.

A neuron's samples are written in one transaction. Several processes may work on one database.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxplain.errors import JaxplainError, first_line
from jaxplain.store.explanation_tables import NEURON_COLUMNS, create_tables
from jaxplain.store.neuron_id import NeuronId

DATABASE_NAME = "explanations.sqlite"
_LEASE_SECONDS = 120.0
_BUSY_SECONDS = 60.0

Status = Literal["explained", "silent", "refused", "unparsable", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """One explanation of a neuron.

    Attributes:
        id: Its number in the database, which scores refer to.
        layer: The neuron's layer.
        index: Its number there.
        expert: Of which expert it is, where the subject is a mixture of experts; else None.
        sign: max explains what drives it up, min what drives it down.
        text: The explanation.
        sample: Number among the explanations that were drawn for this neuron and sign.
        provider: token_table, local, gemini or openai.
        model: The model that answered, as it calls itself; None for token_table.
        style: The prompt's style.
        recipe: Number of the config in the database's table `recipes`.
    """

    id: int
    layer: int
    index: int
    sign: str
    text: str
    sample: int
    provider: str
    model: str | None
    style: str
    recipe: int
    expert: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What came of one request for an explanation; `text` is there if and only if it is `explained`."""

    sign: str
    sample: int
    status: Status
    text: str | None = None
    detail: str | None = None
    reply: str | None = None
    messages: Sequence[tuple[str, str]] = ()
    sequences: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0


class ExplanationDatabase:
    """The database, open for reading and writing, in one process. Use as a context manager.

    `neuron_columns` say in its tables which neuron it is.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, neuron_columns: tuple[str, ...]):
        self.path, self.connection, self.neuron_columns = path, connection, neuron_columns
        self._of_neuron = " AND ".join(f"{column} = ?" for column in ("recipe", *neuron_columns))
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"

    def __enter__(self) -> "ExplanationDatabase":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The connection, for statements that take effect together or not at all."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise JaxplainError(f"{self.path} could not be written: {first_line(error)}.") from error

    # Recipes and what they cost.

    def recipe(self, config: Mapping[str, Any], version: str) -> int:
        """The number of a config; added if it is new. What it holds decides what counts as the same work."""
        text = json.dumps(config, sort_keys=True)
        with self.transaction() as c:
            c.execute(
                "INSERT OR IGNORE INTO recipes (config, jaxplain_version, created) VALUES (?, ?, ?)",
                (text, version, time.time()),
            )
            return c.execute("SELECT id FROM recipes WHERE config = ?", (text,)).fetchone()[0]

    def reserve(
        self, recipe: int, cost_usd: float, *, max_requests: int | None, max_cost_usd: float | None
    ) -> bool:
        """Book a request and the most that it can cost; False where that would exceed a limit."""
        with self.transaction() as c:
            booked = c.execute(
                "UPDATE recipes SET requests = requests + 1, cost_usd = cost_usd + :cost WHERE id = :recipe "
                "AND (:requests IS NULL OR requests < :requests) "
                "AND (:limit IS NULL OR cost_usd + :cost <= :limit + 1e-12)",
                {"cost": cost_usd, "recipe": recipe, "requests": max_requests, "limit": max_cost_usd},
            )
            return booked.rowcount == 1

    def settle(self, recipe: int, reserved_usd: float, cost_usd: float, *, unsent: int = 0) -> None:
        """Put what requests did cost in place of what was booked; `unsent` of them were never sent."""
        with self.transaction() as c:
            c.execute(
                "UPDATE recipes SET cost_usd = max(0, cost_usd + ?), requests = requests - ? WHERE id = ?",
                (cost_usd - reserved_usd, unsent, recipe),
            )

    def spent(self, recipe: int) -> tuple[int, float]:
        """Requests and US dollars so far."""
        return self.connection.execute(
            "SELECT requests, cost_usd FROM recipes WHERE id = ?", (recipe,)
        ).fetchone()

    # Who does which neuron.

    def done(self, recipe: int) -> set[NeuronId]:
        """The neurons that are complete."""
        rows = self.connection.execute(
            f"SELECT {', '.join(self.neuron_columns)} FROM work WHERE recipe = ? AND owner IS NULL", (recipe,)
        )
        return set(map(NeuronId, rows))

    def claim(self, recipe: int, neuron: NeuronId) -> bool:
        """Take a neuron on, unless it is done or a living process has it."""
        key, now = (recipe, *neuron), time.time()
        with self.transaction() as c:
            row = c.execute(f"SELECT owner, expires FROM work WHERE {self._of_neuron}", key).fetchone()
            if row is not None and (row[0] is None or (row[1] > now and _may_live(row[0]))):
                return False
            _insert(c, "INSERT OR REPLACE INTO work", (*key, self.owner, now + _LEASE_SECONDS))
            return True

    @contextlib.contextmanager
    def keeping_claims(self) -> Iterator[None]:
        """Renew this process's claims meanwhile; give up those that are left in the end."""
        stop = threading.Event()

        def renew() -> None:
            with contextlib.closing(_connect(self.path)) as connection:
                while not stop.wait(_LEASE_SECONDS / 4):
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute(
                            "UPDATE work SET expires = ? WHERE owner = ?",
                            (time.time() + _LEASE_SECONDS, self.owner),
                        )

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with self.transaction() as c:
                c.execute("DELETE FROM work WHERE owner = ?", (self.owner,))

    def forget(self, recipe: int, neurons: Iterable[NeuronId]) -> None:
        """Remove what a recipe gave for some neurons, so that it is done again."""
        with self.transaction() as c:
            keys = [(recipe, *neuron) for neuron in neurons]
            for table in ("samples", "work"):
                c.executemany(f"DELETE FROM {table} WHERE {self._of_neuron}", keys)

    # Samples.

    def answered(self, recipe: int, neuron: NeuronId) -> set[tuple[str, int]]:
        """The (sign, sample) pairs that need not be asked for again: all but those that failed."""
        rows = self.connection.execute(
            f"SELECT sign, sample FROM samples WHERE {self._of_neuron} AND status <> 'failed'",
            (recipe, *neuron),
        )
        return {(sign, sample) for sign, sample in rows}

    def finish(self, recipe: int, neuron: NeuronId, samples: Sequence[Sample]) -> None:
        """Write a neuron's samples; it is done unless one of them failed."""
        key, now = (recipe, *neuron), time.time()
        with self.transaction() as c:
            for sample in samples:
                c.execute(
                    f"DELETE FROM samples WHERE {self._of_neuron} AND sign = ? AND sample = ?",
                    (*key, sample.sign, sample.sample),
                )
                _insert(
                    c,
                    "INSERT INTO samples",
                    (
                        None,
                        *key,
                        sample.sign,
                        sample.sample,
                        sample.status,
                        sample.text,
                        sample.detail,
                        sample.reply,
                        json.dumps([_message_id(c, *message) for message in sample.messages]),
                        json.dumps({kind: list(rows) for kind, rows in sample.sequences.items()}),
                        sample.model,
                        sample.input_tokens,
                        sample.output_tokens,
                        sample.cost_usd,
                        now,
                    ),
                )
            if any(sample.status == "failed" for sample in samples):
                c.execute(f"DELETE FROM work WHERE {self._of_neuron}", key)
            else:
                _insert(c, "INSERT OR REPLACE INTO work", (*key, None, None))

    def counts(self, recipe: int) -> dict[str, int]:
        """How many samples of a recipe have each status."""
        rows = self.connection.execute(
            "SELECT status, count(*) FROM samples WHERE recipe = ? GROUP BY status", (recipe,)
        )
        return dict(rows.fetchall())

    def commonest_detail(self, recipe: int, *statuses: Status) -> str | None:
        """The reason that samples with one of the statuses give most often."""
        row = self.connection.execute(
            f"SELECT detail FROM samples WHERE recipe = ? AND status IN ({', '.join('?' * len(statuses))}) "
            "GROUP BY detail ORDER BY count(*) DESC LIMIT 1",
            (recipe, *statuses),
        ).fetchone()
        return row and row[0]

    def explanations(
        self, layer: int | None = None, index: int | None = None, expert: int | None = None
    ) -> list[Explanation]:
        """All explanations, or those of a layer or neuron, in order of neuron, sign, recipe and sample."""
        return list(self.each_explanation(layer, index, expert))

    def each_explanation(
        self, layer: int | None = None, index: int | None = None, expert: int | None = None
    ) -> Iterator[Explanation]:
        """The same, one by one."""
        where, values = self.where_neuron(layer, index, expert)
        names = ", ".join(self.neuron_columns)
        rows = self.connection.execute(
            f"SELECT {names}, explanations.id, sign, text, sample, recipe, model, "
            "json_extract(config, '$.explainer.provider'), json_extract(config, '$.prompt.style') "
            "FROM explanations JOIN recipes ON recipes.id = recipe "
            f"WHERE {where} ORDER BY {names}, sign, recipe, sample",
            values,
        )
        for *named, id_, sign, text, sample, recipe, model, provider, style in rows:
            neuron = NeuronId(named)
            yield Explanation(
                id=id_,
                layer=neuron.layer,
                expert=neuron.expert,
                index=neuron.index,
                sign=sign,
                text=text,
                sample=sample,
                provider=provider,
                model=model,
                style=style,
                recipe=recipe,
            )

    def where_neuron(
        self, layer: int | None, index: int | None, expert: int | None
    ) -> tuple[str, dict[str, int]]:
        """A condition for those of the three that are not None, and the values that it names."""
        given = {"layer": layer, "expert": expert, "neuron": index}
        values = {name: value for name, value in given.items() if value is not None}
        # There is no column of experts where there are none: then nothing is of one.
        conditions = [f"{name} = :{name}" if name in self.neuron_columns else "0" for name in values]
        return " AND ".join(conditions) or "1", values

    def search(self, query: str) -> list[Explanation]:
        """Explanations that match a full-text query, best first (SQLite's FTS5 syntax)."""
        try:
            rows = self.connection.execute(
                "SELECT layer, neuron, samples.id FROM explanations_text "
                "JOIN samples ON samples.id = explanations_text.rowid WHERE explanations_text MATCH ? "
                "ORDER BY rank",
                (query,),
            ).fetchall()
        except sqlite3.OperationalError as error:
            raise JaxplainError(f"{query!r} is no full-text query: {first_line(error)}.") from error
        found = []
        for layer, neuron, id_ in rows:
            found += [e for e in self.explanations(layer, neuron) if e.id == id_]
        return found

    # Batch jobs.

    def add_batch(self, recipe: int, label: str, requests: Sequence[str], reserved_usd: float) -> None:
        """Note a job that is about to be submitted under a label of our own."""
        with self.transaction() as c:
            c.execute(
                "INSERT INTO batches (recipe, label, requests, reserved_usd, created) VALUES (?, ?, ?, ?, ?)",
                (recipe, label, json.dumps(requests), reserved_usd, time.time()),
            )

    def name_batch(self, label: str, name: str) -> None:
        """Note the provider's name for a submitted job."""
        with self.transaction() as c:
            c.execute("UPDATE batches SET name = ? WHERE label = ?", (name, label))

    def settle_batch(self, label: str, cost_usd: float) -> None:
        """Put what a job did cost in place of what was booked; the same again changes nothing."""
        with self.transaction() as c:
            c.execute(
                "UPDATE recipes SET cost_usd = max(0, cost_usd + :cost - reserved_usd) FROM batches "
                "WHERE recipes.id = batches.recipe AND label = :label",
                {"cost": cost_usd, "label": label},
            )
            c.execute("UPDATE batches SET reserved_usd = ? WHERE label = ?", (cost_usd, label))

    def keep_in_batch(self, label: str, requests: Sequence[str]) -> None:
        """Forget a job but for these requests, and all of it where there are none."""
        with self.transaction() as c:
            if requests:
                c.execute("UPDATE batches SET requests = ? WHERE label = ?", (json.dumps(requests), label))
            else:
                c.execute("DELETE FROM batches WHERE label = ?", (label,))

    def batches(self, recipe: int) -> list[tuple[str, str | None, list[str], float]]:
        """Jobs under way: label, the provider's name if known, keys of the requests, and what is booked."""
        rows = self.connection.execute(
            "SELECT label, name, requests, reserved_usd FROM batches WHERE recipe = ? ORDER BY id", (recipe,)
        )
        return [(label, name, json.loads(requests), booked) for label, name, requests, booked in rows]


def open_explanations(
    path: Path, *, fingerprint: str | None = None, subject: str | None = None, experts: bool = False
) -> ExplanationDatabase:
    """Open a database, or create one where `fingerprint` and `subject` of the store are given.

    A new one is for a mixture of `experts`, or for another subject.

    Raises JaxplainError where there is none, or it is not jaxplain's, or belongs to another store.
    """
    if subject is None and not path.exists():
        raise JaxplainError(
            f"there are no explanations at {path}; make some with python -m jaxplain.explain."
        )
    try:
        if fingerprint is not None and subject is not None:
            if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
                raise JaxplainError(f"{path.parent} cannot be written to; name another folder as output.")
            connection = _connect(path)
            _create(connection, fingerprint, subject, version=2 if experts else 1)
        else:
            connection = _connect_reader(path)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in NEURON_COLUMNS:
            raise JaxplainError(
                f"{path} is a database of version {version}, and this jaxplain reads version 1, or 2 for "
                "mixtures of experts."
            )
        kept = connection.execute("SELECT fingerprint, subject FROM store").fetchone()
    except sqlite3.Error as error:
        raise JaxplainError(
            f"{path} is no database of explanations that can be used here: {first_line(error)}."
        ) from error
    if fingerprint is not None and kept[0] != fingerprint:
        connection.close()
        raise JaxplainError(
            f"{path} holds explanations of another store (of {kept[1]}); name another folder."
        )
    return ExplanationDatabase(path, connection, NEURON_COLUMNS[version])


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _connect_reader(path: Path) -> sqlite3.Connection:
    """Open for reading alone; in a folder that cannot be written to, as a file that nobody changes."""
    changing = os.access(path.parent, os.W_OK)
    uri = f"{path.resolve().as_uri()}?{'mode=ro' if changing else 'immutable=1'}"
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)


def _create(connection: sqlite3.Connection, fingerprint: str, subject: str, *, version: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        create_tables(connection, version)
        connection.execute("INSERT INTO store VALUES (?, ?)", (fingerprint, subject))
    connection.execute("COMMIT")


def _insert(connection: sqlite3.Connection, statement: str, values: Sequence[Any]) -> None:
    connection.execute(f"{statement} VALUES ({', '.join('?' * len(values))})", values)


def _message_id(connection: sqlite3.Connection, role: str, content: str) -> int:
    connection.execute("INSERT OR IGNORE INTO messages (role, content) VALUES (?, ?)", (role, content))
    found = connection.execute("SELECT id FROM messages WHERE role = ? AND content = ?", (role, content))
    return found.fetchone()[0]


def _may_live(owner: str) -> bool:
    """False only for a process of this host that is gone."""
    host, process, _ = owner.rsplit(":", 2)
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
