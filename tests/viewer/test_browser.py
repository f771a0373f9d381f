"""The pages in a real browser: they show what they should, and hostile text does nothing."""

import contextlib
import functools
import threading
import time
import warnings

import pytest

import jaxplain
from jaxplain.progress import progress_bars
from jaxplain.viewer.excerpts import LONGEST_TOKEN
from jaxplain.viewer.site import Site
from jaxplain.viewer.static_site import write_site
from tests.viewer import browser as browsers
from tests.viewer import runs


@contextlib.contextmanager
def served(folder):
    """A server of a run's pages on a free port, in a thread; gives its address."""
    import socket

    import uvicorn

    from jaxplain.viewer.app import make_app

    listening = socket.create_server(("127.0.0.1", 0))
    app = make_app(Site(jaxplain.open_store(folder)))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=functools.partial(server.run, sockets=[listening]), daemon=True)
    with contextlib.closing(listening):
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def browser():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the driver leaves sockets to the garbage collector
        found = browsers.open_browser()
    yield found
    found.quit()


@pytest.fixture(scope="module")
def address(run):
    with served(run) as found:
        yield found


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """The same pages as files; gives the address of their folder."""
    out = tmp_path_factory.mktemp("static") / "site"
    write_site(Site(jaxplain.open_store(run)), out, shown=3, progress=progress_bars(enabled=False))
    return out.as_uri()


@pytest.fixture(params=["served", "files"])
def site(request):
    """The pages, served and as files."""
    return request.getfixturevalue("address" if request.param == "served" else "files")


def css(browser, selector):
    return browser.find_elements("css selector", selector)


def visit(browser, url):
    """Open a page of which the browser has nothing to complain."""
    browsers.requests_of(browser)
    browsers.complaints_of(browser)
    browser.get(url)
    assert browsers.complaints_of(browser) == []


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def test_pages_run_nothing_but_their_own(browser, site):
    names = [".".join(map(str, name)) for name in runs.neurons()]
    paths = ["index.html", "search.html?words=say", "search.html?token=*script*"]
    for path in [*paths, *(f"neuron/train/{name}.html" for name in names)]:
        visit(browser, f"{site}/{path}")
        assert browser.execute_script("return typeof window.hacked") == "undefined"
        asked = browsers.requests_of(browser)
        assert asked
        for url in asked:
            assert url.startswith((f"{site}/", "data:,")), "nothing leaves this machine"
        assert css(browser, "main h1")[0].is_displayed()
        style = "return getComputedStyle(document.querySelector('.jaxplain nav .name')).fontWeight"
        assert browser.execute_script(style) == "700", "the style sheet was let in"


def test_hostile_tokens_are_seen_as_text(browser, site):
    seen = ""
    for name in runs.neurons():
        visit(browser, f"{site}/neuron/train/{name.layer}.{name.index}.html")
        seen += browser.find_element("css selector", "main").get_attribute("textContent")
    for token in runs.HOSTILE[:4]:
        assert token.decode() in seen
    assert "[U+202E]gnp.exe" in seen
    assert "w" * LONGEST_TOKEN in seen


def test_no_page_is_wider_than_the_window(browser, site):
    for name in runs.neurons():
        visit(browser, f"{site}/neuron/train/{name.layer}.{name.index}.html?whole=max-0.max-1.max-2")
        width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0


def test_the_value_is_shown_under_the_mouse(browser, site):
    from selenium.webdriver import ActionChains

    visit(browser, f"{site}/neuron/train/3.5.html")
    token = css(browser, "#max .exemplar .text span.p8")[0]
    value = token.get_attribute("title")
    assert float(value) > 0
    tip = browser.find_element("id", "tip")
    assert not tip.is_displayed()
    ActionChains(browser).move_to_element(token).perform()
    assert tip.is_displayed()
    assert tip.text == value
    ActionChains(browser).move_to_element(css(browser, "main h1")[0]).perform()
    assert not tip.is_displayed()
    assert token.get_attribute("title") == value


def test_tokens_are_shaded_in_light_and_dark(browser, site):
    visit(browser, f"{site}/neuron/train/3.5.html")
    colours = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colours[scheme] = [
            browser.execute_script(
                "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor", selector
            )
            for selector in (".legend .p8", ".legend .p1", ".legend .n8", "body")
        ]
        assert len(set(colours[scheme])) == 4
    assert not set(colours["light"]) & set(colours["dark"])
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def all_displayed(tokens):
    """Whether tokens are shown; those that are blanks or nothing take no room."""
    seen = [token for token in tokens if token.get_attribute("textContent").strip()]
    assert seen
    return all(token.is_displayed() for token in seen)


