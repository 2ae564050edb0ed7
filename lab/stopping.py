"""When a run stops before its last step: --stop-at and --stop-plateau.

Both look at the mean evaluation of all seeds, so one process then trains all seeds of an
environment.
"""

from collections.abc import Sequence
from typing import Any


def stops(rules: Any) -> bool:
    """Whether the options, or the job, have such a rule."""
    return rules.stop_at is not None or rules.stop_plateau is not None


def reason_to_stop(rules: Any, means: Sequence[float]) -> str | None:
    """Why the run stops after the last of its evaluations, means over the seeds; None: it goes on.
    `rules` are the options or the job."""
    last = means[-rules.stop_at_evals:]
    if (rules.stop_at is not None and len(last) == rules.stop_at_evals
            and min(last) >= rules.stop_at):
        times = f" in {len(last)} evaluations in a row" if len(last) > 1 else ""
        return f"return {means[-1]:.1f}, at least {rules.stop_at:g}{times}"
    count = rules.stop_plateau
    if count is not None and len(means) > count:
        before, after = max(means[:-count]), max(means[-count:])
        if after <= before + rules.stop_rtol * abs(before):
            return (f"the best of the last {count} evaluations, {after:.1f}, is not "
                    f"{rules.stop_rtol:.1%} above {before:.1f}")
    return None
