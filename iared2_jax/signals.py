"""Stopping cleanly: SIGTERM (or Ctrl-C) asks, every loop looks."""

import signal
import threading
from types import FrameType, TracebackType


class Stop:
    """A flag that SIGTERM and SIGINT raise while this is entered as a context.

    The first signal asks the loops to save and return; a second one ends the process at once, the
    way it would without us. The last committed checkpoint is whole either way.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def request(self) -> None:
        """What a signal does; for tests and notebooks."""
        self.requested = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def __enter__(self) -> "Stop":
        # Python allows handlers in the main thread only; elsewhere request() still works.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
