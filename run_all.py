"""Run the notebooks 00…06 into reports/<run>/ and write the pages that show what came out.

    python run_all.py demo                                      params/demo.yaml → reports/demo/index.html
    python run_all.py quick --set model=/path/to/model epochs=2 --name trial
    python run_all.py demo --from 04_evaluate                   this step and all after it, again
    python run_all.py --list                                    params files and runs

Called again, it skips what is unchanged and resumes what was interrupted.
"""

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from asrlib.parameters import (
    BadParameter,
    Schema,
    check_latent_dim,
    check_surroundings,
    model_width,
    nearest,
    read_assignments,
    read_params_file,
)
from asrlib.runs import Run, write_json

ROOT = Path(__file__).resolve().parent


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("params", nargs="?", metavar="NAME", help="params/NAME.yaml, or the path of a YAML file")
    add("--set", nargs="+", action="extend", default=[], metavar="name=value", help="go before the file's")
    add("--name", metavar="RUN", help="run folder below reports/ (default: NAME; auto: NAME and the time)")
    add("--from", dest="start", metavar="STEP", help="run this step and all after it again")
    add("--force", action="store_true", help="run every step again")
    add("--list", action="store_true", help="show params files and runs")
    add("--root", type=Path, default=ROOT, help="project folder (default: where run_all.py is)")
    args = parser.parse_args(argv)
    if not args.params and not args.list:
        parser.error("which params file? --list shows them")
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done · 1 a step failed · 2 refused before anything started · 130 interrupted."""
    args = parse(argv)
    root = args.root.resolve()
    if args.list:
        print(listing(root))
        return 0
    from asrlib.pipeline import RunLocked, StepFailed

    try:
        return run_all(args, root)
    except (BadParameter, RunLocked) as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except StepFailed as failure:
        print(f"{failure}\nThe same command, given again, resumes at this step.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command, given again, resumes here.", file=sys.stderr)
        return 130


def run_all(args: argparse.Namespace, root: Path) -> int:
    from asrlib import pipeline

    file = find_params(root, args.params)
    notebooks = pipeline.find_notebooks(root)
    schema = Schema(notebooks)
    values, names = read_values(file, args.set, schema, list(notebooks))
    run = Run(root / "reports" / run_name(args.name, file))
    steps = pipeline.plan(root, run, schema, values, names)
    forced = 0 if args.force else len(steps)  # this step and those after it run, changed or not
    if args.start:
        forced = min(forced, known_step(args.start, names, "--from"))

    with pipeline.work_in(root, run) as place:

        def say(text: str) -> None:
            pipeline.log.info(text)
            print(text, flush=True)

        start = min(forced, pipeline.first_to_run(run, steps))
        say(f"params {file.name} → {run.path}")
        for index, step in enumerate(steps):
            seconds = pipeline.expected_seconds(root, run, step)
            took = f"{pipeline.duration(seconds):>12}" if seconds is not None else ""
            say(f"  {step.name:<24}{state(run, steps, index, start, forced):<12}{took}".rstrip())
        for step in steps[forced:]:
            run.discard(step.name)
        write_json(run.path / "params.json", values)
        pipeline.run_steps(steps, start, place, say, command_of(args))
        say(str(run.path / "index.html"))
    return 0


def command_of(args: argparse.Namespace) -> str:
    """What makes this run again from nothing."""
    words = ["python", "run_all.py", args.params]
    words += ["--set", *args.set] if args.set else []
    words += ["--name", args.name] if args.name and args.name != "auto" else []
    return shlex.join(words)


def state(run: Run, steps: list, index: int, start: int, forced: int) -> str:
    if index < start:
        return "unchanged"
    step = steps[index]
    same = run.resumable(step.name) and run.started(step.name)["fingerprint"] == step.fingerprint
    return "resumes" if same and index < forced else "runs"


def read_values(
    file: Path, assignments: list[str], schema: Schema, steps: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Checked parameters of the file and --set, and the steps that run (the file's `steps`, or all)."""
    given = read_params_file(file)
    origin = dict.fromkeys(given, file.name)
    only = given.pop("steps", steps)
    if not isinstance(only, list) or not only:
        raise BadParameter(f"'steps' (in {file.name}) should be a list of steps: {', '.join(steps)}")
    chosen = {steps[known_step(step, steps, file.name)] for step in only}
    assigned = read_assignments(assignments)
    for one, other in (("latent_dim", "cache_cut"), ("cache_cut", "latent_dim")):
        if assigned.get(one) is not None and other not in assigned:
            given.pop(other, None)  # two ways to say one thing: the command line's goes before the file's
    values = schema.check(given | assigned, origin | dict.fromkeys(assigned, "--set"))
    check_width(schema.defaults | values)
    check_surroundings(schema.defaults | values)
    return values, [step for step in steps if step in chosen]


def check_width(values: dict[str, Any]) -> None:
    """Refuse a latent wider than the model allows, where that can be known without a download."""
    if values.get("latent_dim") is None or values.get("cache_cut") is not None or not values.get("model"):
        return
    if values.get("architecture"):  # a new model is made
        hidden_size = values["hidden_size"]
    else:
        hidden_size = model_width(values["model"], values.get("revision"))
    if hidden_size is not None:
        check_latent_dim(values["latent_dim"], values.get("layout") or "joint", hidden_size)


def known_step(name: Any, steps: list[str], where: str) -> int:
    if name not in steps:
        proposal = nearest(str(name), steps) or f": steps are {', '.join(steps)}"
        raise BadParameter(f"unknown step {name!r} (in {where}){proposal}")
    return steps.index(name)


def find_params(root: Path, name: str) -> Path:
    """params/NAME.yaml or the YAML file of that path. Raises BadParameter where there is neither."""
    for path in (root / "params" / f"{name}.yaml", Path(name)):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    known = sorted(path.stem for path in (root / "params").glob("*.yaml"))
    proposal = nearest(name, known) or f": there are {', '.join(known)}"
    raise BadParameter(f"there is no params file {name!r}{proposal}")


def run_name(name: str | None, file: Path) -> str:
    name = name or file.stem
    if name == "auto":
        name = f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(name).name != name:
        raise BadParameter(f"--name {name!r} should be one folder name, without slashes")
    if name.startswith(".") or name == "examples":
        raise BadParameter(f"--name {name!r} is taken: name the run otherwise, without a leading dot")
    return name


def listing(root: Path) -> str:
    """The params files with their first comment line, and the runs with how far they are."""
    from asrlib.pipeline import find_notebooks

    steps = list(find_notebooks(root))
    lines = ["params"]
    for file in sorted((root / "params").glob("*.yaml")):
        text = file.read_text(encoding="utf-8").splitlines()
        comment = next((line.lstrip("# ") for line in text if line.startswith("#")), "")
        lines.append(f"  {file.stem:<20}{comment}".rstrip())
    lines.append("runs")
    for folder in sorted((root / "reports").glob("*/.started")):
        run = Run(folder.parent)
        done = [step for step in steps if run.completed(step)]
        lines.append(f"  {run.path.name:<20}{len(done)} of {len(steps)} steps completed")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop ends like Ctrl-C
    sys.exit(main())
