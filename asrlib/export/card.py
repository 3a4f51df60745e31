"""The model card: README.md of an exported folder, with the hub's YAML head, from the figures of the run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from transformers import AutoModelForCTC

from asrlib.data.corpus import HUB_ID
from asrlib.export.kept import kept_sentence
from asrlib.models.loading import PRETRAINED
from asrlib.models.registry import family_of
from asrlib.models.scratch import architectures
from asrlib.reporting.comparison import comparison_table, readable_comparison
from asrlib.reporting.figures import SYSTEMS
from asrlib.reporting.notebook_pages import TEMPLATES
from asrlib.reporting.numbers import percent, rate_interval, tested_points
from asrlib.reporting.provenance import provenance_of
from asrlib.runs import Run, read_json, resolve


@dataclass(frozen=True)
class Export:
    """An export: the run, its model, the form, and the command."""

    run: Run
    system: str  # baseline, converted or finetuned
    to: str
    command: str
    licence: str | None = None  # None: that of the base model's card

    @property
    def title(self) -> str:
        return f"{self.run.path.name}, {SYSTEMS[self.system].partition(' (')[0]}"


def model_card(export: Export, config, what: str, loading: str, unknown: list[str] = ()) -> str:
    """README.md as text. `config` is the exported model's. `what` describes the folder, `loading` says how to load it,
    and `unknown` what this kind of export leaves open."""
    run, system = export.run, export.system
    metrics = {name: run.metrics_so_far(name) for name in ("baseline", "convert", "finetune", "evaluate", "benchmark")}
    scores = metrics["evaluate"].get("systems", {}).get(system, {})
    if system == "baseline":
        scores = scores or metrics["baseline"].get("splits", {})
    provenance = provenance_of(run, metrics)
    licence, of_licence = _licence(export, metrics["baseline"].get("model"))
    data = ModelCardData(
        model_name=export.title,
        license=licence,
        base_model=_hub_id(metrics["baseline"].get("model")),
        library_name="onnx" if export.to.startswith("onnx") else "transformers",
        pipeline_tag="automatic-speech-recognition",
        tags=_tags(config),
        eval_results=list(_eval_results(scores, metrics["baseline"].get("corpus"))),
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment.from_string((TEMPLATES / "export" / "model_card.md.j2").read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        title=export.title,
        what=what,
        measured=_measured(export) if scores else [],
        tests=list(_tests(metrics["evaluate"].get("paired", {}), system)),
        timed_on=provenance.get("timed on") if export.to == "hub" else None,
        kept=kept_sentence(config),
        loading=loading.strip(),
        made=_made(metrics, system, provenance, config),
        commit=f" at commit {provenance['commit']}" if "commit" in provenance else "",
        run=run.path.name,
        command=export.command,
        params=yaml.safe_dump(_params(run), sort_keys=False, allow_unicode=True),
        unknown=[*_unknown(metrics, scores, provenance, licence), *unknown],
        licence=of_licence,
    )


def _tags(config) -> list[str]:
    family = family_of(config)
    tags = {
        "automatic-speech-recognition": True,
        "ctc": family.head.auto_model is AutoModelForCTC,
        "multi-head-latent-attention": family.is_latent(config),
    }
    return [tag for tag, fits in tags.items() if fits]


def _measured(export: Export) -> list[list[str]]:
    """Rows, the head first: the run's comparison of the baseline and the exported model. Caches are described elsewhere
    in the card. Other forms than the hub's were not timed, so their rows are word and character errors alone."""
    table = comparison_table(export.run)
    systems = [name for name in dict.fromkeys(("baseline", export.system)) if name in table.index]
    rows = readable_comparison(table.loc[systems]).drop(index="K/V cache per second of audio", errors="ignore")
    if export.to != "hub":
        rows = rows[rows.index.str.contains("WER|CER")]
    rows = rows.reset_index()
    return [[str(name) for name in rows.columns], *rows.values.tolist()]


def _eval_results(scores: dict[str, dict], corpus: str | None) -> Iterator[EvalResult]:
    hub = _hub_id(corpus)
    for split, score in scores.items():
        interval = f" (95 % interval {rate_interval(score['wer_interval'])})" if score.get("wer_interval") else ""
        yield EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Automatic speech recognition",
            dataset_type=hub or _name_of(corpus),
            dataset_name=_name_of(corpus),
            dataset_split=split,
            metric_type="wer",
            metric_name=f"WER in per cent{interval}",
            metric_value=round(100 * score["wer"], 2),
        )


