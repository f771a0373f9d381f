"""Pushing to a local stand-in for the hub, and opening what arrived."""

import io

import huggingface_hub.constants
import pyarrow.parquet as pq
import pytest
import yaml

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.export import main as export
from jaxplain.store.formats import hub as pushing
from tests.store.formats import stores
from tests.store.formats.hub_server import serve

REPOSITORY = "someone/neurons"

# The hub's own client, where it sends files over plain HTTP.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = stores.write(tmp_path_factory.mktemp("run") / "exemplars.zarr")
    stores.explain(store)
    return store


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with serve() as (address, hub):
        yield address, hub


def push(store, address, *arguments):
    command = [store.zarr_path, REPOSITORY, "--format", "huggingface", "--endpoint", address]
    export([*command, *arguments])


def unpack(files, folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_what_arrives_opens_as_the_run_that_it_was(store, server, tmp_path, capsys):
    address, hub = server
    push(store, address)
    assert f"{address}/datasets/{REPOSITORY} has it" in capsys.readouterr().out
    assert not hub.private
    unpack(hub.files, tmp_path)
    back = jaxplain.open_store(tmp_path)
    assert back.fingerprint == store.fingerprint
    for name in stores.names(store["train"]):
        ours, theirs = (s["train"].neuron_called(name) for s in (store, back))
        assert theirs.stats == ours.stats
        for kind in back["train"].kinds:
            pairs = zip(ours.exemplars(kind), theirs.exemplars(kind), strict=True)
            assert all(
                stores.counted(store["train"], a) == stores.counted(back["train"], b) for a, b in pairs
            )
    assert [e.text for e in back["train"].neuron(1, 2).explanations()] == [
        'words that "rise" <b>',
        "what falls",
    ]


def test_what_makes_the_store_complete_comes_last(store, server, monkeypatch):
    address, hub = server
    monkeypatch.setattr(pushing, "_FILES_PER_COMMIT", 5)
    push(store, address)
    assert len(hub.commits) > 2
    assert all(len(commit) <= 5 for commit in hub.commits)
    assert hub.commits[-1] == ["exemplars.zarr/zarr.json"]


def test_a_store_that_was_there_goes_first(store, server, tmp_path):
    address, hub = server
    push(store, address)
    hub.files["exemplars.zarr/train/old"] = b"of another store"
    hub.files["notes.txt"] = b"by hand"
    hub.refuse = ("/preupload/", 403)
    with pytest.raises(JaxplainError, match="someone/neurons could not be pushed"):
        push(store, address)
    unpack(hub.files, tmp_path)
    with pytest.raises(JaxplainError, match="there is no store"):
        jaxplain.open_store(tmp_path)
    assert hub.files["notes.txt"] == b"by hand"
    hub.refuse = None
    push(store, address)
    assert "exemplars.zarr/zarr.json" in hub.files
    assert "exemplars.zarr/train/old" not in hub.files


def test_the_card(store, server):
    address, hub = server
    push(store, address)
    _, front, text = hub.files["README.md"].decode().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["pretty_name"] == "Neurons of org/Made-Up-Instruct"
    assert metadata["configs"] == [
        {"config_name": "explanations", "data_files": "explanations.parquet"},
        {"config_name": "scores", "data_files": "scores.parquet"},
    ]
    assert "- Corpora: fineweb, articles" in text
    assert "- Split `train`: 9 sequences, 2 layers x 4 neurons" in text
    assert f'snapshot_download("{REPOSITORY}", repo_type="dataset")' in text
    assert "`explanations.parquet`: 2 rows" in text


def test_explanations_alone(store, server):
    address, hub = server
    push(store, address, "--part", "explanations", "--private")
    assert sorted(hub.files) == ["README.md", "explanations.parquet", "explanations.sqlite", "scores.parquet"]
    assert hub.private
    table = pq.read_table(io.BytesIO(hub.files["explanations.parquet"]))
    assert table["text"].to_pylist() == ['words that "rise" <b>', "what falls"]
    assert "open_store" not in hub.files["README.md"].decode().split("## Explanations")[0]


def test_the_store_alone(store, server):
    address, hub = server
    push(store, address, "--part", "store")
    assert "explanations.sqlite" not in hub.files
    assert "exemplars.zarr/zarr.json" in hub.files


def test_parts_that_are_pushed_one_by_one_stand_on_one_card(store, server):
    address, hub = server
    for part in ("store", "explanations", "store"):
        push(store, address, "--part", part)
    assert {"explanations.sqlite", "exemplars.zarr/zarr.json"} <= hub.files.keys()
    card = hub.files["README.md"].decode()
    assert "open_store" in card
    assert "config_name: explanations" in card
    assert "- `explanations.parquet`\n" in card


def test_explanations_of_another_store_do_not_stay(store, server, tmp_path):
    address, hub = server
    push(store, address)
    push(stores.write(tmp_path / "exemplars.zarr", seed=5), address)
    assert not [name for name in hub.files if name.startswith(("explanations", "scores"))]
    assert "explanations" not in hub.files["README.md"].decode()


def test_a_hub_that_is_not_there_is_one_sentence(store, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(JaxplainError, match="someone/neurons could not be pushed: ") as caught:
        push(store, "http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_the_hub_refuses_is_one_sentence(store, server, status, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    address, hub = server
    hub.refuse = ("/api/repos/create", status)
    with pytest.raises(JaxplainError, match=f"someone/neurons could not be pushed: .*{status}") as caught:
        push(store, address)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_pushed_is_refused(server, tmp_path):
    address, hub = server
    plain = stores.write(tmp_path / "exemplars.zarr")
    with pytest.raises(JaxplainError, match="there are no explanations at"):
        push(plain, address, "--part", "explanations")
    with pytest.raises(JaxplainError, match="--limit is for --format neuron-records or"):
        push(plain, address, "--limit", "3")
    assert hub.files is None
