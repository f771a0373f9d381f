"""Long tables against what the reader gives."""

import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from jaxplain.errors import JaxplainError
from jaxplain.export import main as export
from jaxplain.store.formats.neurons import layers_of, neuron_blocks, neuron_count
from jaxplain.store.schema import STATISTICS
from tests.store.formats import stores

KINDS = ("max", "min", "random", "quantile")


@pytest.fixture(scope="module", params=[None, 2], ids=["plain", "experts"])
def store(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    store = stores.write(folder / "exemplars.zarr", splits=("train", "valid"), experts=request.param)
    stores.explain(store, experts=request.param is not None)
    return store


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "tables"
    export([store.zarr_path, str(out), "--format", "parquet", "--quiet"])
    return out


def test_exemplars_have_every_value(store, folder):
    rows = iter(
        pq.read_table(folder / "exemplars")
        .sort_by(
            [("split", "ascending"), ("layer", "ascending"), ("expert", "ascending"), ("neuron", "ascending")]
        )
        .to_pylist()
    )
    for name in store.splits:
        split = store[name]
        for neuron in map(split.neuron_called, stores.names(split)):
            found = [next(rows) for kind in KINDS for _ in neuron.exemplars(kind)]
            expected = [(kind, e) for kind in KINDS for e in neuron.exemplars(kind)]
            by_rank = {(row["kind"], row["rank"]): row for row in found}
            for kind, e in expected:
                row = by_rank[kind, e.rank]
                assert (row["split"], row["layer"], row["expert"], row["neuron"]) == (
                    name,
                    neuron.layer,
                    neuron.expert,
                    neuron.index,
                )
                assert (row["score"], row["sequence"], row["corpus"]) == (e.score, e.sequence, e.corpus)
                assert (row["document"], row["start"]) == (e.document, e.start)
                assert (row["tokens"], row["token_strings"]) == (e.tokens.tolist(), e.token_strings)
                assert row["activations"] == [None if np.isnan(a) else a for a in e.activations.tolist()]
                stratum = None if row["stratum_from"] is None else (row["stratum_from"], row["stratum_to"])
                assert stratum == e.stratum
    assert next(rows, None) is None


def test_statistics_and_quantiles(store, folder):
    statistics, quantiles = (pd.read_parquet(folder / name) for name in ("statistics", "quantiles"))
    split = store["valid"]
    axes = ["split", "layer", "neuron"] if split.experts is None else ["split", "layer", "expert", "neuron"]
    indexed, levels = statistics.set_index(axes), quantiles.set_index([*axes, "level"])
    assert len(statistics) == 2 * len(stores.names(split))
    for name in stores.names(split):
        neuron = split.neuron_called(name)
        for statistic in STATISTICS:
            assert indexed.loc[("valid", *name), statistic] == np.float32(getattr(neuron.stats, statistic))
        for level, value in neuron.quantiles.items():
            assert levels.loc[("valid", *name, level), "value"] == np.float32(value)


def test_explanations_and_scores(folder):
    explanations = pd.read_parquet(folder / "explanations.parquet")
    assert explanations["text"].tolist() == ['words that "rise" <b>', "what falls"]
    assert len(pq.read_table(folder / "scores.parquet")) == 0


def test_one_split_some_layers_few_ranks(store, tmp_path, capsys):
    out = tmp_path / "out"
    export(
        [
            *(store.zarr_path, str(out), "--format", "parquet", "--split", "valid"),
            *("--layers", "0:2", "--limit", "1"),
        ]
    )
    table = pd.read_parquet(out / "exemplars")
    assert set(table["split"]) == {"valid"}
    assert set(table["layer"]) == {1}
    assert set(table[table["kind"] != "quantile"]["rank"]) == {0}
    assert f"{len(table):,} exemplars" in capsys.readouterr().out


def test_what_was_there_stays_until_the_end(store, tmp_path, monkeypatch):
    from jaxplain.store.formats import tables

    out = tmp_path / "out"
    command = [store.zarr_path, str(out), "--format", "parquet", "--quiet"]
    export(command)
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(JaxplainError, match="exists already"):
        export(command)

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "write_parquet_tables", broken)
    with pytest.raises(JaxplainError, match="cannot be written: No space left on device"):
        export([*command, "--overwrite", "--limit", "1"])
    assert sorted(path.name for path in out.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    export([*command, "--overwrite", "--limit", "1"])
    assert pd.read_parquet(out / "exemplars").query("kind == 'max'")["rank"].max() == 0


def test_explanations_of_another_store_are_not_taken_for_its_own(store, tmp_path):
    other = stores.write(tmp_path / "exemplars.zarr", kinds=("max",))
    shutil.copy(store.explanations_path, tmp_path)
    with pytest.raises(JaxplainError, match="holds explanations of another store"):
        export([other.zarr_path, str(tmp_path / "out"), "--format", "parquet", "--quiet"])
    assert not (tmp_path / "out").exists()


def test_a_result_does_not_take_the_stores_place(store, tmp_path):
    with pytest.raises(JaxplainError, match="which is read; choose another folder"):
        export([store.zarr_path, store.zarr_path, "--format", "parquet", "--overwrite"])
    folder = str(store.explanations_path.parent)
    with pytest.raises(JaxplainError, match="which is read; choose another folder"):
        export([store.zarr_path, folder, "--format", "parquet", "--overwrite"])


def test_splits_may_have_other_layers(store):
    assert layers_of(store["train"], [4, 99, 1]) == [4, 1]
    assert neuron_count(store["train"], [99]) == 0
    assert list(neuron_blocks(store["train"], kinds=["max"], layers=[99])) == []


def test_a_table_of_explanations_that_is_there_stays_unless_told(store, tmp_path):
    out = tmp_path / "all.csv"
    out.write_text("mine")
    with pytest.raises(JaxplainError, match=r"all\.csv exists already"):
        export([store.zarr_path, str(out), "--format", "explanations"])
    assert out.read_text() == "mine"
    export([store.zarr_path, str(out), "--format", "explanations", "--overwrite"])
    assert out.read_text().startswith("id,layer")
