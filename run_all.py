"""Run the notebooks 00…06 into reports/<run>/ and write the pages that show what came out.

    python run_all.py demo                                      params/demo.yaml → reports/demo/index.html
    python run_all.py quick --set model=/path/to/model epochs=2 --name trial
    python run_all.py demo --from 04_evaluate                   this step and all after it, again
    python run_all.py demo --estimate                           the time and memory it would take here; runs nothing
    python run_all.py baselines --engine ray                    several members of a sweep at once, or on a cluster
    python run_all.py --list                                    params files and runs
    python run_all.py --verify reports/demo                     are its files and word errors still those of the run?
    python run_all.py --diff reports/demo reports/wider         the differences: parameters, code, results
    python run_all.py --index                                   reports/index.html: all runs, in a table that sorts

A second call skips what is unchanged and resumes what was interrupted.

A params file with `sweep` asks for several runs, reports/<run>/<member>/, and for the steps that compare them. --set,
--force and --from hold for every member and for the comparison. --engine ray runs the members as tasks of Ray on this
machine, ray://auto on the cluster that this machine is part of, ray://HOST:PORT on another. All machines see the
project under one path. If they do not share its reports, --storage names the place where these are kept.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from asrlib.running.command_line import add_debug, sentence, tell
from asrlib.runs import BadParameter, Run, asked_steps, find_notebooks, progress, write_json

if TYPE_CHECKING:  # functions import slow modules themselves, so that a list or a refused call is answered at once
    from asrlib.running.parameters import Schema
    from asrlib.running.sweeps import Member

ROOT = Path(__file__).resolve().parent
LONGEST_NAME = 200  # bytes of a run folder's name; file systems end at 255


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("params", nargs="?", metavar="NAME", help="params/NAME.yaml, or the path of a YAML file")
    add("--set", nargs="+", action="extend", default=[], metavar="name=value", help="values that replace the file's")
    add("--name", metavar="RUN", help="run folder below reports/ (default: NAME; auto: NAME and the time)")
    add("--from", dest="start", metavar="STEP", help="run this step and all after it again")
    add("--force", action="store_true", help="run every step again")
    add("--estimate", action="store_true", help="say what time and memory the run would take here; run nothing")
    add(
        "--engine",
        default="local",
        help="where the members of a sweep run: local (one after another), ray, ray://auto, ray://HOST:PORT",
    )
    add("--cpus", type=float, metavar="N", help="CPUs for each member on Ray (default: 1)")
    add("--gpus", type=float, metavar="N", help="GPUs for each member on Ray (default: 1 if there are any)")
    add("--storage", metavar="URL", help="URL for the reports, if Ray's machines do not share a folder (s3://...)")
    add("--list", action="store_true", help="show params files and runs")
    add("--verify", type=Path, metavar="FOLDER", help="check the files of a run, and count its word errors again")
    add("--diff", nargs=2, type=Path, metavar="FOLDER", help="show the differences between two runs")
    add("--index", action="store_true", help="write reports/index.html, a table of all runs")
    add("--root", type=Path, default=ROOT, help="project folder (default: where run_all.py is)")
    add_debug(parser)
    args = parser.parse_args(argv)
    check_together(args, parser.error)
    return args


def check_together(args: argparse.Namespace, refuse: Callable[[str], NoReturn]) -> None:
    """Refuse options that contradict each other or would have no effect."""

    def given(**options: Any) -> list[str]:
        return [f"--{name}" for name, value in options.items() if value not in (None, False, [], "local")]

    looks = given(list=args.list, verify=args.verify, diff=args.diff, index=args.index)
    of_a_sweep = given(engine=args.engine, cpus=args.cpus, gpus=args.gpus, storage=args.storage)
    of_a_run = given(set=args.set, name=args.name, **{"from": args.start}, force=args.force, estimate=args.estimate)
    if not (args.params or looks):
        refuse("which params file? --list shows them")
    if len(looks) > 1:
        refuse(f"{' and '.join(looks)} ask for different things: give one of them")
    if looks and args.params:
        refuse(f"{looks[0]} runs nothing, but {args.params!r} asks for a run: give one of them")
    if looks and of_a_run + of_a_sweep:
        refuse(f"{(of_a_run + of_a_sweep)[0]} has no effect without a params file: leave it out with {looks[0]}")
    if args.force and args.start:
        refuse("--force runs every step again, --from only some steps: give one of them")
    if args.estimate and of_a_sweep:
        refuse(f"{of_a_sweep[0]} says where members run, but --estimate runs nothing: give one of them")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done · 1 a step failed · 2 refused before anything started · 130 interrupted."""
    args = parse(argv)
    try:
        return do(args, args.root.resolve())
    except KeyboardInterrupt:
        advice = "The same command, given again, resumes here." if starts_something(args) else "Nothing was kept."
        print(f"\nInterrupted. {advice}", file=sys.stderr)
        return 130
    except Exception as error:
        return end(error, args)


