"""The bar of a run that goes on tells how fast this run is, not what was done before it."""

import time

from jaxplain.progress import progress_bars


def test_what_was_done_before_is_not_this_runs_speed():
    with progress_bars(enabled=True)(total=1000, initial=900, desc="read", unit="sequences") as bar:
        time.sleep(0.1)
        bar.update(1)
        told = bar.format_dict
    per_minute = float(told["pace"].split()[0].replace(",", ""))
    assert 0 < per_minute <= 600


def test_a_bar_that_is_not_shown_tells_its_count():
    with progress_bars(enabled=False)(total=10, desc="read", unit="sequences") as bar:
        bar.update(1)
        assert bar.format_dict["elapsed"] == 0
