"""The signals that ask a command to stop, as one exception."""

import signal


class Stopped(BaseException):
    """Somebody asked the command to stop. Not an `Exception`, so that nothing on the way takes it for a fault."""


def stop_on_signals() -> None:
    """Raise `Stopped` in the main thread at Ctrl-C, SIGTERM and, on Windows, Ctrl-Break."""

    def stop(*_) -> None:
        raise Stopped

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if number := getattr(signal, name, None):
            signal.signal(number, stop)
