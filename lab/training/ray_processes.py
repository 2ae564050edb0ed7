"""Jobs on a Ray cluster (--engine ray): the interface of Processes, one task per job.

All nodes see the folders of the checkout and of the run, so a job that lost its node finds its
checkpoint on the next. Messages come through a mailbox, an actor on the driver's node.
"""

import contextlib
import logging
import math
import os
import secrets
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab.accelerate import physical_cores
from lab.errors import UserError, one_line
from lab.options import Options, Simple, Tune
from lab.training import processes, recorder
from lab.training.job import Emit, Job
from lab.training.loop import train
from lab.training.mailbox import Mailbox
from lab.training.processes import Engine, Failure, Processes, attempt

ANSWER_SECONDS = 15.0  # for an address to answer
START_SECONDS = 120.0  # for a node to start its first Python process
PACKAGES = ("torch", "gymnasium")  # the same version on every node
OBJECT_STORE = 100_000_000  # bytes of shared memory; messages are small
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}  # quiet, by default
DEATHS = {"WorkerCrashedError": "its worker died", "NodeDiedError": "its node died",
          "OutOfMemoryError": "it took the last memory"}


class RayProcesses(Processes):
    """As Processes, on the cluster that this process is connected to. A job whose worker or node
    died starts again on another node if there is one."""

    def __init__(self, work: Callable[[Job, Emit], None] = train, gpus: float = 0.0) -> None:
        import ray

        self.ray = ray
        self.running: dict[int, Any] = {}  # key -> its task, None before it is given a job
        self.tasks: dict[Any, int] = {}  # those that have not ended -> their keys
        self.nodes: dict[int, str] = {}  # key -> the node that it runs on
        self.lost: dict[int, set[str]] = defaultdict(set)  # key -> nodes on which it was killed
        self.mailbox = ray.remote(Mailbox).options(
            num_cpus=0, scheduling_strategy=_on(ray.get_runtime_context().get_node_id())).remote()
        self.letters: Any = None  # what the mailbox sends next
        self.task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=1,
                               scheduling_strategy="SPREAD")(run_job)
        self.work, self.folder = work, os.getcwd()

    def start(self, key: int) -> None:
        self.running[key] = None

    def give(self, key: int, job: Job) -> None:
        elsewhere = {}
        if self.lost[key]:
            elsewhere = {"label_selector": {"ray.io/node-id": f"!in({','.join(self.lost[key])})"},
                         "fallback_strategy": [{"label_selector": {}}]}  # if there is no other
        task = self.task.options(**elsewhere).remote(
            key, job, self.work, self.folder, self.mailbox)
        self.running[key] = task
        self.tasks[task] = key

    def receive(self, timeout: float | None = None
                ) -> Iterator[tuple[int, dict[str, Any] | Failure | None]]:
        if self.letters is None:
            self.letters = self.mailbox.take.remote()
        ready, _ = self.ray.wait([self.letters, *self.tasks], timeout=timeout)
        for ref in ready:
            if ref in self.tasks:  # its messages are in the mailbox: the end goes behind them
                key = self.tasks.pop(ref)
                self.mailbox.put.remote(key, self._outcome(key, ref))
                continue
            self.letters = None
            for key, message in self.ray.get(ref):
                if isinstance(message, str):
                    self.nodes[key] = message
                    continue
                if not isinstance(message, dict):
                    del self.running[key]
                yield key, message

    def _outcome(self, key: int, task: Any) -> Failure | None:
        errors = self.ray.exceptions
        try:
            outcome: Failure | None = self.ray.get(task)
            return outcome
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            return Failure(one_line(error), "error")  # not the agent's: the node is not fit
        except errors.RayError as error:
            reason = DEATHS.get(type(error).__name__, one_line(error))
            if key in self.nodes:
                node = self.nodes.pop(key)
                self.lost[key].add(node)
                reason += f" on {_names(self.ray)[node]}"
            return Failure(reason, "killed")

    def end(self, key: int) -> None:
        if self.running[key] is not None:
            self.ray.cancel(self.running[key])  # raises SIGINT in the task

    def __exit__(self, *exception: object) -> None:
        for key in self.running:
            self.end(key)
        if tasks := list(self.tasks):
            _, late = self.ray.wait(
                tasks, num_returns=len(tasks), timeout=processes.END_SECONDS)
            for task in late:
                processes.warn_late()
                self.ray.cancel(task, force=True)
        self.ray.kill(self.mailbox)