def do(args: argparse.Namespace, root: Path) -> int:
    if args.list:
        print(listing(root))
        return 0
    return run_all(args, root) if args.params else look_at(args, root)


def starts_something(args: argparse.Namespace) -> bool:
    return bool(args.params) and not args.estimate


def end(error: Exception, args: argparse.Namespace) -> int:
    """Say what went wrong, in a sentence; return the exit status."""
    if isinstance(error, BadParameter):
        tell(str(error), error, args.debug)
        return 2
    from asrlib.running.pipeline import with_advice
    from asrlib.running.workplace import RunLocked, StepFailed

    if isinstance(error, RunLocked):
        tell(str(error), error, args.debug)
        return 2
    message = str(error) if isinstance(error, StepFailed) else with_advice(sentence(error))
    if isinstance(error, StepFailed | OSError) and starts_something(args):
        message += "\nThe same command, given again, resumes there."
    tell(message, error, args.debug)
    return 1


def run_all(args: argparse.Namespace, root: Path) -> int:
    if args.estimate:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: its profiler says what it cannot see
    from asrlib.running import parameters

    notebooks = find_notebooks(root)
    if not notebooks:
        raise BadParameter(f"{root} is not a project folder: it holds no notebooks/NN_*.ipynb, see --root")
    file = parameters.find_params(root, args.params)
    schema = parameters.Schema(notebooks)
    if args.start:
        parameters.known_step(args.start, list(notebooks), "--from")
    run = Run(root / "reports" / run_name(args.name, file))
    if "sweep" in parameters.read_params_file(file):
        return run_sweep(args, root, run, file, schema)
    return run_one(args, root, run, file, schema)


def run_sweep(args: argparse.Namespace, root: Path, run: Run, file: Path, schema: "Schema") -> int:
    """Run the members that `file` asks for, and compare them."""
    from asrlib.running import sweeps
    from asrlib.running.preflight import check_model

    sweep = sweeps.read_sweep(root, run, file, args.set, schema)
    redo = steps_to_redo(args, sweep.step_names)
    if args.estimate:
        comparison = sweeps.Member(run, sweep.values, sweeps.plan_comparison(sweep, sweep.members))
        return show_estimate(root, schema, [*sweep.members, comparison], redo)
    for member in sweep.members:
        check_model(schema.defaults | member.values, [step.name for step in member.steps])
    from asrlib.running import cluster

    with cluster.engine_of(args.engine, root / "reports", args.cpus, args.gpus, args.storage) as engine:
        sweeps.run_sweep(sweep, redo, say, command_of(args), engine)
    return 0


def run_one(args: argparse.Namespace, root: Path, run: Run, file: Path, schema: "Schema") -> int:
    """Run the steps that `file` asks for."""
    options = {"engine": args.engine, "cpus": args.cpus, "gpus": args.gpus, "storage": args.storage}
    for option, value in options.items():
        if value not in (None, "local"):
            raise BadParameter(f"--{option} {value} is for the members of a sweep, but {file.name} is not a sweep")
    values, names = read_values(file, args.set, schema, list(schema.parameters))
    redo = steps_to_redo(args, names)
    from asrlib.running import pipeline, sweeps, workplace
    from asrlib.running.preflight import check_model

    steps = pipeline.plan(root, run, schema, values, names)
    if args.estimate:
        return show_estimate(root, schema, [sweeps.Member(run, values, steps)], redo)
    check_model(schema.defaults | values, names)
    with workplace.work_in(root, run) as place:
        say(f"params {file.name} → {run.path}")
        for name in redo:
            run.discard(name)
        chosen = {} if names == list(schema.parameters) else {"steps": names}
        write_json(run.path / "params.json", values | chosen)
        pipeline.run_steps(steps, place, say, command_of(args))
        say(str(run.path / "index.html"))
    return 0


