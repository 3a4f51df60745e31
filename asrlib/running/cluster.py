"""Runs the members of a sweep as tasks of Ray, on a cluster or on the cores of this machine.

    python run_all.py SWEEP --engine ray                  on this machine, as many members at once as it has room for
    python run_all.py SWEEP --engine ray://auto           on the cluster that this machine is part of
    python run_all.py SWEEP --engine ray://HOST:10001     on another one, through Ray's client

Ray decides which machine runs a member. If its worker is lost, Ray runs the member again, which resumes from its
folder. The project and its reports lie on storage that all machines see under one path. If they share the project only,
--storage s3://BUCKET/FOLDER (any URL of fsspec) keeps the reports: a machine fetches a member from there before it
starts, and sends what has changed when a step ends.
"""

import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from asrlib.reporting.numbers import duration
from asrlib.reporting.pages import write_index
from asrlib.running.mirror import Mirror, check_storage
from asrlib.running.pipeline import time_left
from asrlib.running.sweeps import IN_TURN, Engine, Failures, Member, Sweep, reasons, run_member, seconds_ahead
from asrlib.running.workplace import RunLocked, StepFailed, Workplace, locked, log, work_in
from asrlib.runs import BadParameter

RETRIES = 3  # for a member whose worker is lost
POLL_SECONDS = 0.5
ANSWER_SECONDS = 60.0  # for a machine to say whether it sees a file, and for its own files to show up here
CANCEL_SECONDS = 10.0  # for a worker to end its kernel and stop; then it is killed
OBJECT_STORE_BYTES = 80 * 2**20  # nothing large goes through it; Ray needs 75 MiB at least
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "60",  # 10 s are too few on a busy machine or with slow storage
    "RAY_worker_register_timeout_seconds": "300",  # likewise: ray.init would wait forever for a worker given up
}
NEWS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\[(?:\d+/\d+|on \S+)\].*)")  # in a member's pipeline.log


# ---- where members run -------------------------------------------------------------------------------------


@contextmanager
def engine_of(
    name: str, reports: Path, cpus: float | None = None, gpus: float | None = None, storage: str | None = None
) -> Iterator[Engine]:
    """The engine called `name`: local, ray, ray://auto or ray://HOST:PORT. Ray is connected while the block runs.

    `reports`: the folder of all runs. `cpus`, `gpus`: what each member gets (default: one CPU, and one GPU if the
    cluster has any). `storage`: URL of a copy of `reports` for machines that do not share it. Raises BadParameter where
    there is no such engine, Ray is not installed, no cluster answers, no machine has enough CPUs or GPUs, a machine
    does not see `reports`, or `storage` cannot be written to.
    """
    address = ray_address(name)
    if address is None:
        if (cpus, gpus, storage) != (None, None, None):
            raise BadParameter("--cpus, --gpus and --storage belong to --engine ray, but this is --engine local")
        yield IN_TURN
        return
    _check_share(cpus, gpus)
    if storage:
        check_storage(storage)
    ray = _import_ray()
    connected = ray.is_initialized()  # by the program that calls us: its connection is used, and stays open
    try:
        if not connected:
            _connect(ray, address)
        resources, machines, at_once = _room(ray, 1 if cpus is None else cpus, gpus)
        with nullcontext() if storage else _seen_by(ray, machines, reports) as token:
            cluster = _Cluster(ray, resources, machines, at_once, token, storage)
            yield Engine(cluster.run_members, at_once, cluster.fetch, cluster.send)
    finally:
        if not connected:
            ray.shutdown()


def ray_address(engine: str) -> str | None:
    """Ray's address of the cluster that `--engine` names; None for local. Raises BadParameter."""
    name, separator, address = engine.partition("://")
    if engine == "local":
        return None
    if name != "ray" or (separator and address != "auto" and ":" not in address):
        raise BadParameter(f"--engine {engine!r} should be local, ray, ray://auto or ray://HOST:PORT")
    return {"": "local", "auto": "auto"}.get(address, engine)


def _check_share(cpus: float | None, gpus: float | None) -> None:
    for name, number in (("--cpus", cpus), ("--gpus", gpus)):
        if number is not None and not (0 <= number <= 1 or (number > 1 and number == int(number))):
            raise BadParameter(f"{name} {number:g} should be a whole number, or a share of one")
    if cpus == 0 and not gpus:
        raise BadParameter("--cpus 0 needs --gpus above 0: each member must ask for something")


def _import_ray() -> ModuleType:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        install = "pip install -c constraints.txt -e '.[cluster]'"
        raise BadParameter(f"--engine ray needs Ray, here and on every machine of the cluster: {install}") from None
    return ray


def _connect(ray: ModuleType, address: str) -> None:
    library = Path(__file__).parent.parent  # workers on other machines import it too
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": f"{library}:${{PYTHONPATH}}"}}}
    if address == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and plain Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logs = " (more in its logs, as a rule /tmp/ray/session_latest/logs)" if address == "local" else ""
        raise BadParameter(f"no connection to Ray ({address}): {reason}{logs}") from error
    finally:
        signal.signal(
            signal.SIGTERM, stop
        )  # Ray's own handler would end this process at once and leave members running


