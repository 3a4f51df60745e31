"""Sweeps: several runs that one params file asks for, and the steps that compare them.

    sweep: [quick, full]                             params files, each a member named by its file
    sweep: {latent_dim: [16, 32], layout: [joint]}   a member for each combination: latent_dim-16_layout-joint

The file's other values hold for every member; they replace those of a member's own file. A member is a run like any
other, in reports/<sweep>/<member>. Then the steps that declare `members` run once more, in reports/<sweep> itself.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from asrlib.reporting.numbers import duration
from asrlib.running.parameters import Schema, find_params, read_assignments, read_params_file
from asrlib.running.pipeline import Step, expected_seconds, pending, plan, run_steps, time_left
from asrlib.running.preflight import checked, merged
from asrlib.running.workplace import StepFailed, Workplace, work_in
from asrlib.runs import BadParameter, Run, member_names, needed_by, own_values, write_json
from asrlib.runs.fingerprints import fingerprint

RUN_FOLDERS = {"metrics", "predictions", "tables", "figures", "rejected", "models", "checkpoints", "notebooks"}
DIFFERS_BY_CHANCE = r"0x[0-9a-f]+|Request ID: [^)]*"  # between two messages about the same failure of a network


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its folder, its parameters, its steps."""

    run: Run
    values: dict[str, Any]
    steps: list[Step]

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def finished(self) -> bool:
        return not pending(self.run, self.steps)

    def fingerprint_for(self, comparing: Iterable[str]) -> str:
        """The fingerprint of what the steps `comparing`, of the sweep as a whole, may read of this run."""
        names = [step.name for step in self.steps]
        read = {name for step in comparing for name in (step, *needed_by(step, names))}
        return fingerprint([step.fingerprint for step in self.steps if step.name in read])


@dataclass(frozen=True)
class Sweep:
    """What a params file with `sweep` asks for, checked."""

    file: Path
    root: Path
    run: Run  # of the sweep as a whole
    schema: Schema
    sweep: list | dict[str, list]  # as the params file gives it
    values: dict[str, Any]  # of all members
    members: list[Member]

    @property
    def comparing(self) -> list[str]:
        """The steps of the sweep as a whole."""
        return [step for step, declared in self.schema.parameters.items() if "members" in declared]

    @property
    def step_names(self) -> list[str]:
        """Every step that a member or the sweep as a whole has, in order."""
        names = {step.name for member in self.members for step in member.steps} | set(self.comparing)
        return [step for step in self.schema.parameters if step in names]


Failures = list[tuple[str, StepFailed]]  # (name of a member that failed, its error)


@dataclass(frozen=True)
class Engine:
    """Where the members of a sweep run, and how many at once."""

    run_members: Callable[[Sweep, Workplace, Callable[[str], None], str], Failures]  # those that are not finished
    at_once: int = 1
    before: Callable[[Sweep], None] = lambda sweep: None  # fetches what was done elsewhere
    after: Callable[[Sweep], None] = lambda sweep: None


# ---- what a params file asks for ---------------------------------------------------------------------------


def read_sweep(root: Path, run: Run, file: Path, assignments: list[str], schema: Schema) -> Sweep:
    """The sweep in `file`, all its members checked and planned. Raises BadParameter, which names the member."""
    given = read_params_file(file)
    sweep = given.pop("sweep")
    _check_sweep(sweep, given, file.name)
    shared, assigned = (file.name, given), ("--set", read_assignments(assignments))
    members = []
    for name, own in zip(member_names(sweep), own_values(sweep), strict=True):
        try:
            values, steps = checked([*_layers(root, own, shared), assigned], schema, list(schema.parameters))
            for varied, value in own.items() if isinstance(own, dict) else ():
                if values.get(varied) != value:
                    raise BadParameter(f"{varied!r} is what the sweep varies: leave it out of --set")
        except BadParameter as error:
            raise BadParameter("\n".join(f"member {name}: {line}" for line in str(error).splitlines())) from None
        member = Run(run.path / name)
        members.append(Member(member, values, plan(root, member, schema, values, steps)))
    values, origin = merged([shared, assigned])
    values.pop("steps", None)
    return Sweep(file, root, run, schema, sweep, schema.check(values, origin), members)


