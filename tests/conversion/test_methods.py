"""A method is one function and one line of METHODS: whatever differs between methods is asked of the registry."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_parameter_limits import checked

from asrlib import collect_statistics, convert
from asrlib.conversion.convert import decompose
from asrlib.conversion.factorize import Objective, output_metric
from asrlib.conversion.grouped import group_heads
from asrlib.conversion.methods import METHODS, Method, grouping_methods, latent_methods
from asrlib.measuring.recipes import all_recipes
from asrlib.models.scratch import new_processor
from asrlib.running.preflight import check_surroundings
from asrlib.runs import project_root

ROOT = project_root(Path(__file__).parent)
HOME = ROOT / "asrlib" / "conversion" / "methods.py"


def values_as_heard(weights, moments):
    """Keys by their weights, values by what becomes of them behind the output projection."""
    return Objective.of(weights, value_metric=output_metric(weights))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "as_heard", Method("as_heard", values_as_heard))
    return "as_heard"


@pytest.fixture(scope="module")
def statistics():
    return collect_statistics(tiny.conformer(), new_processor(), tiny.corpus(), attention=True)


def assert_same_logits(ours, theirs):
    batch = tiny.padded_batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-4, rtol=0)


def test_one_function_and_one_line_make_a_method(registered, tiny_model):
    assert registered in latent_methods() and registered in grouping_methods()
    assert len(decompose(tiny_model, "joint", registered)) == tiny.LAYERS
    assert_same_logits(convert(tiny_model, tiny.WIDTH, method=registered), tiny_model)
    assert_same_logits(group_heads(tiny_model, tiny_model.config.num_attention_heads, registered), tiny_model)
    narrow, plain = (convert(tiny_model, 5, method=name).state_dict() for name in (registered, "svd"))
    assert any(not torch.equal(narrow[name], plain[name]) for name in plain), "it is not svd under another name"


def test_parameters_and_recipes_know_a_new_method(registered):
    assert checked("method", registered) == registered
    for convert_to in ("mla", "gqa"):
        check_surroundings({"method": registered, "convert_to": convert_to, "device": "cpu"})
    recipe = all_recipes()[registered]
    assert (recipe.method, recipe.layout) == (registered, "joint")


def test_a_method_is_unknown_before_it_has_its_line(tiny_model):
    with pytest.raises(ValueError, match="method is 'as_heard': choose one of svd, "):
        convert(tiny_model, 5, method="as_heard")
    with pytest.raises(ValueError, match="should be one of mean, svd, "):
        checked("method", "as_heard")
    assert "as_heard" not in all_recipes()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loses_nothing_at_full_rank(method, statistics):
    model = tiny.conformer()
    if method in latent_methods():
        for layout in METHODS[method].layouts:
            width = {"joint": 1, "split": 2}[layout] * tiny.WIDTH
            assert_same_logits(convert(model, width, layout=layout, method=method, statistics=statistics), model)
    if method in grouping_methods():
        assert_same_logits(group_heads(model, model.config.num_attention_heads, method, statistics), model)
    assert method in latent_methods() + grouping_methods()


# ---- nobody else tells methods apart -----------------------------------------------------------------------


def comparisons(code: str) -> list[int]:
    """Lines of `code` that compare something with a method's name, by an operator or by `match`."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        else:
            continue
        texts = {leaf.value for part in compared for leaf in _literals(part)}
        if texts & METHODS.keys():
            lines.append(compared[0].lineno)
    return lines


def _literals(node: ast.expr) -> list[ast.Constant]:
    """A text that stands there itself, or in a literal tuple, list or set: not the key of an index or an argument."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return [part for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


@pytest.mark.parametrize(
    "code",
    ['method == "attended"', '"mean" != name', 'x in ("svd", "other")', 'match m:\n    case "two_sided": pass'],
)
def test_a_comparison_with_a_methods_name_is_noticed(code):
    assert comparisons(code)
    assert not comparisons('method = "attended"; convert(m, method="svd") == METHODS["mean"]')


def sources() -> dict[str, str]:
    files = [ROOT / "run_all.py", *(ROOT / "asrlib").rglob("*.py")]
    codes = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files if file != HOME}
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        lines = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code").splitlines()
        codes[file.name] = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)
    return codes


def test_no_method_is_told_by_its_name_elsewhere():
    codes = sources()
    assert "01_convert.ipynb" in codes and any(name.endswith("convert.py") for name in codes)
    assert {name: lines for name, code in codes.items() if (lines := comparisons(code))} == {}


def test_the_names_need_no_torch():
    code = "import sys, asrlib.conversion.methods, asrlib.running.parameter_limits; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
