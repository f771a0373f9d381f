"""The tables of explanations.sqlite; `explanations` says what is in them."""

import sqlite3
from collections.abc import Iterator

NEURON_COLUMNS: dict[int, tuple[str, ...]] = {1: ("layer", "neuron"), 2: ("layer", "expert", "neuron")}
"""By the database's version, the columns that say which neuron it is."""

_SCHEMA = """
CREATE TABLE store (fingerprint TEXT NOT NULL, subject TEXT NOT NULL);
CREATE TABLE recipes (
    id INTEGER PRIMARY KEY, config TEXT NOT NULL UNIQUE, jaxplain_version TEXT NOT NULL,
    created REAL NOT NULL, requests INTEGER NOT NULL DEFAULT 0, cost_usd REAL NOT NULL DEFAULT 0
);
CREATE TABLE work (
    recipe INTEGER NOT NULL REFERENCES recipes, {columns},
    owner TEXT, expires REAL,
    PRIMARY KEY (recipe, {neuron})
) WITHOUT ROWID;
CREATE TABLE messages (
    id INTEGER PRIMARY KEY, role TEXT NOT NULL, content TEXT NOT NULL, UNIQUE (role, content)
);
CREATE TABLE samples (
    id INTEGER PRIMARY KEY, recipe INTEGER NOT NULL REFERENCES recipes,
    {columns},
    sign TEXT NOT NULL CHECK (sign IN ('max', 'min')), sample INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('explained', 'silent', 'refused', 'unparsable', 'failed')),
    text TEXT CHECK ((status = 'explained') = (text IS NOT NULL) AND trim(text) <> ''),
    detail TEXT, reply TEXT, messages TEXT NOT NULL, sequences TEXT NOT NULL, model TEXT,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost_usd REAL NOT NULL,
    created REAL NOT NULL,
    UNIQUE (recipe, {neuron}, sign, sample)
);
CREATE INDEX samples_of_neuron ON samples ({neuron});
CREATE TABLE batches (
    id INTEGER PRIMARY KEY, recipe INTEGER NOT NULL REFERENCES recipes, label TEXT NOT NULL UNIQUE,
    name TEXT, requests TEXT NOT NULL, reserved_usd REAL NOT NULL, created REAL NOT NULL
);
CREATE VIRTUAL TABLE explanations_text USING fts5 (text, content='samples', content_rowid='id');
CREATE TRIGGER samples_inserted AFTER INSERT ON samples WHEN new.text IS NOT NULL BEGIN
    INSERT INTO explanations_text (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER samples_deleted AFTER DELETE ON samples WHEN old.text IS NOT NULL BEGIN
    INSERT INTO explanations_text (explanations_text, rowid, text) VALUES ('delete', old.id, old.text);
END;
CREATE VIEW explanations AS
    SELECT id, recipe, {neuron}, sign, sample, text, model, cost_usd, created
    FROM samples WHERE status = 'explained';
CREATE VIEW failures AS
    SELECT id, recipe, {neuron}, sign, sample, status, detail, reply, model, created
    FROM samples WHERE status <> 'explained';
"""


def create_tables(connection: sqlite3.Connection, version: int) -> None:
    """Make the tables, and note their version."""
    names = NEURON_COLUMNS[version]
    columns = ", ".join(f"{name} INTEGER NOT NULL" for name in names)
    for statement in statements(_SCHEMA.format(neuron=", ".join(names), columns=columns)):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {version}")


def statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one."""
    statement = ""
    for line in script.strip().splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