def say(text: str) -> None:
    """Print `text`, and write it to the log of the run."""
    from asrlib.running.workplace import log

    log.info(text)
    print(text, flush=True)


def look_at(args: argparse.Namespace, root: Path) -> int:
    """Do what --verify, --diff or --index asks of finished runs."""
    from asrlib.reporting import runs_page
    from asrlib.running import differences, verification

    if args.verify:
        verified = verification.verify(root / args.verify)
        print(verification.as_text(verified))
        return int(any(result.problems for result in verified.values()))
    if args.diff:
        from asrlib.running.parameters import Schema

        defaults = Schema(find_notebooks(root)).defaults
        print(differences.differences(*(root / folder for folder in args.diff), defaults))
        return 0
    print(runs_page.write_runs_index(root / "reports"))
    return 0


def show_estimate(root: Path, schema: "Schema", runs: list["Member"], redo: list[str]) -> int:
    """Print what `runs` would take. The estimates are kept in their folders, and nothing is run."""
    from asrlib.running.estimate import as_text, estimate

    print("measuring: a minute or two for a small model, longer for a large one on a CPU", file=sys.stderr, flush=True)
    print(as_text(estimate(root, schema.defaults, runs, redo)))
    return 0


def steps_to_redo(args: argparse.Namespace, names: list[str]) -> list[str]:
    """The steps among `names` that run again, changed or not, because of --force or --from."""
    from asrlib.running.parameters import known_step

    start = known_step(args.start, names, "--from") if args.start else len(names)
    return names if args.force else names[start:]


def command_of(args: argparse.Namespace) -> str:
    """The command that makes this run from nothing."""
    words = ["python", "run_all.py", args.params]
    words += ["--set", *args.set] if args.set else []
    words += ["--name", args.name] if args.name and args.name != "auto" else []
    return shlex.join(words)


def read_values(
    file: Path, assignments: list[str], schema: "Schema", steps: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """The checked parameters of the file and of --set, and the steps that run: the file's `steps`, or all."""
    from asrlib.running.parameters import read_assignments, read_params_file
    from asrlib.running.preflight import checked

    return checked([(file.name, read_params_file(file)), ("--set", read_assignments(assignments))], schema, steps)


def run_name(name: str | None, file: Path) -> str:
    name = name or file.stem
    if name == "auto":
        name = f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(name).name != name or min(name) < " ":
        raise BadParameter(f"--name {name!r} should be one folder name, without slashes or control characters")
    if len(name.encode()) > LONGEST_NAME:
        raise BadParameter(f"--name {name!r} is too long for a folder: give it at most {LONGEST_NAME} bytes")
    if name.startswith((".", "-")) or name == "examples":
        raise BadParameter(f"--name {name!r} is reserved: choose another name, without a leading dot or dash")
    return name


def listing(root: Path) -> str:
    """The params files with their first comment line, and the runs and sweeps with how far they are."""
    params, runs = {}, {}
    for file in sorted((root / "params").glob("*.yaml")):
        text = file.read_text(encoding="utf-8").splitlines()
        params[file.stem] = next((line.lstrip("# ") for line in text if line.startswith("#")), "")
    for folder in sorted((root / "reports").glob("*/")):
        if members := progress(folder):
            runs[folder.name] = f"{members[0]} of {members[1]} members completed"
        elif (folder / ".started").is_dir():
            steps = asked_steps(folder, list(find_notebooks(root)))
            done = [step for step in steps if Run(folder).completed(step)]
            runs[folder.name] = f"{len(done)} of {len(steps)} step{'s' * (len(steps) > 1)} completed"
    width = max(19, *map(len, params | runs))
    lines = []
    for title, texts in (("params", params), ("runs", runs)):
        lines += [title, *(f"  {name:<{width}} {text}".rstrip() for name, text in texts.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop ends like Ctrl-C
    sys.exit(main())