def _room(ray: ModuleType, cpus: float, gpus: float | None) -> tuple[dict[str, float], dict[str, str], int]:
    """(what each member asks Ray for, {id: name} of the machines that have as much, how many members run at once)."""
    machines = [machine for machine in ray.nodes() if machine["Alive"]]
    if gpus is None:
        gpus = 1 if any(machine["Resources"].get("GPU", 0) >= 1 for machine in machines) else 0
    share = {"CPU": cpus, "GPU": gpus}
    room = {}
    for machine in machines:
        has = machine["Resources"]
        room[machine["NodeID"]] = min(int(has.get(kind, 0) / asked) for kind, asked in share.items() if asked)
    named = {machine["NodeID"]: machine["NodeManagerHostname"] for machine in machines if room[machine["NodeID"]]}
    if not named:
        raise BadParameter(
            f"no machine of the cluster has the {cpus:g} CPU and {gpus:g} GPU that each member is to get: "
            "ask for less with --cpus and --gpus"
        )
    return {"num_cpus": cpus, "num_gpus": gpus}, named, sum(room.values())


@contextmanager
def _seen_by(ray: ModuleType, machines: dict[str, str], reports: Path) -> Iterator[Path]:
    """A file in `reports`, while the block runs. Raises BadParameter where one of `machines` cannot see it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    reports.mkdir(parents=True, exist_ok=True)
    token = reports / f".tmp-seen-{uuid.uuid4().hex}"
    token.touch()
    try:
        exists = ray.remote(
            lambda path: os.path.exists(path)
        )  # imports nothing of asrlib, which that machine may not see either
        asked = {}
        for node, machine in machines.items():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[exists.options(num_cpus=0, scheduling_strategy=there).remote(str(token))] = machine
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        blind = [machine for task, machine in asked.items() if task not in answered or not _answer(ray, task)]
        if blind:
            raise BadParameter(
                f"{', '.join(blind)} of the cluster cannot see {reports}: all machines should see the project under "
                "the same path, on storage that they share"
            )
        yield token
    finally:
        token.unlink(missing_ok=True)


def _answer(ray: ModuleType, task: Any) -> bool:
    try:
        return ray.get(task)
    except ray.exceptions.RayError:
        return False


# ---- running -----------------------------------------------------------------------------------------------


@dataclass
class _Followed:
    """A member that Ray runs, followed by what it writes into its pipeline.log."""

    member: Member
    title: str
    read: int = 0  # bytes of pipeline.log that were read
    begun: float | None = None  # on our clock, s

    @property
    def log(self) -> Path:
        return self.member.run.path / "pipeline.log"

    def news(self) -> list[str]:
        """The lines, new since the last call, that say where it runs and which step begins or ends."""
        if not self.log.is_file():
            return []
        with open(self.log, "rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        matches = map(NEWS.match, whole.decode(errors="replace").splitlines())
        return [match[1] for match in matches if match]


@dataclass(frozen=True)
class _Cluster:
    """A connected cluster, and the share of each member."""

    ray: ModuleType
    resources: dict[str, float]  # of each member
    machines: dict[str, str]  # id → name, of those that can run one
    at_once: int
    token: Path | None  # all of them see it
    storage: str | None  # URL of the reports if the machines do not share them
    mirrors: dict[str, Mirror] = field(default_factory=dict)  # of each member, here

    def url(self, sweep: Sweep, *member: str) -> str:
        return "/".join((self.storage.rstrip("/"), sweep.run.path.name, *member))

    def fetch(self, sweep: Sweep) -> None:
        """Fetch from storage the members that are not finished here, and a comparison that was never begun here."""
        for member in sweep.members if self.storage else ():
            mirror = self.mirrors[member.name] = Mirror(member.run.path, self.url(sweep, member.name))
            if not member.finished:
                mirror.fetch()
            elif not mirror.exists():
                mirror.send()
        if self.storage and not any(map(sweep.run.started, sweep.comparing)):
            self.comparison(sweep).fetch()

    def send(self, sweep: Sweep) -> None:
        """Send the comparison; members have sent themselves."""
        if self.storage:
            self.comparison(sweep).send()

    def comparison(self, sweep: Sweep) -> Mirror:
        others = ["pipeline.log", *(member.name for member in sweep.members)]
        return Mirror(sweep.run.path, self.url(sweep), without=others)

    def run_members(self, sweep: Sweep, place: Workplace, say: Callable[[str], None], command: str) -> Failures:
        """Run the members that are not finished; returns those that failed.

        Each member locks its own folder, on its machine. The lock of the sweep, of `place`, is held here.
        """
        waiting = []
        for number, member in enumerate(sweep.members, 1):
            title = f"[{number}/{len(sweep.members)}] {member.name}"
            if member.finished:
                say(f"{title} unchanged")
            else:
                waiting.append(_Followed(member, title))
        if not waiting:
            return []
        say(
            f"on Ray, {_plural(len(self.machines), 'machine')}: {_plural(self.at_once, 'member')} at once, each with "
            f"{self.resources['num_cpus']:g} CPU and {self.resources['num_gpus']:g} GPU"
        )
        work = self.ray.remote(max_retries=RETRIES, retry_exceptions=[RunLocked], **self.resources)(_work)
        tasks: dict[Any, _Followed] = {}
        try:
            for followed in waiting:
                member, url = followed.member, None
                followed.news()  # skip those of earlier calls
                if self.storage:
                    self.mirrors[member.name].send()  # some of its steps may have to run again
                    url = self.url(sweep, member.name)
                task = work.options(name=member.name).remote(member, sweep.root, command, self.token, url)
                tasks[task] = followed
            return self._follow(tasks, sweep, say, command)
        except BaseException:  # Ctrl-C, most often
            self._cancel(list(tasks))
            raise
        finally:
            write_index(sweep.run.path, command)  # the page names the members that were interrupted

    def _follow(self, tasks: dict[Any, _Followed], sweep: Sweep, say: Callable[[str], None], command: str) -> Failures:
        """Say what the members do until all have ended."""
        failures: Failures = []
        took: list[float] = []  # seconds, of members that are finished
        running, begin = dict(tasks), time.monotonic()

        def tell(text: str) -> None:
            with tqdm.external_write_mode():
                say(text)

        with tqdm(
            total=len(tasks),
            bar_format="{n_fmt} of {total_fmt} members done  {elapsed}{postfix}",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
        ) as bar:
            while running:
                ended, _ = self.ray.wait(list(running), timeout=POLL_SECONDS)
                for followed in running.values():
                    for text in followed.news():
                        lost = "worker lost, goes on " if followed.begun and text.startswith("[on ") else ""
                        followed.begun = followed.begun or time.monotonic()
                        tell(f"{followed.title}: {lost}{text}")
                for task in ended:
                    followed = running.pop(task)
                    failure = self._failure(task, followed)
                    seconds = time.monotonic() - (followed.begun or begin)
                    if failure is None:
                        took.append(seconds)
                    else:
                        failures.append((followed.member.name, failure))
                        tell(f"{followed.title}: {reasons(failures)[-1][0]}")
                    write_index(sweep.run.path, command)
                    left = [other.member for other in running.values()]
                    ahead = time_left(seconds_ahead(sweep, left, took, self.at_once))
                    verb = "failed after" if failure else "took"
                    elapsed = duration(time.monotonic() - begin)
                    tell(f"{followed.title} {verb} {duration(seconds)} (elapsed {elapsed}{ahead})")
                    bar.update()
                begun = [followed.member.name for followed in running.values() if followed.begun]
                bar.set_postfix_str(", ".join(begun)[:80])
        order = [member.name for member in sweep.members]
        return sorted(failures, key=lambda failure: order.index(failure[0]))

    def _failure(self, task: Any, followed: _Followed) -> StepFailed | None:
        """The failure of a member that has ended; None where it is finished."""
        try:
            failure = self.ray.get(task)
            if self.storage:
                self.mirrors[followed.member.name].fetch()
            if failure:
                return StepFailed(failure)
            give_up = time.monotonic() + ANSWER_SECONDS
            while not followed.member.finished and time.monotonic() < give_up:  # shared storage shows files late
                time.sleep(0.1)
            if followed.member.finished:
                return None
            reason = f"its machine says it is done, but {followed.member.run.path} does not show that: is it shared?"
        except self.ray.exceptions.RayTaskError as error:
            reason = f"{type(error.cause).__name__}: {error.cause}"
        except self.ray.exceptions.RayError as error:  # most likely its worker was lost too often
            reason = f"{type(error).__name__}: {error}"
        return StepFailed(f"{reason.splitlines()[0]}\nlog: {followed.log}")

    def _cancel(self, tasks: list[Any]) -> None:
        for task in tasks:
            self.ray.cancel(task)
        _, busy = self.ray.wait(tasks, num_returns=len(tasks), timeout=CANCEL_SECONDS) if tasks else ([], [])
        for task in busy:
            self.ray.cancel(task, force=True)


def _work(member: Member, root: Path, command: str, token: Path | None, url: str | None) -> str | None:
    """Run a member in a worker of Ray; returns the message of its failure, or None.

    `token`: a file in the reports that machines share. `url`: the copy of the member where they share none. Raises
    RunLocked, FileNotFoundError.
    """
    machine = socket.gethostname()
    if token and not token.exists():  # this machine joined the cluster later
        raise FileNotFoundError(f"{machine} cannot see {token.parent}, which all machines should share")
    mirror = Mirror(member.run.path, url) if url else None
    if mirror:
        with locked(member.run):
            mirror.fetch()
    try:
        with work_in(root, member.run) as place:
            log.info("[on %s]", machine)
            run_member(member, place, log.info, command, mirror.send if mirror else lambda: None)
    except StepFailed as failure:
        if mirror:
            mirror.send()
        return str(failure)
    return None


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"
