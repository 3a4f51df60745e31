"""The ways to convert that `asrlib.measuring.methods` compares. A new one is a line in `all_recipes`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from asrlib.attention.names import encoder_config
from asrlib.attention.widths import check_latent_dim
from asrlib.conversion.convert import convert, decompose, latent_dim_for, measure_sensitivity
from asrlib.conversion.grouped import group_heads
from asrlib.conversion.methods import METHODS, latent_methods
from asrlib.conversion.sequential import check_one_stack
from asrlib.conversion.statistics import Statistics
from asrlib.models.families.whisper import check_shared
from asrlib.models.registry import chosen_parts, family_of, is_latent
from asrlib.runs import nearest

Converter = Callable[[float], PreTrainedModel]  # cut → latent model


@dataclass(frozen=True)
class Recipe:
    """A way to convert, by the arguments of `convert`.

    Any frozen dataclass with a `name`, an `obstacle` and a `converter` can take its place.
    """

    name: str
    layout: str = "joint"
    method: str = "svd"
    ranks: str = "uniform"
    sequential: bool = False
    batch_norm: bool = False
    shared: bool = False  # one latent for the cross-attention of all layers

    def obstacle(self, config, cut: float, parts: Sequence[str] | None = None) -> str | None:
        """Why the cache of a model of this config cannot be cut by `cut` in these `parts`, or None."""
        try:
            family_of(config).check_layout(config, self.layout)
            width = encoder_config(config).hidden_size
            check_latent_dim(latent_dim_for(cut, width), width, self.layout)
            if self.sequential or self.batch_norm:
                check_one_stack(config)
            if self.shared:
                check_shared(chosen_parts(config, parts), self.layout)
        except ValueError as error:
            return str(error)
        return None

    def converter(self, model: PreTrainedModel, statistics: Statistics) -> Converter:
        """Cut → latent model. What all cuts share is computed here, once."""
        parts = list(statistics.parts)  # those with statistics are to be converted
        decomposition = sensitivities = None
        if not self.sequential or self.ranks != "uniform":  # else each layer is decomposed after those before it
            decomposition = decompose(model, self.layout, self.method, statistics, parts, self.shared)
        if self.ranks == "sensitivity":
            sensitivities = measure_sensitivity(model, self.layout, statistics, decomposition, parts, self.shared)
        return lambda cut: convert(
            model,
            cache_cut=cut,
            layout=self.layout,
            method=self.method,
            ranks=self.ranks,
            statistics=statistics,
            decomposition=decomposition,
            sequential=self.sequential,
            reestimate_batch_norm=self.batch_norm,
            sensitivities=sensitivities,
            parts=parts,
            shared=self.shared,
        )


@dataclass(frozen=True)
class GroupedRecipe:
    """MHA → GQA, at the cuts that some number of key/value heads makes exactly."""

    name: str
    method: str = "mean"

    def obstacle(self, config, cut: float, parts: Sequence[str] | None = None) -> str | None:
        if parts is not None and list(parts) != chosen_parts(config, None):
            return f"heads are grouped in all parts that keep a cache, not in {', '.join(parts)}"
        heads = encoder_config(config).num_attention_heads
        kept = (1 - cut) * heads
        if abs(kept - round(kept)) > 1e-9 or not round(kept) or heads % round(kept):
            return f"no number of key/value heads that divides {heads} makes exactly this cut"
        return None

    def converter(self, model: PreTrainedModel, statistics: Statistics) -> Converter:
        heads = encoder_config(model.config).num_attention_heads
        return lambda cut: group_heads(model, round((1 - cut) * heads), self.method, statistics)


def all_recipes() -> dict[str, Recipe | GroupedRecipe]:
    """By name: each method that makes latents, with the other arguments at their defaults, and further combinations."""
    recipes = (
        Recipe("split svd", layout="split"),
        *(Recipe(name, METHODS[name].layouts[0], name) for name in latent_methods()),
        Recipe("split two_sided", layout="split", method="two_sided"),  # as LatentLLM, but around the mean
        Recipe("whitened, sensitivity", method="whitened", ranks="sensitivity"),
        Recipe("two_sided, energy", method="two_sided", ranks="energy"),
        Recipe("two_sided, sensitivity", method="two_sided", ranks="sensitivity"),
        Recipe("attended, energy", method="attended", ranks="energy"),
        Recipe("attended, sensitivity", method="attended", ranks="sensitivity"),
        Recipe("two_sided, shared", method="two_sided", shared=True),
        Recipe("attended, sensitivity, shared", method="attended", ranks="sensitivity", shared=True),
        Recipe("attended, sensitivity, sequential", method="attended", ranks="sensitivity", sequential=True),
        Recipe("attended, sensitivity, BatchNorm", method="attended", ranks="sensitivity", batch_norm=True),
        Recipe("split attended, sensitivity", layout="split", method="attended", ranks="sensitivity"),
        GroupedRecipe("GQA, mean of heads"),  # Ainslie et al. 2023
        GroupedRecipe("GQA, least squares", method="two_sided"),
    )
    return {recipe.name: recipe for recipe in recipes}


RECIPES = all_recipes()


def reachable(
    config, recipes: Iterable[Recipe], cuts: Sequence[float], parts: Sequence[str] | None = None
) -> dict[Recipe, list[float]]:
    """The cuts that each recipe can reach, ascending. Raises ValueError where no recipe reaches a cut."""
    if is_latent(config):
        raise ValueError(f"the model is latent already ({config.model_type}): give the model it came from")
    for cut in cuts:
        if not 0 < cut < 1:
            raise ValueError(f"a cut is {percents([cut])}: it must lie between 0 and 100 % (75 % keeps a quarter)")
    recipes = list(recipes)
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"two recipes have the same name, of {', '.join(names)}: give each its own")
    plan = {recipe: [cut for cut in sorted(set(cuts)) if not recipe.obstacle(config, cut, parts)] for recipe in recipes}
    if not plan or not cuts:
        raise ValueError("nothing to measure: give at least one recipe and one cut")
    for cut in cuts:
        if not any(cut in reached for reached in plan.values()):
            obstacle = next(iter(plan)).obstacle(config, cut, parts)
            raise ValueError(f"no recipe reaches a cut of {percents([cut])}: {obstacle}")
    return plan


def names_in(text: str, known: Iterable[str]) -> list[str]:
    """The recipes in a list with commas. Names may contain commas too, so the longest name that fits is taken."""
    known, names, words = list(known), [], [word.strip() for word in text.split(",")]
    while words:
        taken = next((n for n in range(len(words), 0, -1) if ", ".join(words[:n]) in known), None)
        if taken is None:
            raise ValueError(f"unknown method {words[0]!r}" + (nearest(words[0], known) or f": {'; '.join(known)}"))
        names.append(", ".join(words[:taken]))
        words = words[taken:]
    return list(dict.fromkeys(names))


def percents(cuts: Iterable[float]) -> str:
    return ", ".join(f"{100 * cut:.4g}" for cut in cuts) + " %"
