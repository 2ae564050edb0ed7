"""The training loop."""

import contextlib
import dataclasses
import os
import signal
from typing import Any

from lab.accelerate import Accelerator
from lab.agent import build_agent
from lab.matmul import computed_by
from lab.training import checkpoint
from lab.training.job import Emit, Job, agent_steps, make_train_envs
from lab.training.logger import TrainLogger


def train(job: Job, emit: Emit) -> None:
    """Train to the end, resuming from the last checkpoint if there is one. `emit` gets progress."""
    # absolute: an environment may change the working directory
    job = dataclasses.replace(job, agent_path=os.path.abspath(job.agent_path),
                              init_from=job.init_from and os.path.abspath(job.init_from),
                              run=job.run and os.path.abspath(job.run))
    accelerate = Accelerator(job.compile, job.precision, job.device)
    envs = make_train_envs(job)
    with (contextlib.closing(envs), computed_by(job.fp32_library),
          contextlib.ExitStack() as held, Interrupts() as interrupts):
        agent = build_agent(job.agent_path, job.config, envs.spec, job.seeds, job.num_envs,
                            agent_steps(job), job.device, accelerate, job.source)
        log = TrainLogger(job, accelerate, envs, emit)
        if log.eval_envs not in (None, envs):
            held.enter_context(contextlib.closing(log.eval_envs))
        if job.checkpoints:
            held.enter_context(checkpoint.lock(job.checkpoints))
        step, obs = log.begin(agent)
        emit({"step": step})
        while step < job.steps:
            actions = envs.act_and_send(agent.act, obs)
            metrics = agent.update()  # on a GPU it runs while the environments step
            t = envs.receive()
            agent.observe(obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
            obs = t.obs
            step += job.steps_per_act
            log.step(step, metrics, agent)
            if log.ended:
                break
            if interrupts.received:
                log.save(step, agent)
                break
        log.close()


class Interrupts:
    """Ctrl-C and SIGTERM request a checkpoint and exit; a second Ctrl-C exits at once. A signal
    that is ignored stays so: `command &` in a script ignores Ctrl-C.

    On leaving the context, the signal is raised again for the previous handler."""

    def __enter__(self) -> "Interrupts":
        self.received: list[int] = []
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)
                       if signal.getsignal(s) != signal.SIG_IGN}
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
            raise KeyboardInterrupt  # the handler returned, but the run is not finished