def run_job(key: int, job: Job, work: Callable[[Job, Emit], None], folder: str, mailbox: Any
            ) -> Failure | None:
    """The task: run the job in the driver's folder, and send its messages."""
    import ray

    def send(message: Any) -> None:
        ray.get(mailbox.put.remote(key, message))

    os.chdir(folder)
    send(ray.get_runtime_context().get_node_id())
    return attempt(work, job, send)


def open_engine(options: Options, folder: Path | None
                ) -> contextlib.AbstractContextManager[Engine | None]:
    """The engine of the options; None for processes of this machine. `folder`: where the run
    writes. UserError if the cluster could not train there."""
    if isinstance(options, Simple | Tune) and options.engine == "ray":
        return connected(options, folder)
    return contextlib.nullcontext()


@contextlib.contextmanager
def connected(options: Simple | Tune, folder: Path | None) -> Iterator[Engine]:
    """The cluster at --address or RAY_ADDRESS; without them, one on this machine that ends with the
    context."""
    ray = _import_ray()
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    before = signal.getsignal(signal.SIGTERM)
    try:
        _connect(ray, address)
        signal.signal(signal.SIGTERM, before)  # Ray has set its own
        nodes = [node for node in ray.nodes() if node["Alive"] and _has(node, "CPU") and (
            _has(node, "GPU") or not options.cuda)]
        if not nodes:
            lacks = "a CPU and a GPU" if options.cuda else "a CPU"
            raise UserError(f"the Ray cluster at {address} has no node with {lacks} for a job")
        _check_nodes(ray, nodes, Path(options.agent), folder)
        cpus, gpus = (sum(_has(node, kind) for node in nodes) for kind in ("CPU", "GPU"))
        yield Engine(cpus, lambda jobs: RayProcesses(
            gpus=share(gpus, jobs) if options.cuda else 0.0))
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def share(gpus: int, jobs: int) -> float:
    """Of a GPU for each of the jobs that run at once: as many on every GPU. Ray takes 4 digits."""
    return math.floor(10_000 / math.ceil(jobs / gpus)) / 10_000


def _has(node: dict[str, Any], kind: str) -> int:
    return int(node["Resources"].get(kind, 0))


def _import_ray() -> Any:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray, here and on every node: pip install ray==2.60.0"
                        ) from error
    return ray


def _connect(ray: Any, address: str) -> None:
    settings: dict[str, Any] = {}
    if address == "local":
        settings = {"num_cpus": physical_cores(), "object_store_memory": OBJECT_STORE,
                    "include_dashboard": False}
    try:
        if address not in ("local", "auto"):
            _check_address(address)
        ray.init(address, logging_level=logging.ERROR, **settings)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot use the Ray cluster at {address}: {one_line(error)}") from error


def _check_address(address: str) -> None:
    """UserError if no cluster answers, or none that this process could join: ray.init would try for
    two minutes, or end the process."""
    import grpc  # tensorboard requires it
    from ray._raylet import GcsClient

    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise UserError(f"--address takes HOST:PORT of a Ray cluster, not {address}")
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", timeout=ANSWER_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise UserError(f"no Ray cluster answers at {address}; start one with ray start "
                                "--head, or leave out --address") from error
            if (error.code() == grpc.StatusCode.UNAUTHENTICATED
                    and os.environ.get("RAY_AUTH_MODE") != "token"):
                raise UserError(f"the Ray cluster at {address} asks for its token: set "
                                "RAY_AUTH_MODE=token; Ray reads it from ~/.ray/auth_token"
                                ) from error
    nodes = GcsClient(address=address).get_all_node_info(timeout=ANSWER_SECONDS).values()
    if not any(os.path.exists(node.raylet_socket_name) for node in nodes):
        raise UserError(f"this machine is no node of the Ray cluster at {address}: ray start "
                        f"--address {address} --num-cpus 0")


