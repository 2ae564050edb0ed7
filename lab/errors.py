"""What the user is told, and the exit code of a program."""

import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """Invalid user input. The message is one line: what is wrong and what to do."""


class CodeError(UserError):
    """The user's code raised an exception, which is __cause__: its traceback is printed too."""


def one_line(error: BaseException) -> str:
    """Its message, after its type unless it is a UserError."""
    reason = " ".join(str(error).split())
    return reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"


def guarded(do: Callable[[], int]) -> int:
    """-> the exit code of `do`, or 2 for a UserError, which is printed, or 128 + signal."""
    before = signal.signal(signal.SIGTERM, _terminated)
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


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def _terminated(number: int, frame: Any) -> None:
    raise Terminated
