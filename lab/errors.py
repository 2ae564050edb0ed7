"""What the user is told, and the exit code of a program."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """Invalid user input. The message is one line: what is wrong and what to do."""


class RefusedError(UserError):
    """An agent refuses its settings or the environment."""


class CodeError(UserError):
    """The user's code raised an exception, which is __cause__: its traceback is printed too."""


def first_line(error: BaseException) -> str:
    """The first line of its message; "" if it has none."""
    return (str(error).strip().splitlines() or [""])[0]


def one_line(error: BaseException) -> str:
    """Its message, after its type unless it is a UserError."""
    reason = " ".join(str(error).split())
    return reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"


def guarded(do: Callable[[], int]) -> int:
    """-> the exit code of `do`, or 2 for a UserError, which is printed, or 128 + signal."""
    before = signal.signal(signal.SIGTERM, _terminated)
    streams = sys.stdout, sys.stderr
    guard_output()
    try:
        return do()
    except UserError as error:
        if isinstance(error, CodeError) and error.__cause__:
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Output):
                stream.end()
        sys.stdout, sys.stderr = streams


def guard_output() -> None:
    """Let no print fail: neither when the reader or the terminal is gone, as with `| head -1`, nor
    on a full disk, nor on a character that the locale's encoding lacks, which is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None:
            setattr(sys, name, _Output(stream))


class _Output:
    """A text stream that loses what a full disk does not take, and goes to the null device once it
    cannot be written for another reason."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def end(self) -> None:
        """Flush for the last time: Python's own flush at exit must find nothing to do."""
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _attempt(self, do: Callable[[], Any]) -> None:
        try:
            do()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._drop()

    def _drop(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def _terminated(number: int, frame: Any) -> None:
    raise Terminated
