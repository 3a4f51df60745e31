"""The methods of conversion: the name of each, the statistics that it needs, and its functions.

A new method is one function and one line in METHODS. Parameters are checked against these names before torch is
imported, so this file imports a function when it is called.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """A method has one or more of three functions, and they decide what it can do.

    `objective(weights, moments)` returns what to minimise in one layer, a `factorize.Objective`. Its minimum has a
    closed form: for one layer, for a latent that layers share, and for heads in groups.
    `decompose(layers, layout, balances)` is for a method without a closed form: of pairs of weights and moments, of one
    layer or of all that share a joint latent. It returns for each a tuple with an object for each balance, which has
    `layout`, `directions` and `cut(rank_k, rank_v, steps)`, like `factorize.Decomposition`. A method that is not
    balanced is given one balance.
    `group(weights, kv_heads)` returns the `factorize.Factors` of heads in groups, for a method that only groups.
    """

    name: str
    objective: Callable | None = None
    decompose: Callable | None = None
    group: Callable | None = None
    needs: Literal["nothing", "inputs", "attention"] = "nothing"  # the statistics of calibration speech
    layouts: tuple[str, ...] = ("joint", "split")
    follows: bool = False  # whether it fits a layer to the input that arrives through converted ones
    balanced: bool = False  # whether a joint latent chooses the weight of the values' error against the keys'

    @property
    def needs_statistics(self) -> bool:
        return self.needs != "nothing"

    @property
    def needs_attention(self) -> bool:
        """Whether the statistics must include the attention weights."""
        return self.needs == "attention"

    @property
    def makes_latents(self) -> bool:
        return bool(self.objective or self.decompose)

    @property
    def groups_heads(self) -> bool:
        return bool(self.objective or self.group)


def _average(*given):
    from asrlib.conversion.factorize import average

    return average(*given)


def _svd(*given):
    from asrlib.conversion.factorize import svd

    return svd(*given)


def _whitened(*given):
    from asrlib.conversion.factorize import whitened

    return whitened(*given)


def _two_sided(*given):
    from asrlib.conversion.factorize import two_sided

    return two_sided(*given)


def _attended(*given):
    from asrlib.conversion.attended import decompose_attended

    return decompose_attended(*given)


def _clover(*given):
    from asrlib.conversion.by_head import decompose_clover

    return decompose_clover(*given)


def _kq_svd(*given):
    from asrlib.conversion.by_head import decompose_kq_svd

    return decompose_kq_svd(*given)


def _palu(*given):
    from asrlib.conversion.by_head import decompose_palu

    return decompose_palu(*given)


METHODS = {
    method.name: method
    for method in (
        Method("mean", group=_average),
        Method("svd", _svd),
        Method("whitened", _whitened, needs="inputs", follows=True),
        Method("two_sided", _two_sided, needs="inputs", follows=True, balanced=True),
        Method("attended", decompose=_attended, needs="attention", follows=True, balanced=True),
        Method("clover", decompose=_clover, layouts=("split",)),
        Method("kq_svd", decompose=_kq_svd, needs="inputs", layouts=("split",)),
        Method("palu", decompose=_palu, needs="inputs", layouts=("split",)),
    )
}


def latent_methods() -> list[str]:
    return [method.name for method in METHODS.values() if method.makes_latents]


def grouping_methods() -> list[str]:
    return [method.name for method in METHODS.values() if method.groups_heads]


def check_method(name: str, choices: Iterable[str]) -> Method:
    """The method of that name. Raises ValueError where it is not among the `choices`."""
    choices = list(choices)
    if name not in choices:
        raise ValueError(f"method is {name!r}: choose one of {', '.join(choices)}")
    return METHODS[name]


def check_follows(name: str) -> None:
    """Raises ValueError where the method has no use for what converted layers change."""
    if not METHODS[name].follows:
        raise ValueError(f"method {name!r} does not look at what converted layers change: leave out sequential")


def best_method(statistics) -> str:
    """The best that the statistics allow; None: those of `collect_statistics` are missing."""
    if statistics is None:
        return "svd"
    return "attended" if statistics.with_attention else "two_sided"


def check_layout_of(name: str, layout: str) -> None:
    """Raises ValueError where the method does not make latents of that layout."""
    if layout == "joint" and layout not in METHODS[name].layouts:
        raise ValueError(f"method {name!r} keeps keys and values apart: give layout=split")
