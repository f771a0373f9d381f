"""Checkpoints by themselves: any tree of arrays, a full disk, and what a kill leaves of one."""

import os
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplain.checkpoints import Checkpoints
from jaxplain.errors import JaxplainError

MEBI = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of six mebibytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={6 * MEBI}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def state(seed, size=1000):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.random(size, np.float32)),
        "b": (jnp.asarray(rng.integers(0, 9, 7), jnp.int32), jnp.asarray(rng.random(5) > 0.5)),
        "c": jnp.asarray(rng.random((3, 4)), jnp.float16),
    }


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_newest_are_kept_and_restored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(lambda _: state(0)) is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
        assert checkpoints.steps == (2, 3)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(lambda about: state(0) if about["step"] == 3 else None)
        assert found.step == 3
        assert found.about == {"step": 3}
        assert found.unreadable == []
        assert_equal(found.state, state(3))


def test_one_that_is_being_written_is_waited_for(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1, MEBI), {})
        found = checkpoints.restore(lambda _: state(0, MEBI))
    assert found.unreadable == []
    assert_equal(found.state, state(1, MEBI))


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.save(1, state(2), {})
        assert_equal(checkpoints.restore(lambda _: state(0)).state, state(1))


def test_what_was_not_finished_is_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
    torn = tmp_path / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "part").write_bytes(b"x" * 1000)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(lambda _: state(0)).step == 1
        checkpoints.save(2, state(2), {})
        checkpoints.wait()
        assert not torn.exists()
        assert checkpoints.restore(lambda _: state(0)).step == 2


def save(folder, step, contents):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(step, contents, {})


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_is_intact(small_disk):
    large, kept = 3 * MEBI // 4, small_disk / "kept"
    save(kept, 1, state(1, large))
    filler = small_disk / "filler"
    filler.write_bytes(os.urandom(free(small_disk) - MEBI))
    full = r"a checkpoint could not be written to .*kept: .*[Nn]o space left"
    with pytest.raises(JaxplainError, match=full) as caught:
        save(kept, 2, state(2, large))
    assert "\n" not in str(caught.value)
    filler.unlink()
    with Checkpoints(kept) as checkpoints:
        found = checkpoints.restore(lambda _: state(0, large))
        assert found.step == 1
        assert_equal(found.state, state(1, large))
    save(kept, 2, state(2, large // 2))
    with Checkpoints(kept) as checkpoints:
        assert checkpoints.steps == (1, 2)


def free(folder):
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def look_until_it_fails(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state(1, MEBI), {})
        for _ in range(2000):
            checkpoints.check()
            time.sleep(0.005)


def test_a_failure_in_the_background_is_known_at_the_next_look(small_disk):
    (small_disk / "filler").write_bytes(os.urandom(free(small_disk) - MEBI))
    started = time.monotonic()
    with pytest.raises(JaxplainError, match="could not be written"):
        look_until_it_fails(small_disk / "kept")
    assert time.monotonic() - started < 8
