"""The pipeline on a tiny project of three notebooks that leave a trace of having run."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

import run_all
from asrlib.reporting.numbers import duration
from asrlib.running.parameters import LIMITS, Schema, read_assignments, read_params_file
from asrlib.running.pipeline import pending, plan, time_left
from asrlib.running.preflight import check_surroundings, check_width
from asrlib.runs import BadParameter, Run, find_notebooks, project_root, read_json, write_json

ROOT = project_root(Path(__file__).parent)

TRACE = """
from asrlib.runs import Run
run = Run.open(run_dir)
with open(run.path / "trace", "a") as file:
    print("{step}", file=file)
"""
FIRST = [
    """
from typing import Optional
run_dir: str = "reports/demo"  # the run's folder
model: str = ""  # folder of a model
latent_dim: Optional[int] = 4  # numbers per frame
cache_cut: Optional[float] = None  # share saved
layout: str = "joint"
learning_rate: float = 1e-3
""",
    TRACE.format(step="first"),
    """
import os, sys
from pathlib import Path
from ipykernel.kernelapp import IPKernelApp
run.write_metrics("first", {
    "cwd": os.getcwd(), "python": sys.executable, "transport": IPKernelApp.instance().transport,
    "latent_dim": latent_dim, "cache_cut": cache_cut, "learning_rate": learning_rate,
})
""",
]
SECOND = [
    """
run_dir: str = "reports/demo"
ticks: int = 3  # a tenth of a second each, at first
epochs: float = 1.0
on_error: str = ""  # what to do at the end: raise, die
""",
    TRACE.format(step="second"),
    """
import os, time
checkpoint = run.checkpoints("01_second") / "tick"
begin = int(checkpoint.read_text()) if checkpoint.exists() else 0
for done in range(begin, ticks):
    checkpoint.write_text(str(done))
    print(f"tick {done}", flush=True)
    time.sleep(0.1 if begin == 0 else 0)
run.write_metrics("second", {"ticks": ticks, "resumed_at": begin})
""",
    """
def fragile(path):
    return path.read_text()

if on_error == "raise":
    fragile(run.path / "wanted")
if on_error == "die":
    os.kill(os.getpid(), 9)
""",
]
THIRD = [
    """
run_dir: str = "reports/demo"
eval_splits: list[str] = ["test-clean"]
epochs: float = 1.0
""",
    TRACE.format(step="third"),
]


NAMES = ["00_first", "01_second", "02_third"]


def write_notebook(path, cells):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# {path.stem}")]
    notebook.cells += [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    notebook.cells[1].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder, on a machine where another environment's kernel goes by the name of ours."""
    for step, cells in zip(NAMES, (FIRST, SECOND, THIRD), strict=True):
        write_notebook(tmp_path / "notebooks" / f"{step}.ipynb", cells)
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "demo.yaml").write_text("# a tiny run\nlearning_rate: 1e-4\n")
    (tmp_path / "params" / "first.yaml").write_text("# the first step\nsteps: [00_first]\n")
    (tmp_path / "params" / "second.yaml").write_text("steps: [01_second]")
    write_json(tmp_path / "jupyter/kernels/python3/kernel.json", {"argv": ["false"], "display_name": "other"})
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return tmp_path


def call(project, *words):
    return run_all.main([*words, "--root", str(project)])


def start(project, *words):
    command = [sys.executable, run_all.__file__, *words, "--root", str(project)]

    def heed_ctrl_c():  # what a shell starts in the background ignores it, and so does all that it starts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_ctrl_c)


def trace(run):
    """The steps that ran since the last look."""
    file = run.path / "trace"
    steps = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return steps


