"""What a run would take on this machine, before anything starts: `run_all.py NAME --estimate`.

A step that was timed here, with the same parameters and after the same steps, is expected to take as long again. What
others do (step_costs.py) is measured on a little of the speech (cost_measurements.py). metrics/estimate.json keeps the
estimate, and is all that is written; the index page sets it beside what the run took.
"""

import ast
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import nbformat

from asrlib import cost_measurements as measure
from asrlib.benchmark import measured_on
from asrlib.cost_card import BEFORE, UNCHANGED, Cost, in_all, summed
from asrlib.models.inference import choose_device
from asrlib.parameters import BadParameter, Schema
from asrlib.pipeline import Step, first_to_run, plan
from asrlib.runs import Run, read_json
from asrlib.step_costs import StepCosts
from asrlib.sweeps import Sweep


def estimate_run(
    root: Path, run: Run, schema: Schema, values: Mapping[str, Any], steps: list[Step], redo: list[str]
) -> dict:
    """Of the planned `steps`, of which `redo` run again even if unchanged; written to metrics/estimate.json too.

    {run, made, device, threads, dtype, seconds, whole, steps, memory, cache, missing, measuring_seconds}; `whole` is
    false where the sum lacks something, which `missing` names. Raises BadParameter where the run could not begin.
    """
    begin = time.perf_counter()
    known = _started(root, steps)
    costs = StepCosts(_every_parameter(schema, values), known)
    found = _of_steps(root, run, steps, redo, costs)
    return _kept(run, costs, found, begin)


def estimate_sweep(sweep: Sweep, redo: list[str]) -> dict:
    """Of all members together, and of the steps that compare them; under `members` that of each."""
    begin, members, timings = time.perf_counter(), {}, []
    known = _started(sweep.root, [step for member in sweep.members for step in member.steps])
    finished = {member.name: member.steps[-1].fingerprint for member in sweep.members}  # as they will be
    comparison = plan(sweep.root, sweep.run, sweep.schema, sweep.values, sweep.comparing, finished)
    start = _first(sweep.run, comparison, redo) if all(member.finished for member in sweep.members) else 0
    to_time = {step.name for step in comparison[start:]} if timed_before(sweep.root, comparison) is None else set()
    for member in sweep.members:
        costs = StepCosts(_every_parameter(sweep.schema, member.values), known)
        members[member.name] = _of_steps(sweep.root, member.run, member.steps, redo, costs)
        if "05_benchmark" in to_time:
            converts = any(step.name == "01_convert" for step in member.steps)
            timings += costs.timings(member.name, costs.converted if converts else costs.baseline)
    steps = {}
    for index, step in enumerate(comparison):
        measured = partial(list, timings) if step.name == "05_benchmark" else partial(costs.of, step.name)
        steps[step.name] = _of_step(sweep.root, comparison[: index + 1], index < start, known, measured)
    found = {"steps": steps, "members": members, **in_all(members | steps)}
    found["missing"] = list(dict.fromkeys(reason for member in members.values() for reason in member["missing"]))
    return _kept(sweep.run, costs, found, begin)


def _every_parameter(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    every = schema.defaults | dict(values)
    if values.get("cache_cut") is not None:
        every["latent_dim"] = None
    return every


def _kept(run: Run, costs: StepCosts, found: dict, begin: float) -> dict:
    device = choose_device(getattr(costs.p, "device", "cpu"), None)
    made = {"run": run.path.name, "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    made |= measured_on(device, getattr(costs.p, "precision", "fp32"))
    estimate = made | found | {"measuring_seconds": time.perf_counter() - begin}
    run.write_metrics("estimate", estimate)
    return estimate


def _first(run: Run, steps: list[Step], redo: list[str]) -> int:
    """Index of the first step that will run."""
    names = [step.name for step in steps]
    return min([first_to_run(run, steps), *(names.index(name) for name in redo if name in names)])


def _of_steps(root: Path, run: Run, steps: list[Step], redo: list[str], costs: StepCosts) -> dict:
    start, found, names = _first(run, steps, redo), {}, [step.name for step in steps]
    for index, step in enumerate(steps):
        measured = partial(costs.of, step.name)
        found[step.name] = _of_step(root, steps[: index + 1], index < start, costs.known, measured)
        if index >= start and costs.trains(step.name) and step.name not in costs.memory:
            measured()  # timed before, but its memory was not
    cache = costs.cache("01_convert" in names) if {"00_baseline", "01_convert"} & set(names) else None
    return {"steps": found, "memory": costs.memory, "cache": cache, "missing": costs.missing, **in_all(found)}


def _of_step(root: Path, steps: list[Step], unchanged: bool, known: dict, measured: Callable[[], list[Cost]]) -> dict:
    """Of the last of `steps`."""
    if unchanged:
        costs = [Cost("nothing to do", 0.0, UNCHANGED)]
    elif (seconds := timed_before(root, steps)) is not None:
        costs = [Cost("the notebook", seconds, BEFORE)]
    else:
        costs = [Cost("start of its kernel, imports", known["start"][0]), *measured()]
    return {"fingerprint": steps[-1].fingerprint, **summed(costs)}


def timed_before(root: Path, steps: list[Step]) -> float | None:
    """Seconds that the last of `steps` took in the latest run, of any name, that had the parameters of all of them."""
    asked = {step.name: step.parameters | {"run_dir": ""} for step in steps}
    seconds: dict[str, float] = {}
    for runs in ("*", "*/*"):
        for path in (root / "reports").glob(f"{runs}/.completed/{steps[-1].name}.json"):
            markers = {name: Run(path.parent.parent).completed(name) for name in asked}
            if all(m and m.get("parameters", {}) | {"run_dir": ""} == asked[name] for name, m in markers.items()):
                seconds[markers[steps[-1].name].get("time", "")] = read_json(path)["seconds"]
    return seconds[max(seconds)] if seconds else None


def _started(root: Path, steps: list[Step]) -> dict:
    """What all kernels begin with, measured: {"start": (seconds, bytes)}."""
    lines = {line: None for step in steps for line in _imports(step.notebook)}
    try:
        return {"start": measure.start_of_a_kernel("\n".join(lines), root)}
    except CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BadParameter(f"what the notebooks import cannot be imported: {reason}") from None


def _imports(notebook: Path) -> list[str]:
    cells = nbformat.read(notebook, as_version=4).cells
    nodes = [node for cell in cells if cell.cell_type == "code" for node in _parsed(cell.source)]
    return [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def _parsed(code: str) -> list[ast.stmt]:
    return ast.parse("\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))).body
