"""The training loop and the evaluation loop."""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab import agent_file, checkpoint, envs
from lab.accelerate import Accelerator
from lab.gym_envs import UserError
from lab.recorder import SeedRecorder, group_folder

Emit = Callable[[dict[str, Any]], None]
Look = Callable[[torch.Tensor, torch.Tensor], None]  # (S, N): returns so far; who has not ended
CHECKPOINT_SECONDS = 300
ENDLESS = 10_000  # steps after which an episode of an environment without a limit counts so


@dataclass(frozen=True)
class Job:
    """What one process trains: a stack of seeds on one environment."""

    agent_path: str
    config: dict[str, Any]  # the agent's
    env_id: str
    seeds: tuple[int, ...]
    steps: int  # transitions of one seed, like all that follow
    eval_every: int
    log_every: int
    checkpoint_every: int | None  # none: a tenth of the run or five minutes; 0: only at the end
    eval_episodes: int = 5  # of one seed, at each evaluation
    num_envs: int = 1
    backend: str | None = None  # none: torch for a torch/ id, else sync
    workers: int | None = None  # processes or threads of the backend; none: physical cores
    groups: int = 1  # of environments, that step in turn
    device: str = "cpu"
    compile: bool = False
    precision: str = "fp32"
    clip_reward: tuple[float, float] | None = None  # in training; evaluation is on the raw reward
    run: str | None = None  # the run's folder; None: leave no files
    name: str = ""  # of the run, in the words given

    @property
    def group(self) -> Path | None:
        """The folder of this environment and agent."""
        name = Path(self.agent_path).stem
        return group_folder(Path(self.run), self.env_id, name) if self.run else None

    @property
    def checkpoints(self) -> Path | None:
        return self.group / f"stack_{self.seeds[0]}_{self.seeds[-1]}" if self.group else None

    @property
    def own_backend(self) -> str | None:
        """Without processes of its own, which are worth their start only where there are many
        steps."""
        return "sync" if self.backend == "workers" else self.backend


