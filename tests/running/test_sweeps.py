"""Sweeps, on a tiny project of two notebooks and one that compares what they leave."""

import re
import signal
import warnings

import psutil
import pytest
from test_run_all import ROOT, TRACE, call, corpus_is_here, gone, kernels_of, start, trace, wait_until, write_notebook

from asrlib.running.parameters import Schema, read_params_file
from asrlib.running.pipeline import Step, expected_seconds
from asrlib.running.sweeps import plan_comparison, read_sweep, seconds_ahead
from asrlib.running.workplace import log, logged
from asrlib.runs import Run, find_notebooks, member_names, read_json, write_json

FIRST = [
    """
from typing import Optional
run_dir: str = "reports/demo"
model: str = ""
latent_dim: Optional[int] = 4
cache_cut: Optional[float] = None
learning_rate: float = 1e-3
seed: int = 0
""",
    TRACE.format(step="first"),
]
SECOND = [
    """
run_dir: str = "reports/demo"
ticks: int = 0  # a tenth of a second each
on_error: str = ""  # what to do at the end: raise
""",
    TRACE.format(step="second"),
    """
import time
checkpoint = run.checkpoints("01_second") / "tick"
for done in range(ticks):
    checkpoint.write_text(str(done))
    time.sleep(0.1)
""",
    """
if on_error == "raise":
    (run.path / "wanted").read_text()
""",
]
COMPARE = [
    """
run_dir: str = "reports/demo"
members: list = []  # of a sweep: the runs below run_dir that are compared
learning_rate: float = 1e-3
""",
    TRACE.format(step="compare"),
    """print("compared:", *members)""",
]
NAMES = ["00_first", "01_second", "02_compare"]


@pytest.fixture
def project(tmp_path):
    for step, cells in zip(NAMES, (FIRST, SECOND, COMPARE), strict=True):
        write_notebook(tmp_path / "notebooks" / f"{step}.ipynb", cells)
    (tmp_path / "params").mkdir()
    params(tmp_path, "small", "learning_rate: 1e-4\nlatent_dim: 2\nsteps: [00_first]")
    params(tmp_path, "large", "learning_rate: 1e-5\nlatent_dim: 8\nticks: 1")
    params(tmp_path, "widths", "# two widths\nsteps: [00_first]\nlearning_rate: 1e-4\nsweep: {latent_dim: [2, 8]}")
    params(tmp_path, "fragile", "steps: [01_second]\nsweep: {on_error: [raise, '']}")
    params(tmp_path, "slow", "steps: [01_second]\nsweep: {ticks: [100000, 1]}")
    return tmp_path


def params(project, name, text):
    (project / "params" / f"{name}.yaml").write_text(text + "\n")


def sweep_of(project, name, *assignments):
    run, schema = Run(project / "reports" / name), Schema(find_notebooks(project))
    return read_sweep(project, run, project / "params" / f"{name}.yaml", list(assignments), schema)


def traces(run, *members):
    """What ran since the last look, in each member and in the sweep as a whole."""
    return [trace(Run(run.path / member)) for member in members] + [trace(run)]


# ---- what a params file asks for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        (["small", "params/conformer-0.5.yaml"], ["small", "conformer-0.5"]),
        ({"latent_dim": [16, None]}, ["latent_dim-16", "latent_dim-null"]),
        ({"a": [1, 2], "b": ["x", True]}, ["a-1_b-x", "a-1_b-true", "a-2_b-x", "a-2_b-true"]),
        ({"a": [-1, 1e-4], "b": [[0.5, 0.75]]}, ["a--1_b-0.5-0.75", "a-0.0001_b-0.5-0.75"]),
        ({"model": ["/some/folder", "two_sided, energy"]}, ["model--some-folder", "model-two_sided-energy"]),
        ({"model": [100 * "x" + "/end"]}, ["model-" + 56 * "x" + "-end"]),
    ],
)
def test_members_are_named_after_their_file_or_their_values(sweep, names):
    assert member_names(sweep) == names


