"""Check that an agent keeps the contract and has none of the common bugs.

    python -m lab.check agents/mine.py                        prints one line per check
    python -m lab.check agents/mine.py --tau 0.01 --cuda      the agent's settings are flags

Only the agent's public methods are used. To be fast, settings with the usual names (batch_size,
*_width, *_lr, ...) are changed; flags override that. Exit code: 0 if all checks passed, 1 if some
failed, 2 on bad input.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lab.accelerate import check_device, prepare_process
from lab.agent import load_agent
from lab.check.checks import CHECKS, Check, Failed
from lab.check.driver import AgentUnderTest, small
from lab.command_line import config_failed, read_flags, read_line
from lab.errors import UserError, first_line, guarded
from lab.settings import plain


@dataclass(frozen=True)
class Options:
    agent: tyro.conf.Positional[str] = "agents/sac.py"  # the agent's file
    cuda: bool = False  # run the checks on the GPU


def parse(argv: Sequence[str]) -> AgentUnderTest:
    """The agent with fast settings, or its defaults if it rejects those. UserError on bad flags."""
    index = read_line(argv, Options).agent
    path = Options.agent if index is None else argv[index]
    module = load_agent(path)
    try:
        defaults = module.Config()
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: every field of Config needs a default: {error}") from error
    except Exception as error:
        raise config_failed(path, error) from error
    reduced = small(plain(defaults))
    try:
        return _subject(argv, index, dataclasses.replace(defaults, **reduced))
    except ValueError:
        return _subject(argv, index, defaults)


def _subject(argv: Sequence[str], index: int | None, defaults: Any) -> AgentUnderTest:
    options, config = read_flags(argv, index, Options(), defaults, __doc__)
    device = "cuda" if options.cuda else "cpu"
    check_device(device)
    subject = AgentUnderTest(options.agent, config, device)
    subject.make()
    return subject


def run(argv: Sequence[str]) -> int:
    """Run and print all checks -> exit code."""
    prepare_process()
    subject, started, passed = parse(argv), time.monotonic(), 0
    defaults = plain(load_agent(subject.path).Config())
    changed = [f"{name} {x}" for name, x in subject.config.items() if x != defaults[name]]
    print(f"{subject.path} with {', '.join(changed) or 'default settings'}", flush=True)
    live = sys.stdout.isatty()
    for name, fn in CHECKS.items():
        print(f"        {name} ...\r" if live else "", end="", flush=True)
        reason = failure(fn, subject)
        passed += reason is None
        line = f"FAILED  {name}: {reason}" if reason else f"passed  {name}"
        print(line + "    " * live, flush=True)
    print(f"{passed} of {len(CHECKS)} checks passed in {time.monotonic() - started:.0f} s")
    return 0 if passed == len(CHECKS) else 1


def failure(fn: Check, subject: AgentUnderTest) -> str | None:
    """The reason if the check fails, in one line; None if it passes."""
    try:
        fn(subject)
        return None
    except (Failed, UserError) as error:
        return str(error).removeprefix(f"{Path(subject.path).name} breaks the contract: ")
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"

if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
