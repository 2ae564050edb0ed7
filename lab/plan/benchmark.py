"""Estimate the time of a training run from short measurements of its parts.

The parts are start-up, steps before the first update, steps and updates after it, and evaluations.
Environments, agent and the order of calls are those of the real run. Only the warm-up is shorter:
the agent observes one transition again and again until it updates.
"""

import contextlib
import heapq
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from lab.accelerate import Accelerator, CudaGraph
from lab.agent import build_agent
from lab.envs.base import VectorEnvs
from lab.envs.shard import TRAINING
from lab.errors import UserError
from lab.matmul import computed_by
from lab.training.evaluation import ENDLESS, evaluate
from lab.training.job import Emit, Job, agent_steps, make_eval_envs, make_train_envs
from lab.training.processes import Processes

# seconds: of steps before the first update, of evaluation, between messages
EARLY, EVALUATION, MESSAGE_EVERY = 0.2, 0.3, 0.2
WINDOW = 2.5  # seconds of measured steps and updates
MAX_WARM_UP = 30  # updates, after which all is assumed to be compiled


@dataclass(frozen=True)
class Cost:
    """Times of one process, in seconds. A step is a step of all its environments; an update is a
    call of update() that makes gradient steps."""

    build: float  # to make environments and agent
    compile: float  # extra time of the first acts and updates
    early_steps: int  # number of steps before the first update
    early_step: float  # a step before the first update
    period: float  # steps per update after the first one; inf: the run has no update
    evaluation: float  # one evaluation
    update: float  # one update
    step: float = 0.0  # a step after the first update, without the update

    def with_speed(self, measured: Mapping[str, float]) -> "Cost":
        """With the speed measured in the window: see `measure`."""
        updates, steps = measured["updates"], measured["steps"]
        # a window of a few rollouts is too short to estimate it
        period = steps / updates if updates >= 10 else self.period
        update = measured["updating"] / updates if updates else self.update
        return replace(self, step=measured["stepping"] / steps, update=update, period=period)

    def speed(self, job: Job) -> float:
        """Steps/s after the first update, summed over seeds."""
        return len(job.seeds) * job.steps_per_act / (self.step + self.update / self.period)

    def total(self, job: Job) -> float:
        """Time of the whole job without imports and without checkpoints, which take less than 1% of
        a run (bench/results/checkpoints.json)."""
        steps = math.ceil(job.steps / job.steps_per_act)
        early = min(self.early_steps, steps)
        evaluations = job.eval_rounds * math.ceil(job.steps / job.eval_every)
        return (self.build + self.compile + early * self.early_step
                + (steps - early) * (self.step + self.update / self.period)
                + evaluations * self.evaluation)


def run(jobs: Sequence[Job], deadline: float) -> tuple[float, list[Cost]]:
    """Measure all jobs at once, one process each -> seconds of imports, and each job's cost while
    all of them run. UserError if one fails, TimeoutError at the deadline."""
    imports, costs, measured = 0.0, dict[int, Cost](), [Counter[str]() for _ in jobs]
    with Processes(measure) as pool:
        start_time = time.monotonic()
        for key, job in enumerate(jobs):
            pool.start(key)
            pool.give(key, job)
        while min(each["stepping"] + each["updating"] for each in measured) < WINDOW:
            if time.monotonic() > deadline:
                raise TimeoutError
            for key, message in pool.receive(0.5):
                if not isinstance(message, dict):
                    raise UserError(message.reason if message else "its process ended")
                if "cost" in message:
                    costs[key] = message["cost"]
                elif not message:
                    imports = time.monotonic() - start_time
                elif len(costs) == len(jobs):
                    measured[key].update(message)
    return imports, [costs[key].with_speed(each) for key, each in enumerate(measured)]


def makespan(jobs: Sequence[Job], processes: int, measured: Sequence[tuple[Job, Cost]],
             waiting: float) -> float:
    """Seconds until the processes have run all jobs, each after `waiting` seconds of imports. A job
    that was not measured gets the cost of the most similar one."""
    free = [0.0] * processes
    for job in jobs:
        def distance(pair: tuple[Job, Cost], job: Job = job) -> tuple[bool, bool, int]:
            other = pair[0]
            return other != job, other.env_id != job.env_id, abs(len(other.seeds) - len(job.seeds))

        _, cost = min(measured, key=distance)
        heapq.heapreplace(free, free[0] + waiting + cost.total(job))
    return max(free)