def test_the_rest_of_a_sequence_on_demand_and_a_link_to_this_view(browser, site):
    visit(browser, f"{site}/neuron/train/0.1.html")
    exemplar = css(browser, "#max .exemplar")[0]
    far = exemplar.find_elements("css selector", ".far")
    assert far
    assert not far[0].is_displayed()
    exemplar.find_element("css selector", ".more input").click()
    assert all_displayed(far)
    link = browser.find_element("id", "link").get_attribute("href")
    assert link == browser.current_url
    assert "whole=max-0" in link
    visit(browser, link)
    shown = css(browser, "#max .exemplar")
    assert shown[0].find_element("css selector", ".more input").is_selected()
    assert not shown[1].find_element("css selector", ".more input").is_selected()


def test_an_exemplars_own_link_shows_all_of_it(browser, site):
    visit(browser, f"{site}/neuron/train/0.1.html#min-1")
    far = css(browser, "#min-1 .far")
    assert all_displayed(far)
    assert not css(browser, "#min-0 .far")[0].is_displayed()


def test_arrow_keys_go_to_the_neighbours(browser, site):
    from selenium.webdriver.common.keys import Keys

    visit(browser, f"{site}/neuron/train/0.2.html")
    browser.find_element("css selector", "body").send_keys(Keys.ARROW_RIGHT)
    wait_for(lambda: browser.current_url.endswith("/neuron/train/0.5.html"))
    browser.find_element("css selector", "body").send_keys(Keys.ARROW_LEFT)
    wait_for(lambda: browser.current_url.endswith("/neuron/train/0.2.html"))


def found(browser):
    """The files of the neurons found; in one step, since the page may be on its way to another."""
    links = "document.querySelectorAll('#results tbody td:first-child a')"
    return browser.execute_script(f"return [...{links}].map((a) => a.href.split('/').at(-1))")


def test_search_by_hand(browser, site):
    visit(browser, f"{site}/index.html")
    browser.find_element("css selector", "form.quick [name=words]").send_keys("cats")
    browser.find_element("css selector", "form.quick button").click()
    wait_for(lambda: found(browser) == ["0.1.html"])
    field = browser.find_element("css selector", "#search [name=words]")
    assert field.get_attribute("value") == "cats"
    field.clear()
    browser.find_element("css selector", "#search [name=layer]").send_keys("3")
    browser.find_element("css selector", "#search button").click()
    wait_for(lambda: found(browser) == ["3.1.html", "3.2.html", "3.5.html", "3.8.html"])
    css(browser, "#results tbody a")[0].click()
    wait_for(lambda: browser.current_url.endswith("/neuron/train/3.1.html"))


def test_a_bar_leads_to_its_neurons(browser, site):
    visit(browser, f"{site}/index.html")
    bar = css(browser, ".distribution svg a")[-1]
    count = bar.find_element("css selector", "title").get_attribute("textContent").split(": ")[1]
    browser.execute_script("location.href = arguments[0].href.baseVal", bar)
    wait_for(lambda: "search.html" in browser.current_url and bool(css(browser, "#results .found")))
    assert css(browser, "#results .found")[0].text == count
    assert found(browser)


SEARCHES = [
    "",
    "words=cat",
    "words=cat*",
    "words=%22small+animals%22",
    "words=cafe",
    "words=cat)+OR+(1=1",
    "words=*",
    "token=cat*&kind=min",
    "token=*o*",
    "layer=3",
    "index=5",
    "expert=1",
    "by=mean&from=0.3&to=&sort=mean",
    "by=kurtosis&from=&to=10&by=mean&from=0.2&to=0.9&sort=skewness&order=up",
    "sort=kurtosis",
    "sort=kurtosis&order=up",
    "split=valid&sort=highest",
]


@pytest.mark.parametrize("query", SEARCHES)
def test_files_are_searched_as_the_server_searches(browser, address, files, query):
    answers = []
    for site in (address, files):
        visit(browser, f"{site}/search.html?{query}")
        names = found(browser)
        # How well words match is known to the server's database alone.
        names = sorted(names) if "words" in query else names
        answers.append((css(browser, "#results .found")[0].text, names))
    assert answers[0] == answers[1]
