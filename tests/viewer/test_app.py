"""What the server lets through: its own pages, to its own machine."""

import numpy as np
import pytest

import jaxplain
from jaxplain.store.files import Files
from jaxplain.viewer.app import make_app
from jaxplain.viewer.site import Site
from tests.viewer import runs
from tests.viewer.conftest import client_of


@pytest.mark.parametrize(
    "path",
    [
        "/../explanations.sqlite",
        "/assets/../pages.py",
        "/assets/..%2fpages.py",
        "/assets/%2e%2e/%2e%2e/view.py",
        "/assets/..%5cpages.py",
        "/assets//etc/passwd",
        "/assets/search.js",
        "/assets/style.css%00",
        "/neuron/../../etc/passwd",
        "/neuron/train/..%2f..%2f..%2fetc%2fpasswd",
        "/neuron/%2e%2e/0.1.html",
        "/neuron/train%2f..%2ftrain/0.1.html",
        "/overview/..%2findex.html",
        "/exemplars.zarr/zarr.json",
        "/explanations.sqlite",
        "//etc/passwd",
    ],
)
def test_no_address_leads_to_a_file(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "import" not in answer.text


@pytest.mark.parametrize("path", ["/", "/neuron/train/0.1.html", "/search.html", "/assets/view.js", "/no"])
def test_pages_may_load_nothing_from_elsewhere(client, path):
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
    assert policy["img-src"] == "data:"
    assert policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", ""])
def test_other_names_of_this_machine_are_refused(client, host):
    assert client.get("/", headers={"host": host}).status_code == 400
    for own in ("localhost:8000", "127.0.0.1:1234", "[::1]:8000"):
        assert client.get("/", headers={"host": own}).status_code == 200


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_nothing_can_be_written(client, method):
    assert getattr(client, method)("/search.html").status_code == 405


def test_a_store_whose_split_is_no_name_is_refused(tmp_path, run):
    store = jaxplain.open_store(run)
    store.attributes["config"]["exemplars"]["splits"] = ["../../etc"]
    with pytest.raises(jaxplain.JaxplainError, match=r"split '\.\./\.\./etc', which is no name"):
        make_app(Site(store))


def test_a_page_reads_no_more_than_it_shows(run, monkeypatch):
    """The arrays read, by their shapes; statistics of all neurons are read once, exemplars of one neuron."""
    read = []
    original = Files.read

    def counting(self, *parts):
        values = original(self, *parts)
        read.extend(value.shape for value in values)
        return values

    monkeypatch.setattr(Files, "read", counting)
    client = client_of(run)
    held = (len(runs.LAYERS), len(runs.NEURONS))
    client.get("/")
    assert sorted(shape for shape in read if len(shape) > 1) == [held] * 3, "count, fraction active, kurtosis"
    read.clear()
    client.get("/")
    client.get("/search.html?by=kurtosis&from=3&sort=fraction_active")
    assert [shape for shape in read if len(shape) > 1] == [held], "the mean, which a result shows"
    read.clear()
    client.get("/neuron/train/0.1.html")
    most = max(int(np.prod(shape)) for shape in read if shape[:1] != (sum(map(len, runs.WORDS)),))
    assert most == runs.K * runs.TOKENS
