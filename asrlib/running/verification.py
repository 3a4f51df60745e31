"""Checks that a report is what its run made: hashes of its files, and its word errors, counted again.

    python run_all.py --verify reports/demo

checksums.sha256 has the format of coreutils, so that `sha256sum -c checksums.sha256` checks the files without asrlib.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asrlib.runs import BadParameter, Run, atomic_write

CHECKSUMS = "checksums.sha256"
# What changes without a change of results.
PASSING = {CHECKSUMS, "pipeline.log", "checkpoints", "exports", "metrics/estimate.json"}
LEFT_OUT = ("models", "notebooks", "figures", "predictions")  # of reports kept small; figures are in the pages too
FIRST = 5  # files named in one problem


@dataclass
class Verification:
    """What was checked of one run, and what is wrong with it, in sentences."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def write_checksums(run: Run, since: float = 0.0) -> None:
    """Write the sha256 of every file of the run; the members of a sweep have files of their own.

    `since`: when the run was called, seconds since the epoch. Files not written after that keep their old sha256, so
    that a second call does not hide what was changed by hand before.
    """
    before = checksums(run)
    old = {name for name in _files(run) if name in before and (run.path / name).stat().st_mtime < since}
    digests = {name: before[name] if name in old else sha256_of(run.path / name) for name in _files(run)}
    keep_checksums(run, digests if since == 0 else before | digests)


def keep_checksums(run: Run, digests: dict[str, str]) -> None:
    with atomic_write(run.path / CHECKSUMS) as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def verify(folder: Path) -> dict[str, Verification]:
    """{name: result} of the run in `folder` and of a sweep's members. Raises BadParameter where there is no run."""
    if not (folder / "metrics").is_dir() and not (folder / "params.json").is_file():
        raise BadParameter(f"{folder} holds no run: give its folder, like reports/demo")
    members = [path.parent for path in folder.glob("*/params.json")]
    results = {}
    for path in (folder, *sorted(members)):
        results[path.name] = result = Verification()
        _check_files(Run(path), result)
        _check_errors(Run(path), result)
    return results


def _files(run: Run) -> Iterator[str]:
    for path in run.path.iterdir():
        if path.name.startswith(".") or path.name in PASSING or (path / "params.json").is_file():
            continue
        for file in [path] if path.is_file() else path.rglob("*"):
            name = file.relative_to(run.path).as_posix()
            if file.is_file() and not file.name.startswith(".") and name not in PASSING:
                yield name


def checksums(run: Run) -> dict[str, str]:
    """{file: sha256} in CHECKSUMS; empty without such a file."""
    path = run.path / CHECKSUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(run: Run, result: Verification) -> None:
    before = checksums(run)
    if not before:
        result.problems.append(f"there is no {CHECKSUMS}, which would tell whether the files are what the run made")
        return
    missing = sorted(name for name in before if not (run.path / name).is_file())
    left_out = [name for name in missing if name.startswith(LEFT_OUT)]
    changed = sorted(name for name in before.keys() - set(missing) if sha256_of(run.path / name) != before[name])
    added = sorted(set(_files(run)) - before.keys())
    same = len(before) - len(missing) - len(changed)
    result.checked.append(f"{same} of {len(before)} files have the sha256 they had when the run ended")
    if left_out:
        folders = sorted({name.split("/")[0] for name in left_out})
        result.checked.append(f"{len(left_out)} files of {', '.join(folders)} are not here")
    lost = [name for name in missing if name not in left_out]
    for what, names in (("changed since", changed), ("missing", lost), ("not of this run", added)):
        if names:
            more = f" and {len(names) - FIRST} more" if len(names) > FIRST else ""
            result.problems.append(f"{what}: {', '.join(names[:FIRST])}{more}")


def _check_errors(run: Run, result: Verification) -> None:
    """Score every file of transcripts again, and compare with metrics/*.json to the last digit."""
    from asrlib.measuring.significance import compare_errors
    from asrlib.measuring.word_errors import EvaluationResult, load_predictions, score

    try:
        metrics = {name: run.metrics_so_far(name) for name in ("baseline", "evaluate")}
    except ValueError as error:
        result.problems.append(str(error))
        return
    reported = {"baseline": metrics["baseline"].get("splits", {}), **metrics["evaluate"].get("systems", {})}
    scored: dict[tuple[str, str], EvaluationResult] = {}  # those that come out the same
    absent, rates = [], sum(map(len, reported.values()))
    for system, splits in reported.items():
        for split, values in splits.items():
            path = run.path / "predictions" / f"{system}_{split}.jsonl"
            if not path.is_file():
                absent.append(f"{system} on {split}")
                continue
            try:
                again = score(load_predictions(path))
            except ValueError as error:
                result.problems.append(str(error))
                continue
            if different := _different(values, again.as_metrics()):
                result.problems.append(f"{system} on {split}: {different}")
            else:
                scored[system, split] = again
    if rates:
        result.checked.append(f"{len(scored)} of {rates} word error rates come out the same again")
    if absent:
        result.checked.append(f"without transcripts here, so not counted again: {', '.join(absent)}")
    tests = 0
    for split, named in metrics["evaluate"].get("paired", {}).items():
        for name, values in named.items():
            pair = [scored.get((system, split)) for system in name.split(" vs ")]
            if None in pair:
                continue
            if different := _different(values, compare_errors(*pair)):
                result.problems.append(f"{name} on {split}: {different}")
            else:
                tests += 1
    if tests:
        result.checked.append(f"{tests} paired tests come out the same again")


def _different(reported: dict, again: dict) -> str:
    """The names whose values differ, the first with both values, or nothing. An older run may report less, or what is
    no longer said (None), as a test of few speakers."""
    again = json.loads(json.dumps(again))
    names = [name for name, value in reported.items() if again.get(name) is not None and again[name] != value]
    if not names:
        return ""
    first, *others = names
    also = f"; different too: {', '.join(others)}" if others else ""
    return f"{first} is {reported[first]} in the metrics, but {again[first]} by the transcripts{also}"


def as_text(results: dict[str, Verification]) -> str:
    lines = []
    for name, result in results.items():
        lines += [name, *(f"  {text}" for text in result.checked), *(f"  WRONG  {text}" for text in result.problems)]
    wrong = sum(len(result.problems) for result in results.values())
    if wrong:
        again = "to run it again: run_all.py NAME --force, or --from the first step in question"
        return "\n".join([*lines, f"{wrong} problem{'s' * (wrong > 1)} found; {again}"])
    return "\n".join([*lines, "nothing is wrong in what was checked above"])
