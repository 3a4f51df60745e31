"""Sweeps whose members are tasks of Ray, on a cluster that is this machine, with two cores and two pretended GPUs."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from test_run_all import TRACE, call, gone, is_locked, trace, wait_until, write_notebook
from test_sweeps import COMPARE, params

from asrlib.running.cluster import engine_of, ray_address
from asrlib.runs import BadParameter, Run

FIRST = [
    """
run_dir: str = "reports/demo"
seed: int = 0
on_error: str = ""  # what to do at the end: raise
""",
    TRACE.format(step="first"),
    """
import os
run.write_metrics("first", {"gpu": os.environ["CUDA_VISIBLE_DEVICES"]})
if on_error == "raise":
    (run.path / "wanted").read_text()
""",
]
SECOND = [
    """
run_dir: str = "reports/demo"
""",
    TRACE.format(step="second"),
    """
import os, time
(run.checkpoints("01_second") / str(os.getpid())).write_text(str(os.getppid()))
while not (run.path.parent / "go").exists():
    time.sleep(0.05)
""",
]


def expect_nothing_of_agents(monkeypatch):
    """Ray starts only if its agents say within 15 s where they listen, which they cannot on a machine that is busy with
    other tests. Without a dashboard they say that they do not, and nothing here asks them: that is said for them."""
    from ray import _raylet
    from ray._private.node import Node

    def start_raylet(node, *arguments, **options):
        for agent in ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN", "RUNTIME_ENV_AGENT"):
            _raylet.persist_port(node.get_session_dir_path(), node.node_id, getattr(_raylet, f"{agent}_PORT_NAME"), -1)
        start(node, *arguments, **options)

    start = Node.start_raylet
    monkeypatch.setattr(Node, "start_raylet", start_raylet)


@pytest.fixture(scope="module")
def cluster():
    """One that engine_of starts; what the tests call finds itself connected and goes on with it."""
    pytest.importorskip("ray", reason="needs the optional package ray")
    before, stop = dict(os.environ), signal.getsignal(signal.SIGTERM)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's path may have 107 bytes, pytest's folders are too deep
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([f"{folder}/quick", *filter(None, [before.get("PYTHONPATH")])]),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_TOKEN": "of-this-test",  # or else Ray leaves one in the home folder
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 2, "GPU": 2}',
    }
    (folder / "quick").mkdir()  # where jsonschema finds this package, it takes a second of each of Ray's processes
    (folder / "quick" / "rfc3987_syntax.py").write_text("raise ImportError")
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            expect_nothing_of_agents(monkeypatch)
            with engine_of("ray", folder / "reports") as engine:
                assert signal.getsignal(signal.SIGTERM) is stop
                yield engine
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    for step, cells in {"00_first": FIRST, "01_second": SECOND, "02_compare": COMPARE}.items():
        write_notebook(tmp_path / "notebooks" / f"{step}.ipynb", cells)
    (tmp_path / "params").mkdir()
    params(tmp_path, "long", "steps: [00_first, 01_second]")
    for seed in (1, 2, 3):
        params(tmp_path, f"short-{seed}", f"seed: {seed}\nsteps: [00_first]")
    params(tmp_path, "four", "sweep: [short-1, long, short-2, short-3]")
    params(tmp_path, "fragile", "steps: [00_first]\nsweep: {on_error: [raise, '']}")
    params(tmp_path, "waiting", "steps: [01_second]\nsweep: {seed: [1, 2]}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def heeding_ctrl_c():
    """What a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def in_background(function, *arguments):
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def processes_in(member):
    """(kernel, worker) for each kernel that ever waited in the second step of a run."""
    files = (member.path / "checkpoints" / "01_second").glob("*")
    return [(int(file.name), int(text)) for file in files if (text := file.read_text())]


# ---- running -----------------------------------------------------------------------------------------------


def test_a_member_whose_worker_is_killed_goes_on_in_another_and_nothing_is_done_twice(cluster, project, capsys):
    assert cluster.at_once == 2
    run, names = Run(project / "reports" / "four"), ["short-1", "long", "short-2", "short-3"]
    long, held = Run(run.path / "long"), set()

    def kill_the_worker():
        wait_until(lambda: processes_in(long))
        ((kernel, worker),) = processes_in(long)
        held.update(file.path for file in psutil.Process(kernel).open_files())
        wait_until((run.path / "short-3/.completed/00_first.json").exists)  # the other worker did all the rest
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: len(processes_in(long)) == 2)
        (run.path / "go").touch()

    killer = in_background(kill_the_worker)
    assert call(project, "four", "--engine", "ray") == 0
    killer.join()
    assert [trace(Run(run.path / name)) for name in names] == [
        ["first"], ["first", "second", "second"], ["first"], ["first"],
    ]  # fmt: skip
    assert trace(run) == ["compare"] and run.completed("02_compare")["parameters"]["members"] == names
    assert str(long.path / ".lock") in held, "until the kernel is gone"
    used = {Run(run.path / name).read_metrics("first")["gpu"] for name in names}
    assert used <= {"0", "1"}, "each member has one GPU"
    shown = capsys.readouterr()
    assert shown.err == "", "not a word of Ray's own"
    lines = shown.out.splitlines()
    assert lines[1] == "on Ray, 1 machine: 2 members at once, each with 1 CPU and 1 GPU"
    told = [line for line in lines if line.startswith("[2/4] long")]
    assert told[0].startswith("[2/4] long: [on ") and told[1] == "[2/4] long: [1/2] 00_first ..."
    assert sum("worker lost, goes on [on" in line for line in lines) == 1
    assert told[-1].startswith("[2/4] long took ") and "(elapsed" in told[-1]

    assert call(project, "four", "--engine", "ray") == 0
    assert [trace(Run(run.path / name)) for name in ("", *names)] == 5 * [[]]
    assert capsys.readouterr().out.count(" unchanged") == 5