def _layers(root: Path, own: str | dict[str, Any], shared: tuple[str, dict]) -> list[tuple[str, dict]]:
    if isinstance(own, dict):
        return [shared, (f"the sweep of {shared[0]}", own)]
    file = find_params(root, own)
    values = read_params_file(file)
    if "sweep" in values:
        raise BadParameter(f"{file.name} is a sweep itself: give its members instead")
    return [(file.name, values), shared]


def _check_sweep(sweep: Any, shared: Mapping[str, Any], where: str) -> None:
    """Raises BadParameter where `sweep` has neither of the two forms, or two members would have the same name."""
    files = isinstance(sweep, list) and sweep and all(isinstance(name, str) and name for name in sweep)
    lists = isinstance(sweep, dict) and sweep and all(isinstance(name, str) for name in sweep)
    if not files and not (lists and all(isinstance(values, list) and values for values in sweep.values())):
        raise BadParameter(
            f"'sweep' (in {where}) should be a list of params files, or a mapping from parameters to lists of values"
        )
    for name in sweep if lists else ():
        if name in shared:
            raise BadParameter(f"{name!r} (in {where}) is given twice: in the sweep and beside it")
    names = member_names(sweep)
    for name in names:
        if [other.casefold() for other in names].count(name.casefold()) > 1:
            raise BadParameter(f"two members of the sweep (in {where}) would be named {name!r}")
        if name in RUN_FOLDERS or name.startswith(".") or len(name.encode()) > 200:
            raise BadParameter(
                f"a member of the sweep (in {where}) cannot be named {name!r}: a folder needs another name"
            )


# ---- running -----------------------------------------------------------------------------------------------


def run_sweep(
    sweep: Sweep, redo: list[str], say: Callable[[str], None], command: str, engine: Engine | None = None
) -> None:
    """Run all members that are not finished, then, on this machine, the steps that compare the finished ones.

    `redo`: steps that run again even if unchanged, in every member and in the comparison. `engine`: by default IN_TURN.
    A member that fails does not stop the others: StepFailed is raised at the end and names all that failed. Raises
    RunLocked.
    """
    from asrlib.reporting.pages import write_index

    engine = engine or IN_TURN
    with work_in(sweep.root, sweep.run) as place:
        engine.before(sweep)
        _begin(sweep, redo)
        write_index(sweep.run.path, command)
        ahead = time_left(seconds_ahead(sweep, sweep.members, [], engine.at_once))
        say(f"params {sweep.file.name} → {sweep.run.path}: {len(sweep.members)} members{ahead}")
        failures = engine.run_members(sweep, place, say, command)
        finished = [member.name for member in sweep.members if member.finished]
        if finished and sweep.comparing:
            say(f"{sweep.run.path.name}, {len(finished)} of {len(sweep.members)} members compared")
            try:
                run_steps(plan_comparison(sweep), place, say, command)
            except StepFailed as failure:
                failures.append((sweep.run.path.name, failure))
        engine.after(sweep)
        if failures:
            raise StepFailed(_explain(failures))
        say(str(sweep.run.path / "index.html"))


def _begin(sweep: Sweep, redo: list[str]) -> None:
    """Mark as out of date what is, before the first member runs."""
    for name in redo:
        for member in sweep.members:
            if name in [step.name for step in member.steps]:
                member.run.discard(name)
        if name in sweep.comparing:
            sweep.run.discard(name)
    write_json(sweep.run.path / "params.json", {"sweep": sweep.sweep, **sweep.values})
    comparison = plan_comparison(sweep)
    for step in pending(sweep.run, comparison):
        sweep.run.outdate(step.name)