def measure(job: Job, emit: Emit) -> None:
    """Emits {} after the imports, then {"cost": Cost}, then until the process is stopped the work
    since the last message: {"steps", "updates"} as counts, {"stepping", "updating"} in seconds."""
    emit({})
    start_time = time.perf_counter()
    envs = make_train_envs(job)
    eval_envs = make_eval_envs(job, envs)
    with (contextlib.closing(envs), contextlib.closing(eval_envs or envs),
          computed_by(job.fp32_library)):
        loop = Loop(job, envs)
        build = time.perf_counter() - start_time
        compiling, evaluating = (sample_evaluation(loop.agent, eval_envs) if eval_envs
                                 else (0.0, 0.0))
        emit({"cost": loop.warm_up(build, compiling, evaluating)})
        while True:
            loop.done.clear()
            while loop.done["stepping"] + loop.done["updating"] < MESSAGE_EVERY:
                loop.step()
            emit(dict(loop.done))


class Loop:
    """The training loop, timed."""

    def __init__(self, job: Job, envs: VectorEnvs):
        self.job, self.envs = job, envs
        self.accelerate = Accelerator(job.compile, job.precision, job.device)
        self.agent = build_agent(job.agent_path, job.config, envs.spec, job.seeds,
                                 job.num_envs, agent_steps(job), job.device, self.accelerate)
        self.obs = envs.reset(TRAINING, 0)
        self.t: Any = None  # the last transition
        self.done: Any = Counter()  # steps, updates; seconds: stepping, updating

    def step(self, live: bool = True) -> tuple[float, float]:
        """A step, or if not live the last transition again -> seconds: total, update (or 0)."""
        start_time = time.perf_counter()
        if live:
            actions = self.envs.act_and_send(self.agent.act, self.obs)
        else:
            actions = self.agent.act(self.obs)
        sent = time.perf_counter()
        learns = bool(self.agent.update())
        if not live and self.job.device != "cpu":
            torch.cuda.synchronize()
        updating = time.perf_counter() - sent if learns else 0.0
        t = self.t = self.envs.receive() if live else self.t
        self.agent.observe(self.obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
        self.obs = t.obs
        seconds = time.perf_counter() - start_time
        self.done.update({"steps": 1, "updates": int(learns)})
        self.done["stepping"] += seconds - updating
        self.done["updating"] += updating
        return seconds, updating

    def warm_up(self, build: float, compiling: float, evaluation: float) -> Cost:
        """Run until updates have a constant cost -> the costs, with the three given ones."""
        early = list[float]()
        updates = list[tuple[float, float, float]]()  # steps so far; seconds of step, update
        while not self._warm(len(updates)):
            live = sum(early) < EARLY
            seconds, updating = self.step(live)
            if updating:
                updates.append((self.done["steps"], seconds, updating))
            elif live and not updates:
                early.append(seconds)
        none = self.done["steps"] + 1, 0.0, 0.0
        first, last = (updates or [none])[0], (updates or [none])[-1]
        return Cost(
            build=build, evaluation=evaluation,
            compile=compiling + max(0.0, sum(seconds - last[1] for _, seconds, _ in updates)),
            early_steps=round(first[0]) - 1, early_step=sum(early) / max(1, len(early)),
            period=(last[0] - first[0]) / (len(updates) - 1) if len(updates) > 1 else math.inf,
            update=last[2])

    def _warm(self, updates: int) -> bool:
        calls = 1
        if self.accelerate.compiled:
            calls = 3 if self.job.device == "cpu" else CudaGraph.WARM_UP + 2
        compiled = all(count >= calls for count in self.accelerate.calls.values())
        over = self.done["steps"] * self.job.steps_per_act >= self.job.steps
        return over or updates >= MAX_WARM_UP or (updates > 1 and compiled)


def sample_evaluation(agent: Any, evaluation: VectorEnvs) -> tuple[float, float]:
    """-> extra seconds of the first act, and seconds of a whole evaluation. Episodes that do not
    end within EVALUATION seconds are assumed to last until the time limit."""
    times = list[float]()

    def act(obs: torch.Tensor, explore: bool) -> torch.Tensor:
        times.append(time.perf_counter())
        if len(times) > 2 and times[-1] - times[1] > EVALUATION:
            raise TimeoutError
        return agent.act(obs, explore=explore)

    steps = evaluation.spec.max_episode_steps or ENDLESS
    with contextlib.suppress(TimeoutError):
        evaluate(SimpleNamespace(act=act), evaluation)
        times.append(time.perf_counter())
        steps = len(times) - 1
    step = (times[-1] - times[1]) / max(1, len(times) - 2) or times[1] - times[0]
    return max(0.0, times[1] - times[0] - step), steps * step