def test_a_member_that_fails_does_not_stop_the_others_and_storage_keeps_what_they_did(cluster, project, capsys):
    run, words = Run(project / "reports" / "fragile"), ["--engine", "ray", "--storage", f"file://{project}/bucket"]
    assert call(project, "fragile", *words) == 1
    assert [trace(Run(run.path / name)) for name in ("on_error-raise", "on_error-", "")] == [
        ["first"], ["first"], ["compare"],
    ]  # fmt: skip
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        "failed: on_error-raise",
        "  on_error-raise: 00_first failed: FileNotFoundError: [Errno 2] No such file or directory: "
        f"'{run.path}/on_error-raise/wanted'",
        f"    executed notebook: {run.path}/on_error-raise/notebooks/00_first.failed.ipynb",
        "The same command, given again, resumes there.",
    ]
    assert "[1/2] on_error-raise failed after" in shown.out and "1 of 2 members compared" in shown.out

    shutil.rmtree(project / "reports")  # as on a machine that has nothing of it yet
    (project / "bucket/fragile/on_error-raise/wanted").touch()
    assert call(project, "fragile", *words) == 0
    assert [trace(Run(run.path / name)) for name in ("on_error-raise", "on_error-", "")] == [
        ["first", "first"], ["first"], ["compare", "compare"],
    ]  # fmt: skip
    assert (project / "bucket/fragile/index.html").read_text() == (run.path / "index.html").read_text()


def test_ctrl_c_ends_all_members_and_their_kernels(cluster, project, heeding_ctrl_c, capsys):
    run = Run(project / "reports" / "waiting")
    members = [Run(run.path / name) for name in ("seed-1", "seed-2")]
    kernels = []

    def press_ctrl_c():
        wait_until(lambda: all(processes_in(member) for member in members))
        kernels.extend(psutil.Process(kernel) for member in members for kernel, _ in processes_in(member))
        os.kill(os.getpid(), signal.SIGINT)

    in_background(press_ctrl_c)
    assert call(project, "waiting", "--engine", "ray") == 130  # they would wait for ever
    assert "Interrupted. The same command, given again, resumes here." in capsys.readouterr().err
    assert len(kernels) == 2
    wait_until(lambda: gone(kernels) and not any(map(is_locked, members)))
    assert all(member.resumable("01_second") for member in members)
    assert run.completed("02_compare") is None and not is_locked(run)
    assert not list((project / "reports").glob(".tmp-*"))


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "address"),
    [("local", None), ("ray", "local"), ("ray://auto", "auto"), ("ray://head:10001", "ray://head:10001")],
)
def test_an_engine_is_named_as_ray_names_its_clusters(engine, address):
    assert ray_address(engine) == address


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["four", "--engine", "rey"], "--engine 'rey' should be local, ray, ray://auto or ray://HOST:PORT"),
        (["four", "--engine", "ray://"], "--engine 'ray://' should be local, ray"),
        (
            ["four", "--engine", "ray://head"],
            "--engine 'ray://head' should be local, ray, ray://auto or ray://HOST:PORT",
        ),
        (["four", "--gpus", "1"], "--cpus, --gpus and --storage belong to --engine ray"),
        (["four", "--engine", "ray", "--cpus", "1.5"], "--cpus 1.5 should be a whole number, or a share of one"),
        (["four", "--engine", "ray", "--gpus", "-1"], "--gpus -1 should be a whole number, or a share of one"),
        (["four", "--engine", "ray", "--cpus", "0"], "--cpus 0 needs --gpus above 0"),
        (["four", "--engine", "ray", "--set", "sed=1"], "did you mean 'seed'?"),
        (
            ["four", "--engine", "ray", "--storage", "s4://reports"],
            "s4://reports cannot be used: Protocol not known: s4",
        ),
        (["long", "--engine", "ray"], "--engine ray is for the members of a sweep, but long.yaml is not a sweep"),
    ],
)
def test_impossible_engines_are_refused_before_anything_starts(project, capsys, words, message):
    assert call(project, *words) == 2
    assert message in capsys.readouterr().err
    assert not (project / "reports").exists()


def test_without_ray_it_says_how_to_install_it(project, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call(project, "four", "--engine", "ray") == 2
    assert "pip install -c constraints.txt -e '.[cluster]'" in capsys.readouterr().err


def test_a_cluster_without_room_for_a_member_is_refused(cluster, project, capsys):
    assert call(project, "four", "--engine", "ray", "--gpus", "3") == 2
    assert "no machine of the cluster has the 1 CPU and 3 GPU that each member is to get" in capsys.readouterr().err


def test_machines_that_cannot_see_the_reports_are_named(cluster, project):
    elsewhere = Path("reports")  # the same name, but not the same folder: a worker runs in another
    refused = pytest.raises(BadParameter, match="cannot see reports: all machines should see the project")
    with refused, engine_of("ray", elsewhere):
        pass
    assert not list(elsewhere.iterdir())
