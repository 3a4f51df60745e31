"""Is a report still what its run made? Hashes of its files, and its word errors counted again from the transcripts.

    python run_all.py --verify reports/demo

checksums.sha256 has the format of coreutils, so that `sha256sum -c checksums.sha256` checks the files without us.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asrlib.runs import BadParameter, Run, atomic_write

CHECKSUMS = "checksums.sha256"
PASSING = {CHECKSUMS, "pipeline.log", "checkpoints", "exports", "metrics/estimate.json"}  # change, and no result does
LEFT_OUT = ("models", "notebooks", "figures", "predictions")  # of reports kept small: figures are in the pages, too
FIRST = 5  # problems of a kind are named


@dataclass
class Verification:
    """What was checked of one run, in sentences, and what is wrong with it."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def write_checksums(run: Run, since: float = 0.0) -> None:
    """Keep the sha256 of every file of the run, of a sweep without its members, which keep their own.

    since: when the run was called, s since the epoch. Files not written after that keep the sha256 they had: calling a
    run again makes nothing right that was changed by hand before.
    """
    kept = _kept(run)
    old = {name for name in _files(run) if name in kept and (run.path / name).stat().st_mtime < since}
    digests = {name: kept[name] if name in old else sha256_of(run.path / name) for name in _files(run)}
    digests = digests if since == 0 else kept | digests
    with atomic_write(run.path / CHECKSUMS) as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def verify(folder: Path) -> dict[str, Verification]:
    """By name the run in `folder` and, of a sweep, its members. Raises BadParameter where there is no run."""
    if not (folder / "metrics").is_dir() and not (folder / "params.json").is_file():
        raise BadParameter(f"{folder} holds no run: give its folder, like reports/demo")
    members = [path.parent for path in folder.glob("*/params.json")]
    found = {}
    for path in (folder, *sorted(members)):
        found[path.name] = one = Verification()
        _check_files(Run(path), one)
        _check_errors(Run(path), one)
    return found


def _files(run: Run) -> Iterator[str]:
    for path in run.path.iterdir():
        if path.name.startswith(".") or path.name in PASSING or (path / "params.json").is_file():
            continue
        for file in [path] if path.is_file() else path.rglob("*"):
            name = file.relative_to(run.path).as_posix()
            if file.is_file() and not file.name.startswith(".") and name not in PASSING:
                yield name


def _kept(run: Run) -> dict[str, str]:
    """{file: sha256} of CHECKSUMS; empty where there is none."""
    path = run.path / CHECKSUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(run: Run, found: Verification) -> None:
    kept = _kept(run)
    if not kept:
        found.problems.append(f"there is no {CHECKSUMS}: whether its files are what the run made cannot be told")
        return
    missing = sorted(name for name in kept if not (run.path / name).is_file())
    left_out = [name for name in missing if name.startswith(LEFT_OUT)]
    changed = sorted(name for name in kept.keys() - set(missing) if sha256_of(run.path / name) != kept[name])
    added = sorted(set(_files(run)) - kept.keys())
    same = len(kept) - len(missing) - len(changed)
    found.checked.append(f"{same} of {len(kept)} files have the sha256 they had when the run ended")
    if left_out:
        folders = sorted({name.split("/")[0] for name in left_out})
        found.checked.append(f"{len(left_out)} files of {', '.join(folders)} are not here")
    lost = [name for name in missing if name not in left_out]
    for what, names in (("changed since", changed), ("missing", lost), ("not of this run", added)):
        if names:
            more = f" and {len(names) - FIRST} more" if len(names) > FIRST else ""
            found.problems.append(f"{what}: {', '.join(names[:FIRST])}{more}")


def _check_errors(run: Run, found: Verification) -> None:
    """Score every file of transcripts again and compare all that metrics/*.json says of it, to the last digit."""
    from asrlib.measuring.significance import compare_errors
    from asrlib.measuring.word_errors import EvaluationResult, load_predictions, score

    try:
        metrics = {name: run.metrics_so_far(name) for name in ("baseline", "evaluate")}
    except ValueError as error:
        found.problems.append(str(error))
        return
    said = {"baseline": metrics["baseline"].get("splits", {}), **metrics["evaluate"].get("systems", {})}
    scored: dict[tuple[str, str], EvaluationResult] = {}  # where they come out the same
    absent, rates = [], sum(map(len, said.values()))
    for system, splits in said.items():
        for split, values in splits.items():
            path = run.path / "predictions" / f"{system}_{split}.jsonl"
            if not path.is_file():
                absent.append(f"{system} on {split}")
                continue
            try:
                again = score(load_predictions(path))
            except ValueError as error:
                found.problems.append(str(error))
                continue
            if different := _different(values, again.as_metrics()):
                found.problems.append(f"{system} on {split}: {different}")
            else:
                scored[system, split] = again
    if rates:
        found.checked.append(f"{len(scored)} of {rates} word error rates come out the same again")
    if absent:
        found.checked.append(f"without transcripts here, so not counted again: {', '.join(absent)}")
    tests = 0
    for split, named in metrics["evaluate"].get("paired", {}).items():
        for name, values in named.items():
            pair = [scored.get((system, split)) for system in name.split(" vs ")]
            if None in pair:
                continue
            if different := _different(values, compare_errors(*pair)):
                found.problems.append(f"{name} on {split}: {different}")
            else:
                tests += 1
    if tests:
        found.checked.append(f"{tests} paired tests come out the same again")


def _different(said: dict, again: dict) -> str:
    """What `said` has otherwise, the first of it in full, or nothing; an older run may say less."""
    again = json.loads(json.dumps(again))
    names = [name for name, value in said.items() if name in again and again[name] != value]
    if not names:
        return ""
    first, *others = names
    also = f"; different too: {', '.join(others)}" if others else ""
    return f"{first} is {said[first]} in the metrics, but {again[first]} by the transcripts{also}"


def as_text(found: dict[str, Verification]) -> str:
    lines = []
    for name, one in found.items():
        lines += [name, *(f"  {text}" for text in one.checked), *(f"  WRONG  {text}" for text in one.problems)]
    wrong = sum(len(one.problems) for one in found.values())
    if wrong:
        again = "to make it again: run_all.py NAME --force, or --from the first step in question"
        return "\n".join([*lines, f"{wrong} problem{'s' * (wrong > 1)} found; {again}"])
    return "\n".join([*lines, "nothing wrong found in what is checked above"])
