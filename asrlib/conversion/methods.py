"""The methods of conversion: what each is called, what it needs to know of speech, and the functions that carry it out.

A new method is one function and one line in METHODS. Names are asked for where no torch is wanted (parameters are
checked before anything is loaded), so this file imports a function when it is first called.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """What it can do follows from the functions it gives; one of `objective` and `decompose` makes latents.

    `objective(weights, moments)` says what to minimise in one layer, a `factorize.Objective`. Its minimum has a closed
    form, for one layer, for a latent that layers share, and for heads in groups.
    `decompose(weights, layout, moments, balance)` is for a method without a closed form: something with `layout`,
    `directions` and `cut(rank_k, rank_v)`, as `factorize.Decomposition` has them.
    `group(weights, kv_heads)` gives the `factorize.Factors` of heads in groups, where that is done another way.
    """

    name: str
    objective: Callable | None = None
    decompose: Callable | None = None
    group: Callable | None = None
    needs: Literal["nothing", "inputs", "attention"] = "nothing"  # statistics of calibration speech, of what
    balanced: bool = False  # does a joint latent choose how much the values' error counts against the keys'?

    @property
    def needs_statistics(self) -> bool:
        return self.needs != "nothing"

    @property
    def needs_attention(self) -> bool:
        """Of the statistics, those that hold every weight of the attention too."""
        return self.needs == "attention"

    @property
    def makes_latents(self) -> bool:
        return bool(self.objective or self.decompose)

    @property
    def shares_latents(self) -> bool:
        """One latent for several layers."""
        return bool(self.objective)

    @property
    def groups_heads(self) -> bool:
        return bool(self.objective or self.group)


def _average(*given):
    from asrlib.conversion.grouped import average

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


METHODS = {
    method.name: method
    for method in (
        Method("mean", group=_average),
        Method("svd", _svd),
        Method("whitened", _whitened, needs="inputs"),
        Method("two_sided", _two_sided, needs="inputs", balanced=True),
        Method("attended", decompose=_attended, needs="attention", balanced=True),
    )
}


def latent_methods() -> list[str]:
    return [method.name for method in METHODS.values() if method.makes_latents]


def grouping_methods() -> list[str]:
    return [method.name for method in METHODS.values() if method.groups_heads]


def sharing_methods() -> list[str]:
    return [method.name for method in METHODS.values() if method.shares_latents]


def check_method(name: str, choices: Iterable[str]) -> Method:
    """The method of that name; ValueError where it is none of the `choices`."""
    choices = list(choices)
    if name not in choices:
        raise ValueError(f"method is {name!r}: choose one of {', '.join(choices)}")
    return METHODS[name]