def _run_in_turn(sweep: Sweep, place: Workplace, say: Callable[[str], None], command: str) -> Failures:
    from asrlib.reporting.pages import write_index

    failures: Failures = []
    took: list[float] = []  # seconds, of members that are finished
    begin = time.monotonic()
    for number, member in enumerate(sweep.members, 1):
        title = f"[{number}/{len(sweep.members)}] {member.name}"
        if member.finished:
            say(f"{title} unchanged")
            continue
        say(title)
        member_begin = time.monotonic()
        try:
            with work_in(sweep.root, member.run, held=place.locks) as member_place:
                run_member(member, member_place, say, command)
        except StepFailed as failure:
            failures.append((member.name, failure))
            say(reasons(failures)[-1][0])
        finally:  # after Ctrl-C too: the page names the member that was interrupted
            write_index(sweep.run.path, command)
        now = time.monotonic()
        if member.finished:
            took.append(now - member_begin)
        verb = "took" if member.finished else "failed after"
        ahead = time_left(seconds_ahead(sweep, sweep.members[number:], took))
        say(f"{title} {verb} {duration(now - member_begin)} (elapsed {duration(now - begin)}{ahead})")
    return failures


IN_TURN = Engine(_run_in_turn)


def run_member(
    member: Member,
    place: Workplace,
    say: Callable[[str], None],
    command: str,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Run the steps of the member that are not done, in its own `place`. Raises StepFailed."""
    write_json(member.run.path / "params.json", member.values)
    run_steps(member.steps, place, say, command, after_step)


def plan_comparison(sweep: Sweep, members: Iterable[Member] | None = None) -> list[Step]:
    """The steps of the sweep as a whole over `members`; by default those that are finished now."""
    compared = [member for member in sweep.members if member.finished] if members is None else members
    fingerprints = {member.name: member.fingerprint_for(sweep.comparing) for member in compared}
    return plan(sweep.root, sweep.run, sweep.schema, sweep.values, sweep.comparing, fingerprints)


def seconds_ahead(sweep: Sweep, members: list[Member], took: list[float], at_once: int = 1) -> list[float | None]:
    """Seconds by which each unfinished one of `members`, and each comparing step, delays the end, if `at_once` members
    run at once; None where that is unknown.

    A member that was never timed is expected to take the mean of `took`: the seconds of members that ran before it.
    """
    ahead: list[float | None] = []
    for member in members:
        ends = [member.steps.index(step) + 1 for step in pending(member.run, member.steps)]
        known = [expected_seconds(sweep.root, member.run, member.steps[:end]) for end in ends]
        typical = mean(took) if took else None
        if known:
            ahead.append(typical if None in known else sum(known))
    comparison = plan_comparison(sweep)
    left = comparison if ahead else pending(sweep.run, comparison)
    return _delays(ahead, at_once) + [sweep.run.seconds(step.name) for step in left]


def _delays(durations: list[float | None], at_once: int) -> list[float | None]:
    """Seconds by which each delays the end, if each begins as soon as one of `at_once` places is free."""
    places, delays = [0.0] * at_once, []
    for seconds in durations:
        end, first_free = max(places), places.index(min(places))
        places[first_free] += seconds or 0.0
        delays.append(None if seconds is None else max(places) - end)
    return delays


def _explain(failures: Failures) -> str:
    """The members that failed, each with its reason and its notebook."""
    lines = [f"failed: {', '.join(name for name, _ in failures)}"]
    for (name, _), (reason, *notebook) in zip(failures, reasons(failures), strict=True):
        lines += [f"  {name}: {reason}", *(f"    {where}" for where in notebook)]
    return "\n".join(lines)


def reasons(failures: Failures) -> list[list[str]]:
    """For each failure [the first line of its reason, where its notebook is], or [`the same as` another member]."""
    first: dict[str, str] = {}
    lines = []
    for name, failure in failures:
        reason, *_, notebook = str(failure).splitlines()
        kind = re.sub(DIFFERS_BY_CHANCE, "", reason)
        lines.append([f"the same as {first[kind]}"] if kind in first else [reason, notebook])
        first.setdefault(kind, name)
    return lines
