"""Exports a run's model to a form that works without asrlib.

    python -m asrlib export demo --to hub                 for transformers alone, with its code in the folder
    python -m asrlib export demo --to standard            multi-head attention, without code
    python -m asrlib export reports/demo --to hub --model converted --out somewhere
    python -m asrlib export demo --to onnx --int8         a graph of whole utterances, and one with 8-bit weights
    python -m asrlib export demo --to onnx-streaming --chunk 640 --lookahead 640

The folder appears when it is complete. --out names a new or empty folder, or an earlier export.
"""

import argparse
import shlex
import sys
from pathlib import Path

from asrlib.reporting.provenance import versions
from asrlib.runs import STEP_OF_MODEL, Run, atomic_folder, project_root, write_json

ABOUT = "export.json"  # marks a folder as an export, and names the model
GRAPHS = ("onnx", "onnx-streaming")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's name, as in reports/, or its folder")
    add("--to", required=True, choices=["hub", "standard", *GRAPHS])
    add("--model", choices=list(STEP_OF_MODEL), help="a model of the run (default: the last one)")
    add("--out", type=Path, metavar="DIR", help="default: exports/MODEL-TO in the run's folder")
    add("--licence", metavar="ID", help="of the weights, by its hub name (default: from the base model's card)")
    add = parser.add_argument_group("graphs").add_argument
    add("--int8", action="store_true", help="also write a graph with the weights of matrix products in 8 bits")
    add("--utterances", type=int, metavar="N", help="of the first test split, to check the graph (default: all)")
    add("--chunk", type=float, metavar="MS", help="chunks of a stream (default: 320)")
    add("--left", type=float, metavar="SECONDS", help="left context of a stream (default: 10; inf: all)")
    add("--lookahead", type=float, metavar="MS", help="lookahead of a stream (default: 0)")
    args = parser.parse_args(argv)
    of_streams = {"--chunk": args.chunk, "--left": args.left, "--lookahead": args.lookahead}
    given = [name for name, value in of_streams.items() if value is not None]
    if given and args.to != "onnx-streaming":
        parser.error(f"{given[0]} is for streams: use it with --to onnx-streaming")
    if args.int8 and args.to not in GRAPHS:
        parser.error("--int8 is for graphs: use it with --to onnx or onnx-streaming")
    if args.utterances is not None and args.utterances < 1:
        parser.error(f"--utterances is {args.utterances}: checking a graph takes at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    run = find_run(args.run)
    system = args.model or last_model(run)
    source = run.require_model(system)
    out = writable(args.out.expanduser().absolute() if args.out else run.path / "exports" / f"{system}-{args.to}")
    summary = export_folder(args, run, system, source, out)
    sys.stdout.write("\n".join([str(out), *summary]) + "\n")
    return 0


def find_run(name: str) -> Run:
    """The run in this folder, or with this name below reports/. Raises FileNotFoundError."""
    named = project_root() / "reports" / name
    for folder in (Path(name).expanduser().absolute(), named):
        if (folder / "models").is_dir():
            return Run(folder)
    if (Path(name) / "index.html").is_file() or (named / "index.html").is_file():
        raise FileNotFoundError(f"the run {name} has no models any more: run it again, then export it")
    raise FileNotFoundError(f"no run with models at {named}: give a run's name or folder (run_all.py --list)")


def last_model(run: Run) -> str:
    for system in reversed(STEP_OF_MODEL):
        if (run.path / "models" / system / "config.json").is_file():
            return system
    raise FileNotFoundError(f"{run.path} holds no model: run 00_baseline first")


def writable(out: Path) -> Path:
    """`out`, if it may be replaced. Raises FileExistsError where it exists and is no export."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file()):
        raise FileExistsError(f"{out} exists already, and is no export: give --out a new or an empty folder")
    return out


def export_folder(args: argparse.Namespace, run: Run, system: str, source: Path, out: Path) -> list[str]:
    """Writes `out`; returns a line with the result of its check, or none."""
    from asrlib.export import folders
    from asrlib.export.card import Export, model_card
    from asrlib.models.loading import load

    export = Export(run, system, args.to, command_of(args, run, system), args.licence)
    about = {"run": run.path.name, "model": system, "to": args.to, "versions": versions()}
    if args.to in GRAPHS:
        from transformers import AutoConfig

        from asrlib.export import graphs, onnx_folder

        graphs.check_head(AutoConfig.from_pretrained(source))
        onnx_folder.check_installed()
    model, processor = load(source)
    if args.to == "standard":
        model = folders.standard(model)
    with atomic_folder(out) as folder:
        if args.to in GRAPHS:
            about |= onnx_folder.write(args, run, model, processor, folder)
            what, loading = onnx_folder.described(model, about)
        else:
            write = folders.write_hub_folder if args.to == "hub" else folders.write_folder
            write(model, processor, folder)
            what, loading = folders.described(model, processor, args.to)
        (folder / "README.md").write_text(model_card(export, model.config, what, loading), encoding="utf-8")
        write_json(folder / ABOUT, about)
    return [onnx_folder.summary(about)] if args.to in GRAPHS else []


def command_of(args: argparse.Namespace, run: Run, system: str) -> str:
    """The command that makes this export of a run below reports/."""
    reports = project_root() / "reports"
    name = run.path.relative_to(reports).as_posix() if run.path.is_relative_to(reports) else run.path.name
    words = ["python", "-m", "asrlib", "export", name, "--to", args.to, "--model", system]
    for option in ("licence", "utterances", "chunk", "left", "lookahead"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", str(value)]
    return shlex.join([*words, "--int8"] if args.int8 else words)