def test_a_sweeps_values_go_before_those_of_its_members_and_set_before_all(project):
    params(project, "both", "sweep: [small, large]\nlearning_rate: 0.5")
    small, large = sweep_of(project, "both", "ticks=7").members
    assert small.values == {"learning_rate": 0.5, "latent_dim": 2, "ticks": 7}
    assert large.values == {"learning_rate": 0.5, "latent_dim": 8, "ticks": 7}
    assert [step.name for step in small.steps] == ["00_first"], "its own file's"
    assert [step.name for step in large.steps] == NAMES
    assert large.run.path == project / "reports" / "both" / "large"
    assert large.steps[2].parameters == {"learning_rate": 0.5, "run_dir": "reports/both/large"}

    params(project, "both", "sweep: [small, large]\ncache_cut: 0.5\nsteps: [01_second]")
    sweep = sweep_of(project, "both", "learning_rate=1.0")
    for member in sweep.members:
        assert [step.name for step in member.steps] == ["01_second"]
        assert member.values["cache_cut"] == 0.5 and "latent_dim" not in member.values
        assert member.values["learning_rate"] == 1.0
    assert sweep.values == {"cache_cut": 0.5, "learning_rate": 1.0}


def test_values_that_vary_are_combined(project):
    params(project, "grid", "cache_cut: 0.5\nsweep: {latent_dim: [2, 8], ticks: [1, 2]}")
    members = sweep_of(project, "grid").members
    assert [member.name for member in members] == [
        f"latent_dim-{width}_ticks-{ticks}" for width in (2, 8) for ticks in (1, 2)
    ]
    assert members[2].values == {"latent_dim": 8, "ticks": 1}, "a width takes the place of a cut"


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("sweep: small", [], "'sweep' (in mine.yaml) should be a list of params files, or a mapping"),
        ("sweep: []", [], "'sweep' (in mine.yaml) should be a list of params files, or a mapping"),
        ("sweep: {ticks: 3}", [], "'sweep' (in mine.yaml) should be a list of params files, or a mapping"),
        ("sweep: [small, smal]", [], "member smal: there is no params file 'smal': did you mean 'small'?"),
        ("sweep: [small, widths]", [], "member widths: widths.yaml is a sweep itself"),
        ("sweep: [small, mine]", [], "member mine: mine.yaml is a sweep itself"),
        ("sweep: [small, params/small.yaml]", [], "two members of the sweep (in mine.yaml) would be named 'small'"),
        ("sweep: {model: [a/b, a-b]}", [], "two members of the sweep (in mine.yaml) would be named 'model-a-b'"),
        ("sweep: [models]", [], "cannot be named 'models'"),
        ("sweep: {ticks: [1, many]}", [], "member ticks-many: parameter 'ticks' (in the sweep of mine.yaml) is"),
        ("sweeep: {ticks: [1]}", [], "unknown parameter 'sweeep' (in mine.yaml): did you mean 'sweep'?"),
        (
            "ticks: 1",
            ["--set", "sweep={ticks: [1]}"],
            "'sweep' (in --set) is not a parameter: it belongs at the top of",
        ),
        (
            "sweep: {tiks: [1]}",
            [],
            "unknown parameter 'tiks' (in the sweep of mine.yaml): did you mean 'ticks'?",
        ),
        ("sweep: {ticks: [1]}\nticks: 2", [], "'ticks' (in mine.yaml) is given twice: in the sweep and beside it"),
        ("sweep: {ticks: [1]}", ["--set", "ticks=2"], "member ticks-1: 'ticks' is what the sweep varies"),
        ("sweep: {latent_dim: [2]}", ["--set", "cache_cut=0.5"], "member latent_dim-2: 'latent_dim' is what the sweep"),
        (
            "sweep: {latent_dim: [16, 17]}\nmodel: tiny",
            [],
            "member latent_dim-17: latent_dim is 17, but a joint",
        ),
        ("sweep: {model: [tiny, tny]}", [], "member model-tny: "),
        ("sweep: {ticks: [1]}\nmembers: [a]", [], "member ticks-1: 'members' (in mine.yaml) is set by run_all itself"),
        ("sweep: {ticks: [1]}\nsteps: [00_frist]", [], "unknown step '00_frist' (in mine.yaml): did you mean"),
        ("sweep: [small]", ["--from", "01_second"], "unknown step '01_second' (in --from)"),
    ],
)
def test_impossible_sweeps_are_refused_before_anything_starts(project, monkeypatch, capsys, text, words, message):
    write_json(project / "tiny" / "config.json", {"model_type": "wav2vec2-conformer", "hidden_size": 8})
    params(project, "mine", text)
    monkeypatch.chdir(project)
    assert call(project, "mine", *words) == 2
    assert message in capsys.readouterr().err
    assert not (project / "reports").exists()


def test_a_run_that_is_no_sweep_has_no_members(project, capsys):
    assert call(project, "small", "--set", "members=[a]") == 2
    assert "'members' (in --set) is set by run_all itself: name them in `sweep`" in capsys.readouterr().err