def wait_until(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def kernels_of(process):
    children = psutil.Process(process.pid).children()
    return [child for child in children if "ipykernel_launcher" in child.cmdline()]


def is_locked(run):
    with open(run.path / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def gone(kernels):
    return not any(kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE for kernel in kernels)


# ---- refusals, before anything starts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "latent_dmi=64"], "unknown parameter 'latent_dmi' (in --set): did you mean 'latent_dim'?"),
        (["--set", "zzzz=1"], "unknown parameter 'zzzz' (in --set): valid are model, latent_dim,"),
        (["--set", "run_dir=x"], "'run_dir' (in --set) is set by run_all itself: name the run with --name"),
        (["--set", "epochs=many"], "parameter 'epochs' (in --set) is 'many', should be a valid number"),
        (["--set", "epochs=true"], "parameter 'epochs' (in --set) is True, should be a valid number"),
        (["--set", "latent_dim=4.5"], "parameter 'latent_dim' (in --set) is 4.5, should be a valid integer"),
        (["--set", "model=12"], "parameter 'model' (in --set) is 12, should be a valid string"),
        (["--set", "eval_splits=a"], "parameter 'eval_splits' (in --set) is 'a', should be a valid list"),
        (["--set", "eval_splits=[a, 7]"], "is ['a', 7] (its item 1 is 7), should be a valid string"),
        (["--set", "epochs=null"], "parameter 'epochs' (in --set) is None, should be a valid number"),
        (["--set", "epochs=.nan"], "parameter 'epochs' (in --set) is nan, should be a finite number"),
        (
            ["--set", "latent_dim=0"],
            "'latent_dim' (in --set) is 0, should be greater than or equal to 1",
        ),
        (["--set", "learning_rate=-1e-4"], "'learning_rate' (in --set) is -0.0001, should be greater than 0"),
        (["--set", "cache_cut=1.0"], "parameter 'cache_cut' (in --set) is 1.0, should be less than 1"),
        (["--set", "layout=splt"], "is 'splt', should be one of joint, split: did you mean 'split'?"),
        (
            ["--set", "latent_dim=4", "cache_cut=0.5"],
            "'cache_cut' (in --set) say the same thing twice",
        ),
        (
            ["--set", "model=tiny", "latent_dim=17"],
            "latent_dim is 17, but a joint latent of a model of width 8 has between 1 and 16 numbers",
        ),
        (["--set", "epochs"], "'epochs' (in --set) should be name=value"),
        (["--set", "epochs=[1"], "the value of 'epochs' (in --set) is not valid YAML"),
        (["--from", "01_secnd"], "unknown step '01_secnd' (in --from): did you mean '01_second'?"),
        (["--name", "a/b"], "--name 'a/b' should be one folder name, without slashes"),
        (["--name", ".."], "--name '..' is reserved"),
        (["--name", "examples"], "--name 'examples' is reserved"),
    ],
)
def test_impossible_calls_are_refused_before_anything_starts(project, monkeypatch, capsys, words, message):
    write_json(project / "tiny" / "config.json", {"hidden_size": 8})
    monkeypatch.chdir(project)
    assert call(project, "demo", *words) == 2
    assert message in capsys.readouterr().err
    assert not (project / "reports").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 1", "unknown parameter 'epoch' (in mine.yaml): did you mean 'epochs'?"),
        ("epochs: 1\nepochs: 2", "'epochs' is given twice"),
        ("steps: [00_frist]", "unknown step '00_frist' (in mine.yaml): did you mean '00_first'?"),
        ("steps: 00_first", "'steps' (in mine.yaml) should be a list of steps"),
        ("- epochs", "should be one flat mapping"),
        ("epochs: [", "is not valid YAML"),
        (r'layout: "\ud83c"', "holds half a character"),
        ("latent_dmi: 1\nepochs: x", "did you mean 'latent_dim'?\nparameter 'epochs' (in mine.yaml) is 'x'"),
    ],
)
def test_params_files_with_mistakes_are_refused(project, capsys, text, message):
    (project / "params" / "mine.yaml").write_text(text)
    assert call(project, "mine") == 2
    output = capsys.readouterr().err
    assert all(line in output for line in message.split("\n"))


def test_an_unknown_params_file_is_refused_with_the_nearest(project, capsys):
    assert call(project, "dmo") == 2
    assert "there is no params file 'dmo': did you mean 'demo'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("epochs: int = 1", "parameter 'epochs' is float in 01_second but int in 02_third"),
        ("width: int | None = 1", "papermill does not see parameter 'width'"),
        ("seed: int = 0  # with = in its help", "papermill does not see parameter 'seed'"),
        ("width: Path = 1", "parameter 'width' has type Path"),
        ("width: int = 2 * 3", "default of 'width' is not a literal"),
        ("seed: int = -1", "parameter 'seed' (in the parameters cell of 02_third) is -1"),
    ],
)
def test_a_parameters_cell_that_would_be_misread_is_an_error(project, cell, message):
    write_notebook(project / "notebooks" / "02_third.ipynb", [cell])
    with pytest.raises(BadParameter) as error:
        Schema(find_notebooks(project))
    assert message in str(error.value)


