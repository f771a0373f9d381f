"""python -m jaxplain.view: what it says, refuses, writes and serves."""

import http.client
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.view import _is_loopback, main
from jaxplain.viewer.peaks import FOLDER, open_index
from tests.viewer import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.make_run(tmp_path_factory.mktemp("run"))


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.putrequest("GET", path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_it_serves_this_machine_alone_until_it_is_interrupted(run):
    command = [sys.executable, "-m", "jaxplain.view", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)\n", line)[1])
        assert get(port, "/neuron/train/0.1.html")[0] == 200
        # As it stands, without a client that would tidy it up first.
        for path in (
            "/../../../../../etc/passwd",
            "/assets/../../../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
        ):
            status, text = get(port, path)
            assert status == 404
            assert "root:" not in text
        assert get(port, "/", Host="evil.example")[0] == 400
        listening = Path("/proc/net/tcp").read_text()
        own = [entry.split()[1] for entry in listening.splitlines()[1:] if entry.split()[3] == "0A"]
        assert f"0100007F:{port:04X}" in own
        assert f"00000000:{port:04X}" not in own
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_a_port_that_is_taken(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(JaxplainError, match=f"cannot listen on 127.0.0.1, port {port}: .*another --port"):
            main([str(run), "--port", str(port)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--exemplars", "0"], "--exemplars is 0"),
        (["--static", "OUT", "--layers", "x"], "--layers is 'x'"),
        (["--static", "OUT", "--layers", "1:3"], "none of the chosen neurons"),
        (["--static", "OUT", "--indices", "100:"], "none of the chosen neurons"),
        (["--explanations", "OUT/nothing"], "there are no explanations at"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
    ],
)
def test_what_is_refused(run, tmp_path, arguments, says):
    arguments = [argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]
    with pytest.raises(JaxplainError, match=re.escape(says)):
        main([str(run), "--quiet", *arguments])
    assert list(tmp_path.iterdir()) == []


def test_no_store(tmp_path):
    with pytest.raises(JaxplainError, match="there is no store at"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["0.1", "0.2", "0.5", "0.7", "0.8", "3.1", "3.2", "3.5", "3.8"]),
        (["--layers", "3", "--indices", "2:6"], ["3.2", "3.5"]),
        (["--explained"], ["0.1", "0.2", "0.5", "0.7"]),
    ],
)
def test_files(run, tmp_path, capsys, arguments, names):
    out = tmp_path / "out"
    main([str(run), "--static", str(out), *arguments])
    assert sorted(path.stem for path in (out / "neuron" / "valid").iterdir()) == names
    files = sum(path.is_file() for path in out.rglob("*"))
    assert re.search(rf"^{files} files, [\d.]+ MB; open .*/out/index.html$", capsys.readouterr().out)


def test_exemplars_on_a_page(run, tmp_path):
    main([str(run), "--static", str(tmp_path / "out"), "--quiet", "--exemplars", "2", "--layers", "0"])
    page = (tmp_path / "out" / "neuron" / "train" / "0.1.html").read_text(encoding="utf-8")
    assert page.count('class="exemplar"') == 3 * 2


def test_many_pages_are_written_only_where_that_is_meant(run, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxplain.view._MANY_PAGES", 10)
    with pytest.raises(JaxplainError, match=r"these are 18 pages, about 0\.0 GB; choose fewer"):
        main([str(run), "--static", str(tmp_path / "out"), "--quiet"])
    main([str(run), "--static", str(tmp_path / "out"), "--quiet", "--all"])
    assert (tmp_path / "out" / "index.html").is_file()


def test_the_index_of_tokens(run, tmp_path, capsys):
    folder = tmp_path / "index"
    arguments = ["--static", str(tmp_path / "out"), "--layers", "0"]
    main([str(run), "--index", "--index-folder", str(folder), *arguments])
    assert f"the index of tokens is in {folder}" in capsys.readouterr().out
    assert open_index(jaxplain.open_store(run), folder) is not None
    assert not (run / FOLDER).exists()
    main([str(run), "--index", "--overwrite", *arguments])
    assert (run / FOLDER / "index.json").is_file()


def test_an_index_takes_no_folder_with_other_things(run, tmp_path, monkeypatch):
    (tmp_path / "precious.txt").write_text("x")
    for folder in (tmp_path, run, "."):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(JaxplainError, match="holds other things than an index of tokens"):
            main([str(run), "--index", "--index-folder", str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    assert (run / "exemplars.zarr").is_dir()


def test_pages_never_replace_what_they_are_made_of(run, monkeypatch):
    for folder in (run, run.parent, "."):
        monkeypatch.chdir(run)
        with pytest.raises(JaxplainError, match="which is read; choose another folder"):
            main([str(run), "--static", str(folder), "--overwrite"])
    assert (run / "exemplars.zarr").is_dir()


def test_a_neuron_of_one_split_alone(tmp_path, capsys):
    path = runs.write_store(tmp_path / "exemplars.zarr")
    zarr.open(path, mode="r+")["train/stats/count"][0, 0] = -1
    main([str(path), "--static", str(tmp_path / "out"), "--layers", "0"])
    pages = tmp_path / "out" / "neuron"
    assert sorted(page.stem for page in (pages / "train").iterdir()) == ["0.2", "0.5", "0.7", "0.8"]
    assert sorted(page.stem for page in (pages / "valid").iterdir()) == ["0.1", "0.2", "0.5", "0.7", "0.8"]


@pytest.mark.parametrize(("host", "is_loopback"), [("127.0.0.2", True), ("::1", True), ("0.0.0.0", False)])
def test_what_is_this_machine_alone(host, is_loopback):
    assert _is_loopback(host) == is_loopback


def test_what_a_missing_package_says(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JaxplainError, match=re.escape("pip install 'jaxplain[view]'")):
        main([str(run)])