SWEEPS = [file for file in sorted((ROOT / "params").glob("*.yaml")) if "sweep" in read_params_file(file)]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_sweep_of_this_repository_fits_the_notebooks(file):
    values = read_params_file(file)
    if not corpus_is_here(values):
        pytest.skip(f"{values['corpus']} is not on this machine")
    if made_by := re.match(r"reports/([^/]+)/([^/]+)/models/", values.get("model") or ""):
        assert made_by[2] in member_names(read_params_file(ROOT / "params" / f"{made_by[1]}.yaml")["sweep"])
    trained = ["model=synthetic-conformer"]  # for one of those that a sweep must train first
    given = trained if str(values.get("model", "")).startswith("reports/") else []
    sweep = read_sweep(ROOT, Run(ROOT / "reports" / file.stem), file, given, Schema(find_notebooks(ROOT)))
    assert len(sweep.members) > 1


# ---- running -----------------------------------------------------------------------------------------------


def test_members_run_and_are_compared_and_only_what_changed_runs_again(project, capsys):
    run, names = Run(project / "reports" / "trial"), ["latent_dim-2", "latent_dim-8"]
    words = ["widths", "--name", "trial"]
    assert call(project, *words) == 0
    assert traces(run, *names) == [["first"], ["first"], ["compare"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"params widths.yaml → {run.path}: 2 members"
    assert lines[-1] == str(run.path / "index.html")
    starts = [line.split(" took ")[0] for line in lines if line.startswith("[")]
    assert starts == [
        "[1/2] latent_dim-2", "[1/1] 00_first ...", "[1/1] 00_first", "[1/2] latent_dim-2",
        "[2/2] latent_dim-8", "[1/1] 00_first ...", "[1/1] 00_first", "[2/2] latent_dim-8",
        "[1/1] 02_compare ...", "[1/1] 02_compare",
    ]  # fmt: skip
    after_first = next(line for line in lines if line.startswith("[1/2] latent_dim-2 took"))
    assert "(elapsed" in after_first and ", more than" in after_first, "the second may take as long as the first"

    assert read_json(run.path / "params.json") == {"sweep": {"latent_dim": [2, 8]}, "learning_rate": 1e-4}
    assert run.completed("02_compare")["parameters"] == {
        "members": names,
        "learning_rate": 1e-4,
        "run_dir": "reports/trial",
    }
    assert run.completed("00_first") is None
    for name, width in zip(names, (2, 8), strict=True):
        member = Run(run.path / name)
        assert read_json(member.path / "params.json") == {"learning_rate": 1e-4, "latent_dim": width}
        assert member.completed("00_first") and member.completed("02_compare") is None
        assert (member.path / "index.html").is_file() and (member.path / "00_first.html").is_file()
        assert "[1/1] 00_first took" in (member.path / "pipeline.log").read_text()
    log = (run.path / "pipeline.log").read_text()
    assert "[2/2] latent_dim-8 took" in log and "compared: latent_dim-2 latent_dim-8" in log

    assert call(project, *words) == 0
    assert traces(run, *names) == [[], [], []]
    output = capsys.readouterr().out
    assert "[1/2] latent_dim-2 unchanged\n[2/2] latent_dim-8 unchanged\n" in output and "took" not in output

    Run(run.path / names[1]).discard("00_first")
    assert call(project, *words) == 0
    assert traces(run, *names) == [[], ["first"], ["compare"]], "a member was made anew"

    params(project, "widths", "steps: [00_first]\nlearning_rate: 1e-4\nsweep: {latent_dim: [2]}")
    assert call(project, *words) == 0
    assert traces(run, *names) == [[], [], ["compare"]]
    assert run.completed("02_compare")["parameters"]["members"] == ["latent_dim-2"]


def test_from_and_force_hold_for_every_member_and_the_comparison(project):
    params(project, "one", "steps: [00_first, 01_second]\nsweep: {latent_dim: [2]}")
    run = Run(project / "reports" / "one")
    for words, member, whole in (
        ([], ["first", "second"], ["compare"]),
        (["--from", "01_second"], ["second"], ["compare"]),
        (["--from", "02_compare"], [], ["compare"]),
        (["--force"], ["first", "second"], ["compare"]),
    ):
        assert call(project, "one", *words) == 0
        assert traces(run, "latent_dim-2") == [member, whole], words


def test_a_member_that_fails_does_not_stop_the_others(project, capsys):
    run, names = Run(project / "reports" / "fragile"), ["on_error-raise", "on_error-"]
    assert call(project, "fragile") == 1
    assert traces(run, *names) == [["second"], ["second"], ["compare"]]
    shown = capsys.readouterr()
    notebook = run.path / "on_error-raise" / "notebooks" / "01_second.failed.ipynb"
    assert shown.err.splitlines() == [
        "failed: on_error-raise",
        f"  on_error-raise: 01_second failed: FileNotFoundError: [Errno 2] No such file or directory: "
        f"'{run.path}/on_error-raise/wanted'",
        f"    executed notebook: {notebook}",
        "The same command, given again, resumes there.",
    ]
    assert notebook.is_file()
    assert "[1/2] on_error-raise failed after" in shown.out and "1 of 2 members compared" in shown.out
    assert run.completed("02_compare")["parameters"]["members"] == ["on_error-"]

    assert call(project, "fragile") == 1
    assert traces(run, *names) == [["second"], [], []], "the others are compared already"

    (run.path / "on_error-raise" / "wanted").touch()
    assert call(project, "fragile") == 0
    assert traces(run, *names) == [["second"], [], ["compare"]]
    assert run.completed("02_compare")["parameters"]["members"] == names


def test_a_failure_that_members_share_is_told_once(project, capsys):
    params(project, "fragile", "steps: [01_second]\non_error: network\nsweep: {seed: [1, 2, 3]}")
    fail = "if on_error == 'network':\n    raise OSError(f'no way to the hub (Request ID: {run.path})')"
    write_notebook(project / "notebooks" / "01_second.ipynb", [*SECOND, fail])
    assert call(project, "fragile") == 1
    shown = capsys.readouterr()
    first, notebook, *others = shown.err.splitlines()[1:-1]
    assert first.startswith("  seed-1: 01_second failed: OSError: no way to the hub") and "executed" in notebook
    assert others == ["  seed-2: the same as seed-1", "  seed-3: the same as seed-1"]
    assert shown.out.count("no way to the hub") == 1 and shown.out.count("\nthe same as seed-1\n") == 2


def test_where_no_member_finishes_nothing_is_compared(project, capsys):
    params(project, "fragile", "steps: [01_second]\nsweep: {on_error: [raise]}")
    run = Run(project / "reports" / "fragile")
    assert call(project, "fragile") == 1
    assert traces(run, "on_error-raise") == [["second"], []]
    assert "failed: on_error-raise\n" in capsys.readouterr().err


def test_a_comparison_that_fails_is_named_beside_the_members(project, capsys):
    write_notebook(project / "notebooks" / "02_compare.ipynb", [*COMPARE, "members[7]"])
    assert call(project, "fragile") == 1
    message = capsys.readouterr().err
    assert "failed: on_error-raise, fragile\n" in message
    assert "  fragile: 02_compare failed: IndexError: list index out of range\n" in message


def test_a_comparison_is_another_once_a_member_is(project):
    fingerprints = set()
    for assignments in ([], ["seed=1"], ["seed=1"]):  # which the comparison itself does not declare
        sweep = sweep_of(project, "widths", *assignments)
        for member in sweep.members:
            member.run.mark_completed("00_first", member.steps[0].fingerprint, seconds=1.0, parameters={})
        (step,) = plan_comparison(sweep)
        fingerprints.add(step.fingerprint)
    assert len(fingerprints) == 2


def test_ctrl_c_stops_the_whole_sweep_which_is_one_process_s_alone(project, capsys):
    run = Run(project / "reports" / "slow")
    begun = run.path / "ticks-100000"
    process = start(project, "slow")
    try:
        wait_until((begun / "checkpoints/01_second/tick").exists)
        (kernel,) = kernels_of(process)
        held = {file.path for file in psutil.Process(kernel.pid).open_files()}
        assert {str(run.path / ".lock"), str(begun / ".lock")} <= held, "until the kernel is gone"
        assert call(project, "slow", "--set", "learning_rate=1.0") == 2
        assert f"{run.path} is in use by another run (process {process.pid})" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and gone([kernel])
    assert "Interrupted. The same command, given again, resumes here." in output
    assert not (run.path / "ticks-1").exists() and run.completed("02_compare") is None
    interrupted = (begun / ".started" / "01_second.json").stat().st_mtime_ns
    assert (run.path / "index.html").stat().st_mtime_ns > interrupted, "the page says so"


# ---- beside ------------------------------------------------------------------------------------------------


def test_what_an_interrupted_call_was_to_make_anew_no_longer_counts(project, monkeypatch):
    run = Run(project / "reports" / "widths")
    assert call(project, "widths") == 0

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("asrlib.running.sweeps.run_steps", interrupt)
    assert call(project, "widths", "--set", "learning_rate=0.5") == 130
    assert run.completed("02_compare") is None

    monkeypatch.undo()
    traces(run, "latent_dim-2", "latent_dim-8")
    assert call(project, "widths") == 0
    assert traces(run, "latent_dim-2", "latent_dim-8") == [[], [], ["compare"]], "as it was asked for at first"


def test_the_log_of_a_sweep_goes_on_where_that_of_a_member_ends(tmp_path):
    sweep, member = Run(tmp_path), Run(tmp_path / "member")
    member.path.mkdir()
    with logged(sweep):
        with logged(member):
            warnings.warn("of the member", stacklevel=1)
        warnings.warn("of the comparison", stacklevel=1)
        assert not log.propagate
    assert log.propagate
    both, one = ((run.path / "pipeline.log").read_text() for run in (sweep, member))
    assert "of the member" in both and "of the comparison" in both
    assert "of the member" in one and "of the comparison" not in one


def test_a_step_is_expected_to_take_what_it_took_in_a_member_of_a_sweep(project):
    member, run = Run(project / "reports/sweep/member"), Run(project / "reports/other")
    parameters = {"epochs": 1.0, "run_dir": "reports/sweep/member"}
    member.mark_completed("00_first", "a", seconds=7.0, parameters=parameters)
    step = Step("00_first", project / "notebooks/00_first.ipynb", {"epochs": 1.0, "run_dir": "reports/other"}, "b")
    assert expected_seconds(project, run, [step]) == 7.0
    other = Step("00_first", step.notebook, {"epochs": 2.0}, "b")
    assert expected_seconds(project, run, [other]) is None
    second = Step("01_second", step.notebook, {}, "c")
    member.mark_completed("01_second", "c", seconds=3.0, parameters={})
    assert expected_seconds(project, run, [step, second]) == 3.0
    assert expected_seconds(project, run, [other, second]) is None, "what it works on was another's"


def test_members_that_were_never_timed_are_expected_to_be_like_the_others(project):
    sweep = sweep_of(project, "widths")
    assert seconds_ahead(sweep, sweep.members, []) == [None, None, None]
    assert seconds_ahead(sweep, sweep.members[1:], [10.0, 20.0]) == [15.0, None]
    known = sweep.members[1]
    known.run.mark_completed("00_first", "another", seconds=7.0, parameters={})
    sweep.run.mark_completed("02_compare", "another", seconds=2.0, parameters={})
    assert seconds_ahead(sweep, sweep.members, [10.0]) == [10.0, 7.0, 2.0]
    known.run.mark_completed("00_first", known.steps[0].fingerprint, seconds=7.0, parameters={})
    assert seconds_ahead(sweep, sweep.members, [10.0]) == [10.0, 2.0], "what is finished takes no time"
    for member in sweep.members:
        member.run.mark_completed("00_first", member.steps[0].fingerprint, seconds=7.0, parameters={})
    assert seconds_ahead(sweep, sweep.members, []) == [2.0], "the comparison is of others"
    sweep.run.mark_completed("02_compare", plan_comparison(sweep)[0].fingerprint, seconds=2.0, parameters={})
    assert seconds_ahead(sweep, sweep.members, []) == []


def test_members_side_by_side_delay_the_end_by_what_the_others_do_not_cover(project):
    sweep = sweep_of(project, "widths")
    sweep.run.mark_completed("02_compare", "another", seconds=2.0, parameters={})
    for member, seconds in zip(sweep.members, (4.0, 7.0), strict=True):
        member.run.mark_completed("00_first", "another", seconds=seconds, parameters={})
    assert seconds_ahead(sweep, sweep.members, [], at_once=2) == [4.0, 3.0, 2.0]
    assert seconds_ahead(sweep, sweep.members, [], at_once=1) == [4.0, 7.0, 2.0]


def test_the_list_shows_how_many_members_are_done(project, capsys):
    run = Run(project / "reports" / "widths")
    write_json(run.path / "params.json", {"sweep": {"latent_dim": [2, 8, 9]}})
    for name in ("latent_dim-2", "latent_dim-8"):
        Run(run.path / name).mark_started("00_first", "a")
    Run(run.path / "latent_dim-2").mark_completed("00_first", "a", seconds=1.0, parameters={})
    assert call(project, "small", "--name", "of_one_step_and_with_a_long_name") == 0
    single = Run(project / "reports" / "single")
    single.mark_started("00_first", "a")
    capsys.readouterr()
    assert call(project, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("runs") + 1 :] == [
        "  of_one_step_and_with_a_long_name 1 of 1 step completed",
        "  single                           0 of 3 steps completed",
        "  widths                           1 of 3 members completed",
    ]