def test_numbers_are_read_as_people_write_them(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1e-4\nb: -2.5E+3\nc: 3\nd: .5e1\ne: 1e\nf: '1e-4'\n")
    expected = {"a": 1e-4, "b": -2500.0, "c": 3, "d": 5.0, "e": "1e", "f": "1e-4"}
    assert read_params_file(tmp_path / "a.yaml") == expected
    assert read_assignments(["a=1e-4", "s=x=y", "n=", "l=[1e-3, b]"]) == {
        "a": 1e-4,
        "s": "x=y",
        "n": None,
        "l": [1e-3, "b"],
    }


def test_a_latent_is_at_most_as_wide_as_keys_and_values(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    check_width({"model": str(tmp_path), "latent_dim": 16, "layout": "joint"})
    check_width({"model": str(tmp_path), "latent_dim": 2, "layout": "split"})
    with pytest.raises(BadParameter, match="between 1 and 16 numbers"):
        check_width({"model": str(tmp_path), "latent_dim": 17, "layout": "joint"})
    with pytest.raises(BadParameter, match="between 2 and 16 numbers"):
        check_width({"model": str(tmp_path), "latent_dim": 1, "layout": "split"})


def test_giving_cache_cut_switches_the_default_of_latent_dim_off(project):
    schema = Schema(find_notebooks(project))
    assert schema.for_step("00_first", {"cache_cut": 0.5, "epochs": 2.0}) == {
        "cache_cut": 0.5,
        "latent_dim": None,
    }
    assert schema.for_step("02_third", {"cache_cut": 0.5, "epochs": 2.0}) == {"epochs": 2.0}


# ---- the notebooks and params files of this repository -----------------------------------------------------


def corpus_is_here(values: dict) -> bool:
    """Whether a params file's corpus is no folder beside the project, or one that exists."""
    return not str(values.get("corpus", "")).startswith("..") or (ROOT / values["corpus"]).exists()


FILES = sorted((ROOT / "params").glob("*.yaml"))


def test_the_params_files_of_the_readme_are_here():
    assert {"demo", "quick", "full", "smoke"} <= {file.stem for file in FILES}


@pytest.mark.parametrize(
    "file", [file for file in FILES if "sweep" not in read_params_file(file)], ids=lambda f: f.stem
)
def test_every_params_file_fits_the_notebooks(file):
    notebooks, values = find_notebooks(ROOT), read_params_file(file)
    if not corpus_is_here(values):
        pytest.skip(f"{values['corpus']} is not on this machine")
    made_by = re.match(r"reports/([^/]+)/models/", values.get("model", ""))
    assert made_by is None or made_by[1] in {other.stem for other in FILES}
    # A model that another run makes is not there yet: the shipped one takes its place.
    given = ["model=synthetic-conformer"] if made_by else []
    run_all.read_values(file, given, Schema(notebooks), list(notebooks))


def test_every_limit_is_about_a_parameter_of_some_notebook():
    assert set(LIMITS) <= set(Schema(find_notebooks(ROOT)).defaults)


# ---- running -----------------------------------------------------------------------------------------------


def test_only_what_changed_runs_again(project, capsys):
    run = Run(project / "reports" / "demo")
    assert call(project, "demo", "--set", "cache_cut=0.25") == 0
    assert trace(run) == ["first", "second", "third"]
    assert run.read_metrics("first") == {
        "cwd": str(project),
        "python": sys.executable,
        "transport": "ipc",
        "latent_dim": None,
        "cache_cut": 0.25,
        "learning_rate": 1e-4,
    }
    assert read_json(run.path / "params.json") == {"learning_rate": 1e-4, "cache_cut": 0.25}
    for page in ("00_first.html", "01_second.html", "02_third.html", "index.html"):
        assert (run.path / page).is_file()
    assert sorted(path.name for path in (run.path / "notebooks").iterdir()) == [
        "00_first.ipynb",
        "01_second.ipynb",
        "02_third.ipynb",
    ]
    assert capsys.readouterr().out.splitlines()[-1] == str(run.path / "index.html")
    log = (run.path / "pipeline.log").read_text()
    assert "tick 2" in log and "[3/3] 02_third took" in log

    same = ["demo", "--set", "cache_cut=0.25"]
    call(project, *same, "epochs=1.0")  # the default, said aloud
    assert trace(run) == []
    table = capsys.readouterr().out
    assert table.count("unchanged") == 3 and table.count(" s\n") == 3

    call(project, *same, "epochs=2")
    assert trace(run) == ["second", "third"]
    assert "about" in capsys.readouterr().out, "it knows how long the third step took"
    assert run.completed("02_third")["parameters"] == {"epochs": 2.0, "run_dir": "reports/demo"}


CHANGES = {
    "nothing": (3, lambda project: None),
    "another parameter": (1, lambda project: {"epochs": 2.0}),
    "a parameter's default, said aloud": (3, lambda project: {"epochs": 1.0}),
    "a notebook's code": (
        2,
        lambda project: write_notebook(project / "notebooks/02_third.ipynb", [*THIRD, "1"]),
    ),
    "a default in a notebook": (
        1,
        lambda project: replace_in(project / "notebooks/01_second.ipynb", "3", "4"),
    ),
    "a notebook's text": (
        3,
        lambda project: replace_in(project / "notebooks/00_first.ipynb", "# 00", "## 00"),
    ),
    "what the third imports": (2, lambda project: (project / "asrlib" / "deeper.py").write_text("depth = 2")),
    "what none imports": (3, lambda project: (project / "asrlib" / "new.py").write_text("")),
    "a file that a parameter points to": (0, lambda project: (project / "model.bin").write_text("two")),
    "only its time": (3, lambda project: os.utime(project / "model.bin", (1, 1))),
}


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_does_again_what_a_change_touches(project, what):
    def steps(values):
        return plan(project, run, Schema(find_notebooks(project)), {"model": "model.bin", **values}, NAMES)

    (project / "asrlib").mkdir()
    (project / "asrlib" / "__init__.py").touch()
    (project / "asrlib" / "figures.py").write_text("def draw():\n    import asrlib.deeper\n")
    (project / "asrlib" / "deeper.py").write_text("depth = 1")
    write_notebook(project / "notebooks/02_third.ipynb", [*THIRD, "if False:\n    from asrlib.figures import draw"])
    (project / "model.bin").write_text("one")
    run = Run(project / "reports" / "demo")
    assert pending(run, steps({})) == steps({})
    for step in steps({}):
        run.mark_completed(step.name, step.fingerprint, seconds=1.0)
    expected, change = CHANGES[what]
    changed = change(project)
    planned = steps(changed if isinstance(changed, dict) else {})
    assert pending(run, planned) == planned[expected:], "these steps are not in the table of needs"


def test_steps_that_are_unchanged_run_again_when_told_to(project):
    run = Run(project / "reports" / "trial")
    for words in ([], ["--force"], ["--from", "00_first"]):
        assert call(project, "first", "--name", "trial", *words) == 0
        assert trace(run) == ["first"], "the params file names this step only"
    assert run.completed("01_second") is None


def test_a_failing_step_shows_its_error_and_the_next_call_resumes_there(project, capsys):
    run = Run(project / "reports" / "demo")
    words = ["demo", "--set", "on_error=raise"]
    assert call(project, *words) == 1
    message = capsys.readouterr().err
    executed = run.path / "notebooks" / "01_second.failed.ipynb"
    for part in (
        "01_second failed: FileNotFoundError",
        'fragile(run.path / "wanted")',
        "return path.read_text()",
        f"executed notebook: {executed}",
    ):
        assert part in message
    assert executed.is_file() and not (run.path / "notebooks" / "01_second.ipynb").exists()
    assert trace(run) == ["first", "second"]
    assert run.completed("01_second") is None

    (run.path / "wanted").touch()
    assert call(project, *words) == 0
    assert trace(run) == ["second", "third"]
    assert not executed.exists()


def test_a_kernel_that_dies_is_a_failed_step(project, capsys):
    assert call(project, "second", "--set", "on_error=die") == 1
    assert "01_second failed: its kernel died" in capsys.readouterr().err
    assert Run(project / "reports" / "second").completed("01_second") is None


def test_killed_in_the_middle_and_called_again_it_resumes(project, capsys):
    run = Run(project / "reports" / "demo")
    checkpoint = run.path / "checkpoints" / "01_second" / "tick"
    words = ["demo", "--set", "ticks=80"]
    process = start(project, *words)
    try:
        wait_until(lambda: checkpoint.exists() and checkpoint.read_text() not in ("", "0"))
        kernels = kernels_of(process)
        assert len(kernels) == 1

        assert call(project, *words) == 2
        assert f"is in use by another run (process {process.pid})" in capsys.readouterr().err
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert is_locked(run) or gone(kernels), "while the orphan lives, nobody else may write"
    assert run.completed("00_first") and not run.completed("01_second")
    assert trace(run) == ["first", "second"]

    assert call(project, *words) == 0, "it waits for the orphaned kernel, which ends by itself"
    assert gone(kernels)
    assert "resumes" in capsys.readouterr().out
    assert trace(run) == ["second", "third"]
    metrics = run.read_metrics("second")
    assert metrics["ticks"] == 80 and metrics["resumed_at"] > 0
    assert not [path for path in run.path.rglob("*") if ".tmp-" in path.name or ".running." in path.name]


def test_ctrl_c_ends_a_run_long_before_its_end_and_takes_the_kernel_along(project):
    process = start(project, "second", "--set", "ticks=100000")
    try:
        wait_until((project / "reports/second/checkpoints/01_second/tick").exists)
        kernels = kernels_of(process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)  # its ticks would take hours
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted. The same command, given again, resumes here." in output
    assert kernels and gone(kernels)


def test_a_folder_that_cannot_be_written_is_named_in_one_sentence(project, capsys):
    reports = project / "reports"
    if os.geteuid():
        reports.mkdir(exist_ok=True)
        reports.chmod(0o555)
    else:  # whom no mode stops
        reports.symlink_to("/sys/kernel")
    assert call(project, "first") == 1
    error = capsys.readouterr().err
    assert str(reports / "first") in error and "make the folder writable" in error
    assert "Traceback" not in error


def test_the_list_shows_params_files_and_how_far_runs_are(project, capsys):
    run = Run(project / "reports" / "trial")
    run.mark_started("00_first", "a")
    run.mark_completed("00_first", "a", seconds=1.0)
    assert call(project, "--list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "params",
        "  demo                a tiny run",
        "  first               the first step",
        "  second",
        "runs",
        "  trial               1 of 3 steps completed",
    ]


def test_auto_names_a_run_after_its_params_file_and_the_time():
    name = run_all.run_name("auto", Path("params/demo.yaml"))
    time.strptime(name, "demo-%Y%m%d-%H%M%S")
    assert run_all.run_name(None, Path("params/demo.yaml")) == "demo"


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ([], ""),
        ([None], ""),
        ([5.0, 60.0], ", about 1 min 05 s left"),
        ([None, 7500.0], ", more than 2 h 05 min left"),
    ],
)
def test_time_left_says_what_is_not_known(expected, text):
    assert time_left(expected) == text


def test_duration():
    assert [duration(seconds) for seconds in (0.04, 59.94, 60, 3599, 3600)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
    ]


def test_what_the_command_line_asks_of_the_cache_goes_before_what_the_file_asks(tmp_path):
    notebooks = find_notebooks(ROOT)
    file = tmp_path / "mine.yaml"
    file.write_text("latent_dim: 4\nepochs: 2\n")
    values, _ = run_all.read_values(file, ["cache_cut=0.5"], Schema(notebooks), list(notebooks))
    assert values == {"cache_cut": 0.5, "epochs": 2}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architecture": "wav2vec2-conformer", "baseline_epochs": None}, "weights are random: give 'baseline_epochs'"),
        ({"analysis_methods": ["svd", "two_side"]}, "'analysis_methods' holds 'two_side': did you mean 'two_sided'?"),
        ({"kl_weight": 0, "ctc_weight": 0, "hidden_weight": 0}, "are all 0: there is nothing to learn from"),
    ],
)
def test_values_that_cannot_go_together_are_refused(values, said):
    with pytest.raises(BadParameter, match=said):
        check_surroundings(values)
    check_surroundings({"architecture": "conformer", "baseline_epochs": 1.0, "analysis_methods": ["svd"]})