def _check_nodes(ray: Any, nodes: Sequence[dict[str, Any]], agent: Path, folder: Path | None
                 ) -> None:
    """UserError that names the nodes which lack what this machine has."""
    with _token(folder) as token:
        look = inspection(os.path.abspath(agent), token)
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        answers = [task.options(scheduling_strategy=_on(node["NodeID"])).remote()
                   for node in nodes]
        here = look()
        answered, _ = ray.wait(answers, num_returns=len(answers), timeout=START_SECONDS)
        faults, names = [], _names(ray)
        for node, answer in zip(nodes, answers, strict=True):
            try:
                fault = difference(here, ray.get(answer), agent, folder) if (
                    answer in answered) else f"starts no process in {START_SECONDS:.0f} s"
            except ray.exceptions.RayError as error:
                fault = f"runs no task: {one_line(error)}"
            faults += [f"node {names[node['NodeID']]} {fault}"] * bool(fault)
    if faults:
        raise UserError("; ".join(faults))


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _names(ray: Any) -> dict[str, str]:
    """Node -> host name and address."""
    return {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            for node in ray.nodes()}


@contextlib.contextmanager
def _token(folder: Path | None) -> Iterator[str]:
    """A file in the folder, gone at the end. One that does not exist yet will be made where its
    parent is."""
    if folder is None:
        yield ""
        return
    found = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    token = found / f".seen-by-all-nodes-{secrets.token_hex(8)}"
    with recorder.writable(folder):
        token.touch()
    try:
        yield str(token)
    finally:
        token.unlink()


def inspection(agent: str, token: str) -> Callable[[], dict[str, Any]]:
    """A function -> what a node has. Ray sends its code, as a node may have no lab."""
    packages = PACKAGES

    def look() -> dict[str, Any]:
        import hashlib
        import importlib.util
        import os
        import platform
        from importlib import metadata
        from pathlib import Path

        def digest(*paths: str | Path) -> str:
            return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()

        found: dict[str, Any] = {"python": platform.python_version()}
        for package in packages:
            try:
                found[package] = metadata.version(package).split("+")[0]  # 2.13.0+cpu
            except metadata.PackageNotFoundError:
                found[package] = None
        lab = importlib.util.find_spec("lab")
        files = [path for folder in (lab and lab.submodule_search_locations) or ()
                 for path in sorted(Path(folder).rglob("*.py"))]
        return found | {"lab": digest(*files) if files else None,
                        "agent": digest(agent) if os.path.isfile(agent) else None,
                        "token": os.path.exists(token)}

    return look


def difference(here: dict[str, Any], there: dict[str, Any], agent: Path, folder: Path | None
               ) -> str:
    """What keeps a node from training, and what to do; "" if nothing does."""
    for package in ("python", *PACKAGES):
        if there[package] != here[package]:
            has = f"{package} {there[package]}" if there[package] else f"no {package}"
            return f"has {has}, this machine {here[package]}: install the same version"
    shared = "on storage that all nodes share"
    if there["token"] != here["token"]:
        return f"does not see the folder {folder}: put it {shared}, or choose another with --runs"
    if there["lab"] != here["lab"]:
        return f"has {'another' if there['lab'] else 'no'} lab/: put the checkout {shared}"
    if there["agent"] != here["agent"]:
        return f"does not see this {agent}: put it {shared}"
    return ""
