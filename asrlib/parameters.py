"""What may be set in a run: the notebooks' own `parameters` cells, read as one schema.

Types come from the cells (`epochs: int = 4  # passes over the training data`), limits on values from LIMITS.
A name means the same in every notebook that declares it.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from asrlib.parameter_limits import LIMITS, nearest
from asrlib.runs import read_json, resolve

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
TYPES |= {"List": list, "Dict": dict, "Optional": Optional}


class BadParameter(ValueError):
    """A parameter that cannot be used; the message says which, where it was given, what would be valid."""


SET_BY_RUN_ALL = {"run_dir": "name the run with --name", "members": "name them in `sweep`"}
BESIDE_PARAMETERS = ("sweep", "steps")  # what a params file may say at its top, though no notebook declares it


# ---- YAML --------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string and takes the last of two equal keys: here a float, and an error. And what JSON
    writes as two escapes, as programs write emoji, is one character."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        try:
            return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            message = f"{value!r} holds half a character"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise BadParameter(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def read_params_file(path: Path) -> dict[str, Any]:
    """The flat mapping in a params file; an empty file sets nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadParameter(f"{path} is not text in UTF-8 (see its byte {error.start}): save it as such") from None
    values = read_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise BadParameter(f"{path} should be one flat mapping of `name: value`")
    return values


def read_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["epochs=2", "learning_rate=1e-4"]` → `{"epochs": 2, "learning_rate": 0.0001}`; values are YAML."""
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals):
            raise BadParameter(f"{assignment!r} (in --set) should be name=value")
        if name in values:
            raise BadParameter(f"{name!r} (in --set) is given twice: give one value")
        values[name] = read_yaml(text, f"the value of {name!r} (in --set)")
    return values


# ---- the notebooks' parameters cells -----------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    annotation: str  # as written in the notebook
    default: Any
    help: str


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """Parameters of one notebook, as papermill will see them.

    Raises BadParameter where papermill would overlook one (it skips `int | None` and lines with a second
    `=`), or where a default is no literal.
    """
    import papermill

    seen = papermill.inspect_notebook(notebook)
    for name in _assigned_names(notebook):
        if name not in seen:
            raise BadParameter(
                f"{notebook.name}: papermill does not see parameter {name!r}: write it on one line as "
                "`name: type = literal  # help`, with Optional[int] for `int | None` and no second `=`"
            )
    found = {}
    for name, facts in seen.items():
        try:
            default = ast.literal_eval(facts["default"])
        except (ValueError, SyntaxError):
            raise BadParameter(f"{notebook.name}: default of {name!r} is no literal: {facts['default']}") from None
        _type_of(facts["inferred_type_name"], f"{notebook.name}: parameter {name!r}")
        found[name] = Parameter(facts["inferred_type_name"], default, facts["help"])
    return found


