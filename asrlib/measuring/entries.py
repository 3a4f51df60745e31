"""The recognisers of a comparison, with the metrics of their runs.

A single run has three: its baseline, its converted and its fine-tuned model. A sweep has one for each member.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from asrlib.runs import Run, read_json

UNCONVERTED = "before conversion"


@dataclass(frozen=True)
class Entry:
    """One recogniser of the comparison: a model of a run."""

    name: str
    run: Run
    system: str  # baseline, control, converted or finetuned
    origin: str | None = None  # name of the entry that it was converted from

    def metrics(self, name: str) -> dict:
        """metrics/<name>.json of the run; empty where there is none."""
        return self.run.metrics_so_far(name)

    def scores(self) -> dict[str, dict]:
        """{split: {wer, wer_interval, cer, …}}; empty if it was not evaluated."""
        return self.all_scores().get(self.system, {})

    def all_scores(self) -> dict[str, dict[str, dict]]:
        """`scores` of all systems of its run, the baseline first, the fine-tuned one last."""
        scores = self.metrics("evaluate").get("systems", {})
        return {"baseline": self.metrics("baseline").get("splits", {})} | scores

    def training(self) -> dict:
        """{history, seconds, steps, best_wer, …} of its training; empty if it was not trained."""
        if self.system in ("finetuned", "control"):
            finetune = self.metrics("finetune")
            return finetune if self.system == "finetuned" else finetune.get("control") or {}
        return self.metrics("baseline").get("training") or {} if self.system == "baseline" else {}

    def parameters(self) -> dict:
        """The parameters of the member, from its params.json."""
        path = self.run.path / "params.json"
        return read_json(path) if path.is_file() else {}


def entries_of(run: Run, members: Sequence[str]) -> list[Entry]:
    """The members of a sweep in their order, then the models that they were converted from, each once.

    Without members the run is a single one: its baseline, the control that was trained like the fine-tuned model if
    there is one, its converted and its fine-tuned model, made or not.
    """
    if not members:
        control = ["control"] if run.metrics_so_far("finetune").get("control") else []
        derived = [Entry(system, run, system, "baseline") for system in (*control, "converted", "finetuned")]
        return [Entry("baseline", run, "baseline"), *derived]
    entries, origins = [], {}
    for name in members:
        member = Entry(name, Run(run.path / name), "baseline")
        converted = member.metrics("convert")
        if not converted:
            entries.append(member)
            continue
        before = json.dumps([member.metrics("baseline").get(fact) for fact in ("model", "revision", "splits")])
        if before not in origins:
            number = f" {len(origins) + 1}" if origins else ""
            origins[before] = Entry(UNCONVERTED + number, member.run, "baseline")
        system = "finetuned" if member.metrics("finetune") else "converted"
        entries.append(Entry(name, member.run, system, origins[before].name))
    return entries + list(origins.values())