def train(job: Job, emit: Emit) -> None:
    """Train to the end, from the last checkpoint if there is one. Progress goes to `emit`."""
    accelerate = Accelerator(job.compile, job.precision, job.device)
    training = make_training(job)
    with contextlib.closing(training), contextlib.ExitStack() as held, Interrupts() as interrupts:
        agent = agent_file.build(job.agent_path, job.config, training.spec, job.seeds, job.num_envs,
                                 job.steps, job.device, accelerate)
        log = Log(job, accelerate, training, emit)
        if job.checkpoints:
            held.enter_context(checkpoint.lock(job.checkpoints))
        step, obs = log.begin(agent)
        emit({"step": step})
        while step < job.steps:
            actions = training.send_groups(agent.act, obs)
            metrics = agent.update()  # on a GPU it runs while the environments step
            t = training.receive()
            agent.observe(obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
            obs = t.obs
            step += job.num_envs
            log.step(step, metrics, agent)
            if interrupts.received:
                log.save(step, agent)
                break
        log.close()


def make_training(job: Job) -> envs.VectorEnvs:
    return envs.make(
        job.env_id, job.seeds, job.num_envs, job.backend, job.device, workers=job.workers,
        groups=job.groups, compile=job.compile, clip_reward=job.clip_reward)


def make_evaluation(job: Job) -> envs.VectorEnvs:
    return envs.make(job.env_id, job.seeds, job.eval_episodes, job.own_backend, job.device)


def evaluate(agent: Any, evaluation: envs.VectorEnvs, *stream: int, look: Look = lambda *_: None
             ) -> list[float]:
    """Mean return of each seed over one deterministic episode in each of its environments.
    UserError if an episode does not end. `look` is called before the first step and after each."""
    obs = evaluation.reset(envs.EVALUATION, *stream)
    returns = torch.zeros(evaluation.shape, dtype=torch.float64, device=obs.device)
    running = torch.ones_like(returns, dtype=torch.bool)
    limit = evaluation.spec.max_episode_steps or ENDLESS
    look(returns, running)
    for _ in range(limit):
        t = evaluation.step(agent.act(obs, explore=False))
        obs = t.obs
        returns += torch.where(running, t.rewards, 0)
        running &= (t.terminations + t.truncations) == 0
        look(returns, running)
        if not running.any():  # the host waits for the device
            return returns.mean(1).tolist()
    raise UserError(f"{evaluation.spec.id}: an evaluation episode does not end in {limit} steps; "
                    "register the environment with max_episode_steps")


def due(step: int, every: int, num_envs: int) -> bool:
    """Whether the last num_envs transitions crossed a multiple of `every`; 0 is never."""
    return bool(every) and step // every > (step - num_envs) // every


class Log:
    """When to log, evaluate and checkpoint, so that the loop above stays the algorithm's."""

    def __init__(self, job: Job, accelerate: Accelerator, training: envs.VectorEnvs, emit: Emit):
        self.job, self.accelerate, self.training, self.emit = job, accelerate, training, emit
        self.evaluation = make_evaluation(job)
        self.recorders: list[SeedRecorder] = []
        self.metrics: dict[str, torch.Tensor] = {}
        self.failed: set[int] = set()
        self.last_eval: list[float] = []
        self.clock = self.beat = self.saved = time.perf_counter()
        self.tried = False  # whether the environments can be put back
        self.logged_step = self.logged_updates = 0
        self.speed: dict[str, float] = {}

    def begin(self, agent: Any) -> tuple[int, torch.Tensor]:
        """At the start, or where the last checkpoint was written -> the step, obs (S, N, O)."""
        if self.job.group is None or self.job.checkpoints is None:
            return 0, self.training.reset(envs.TRAINING, 0)
        state = checkpoint.load_latest(self.job.checkpoints, self.job.device)
        self._check_settings(state or {})
        step = 0 if state is None else state["step"]
        if step < self.job.steps:  # or else what is there is whole
            self.recorders = [SeedRecorder(self.job.group / f"seed_{seed}", step)
                              for seed in self.job.seeds]
        if state is None:
            return 0, self.training.reset(envs.TRAINING, 0)
        agent.load_state_dict(state["agent"])
        self.last_eval, self.failed = state["last_eval"], set(state["failed"])
        self.metrics, self.logged_step = state["metrics"], step
        for place in self.failed:
            self.emit({"failed_seed": self.job.seeds[place], "reason": "failed before"})
        if step >= self.job.steps:
            return step, torch.empty(0)
        obs, lost = self.training.load_state_dict(state["envs"], envs.TRAINING, step)
        if lost:
            self.emit({"step": step, "warning": f"{lost} of {obs[..., 0].numel()} episodes begin "
                       "anew: their environment cannot be put back where it was"})
        return step, obs

    def _check_settings(self, state: dict[str, Any]) -> None:
        """UserError if the run was begun with others: its result would be of neither."""
        now = self._settings()
        for name, value in state.get("settings", now).items():
            if now.get(name) != value:
                raise UserError(f"{self.job.run} began with {name} = {value}, not {now.get(name)}: "
                                "put it back, or begin a new run")

    def _settings(self) -> dict[str, str]:
        others = ("env_id", "seeds", "num_envs", "precision", "clip_reward")
        return {name: repr(value) for name, value in (
            self.job.config | {name: getattr(self.job, name) for name in others}).items()}

    def step(self, step: int, metrics: dict[str, torch.Tensor], agent: Any) -> None:
        """After every step of the environments."""
        job, end = self.job, step >= self.job.steps
        self.metrics.update(metrics)
        evaluating = end or due(step, job.eval_every, job.num_envs)
        if evaluating or due(step, job.log_every, job.num_envs):
            self.write_rows(step, agent, evaluating)
        elif time.perf_counter() - self.beat > 1:
            self.beat = time.perf_counter()
            self.emit({"step": step})
        every = job.checkpoint_every
        late = every is None and time.perf_counter() - self.saved > CHECKPOINT_SECONDS
        if end or late or due(step, job.steps // 10 if every is None else every, job.num_envs):
            self.save(step, agent)

    def write_rows(self, step: int, agent: Any, evaluating: bool) -> None:
        """One row for each seed: the last losses, the episodes since the last row, the speed."""
        now = time.perf_counter()
        updates = self.accelerate.updates - self.logged_updates
        if updates or not self.speed:  # a rollout without its update would seem too fast
            per_second = len(self.job.seeds) / (now - self.clock)
            self.speed = {"perf/steps_per_s": (step - self.logged_step) * per_second,
                          "perf/updates_per_s": updates * per_second}
            self.clock, self.logged_step = now, step
            self.logged_updates = self.accelerate.updates
        if evaluating:
            self.last_eval = evaluate(agent, self.evaluation, step)
        columns = {}
        if self.metrics:  # here and in finished() the host waits for the device
            values = torch.stack([x.double() for x in self.metrics.values()]).tolist()
            columns = dict(zip(self.metrics, values, strict=True))
            self.metrics = {}  # or the rows until the next update would repeat them
        rows, finished = {}, self.training.finished()
        for place, seed in enumerate(self.job.seeds):
            row = {tag: values[place] for tag, values in columns.items()}
            if finished[place].episodes:
                row["return/train"] = finished[place].episode_return
                row["length/train"] = finished[place].length
            if evaluating:
                row["return/eval"] = self.last_eval[place]
            broken = [tag for tag, value in row.items() if not math.isfinite(value)]
            if broken and place not in self.failed:
                self.failed.add(place)
                self.emit({"failed_seed": seed, "step": step,
                           "reason": f"{broken[0]} is not finite"})
            if place not in self.failed:
                rows[seed] = row
                if self.recorders:
                    self.recorders[place].write({"step": step} | row | self.speed)
        self.emit({"step": step, "rows": rows, **self.speed})
        self.beat = time.perf_counter()
        self.clock += self.beat - now  # evaluation is not training

    def save(self, step: int, agent: Any) -> None:
        if self.job.checkpoints is not None:
            try:
                checkpoint.save(self.job.checkpoints, step, {
                    "step": step, "agent": agent.state_dict(), "envs": self.training.state_dict(),
                    "metrics": self.metrics, "settings": self._settings(),
                    "failed": sorted(self.failed), "last_eval": self.last_eval})
            except OSError as error:
                self.emit({"step": step, "warning": f"no checkpoint: {error}"})
            if not self.tried:
                self.tried = (goes_on := self.training.goes_on()) is not None
                if goes_on is False:
                    self.emit({"step": step, "warning": "the environment cannot be put back where "
                               "it was: a resumed run begins new episodes"})
        self.saved = time.perf_counter()
        for recorder in self.recorders:
            recorder.board.flush()

    def close(self) -> None:
        settings = {"name": self.job.name, "agent": Path(self.job.agent_path).stem,
                    "env": self.job.env_id, **self.job.config}
        if self.job.clip_reward:
            settings["clip_reward"] = "{} to {}".format(*self.job.clip_reward)
        for place, recorder in enumerate(self.recorders):
            final = self.last_eval[place] if self.last_eval else None
            recorder.close(settings | {"seed": self.job.seeds[place]},
                           None if place in self.failed else final)
        self.evaluation.close()


class Interrupts:
    """Ctrl-C and SIGTERM ask for a checkpoint and an end; a second Ctrl-C ends at once.

    At the end the signal goes on to the handler that it was meant for."""

    def __enter__(self) -> "Interrupts":
        self.received: list[int] = []
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and kind is None:
            signal.raise_signal(self.received[0])