def _tests(paired: dict[str, dict], system: str) -> Iterator[str]:
    for split, tests in paired.items():
        test = tests.get(f"baseline vs {system}")
        if test:
            change = tested_points(test["difference"], test["interval"], test.get("p"), unit=" points")
            yield f"Change of the WER on {split}, by the paired bootstrap: {change}."


def _made(metrics: dict[str, dict], system: str, provenance: dict[str, str], config) -> dict[str, str]:
    before, convert, finetune = metrics["baseline"], metrics["convert"], metrics["finetune"]
    base = before.get("model")
    made = {"base model": "none: trained from scratch in this run" if base in architectures() else _name_of(base)}
    made["speech"] = _name_of(before.get("corpus"))
    if system not in ("baseline", "control") and convert:
        made["conversion"] = (
            f"multi-head attention to {convert.get('attention', 'MLA')} by the method {convert.get('method', 'svd')}, "
            f"{percent(convert['cache_cut'], 2)} of the cache cut"
        )
        if convert.get("latent_dim"):
            widths = [str(width) for width in convert["latent_dim"]]
            if getattr(config, "latent_shared", False):
                widths[-config.decoder_layers :] = [f"{widths[-1]}, once for all layers,"]
            widths = ", ".join(widths)
            unit = "a frame, layer by layer"
            if parts := getattr(config, "latent_parts", None):
                unit = f"a token or a frame, layer by layer of {', then '.join(parts)}"
            made[f"numbers kept of {unit}"] = (
                f"{widths} ({convert.get('layout', 'joint')}, ranks {convert.get('ranks', 'uniform')})"
            )
    training = finetune if system == "finetuned" else finetune.get("control", {}) if system == "control" else {}
    if settings := training.get("settings"):
        made["fine-tuning"] = (
            f"{settings['epochs']:g} epochs over {finetune.get('utterances', '?')} utterances, trained: "
            f"{settings['trainable']}"
        )
    facts = ("versions", "machine", "finished")
    return made | {name: provenance[name] for name in facts if name in provenance}


def _unknown(metrics: dict, scores: dict, provenance: dict[str, str], licence: str) -> Iterator[str]:
    corpus = _name_of(metrics["baseline"].get("corpus"))
    if scores:
        yield f"Word errors were measured on {' and '.join(scores)} of {corpus}, and not on other speech."
    seed = provenance.get("seed")
    yield f"This is one run{f' with seed {seed}' if seed else ''}: the spread over other seeds was not measured."
    if metrics["benchmark"]:
        yield "Speed and memory of the run's model were measured on one machine alone."
    if not metrics["evaluate"].get("paired"):
        yield "No test says whether the difference from the baseline is more than chance."
    if licence == "unknown":
        yield "The licence of the base model is not known to the run."


def _params(run: Run) -> dict:
    path = run.path / "params.json"
    params = read_json(path) if path.is_file() else {}
    return {
        name: f"path/to/{_name_of(value)}" if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in params.items()
        if name != "run_dir"
    }


def _hub_id(source: str | None) -> str | None:
    """`source` if it is a hub id and not a folder, otherwise None."""
    return source if source and re.fullmatch(HUB_ID, source) and not resolve(source).exists() else None


def _name_of(source: str | None) -> str:
    """The name of a model or a corpus for readers: of a folder its last part, without the path."""
    if not source:
        return "unknown"
    return source if _hub_id(source) or "://" in source else Path(source).name


def _licence(export: Export, base: str | None) -> tuple[str, str]:
    """(identifier for the hub, sentences)"""
    code = "Code in this folder, if any, is asrlib's, under the MIT licence."
    if export.licence:
        return export.licence, f"Weights: {export.licence}, given at the export. {code}"
    if base and Path(base).name == base and (PRETRAINED / base / "config.json").is_file():
        return "mit", "Weights and code: MIT, the licence of the base model, which comes with asrlib."
    if licence := _licence_of_base(base):
        return licence, f"Weights: {licence}, by the base model's own card. {code}"
    if base in architectures():
        return "unknown", f"Weights: trained from scratch; the run does not record their owner. {code}"
    return "unknown", f"Weights: under the base model's licence, which the run does not know. {code}"


def _licence_of_base(base: str | None) -> str | None:
    """The licence in the base model's card, if that card is on this machine."""
    if not base:
        return None
    card = resolve(base) / "README.md"
    if not card.is_file():
        cached = try_to_load_from_cache(base, "README.md") if _hub_id(base) else None
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    try:
        return ModelCard.load(card).data.to_dict().get("license")
    except ValueError:  # its head is not valid YAML
        return None
