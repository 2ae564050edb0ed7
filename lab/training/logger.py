"""Logging, evaluation and checkpoints of a run, kept out of the loop in loop.py."""

import copy
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lab.accelerate import Accelerator
from lab.agent import copy_seed, restore_state, save_state, weights
from lab.envs.base import VectorEnvs
from lab.envs.shard import TRAINING
from lab.errors import UserError
from lab.stopping import reason_to_stop
from lab.training import checkpoint, plasticity
from lab.training.evaluation import evaluate
from lab.training.job import Emit, Job, init_agent, make_eval_envs
from lab.training.recorder import STOPPED, SeedRecorder, reported_return, write_json

CHECKPOINT_SECONDS = 300
DIAGNOSTICS = ("value/", "policy/", "plasticity/")  # these may be NaN without failing the seed
RETURNS = ("return/", "length/")  # from the environment


def due(step: int, every: int, stride: int) -> bool:
    """Whether the last `stride` steps crossed a multiple of `every`; 0: never."""
    return bool(every) and step // every > (step - stride) // every


def adjusted_settings(agent: Any, job: Job) -> list[str]:
    """A line for each number among the settings that the agent holds under the same name with
    another value, as learning_starts in a short run."""
    held = {name: getattr(agent, name, None) for name in job.config}
    return [f"{name} {setting} becomes {held[name]} in a run of {job.steps} steps"
            for name, setting in job.config.items()
            if isinstance(setting, int | float) and isinstance(held[name], int | float)
            and held[name] != setting]


