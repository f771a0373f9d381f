"""SIGTERM, by which clusters announce that they take a machine back."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jaxplain.errors import Stopped

_SECONDS_TO_RETRY = 0.05


class StopRequest:
    """Whether SIGTERM has come; heard within the context."""

    def __init__(self):
        self.requested = False
        self._at_once, self._message = False, ""

    def __enter__(self) -> "StopRequest":
        # Python hears signals in its main thread only.
        self._heard = threading.current_thread() is threading.main_thread()
        if self._heard:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._heard:
            signal.signal(signal.SIGTERM, self._before)

    @contextlib.contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Work that leaves nothing to save: a request raises Stopped with the message in the midst of it."""
        if self.requested:
            raise Stopped(message)
        self._message = message
        self._at_once = True
        try:
            yield
        except Exception:
            # Processes that work for this one hear the signal too, and fail of it first.
            if self.requested:
                raise Stopped(message) from None
            raise
        finally:
            self._at_once = False

    def _hear(self, _: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._at_once:
            return
        if _ignores_exceptions(frame):
            again = threading.Timer(_SECONDS_TO_RETRY, os.kill, (os.getpid(), signal.SIGTERM))
            again.daemon = True
            again.start()
            return
        self._at_once = False
        raise Stopped(self._message)


def _ignores_exceptions(frame: FrameType | None) -> bool:
    """Whether Python would print an exception that is raised here, and go on: while it collects garbage."""
    while frame is not None:
        if frame.f_code.co_name in ("__del__", "_xla_gc_callback"):
            return True
        frame = frame.f_back
    return False
