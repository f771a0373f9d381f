"""Headless Chromium, driven by its own driver, and what it asked for over the network."""

import json
import os
import shutil

import pytest


def open_browser():
    """A browser; the test is skipped, with the reason, where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra `test`)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: chromium and chromedriver are not on PATH (in Debian chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,800"]
    # Chromium's sandbox does not work for root, as which containers run.
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
    for argument in [*arguments, "--no-first-run", "--disable-background-networking"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def requests_of(browser):
    """The addresses that pages asked for since the last time."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def complaints_of(browser):
    """What the browser complained of since the last time: errors, scripts and styles it would not take."""
    return [entry["message"] for entry in browser.get_log("browser")]