def _assigned_names(notebook: Path) -> list[str]:
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    names = []
    for node in ast.parse("\n".join(sources[:1])).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def _type_of(annotation: str, where: str) -> Any:
    def build(node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if name in TYPES:
                return TYPES[name]
            case ast.Subscript(value=outer, slice=ast.Tuple(elts=inner)):
                return build(outer)[*map(build, inner)]
            case ast.Subscript(value=outer, slice=inner):
                return build(outer)[build(inner)]
        raise BadParameter(f"{where} has type {annotation}: annotate it with {', '.join(TYPES)}")

    return build(ast.parse(annotation, mode="eval").body)


# ---- one schema for all notebooks --------------------------------------------------------------------------


class Schema:
    """Every parameter of every notebook, and how to check values against them.

    `run_dir` and `members` are left out: it is the pipeline that says where a run goes and what a sweep compares.
    """

    def __init__(self, notebooks: Mapping[str, Path]):
        """`notebooks`: step name → notebook. Raises BadParameter where the notebooks disagree."""
        self.parameters = {step: read_parameters(path) for step, path in notebooks.items()}
        first: dict[str, tuple[str, Parameter]] = {}
        for step, declared in self.parameters.items():
            for name, parameter in declared.items():
                other, known = first.setdefault(name, (step, parameter))
                if known.annotation != parameter.annotation:
                    raise BadParameter(
                        f"parameter {name!r} is {known.annotation} in {other} but {parameter.annotation} in {step}"
                    )
        first = {name: known for name, known in first.items() if name not in SET_BY_RUN_ALL}
        self.defaults = {name: parameter.default for name, (_, parameter) in first.items()}
        fields = {}
        for name, (step, parameter) in first.items():
            kind = _type_of(parameter.annotation, step)
            fields[name] = (Annotated[kind, LIMITS[name]] if name in LIMITS else kind, parameter.default)
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
        self.model: type[BaseModel] = create_model("Parameters", __config__=config, **fields)
        for step in self.parameters:
            own = self.defaults_of(step)
            self.check(own, dict.fromkeys(own, f"the parameters cell of {step}"))

    def defaults_of(self, step: str) -> dict[str, Any]:
        declared = self.parameters[step]
        return {name: parameter.default for name, parameter in declared.items() if name not in SET_BY_RUN_ALL}

    def check(self, values: Mapping[str, Any], origin: Mapping[str, str]) -> dict[str, Any]:
        """The given values with their declared types; `origin[name]` says where a value was given.

        Raises BadParameter with one line for each thing that is wrong.
        """
        try:
            checked = self.model(**values).model_dump(exclude_unset=True)
        except ValidationError as errors:
            lines = [self._explain(error, values, origin) for error in errors.errors(include_url=False)]
            raise BadParameter("\n".join(dict.fromkeys(lines))) from None
        if checked.get("latent_dim") is not None and checked.get("cache_cut") is not None:
            raise BadParameter(
                f"'latent_dim' (in {origin['latent_dim']}) and 'cache_cut' (in {origin['cache_cut']}) say "
                "the same thing twice: give one and set the other to null"
            )
        return checked

    def _explain(self, error: Any, values: Mapping[str, Any], origin: Mapping[str, str]) -> str:
        name, inside = error["loc"][0], error["loc"][1:]
        where = f"{name!r} (in {origin[name]})"
        if name in SET_BY_RUN_ALL:
            return f"{where} is set by run_all itself: {SET_BY_RUN_ALL[name]}"
        if name in BESIDE_PARAMETERS:
            return f"{where} is no parameter: it belongs at the top of a params file"
        if error["type"] == "extra_forbidden":
            valid = [*self.model.model_fields, *BESIDE_PARAMETERS]
            return f"unknown parameter {where}{nearest(name, valid) or ': valid are ' + ', '.join(valid)}"
        message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
        item = f" (its item {inside[-1]!r} is {error['input']!r})" if inside else ""
        return f"parameter {where} is {values[name]!r}{item}, {message}"

    def for_step(self, step: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `values` that the notebook of `step` declares.

        latent_dim and cache_cut are two ways to say one thing: giving one switches the other's default off.
        """
        values = dict(values)
        for given, other in (("latent_dim", "cache_cut"), ("cache_cut", "latent_dim")):
            if values.get(given) is not None:
                values[other] = None
        return {name: value for name, value in values.items() if name in self.parameters[step]}


def known_step(name: Any, steps: list[str], where: str) -> int:
    if name not in steps:
        proposal = nearest(str(name), steps) or f": steps are {', '.join(steps)}"
        raise BadParameter(f"unknown step {name!r} (in {where}){proposal}")
    return steps.index(name)


def check_width(values: dict[str, Any]) -> None:
    """Refuse a latent wider or narrower than the model allows, where that can be known without a download."""
    latent_dim, cache_cut = values.get("latent_dim"), values.get("cache_cut")
    if (latent_dim is None and cache_cut is None) or not values.get("model"):
        return
    if values.get("architecture"):  # a new model is made
        hidden_size = values["hidden_size"]
    else:
        hidden_size = model_width(values["model"], values.get("revision"))
    if hidden_size is None:
        return
    if cache_cut is not None:
        from asrlib.conversion.convert import latent_dim_for

        try:
            latent_dim = latent_dim_for(cache_cut, hidden_size)
        except ValueError as error:
            raise BadParameter(str(error)) from None
    check_latent_dim(latent_dim, values.get("layout") or "joint", hidden_size)


def check_latent_dim(latent_dim: int, layout: str, hidden_size: int) -> None:
    """Raises BadParameter where a latent of this width makes no sense in a model of width `hidden_size`."""
    if latent_dim > 2 * hidden_size:
        raise BadParameter(
            f"latent_dim {latent_dim} is wider than the keys and values it replaces: this model allows "
            f"at most 2·d = {2 * hidden_size}"
        )
    if layout == "split" and latent_dim < 2:
        raise BadParameter("a split latent needs latent_dim of at least 2: one number for keys, one for values")


def model_width(source: str, revision: str | None = None) -> int | None:
    """hidden_size of a model folder, a shipped model, or a hub model that was downloaded before; None where
    only a download would tell."""
    folder = resolve(source)
    if not (folder / "config.json").is_file():
        from asrlib.models.families import resolve_model  # costs the import of torch

        try:
            folder = Path(resolve_model(source))
        except FileNotFoundError:
            return None
    config = folder / "config.json"
    if not config.is_file():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        config = Path(cached)
    try:
        found = read_json(config)
        return (found.get("encoder_config") or found).get("hidden_size")
    except (ValueError, AttributeError):  # damaged, as `check_surroundings` will say
        return None


def check_surroundings(values: dict[str, Any]) -> None:
    """Refuses what would fail in the middle of a run for what this machine has: model, splits, device, precision.

    Reads no audio and no weights, and nothing from a network but the names of the files where the corpus is a URL: a
    hub id is taken on trust. Raises BadParameter.
    """
    import torch

    from asrlib.attention.kinds import attention_kind
    from asrlib.conversion.recipes import RECIPES
    from asrlib.data.splits import check_splits
    from asrlib.models.families import resolve_model
    from asrlib.models.inference import choose_device

    unknown = f": choose from {'; '.join(RECIPES)}"
    asked: dict[str, list[str]] = {}
    try:
        if values.get("model") and not values.get("architecture"):
            resolve_model(values["model"])
        if values.get("corpus"):
            asked = {"eval_splits": values.get("eval_splits", [])}
            asked |= {name: [values[name]] for name in ("train_split", "validation_split") if values.get(name)}
            check_splits(values["corpus"], [split for splits in asked.values() for split in splits])
        attention_kind(values.get("attention", "mha"))
        choose_device(values.get("device", "auto"))
    except (OSError, ValueError) as error:
        missing = re.search(r"no split '([^']*)'", str(error))
        whose = [name for name, splits in asked.items() if missing and missing[1] in "+".join(splits).split("+")]
        raise BadParameter(f"{' and '.join(whose)}: {error}" if whose else str(error)) from None
    device, cuda = values.get("device", "auto"), torch.cuda.is_available()
    for name in ("precision", "baseline_precision"):
        if values.get(name) == "fp16" and (device == "cpu" or not cuda):
            raise BadParameter(f"{name!r} is fp16, which needs a CUDA device: use bf16 or fp32")
    _check_processes(values, torch.cuda.device_count() if cuda and device != "cpu" else 0)
    if values.get("architecture") and not values.get("baseline_epochs", True):
        raise BadParameter("'architecture' asks for a new model, whose weights are random: say 'baseline_epochs' too")
    if values.get("architecture"):
        _check_new_model(values)
    forbidden = "attended" if values.get("convert_to") == "gqa" else "mean"
    if values.get("method") == forbidden:
        raise BadParameter(f"'method' is {forbidden}, which cannot convert to {values.get('convert_to', 'mla')}")
    for seconds in values.get("benchmark_seconds", []):
        if not isinstance(seconds, float | int) or seconds <= 0:
            raise BadParameter(f"'benchmark_seconds' holds {seconds!r}: each should be a number of seconds above 0")
    for cut in values.get("analysis_cuts", []):
        if not isinstance(cut, float) or not 0 < cut < 1:
            raise BadParameter(f"'analysis_cuts' holds {cut!r}: a cut lies between 0 and 1 (0.75 keeps a quarter)")
    for name in values.get("analysis_methods", []):
        if name not in RECIPES:
            raise BadParameter(f"'analysis_methods' holds {name!r}{nearest(str(name), RECIPES) or unknown}")
    weights = [values.get(name) for name in ("ctc_weight", "kl_weight", "hidden_weight")]
    if None not in weights and not any(weights):
        raise BadParameter("'ctc_weight', 'kl_weight' and 'hidden_weight' are all 0: there is nothing to learn from")


def check_model(values: Mapping[str, Any]) -> None:
    """Refuses a model folder in which something is missing or cut short, of which an estimate would take the config,
    and what the architecture in it forbids. Raises BadParameter."""
    from asrlib.models.families import check_abilities, check_folder, resolve_model

    if not values.get("model") or values.get("architecture"):
        return
    folder = Path(resolve_model(values["model"]))
    try:
        if folder.is_dir():
            check_folder(folder)
            check_abilities(folder, values.get("layout") or "joint", bool(values.get("stream_chunks_ms")))
    except (OSError, ValueError) as error:
        raise BadParameter(str(error)) from None


def _check_processes(values: dict[str, Any], gpus: int) -> None:
    """`gpus` is how many of them training may use; 0: it runs on the CPU."""
    count, config = values.get("training_processes", 1), values.get("accelerate_config")
    if config is not None and not resolve(config).is_file():
        raise BadParameter(f"'accelerate_config' is {config}, which is no file: `accelerate config` writes one")
    if config is not None and count > 1:
        raise BadParameter(f"'training_processes' is {count}, but 'accelerate_config' says how many: give one of them")
    if 0 < gpus < count:
        raise BadParameter(f"'training_processes' is {count}, but each needs a GPU and here are {gpus}")
    if values.get("training_strategy") != "fsdp":
        return
    if not gpus or (count == 1 and config is None):
        raise BadParameter("'training_strategy' is fsdp, which needs GPUs and 'training_processes' above 1: use ddp")
    if "fp16" in (values.get("precision"), values.get("baseline_precision")):
        raise BadParameter("'training_strategy' is fsdp, which is not provided for fp16: use bf16 or fp32")


def _check_new_model(values: dict[str, Any]) -> None:
    from huggingface_hub.errors import StrictDataclassError

    from asrlib.models.scratch import SIZES, new_config, new_processor

    speeds = values.get("speeds", [])
    if any(not isinstance(speed, float | int) or speed <= 0 for speed in speeds):
        raise BadParameter(f"'speeds' is {speeds!r}: each should be a number above 0 (1.1 is 10 % faster)")
    features = {name: values[name] for name in ("mel_bins", "frame_shift_ms") if name in values}
    sizes = {name: values[name] for name in SIZES if name in values}
    try:
        new_config(values["architecture"], new_processor(values["architecture"], **features), **sizes)
    except (ValueError, StrictDataclassError) as error:
        raise BadParameter(f"no such model can be made: {error}") from None