class TrainLogger:
    """Decides after each environment step whether to log, evaluate and checkpoint, and does it."""

    def __init__(self, job: Job, accelerate: Accelerator, envs: VectorEnvs, emit: Emit):
        self.job, self.accelerate, self.envs, self.emit = job, accelerate, envs, emit
        self.eval_envs = make_eval_envs(job, envs)
        self.recorders: list[SeedRecorder] = []
        self.metrics: dict[str, torch.Tensor] = {}
        self.updated = False  # whether there was an update since plasticity was measured
        self.learned = False  # whether there was an update at all, as far as is known
        self.failed: set[int] = set()
        self.last_eval: Sequence[float | None] = []
        self.means: list[float] = []  # of the evaluations, over the seeds that have not failed
        self.stopped: str | None = None  # why the run stops before its last step
        self.best: dict[str, Any] = {}  # of each seed: steps, returns, weights; {}: none yet
        # without evaluation, of the episodes since it would have been due: number, sum of returns
        self.recent = [[0.0, 0.0] for _ in job.seeds]
        self.clock = self.last_emit = self.saved = time.perf_counter()
        # whether can_restore_exactly(), which makes an environment, has given an answer
        self.restore_checked = job.eval_env != "own"
        self.logged_step = self.logged_updates = 0
        self.speed: dict[str, float] = {}
        self.notes: dict[str, list[str]] = {}  # for the next message, then empty
        self.cut_before_evaluation(0)

    def begin(self, agent: Any) -> tuple[int, torch.Tensor]:
        """Start, or resume from the last checkpoint -> the step (of a complete run, the last one),
        obs (S, N, O)."""
        if self.job.group is None or self.job.checkpoints is None:
            return self.start(agent)
        state = checkpoint.load_latest(self.job.checkpoints, self.job.device)
        if state is None and checkpoint.exist(self.job.checkpoints):
            raise UserError(f"no checkpoint in {self.job.checkpoints} can be read, so this run "
                            "cannot continue; its metrics are kept: start a new run (--init-from "
                            "may still read its weights)")
        self._check_settings(state or {})
        step = 0 if state is None else state["step"]
        self.stopped = (state or {}).get("stopped")
        if step < self.job.steps and not self.stopped:  # else the run is complete
            (self.job.group / STOPPED).unlink(missing_ok=True)  # later than the checkpoint
            self.recorders = [SeedRecorder(self.job.group / f"seed_{seed}", step)
                              for seed in self.job.seeds]
        if state is None:
            return self.start(agent)
        self.learned = True  # probably: not stored
        self.last_eval, self.failed = state["last_eval"], set(state["failed"])
        self.means = state.get("means", [])
        self.metrics, self.logged_step = state["metrics"], step
        self.recent = state.get("recent", self.recent)
        self.best = state.get("best", {})
        for index in self.failed:
            self.emit({"failed_seed": self.job.seeds[index], "reason": "failed before"})
        if step >= self.job.steps or self.ended:
            return self.job.steps, torch.empty(0)
        restore_state(agent, state["agent"])
        self.notes = {"notes": adjusted_settings(agent, self.job)}
        self.cut_before_evaluation(step)
        obs, lost = self.envs.load_state_dict(state["envs"], TRAINING, step)
        if lost:
            self.emit({"step": step, "warning": f"{lost} of {obs[..., 0].numel()} episodes start "
                       "again: their environment cannot be restored"})
        return step, obs

    def start(self, agent: Any) -> tuple[int, torch.Tensor]:
        """-> step 0, the first obs."""
        if self.job.init_from:
            init_agent(self.job, self.envs.spec, self.job.device, agent)
        self.notes = {"notes": adjusted_settings(agent, self.job)}
        return 0, self.envs.reset(TRAINING, 0)

    def _check_settings(self, state: dict[str, Any]) -> None:
        """UserError if the run was started with other settings."""
        now = self._settings()
        for name, value in state.get("settings", now).items():
            if now.get(name) != value:
                raise UserError(f"{self.job.run} was started with {name} = {value}, not "
                                f"{now.get(name)}: restore the setting, or start a new run")

    def _settings(self) -> dict[str, str]:
        others = ("env_id", "seeds", "num_envs", "precision", "action_repeat", "clip_reward",
                  "failure_below", "env_kwargs", "eval_env")
        return {name: repr(value) for name, value in (
            self.job.config | {name: getattr(self.job, name) for name in others}).items()}

    def step(self, step: int, metrics: dict[str, torch.Tensor], agent: Any) -> None:
        """Call after every environment step."""
        job, evaluating = self.job, self.evaluates(step)
        self.fail_broken(step, self.envs)
        self.metrics.update(metrics)
        self.updated |= bool(metrics)
        self.learned |= bool(metrics)
        if evaluating or due(step, job.log_every, job.steps_per_act):
            self.write_rows(step, agent, evaluating)
        elif time.perf_counter() - self.last_emit > 1:
            self.last_emit = time.perf_counter()
            self.emit({"step": step} | self.notes)
            self.notes = {}
        every = job.checkpoint_every
        late = every is None and time.perf_counter() - self.saved > CHECKPOINT_SECONDS
        end = step >= job.steps or self.ended
        if end and not self.learned:
            self.emit({"step": step, "warning": "nothing was learned: update() gave no metrics. "
                       "The agent may collect more steps before it learns than the run has"})
        if end or late or due(step, job.steps // 10 if every is None else every, job.steps_per_act):
            self.save(step, agent)
        self.cut_before_evaluation(step)

    @property
    def ended(self) -> bool:
        """Whether the run ends before its last step: by its rule, or because no seed is left."""
        return bool(self.stopped) or len(self.failed) == len(self.job.seeds)

    def evaluates(self, step: int) -> bool:
        return step >= self.job.steps or due(step, self.job.eval_every, self.job.steps_per_act)

    def cut_before_evaluation(self, step: int) -> None:
        """An evaluation in the environments of training truncates their episodes."""
        self.envs.cut = (self.eval_envs is self.envs
                         and self.evaluates(step + self.job.steps_per_act))

    def mean_returns(self, step: int, agent: Any) -> Sequence[float | None]:
        """The mean return of each seed in an evaluation; with --eval-env none, in the episodes of
        training since the last call, None before the first one."""
        if self.eval_envs is None:
            before = self.last_eval or [None] * len(self.recent)
            returns = [total / number if number else last
                       for (number, total), last in zip(self.recent, before, strict=True)]
            self.recent = [[0.0, 0.0] for _ in returns]
            return returns
        if self.eval_envs is not self.envs:
            return evaluate(agent, self.eval_envs, step)
        with self.envs.lend(TRAINING, step):
            rounds = [evaluate(agent, self.envs, step, k) for k in range(self.job.eval_rounds)]
        return [statistics.fmean(returns) for returns in zip(*rounds, strict=True)]

    def write_rows(self, step: int, agent: Any, evaluating: bool) -> None:
        """One row per seed: the last update's metrics, episodes since the last row, speed."""
        now = time.perf_counter()
        self.measure_speed(step, now)
        finished = self.envs.finished()  # the host waits for the device here and below
        self.fail_broken(step, self.envs)
        for recent, (episodes, mean, _) in zip(self.recent, finished, strict=True):
            recent[0] += episodes
            recent[1] += episodes * mean
        if evaluating:
            self.last_eval = self.mean_returns(step, agent)
            if self.eval_envs:
                self.fail_broken(step, self.eval_envs, " in evaluation")
        self.measure_plasticity(agent)
        columns = self.take_metrics()
        rows = {}
        for index, seed in enumerate(self.job.seeds):
            row = {tag: values[index] for tag, values in columns.items()}
            if finished[index].episodes:
                row["return/train"] = finished[index].episode_return
                row["length/train"] = finished[index].length
            if evaluating and (value := self.last_eval[index]) is not None:
                row[reported_return(self.job.eval_env)] = value
            row = self.finite(step, index, row)
            if index not in self.failed:
                rows[seed] = row
                if self.recorders:
                    self.recorders[index].write({"step": step} | row | self.speed)
        if evaluating and self.eval_envs:
            self.note_best(step, agent)
            self.decide_to_stop(step)
        stopped = {"stopped": self.stopped} if self.stopped else {}
        self.emit({"step": step, "rows": rows, **self.speed, **self.notes, **stopped})
        self.notes = {}
        self.last_emit = time.perf_counter()
        self.clock += self.last_emit - now  # speed leaves out evaluation

    def measure_speed(self, step: int, now: float) -> None:
        """Steps and updates since the last time, all seeds together, per second."""
        updates = self.accelerate.gradient_steps - self.logged_updates
        if updates or not self.speed:  # PPO: do not count a rollout without its update
            per_second = len(self.job.seeds) / (now - self.clock)
            self.speed = {"perf/steps_per_s": (step - self.logged_step) * per_second,
                          "perf/updates_per_s": updates * per_second}
            self.clock, self.logged_step = now, step
            self.logged_updates = self.accelerate.gradient_steps

    def take_metrics(self) -> dict[str, list[float]]:
        """The metrics of the last update, a number for each seed; {} until the next update."""
        metrics, self.metrics = self.metrics, {}
        if not metrics:
            return {}
        values = torch.stack([x.double() for x in metrics.values()]).tolist()
        return dict(zip(metrics, values, strict=True))

    def finite(self, step: int, index: int, row: dict[str, float]) -> dict[str, float]:
        """The finite values of the row. The seed fails for another one, unless it may be NaN."""
        broken = [tag for tag, value in row.items() if not math.isfinite(value)]
        fatal = [tag for tag in broken if not tag.startswith(DIAGNOSTICS)
                 or tag.endswith("weight_magnitude")]
        if fatal:
            whose = "the environment's" if fatal[0].startswith(RETURNS) else "the agent's"
            self.fail(index, step, f"{whose} {fatal[0]} is not finite")
        return {tag: value for tag, value in row.items() if tag not in broken}

    def decide_to_stop(self, step: int) -> None:
        alive = [value for index, value in enumerate(self.last_eval)
                 if value is not None and index not in self.failed]
        if not alive:
            return
        self.means.append(statistics.fmean(alive))
        if step < self.job.steps:
            self.stopped = reason_to_stop(self.job, self.means)
        if self.stopped and self.job.group:
            try:
                write_json(self.job.group / STOPPED, {"step": step, "reason": self.stopped})
            except OSError as error:
                self.emit({"step": step, "warning": f"{STOPPED} not written: {error}"})

    def note_best(self, step: int, agent: Any) -> None:
        """Copy the weights of each seed whose evaluation is its best so far."""
        S, now = len(self.job.seeds), weights(agent)
        if not (now and self.job.keep_best and self.job.checkpoints):
            return
        if not self.best:
            self.best = {"steps": [step] * S, "returns": [-math.inf] * S,
                         "weights": copy.deepcopy(now)}
        for index, value in enumerate(self.last_eval):
            better = value is not None and value > self.best["returns"][index]
            if better and index not in self.failed:
                self.best["steps"][index], self.best["returns"][index] = step, value
                copy_seed(self.best["weights"], (S, index), now, (S, index))

    def fail_broken(self, step: int, envs: VectorEnvs, where: str = "") -> None:
        for index, value in envs.broken.items():
            self.fail(index, step, f"the environment returned {value}{where}")

    def fail(self, index: int, step: int, reason: str) -> None:
        """Leave the seed out from here on."""
        if index not in self.failed:
            self.failed.add(index)
            self.emit({"failed_seed": self.job.seeds[index], "step": step,
                       "reason": f"{reason} at step {step}"})

    def measure_plasticity(self, agent: Any) -> None:
        """Plasticity metrics of the last batch, once per update. A resumed agent has no batch
        before its next update: until then it keeps what was measured at the checkpoint."""
        if self.updated:
            self.metrics |= plasticity.measure(agent)
            self.updated = False

    def save(self, step: int, agent: Any) -> None:
        for recorder in self.recorders:  # first: rows up to the checkpoint are not written again
            recorder.flush()
        if self.job.checkpoints is not None:
            self.measure_plasticity(agent)  # a checkpoint does not hold the last batch
            try:
                checkpoint.save(self.job.checkpoints, step, {
                    "step": step, "agent": save_state(agent), "envs": self.envs.state_dict(),
                    "metrics": self.metrics, "settings": self._settings(),
                    "failed": sorted(self.failed), "last_eval": self.last_eval,
                    "evaluated": bool(self.eval_envs) and self.evaluates(step),
                    "recent": self.recent, "best": self.best, "means": self.means,
                    "stopped": self.stopped})
            except OSError as error:
                self.emit({"step": step, "warning": f"checkpoint not written: {error}",
                           "unsaved": step >= self.job.steps or self.ended})
            if not self.restore_checked:
                exact = self.envs.can_restore_exactly()
                self.restore_checked = exact is not None
                if exact is False:
                    self.emit({"step": step, "warning": "the environment cannot be restored: a "
                               "resumed run starts new episodes"})
        self.saved = time.perf_counter()

    def close(self) -> None:
        settings = {"name": self.job.name, "agent": Path(self.job.agent_path).stem,
                    "env": self.job.env_id, **self.job.config}
        if self.job.action_repeat > 1:
            settings["action_repeat"] = self.job.action_repeat
        if self.job.clip_reward:
            settings["clip_reward"] = "{} to {}".format(*self.job.clip_reward)
        if self.job.failure_below is not None:
            settings["failure_below"] = self.job.failure_below
        if self.job.env_kwargs:
            settings["env_kwargs"] = " ".join(self.job.env_kwargs)
        for index, recorder in enumerate(self.recorders):
            final = self.last_eval[index] if self.last_eval else None
            recorder.close(settings | {"seed": self.job.seeds[index]},
                           None if index in self.failed else final,
                           reported_return(self.job.eval_env))
