"""The parameters of a run: the `parameters` cells of the notebooks, read as one schema.

Types come from the cells (`epochs: int = 4  # passes over the training data`), limits on values from LIMITS.
A name means the same in every notebook that declares it.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from asrlib.running.parameter_cells import Parameter, read_parameters, type_of
from asrlib.running.parameter_limits import LIMITS
from asrlib.runs import BadParameter, nearest

SET_BY_RUN_ALL = {"run_dir": "name the run with --name", "members": "name them in `sweep`"}
BESIDE_PARAMETERS = ("sweep", "steps")  # names that a params file may hold though no notebook declares them


# ---- params files and --set ----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but for three things: 1e-4 is a float, two equal keys are an error, and a character that JSON writes as
    two escapes (an emoji, for example) is one character."""

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


def find_params(root: Path, name: str) -> Path:
    """params/NAME.yaml or the YAML file of that path. Raises BadParameter where there is neither."""
    for path in (root / "params" / f"{name}.yaml", Path(name)):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    if Path(name).is_file():
        raise BadParameter(f"{name} is not a params file: its name should end in .yaml")
    known = sorted(path.stem for path in (root / "params").glob("*.yaml"))
    proposal = nearest(name, known) or f": there are {', '.join(known)}"
    raise BadParameter(f"there is no params file {name!r}{proposal}")


def read_params_file(path: Path) -> dict[str, Any]:
    """The mapping in a params file; an empty file sets nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadParameter(f"{path} is not text in UTF-8 (see its byte {error.start}): save it in UTF-8") from None
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


# ---- one schema for all notebooks --------------------------------------------------------------------------


class Schema:
    """Every parameter of every notebook, and the check of values against them.

    `run_dir` and `members` are left out: the pipeline sets them.
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
            kind = type_of(parameter.annotation, step)
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

        Raises BadParameter with a line for each wrong value.
        """
        try:
            checked = self.model(**values).model_dump(exclude_unset=True)
        except ValidationError as errors:
            lines = [self._explain(error, values, origin) for error in errors.errors(include_url=False)]
            raise BadParameter("\n".join(dict.fromkeys(lines))) from None
        for one, other in (("latent_dim", "cache_cut"), ("learning_rate", "learning_rates")):
            if checked.get(one) is not None and checked.get(other) is not None:
                raise BadParameter(
                    f"{one!r} (in {origin[one]}) and {other!r} (in {origin[other]}) say the same thing twice: give one "
                    "and set the other to null"
                )
        return checked

    def _explain(self, error: Any, values: Mapping[str, Any], origin: Mapping[str, str]) -> str:
        name, inside = error["loc"][0], error["loc"][1:]
        where = f"{name!r} (in {origin[name]})"
        if name in SET_BY_RUN_ALL:
            return f"{where} is set by run_all itself: {SET_BY_RUN_ALL[name]}"
        if name in BESIDE_PARAMETERS:
            return f"{where} is not a parameter: it belongs at the top of a params file"
        if error["type"] == "extra_forbidden":
            valid = [*self.model.model_fields, *BESIDE_PARAMETERS]
            return f"unknown parameter {where}{nearest(name, valid) or ': valid are ' + ', '.join(valid)}"
        message = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
        item = f" (its item {inside[-1]!r} is {error['input']!r})" if inside else ""
        return f"parameter {where} is {values[name]!r}{item}, {message}"

    def for_step(self, step: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the notebook of `step` declares.

        latent_dim and cache_cut both say how wide the latent is: a value of one switches the other's default off.
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
