"""MHA → MLA, on any model family. The given model stays unchanged."""

import functools
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from asrlib.attention.names import encoder_config
from asrlib.attention.widths import check_latent_dim
from asrlib.conversion.factorize import DRAFT, Decomposition, Factors, LayerWeights
from asrlib.conversion.layers import decompose_latent
from asrlib.conversion.methods import METHODS, best_method, check_follows, check_layout_of, check_method, latent_methods
from asrlib.conversion.ranks import PROBED_SHARES, RANKS, energy, sensitivity, smallest_rank
from asrlib.conversion.sequential import check_one_stack, convert_in_sequence
from asrlib.conversion.statistics import Statistics
from asrlib.conversion.sums import LayerStatistics
from asrlib.conversion.twins import check_replaced, fill, twin
from asrlib.models.families.whisper import check_shared
from asrlib.models.heard_once import KEPT
from asrlib.models.inference import inference, modules_before, on_cpu, recorded, replayed, spoken_logits
from asrlib.models.loading import check_loaded
from asrlib.models.registry import attention_modules, chosen_parts, family_of, is_latent, latent_modules

Candidates = tuple[Decomposition, ...]  # of one layer
BALANCES = (0.25, 0.5, 1.0, 2.0, 4.0)  # weights of the values' error against the keys'; each latent chooses one


def latent_dim_for(cache_cut: float, hidden_size: int) -> int:
    """The widest latent that cuts the cache by at least `cache_cut` (0.75: to a quarter of 2·D numbers).

    Raises ValueError where less than one number per frame would be left.
    """
    if not 0 < cache_cut < 1:
        raise ValueError(f"cache_cut is {cache_cut}: it must lie between 0 and 1 (0.75 keeps a quarter)")
    # Rounded first: (1 − 0.9) · 20 is 1.9999999999999996, but means 2.
    latent_dim = int(round((1 - cache_cut) * 2 * hidden_size, 6))
    if latent_dim < 1:
        raise ValueError(
            f"cache_cut is {cache_cut}, which leaves less than one of the {2 * hidden_size} numbers per frame of a "
            f"model of width {hidden_size}: the deepest cut is {1 - 0.5 / hidden_size:.6g}"
        )
    return latent_dim


def decompose(
    model: PreTrainedModel,
    layout: str = "joint",
    method: str | None = None,
    statistics: Statistics | None = None,
    parts: Sequence[str] | None = None,
    shared: bool = False,
) -> Sequence[Candidates]:
    """The decompositions of every layer's key and value projections, first layer first. `parts`, `shared`: see
    `convert`. Where the statistics are on disk, each is computed when it is asked for, and only the last one is kept.

    Made once, they can be cut at many widths (`convert(..., decomposition=...)`). A layer has one decomposition,
    except for a balanced method with a joint latent: then it has one for each of BALANCES, and `convert` takes the best
    at its width, the same for all layers that share a latent. Raises ValueError where the layout or the method is
    impossible.
    """
    method = method or best_method(statistics)
    _check_convertible(model, layout, method)
    parts = chosen_parts(model.config, parts)
    if shared:
        check_shared(parts, layout)
    modules = attention_modules(model, parts)
    of_modules = _by_module(statistics, parts, len(modules))

    def of_latent(places: list[int]) -> list[Candidates]:
        return _candidates([modules[i] for i in places], [of_modules[i] for i in places], layout, method)

    latents = _latents(model, parts, shared)
    if statistics and statistics.passes > 1:
        return OnDemand(of_latent, latents)
    progress = tqdm(latents, desc="decomposing", unit="latent", leave=False)
    return [candidates for places in progress for candidates in of_latent(places)]


class OnDemand(Sequence):
    """Candidates that are computed when they are asked for. Those of the last latent are kept."""

    def __init__(self, of_latent: Callable[[list[int]], list[Candidates]], latents: list[list[int]]):
        self._where = {place: (number, i) for number, places in enumerate(latents) for i, place in enumerate(places)}
        self._computed = functools.lru_cache(1)(lambda number: of_latent(latents[number]))

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, place: int | slice) -> Candidates | list[Candidates]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        number, i = self._where[range(len(self))[place]]
        return self._computed(number)[i]


def _by_module(statistics: Statistics | None, parts: Sequence[str], modules: int) -> list[LayerStatistics | None]:
    return statistics.of(parts) if statistics else [None] * modules


def _candidates(
    attentions: list[nn.Module], statistics: list[LayerStatistics | None], layout: str, method: str
) -> list[Candidates]:
    """Those of the layers of one latent."""
    weights = [LayerWeights.of(attention) for attention in attentions]
    reads = METHODS[method].needs_statistics
    moments = [layer.moments() if layer and reads else None for layer in statistics]
    balances = BALANCES if METHODS[method].balanced and layout == "joint" else (1.0,)
    return decompose_latent(weights, layout, method, moments, balances)


def _latents(model: PreTrainedModel, parts: Sequence[str], shared: bool) -> list[list[int]]:
    """The places of the modules of each latent: one, or all of cross-attention, the last part, where it is shared."""
    modules = len(attention_modules(model, parts))
    alone = modules - (len(attention_modules(model, ["cross"])) if shared else 0)
    return [[place] for place in range(alone)] + [list(range(alone, modules))] * shared


def _check_convertible(model: PreTrainedModel, layout: str, method: str) -> None:
    check_loaded(model)
    if is_latent(model.config):
        raise ValueError(
            f"the model is latent already ({model.config.model_type}): convert the model it came from, or apply "
            "to_standard_attention first"
        )
    check_method(method, latent_methods())
    family_of(model.config).check_layout(model.config, layout)
    check_layout_of(method, layout)


def convert(
    model: PreTrainedModel,
    latent_dim: int | Sequence[int] | None = None,
    cache_cut: float | None = None,
    layout: str = "joint",
    method: str | None = None,
    ranks: str | None = None,
    rank_multiple: int = 1,
    statistics: Statistics | None = None,
    decomposition: Sequence[Candidates] | None = None,
    sequential: bool = False,
    reestimate_batch_norm: bool = False,
    sensitivities: list[dict[int, float]] | None = None,
    parts: Sequence[str] | None = None,
    shared: bool = False,
) -> PreTrainedModel:
    """The latent twin of `model`, on the CPU, in evaluation mode; `model` ends on the device where it was.

    `latent_dim` is the number of cached values per frame and layer: one number, or one a layer. `cache_cut` gives the
    share to save instead. `ranks` says how this budget is spent over layers (uniform, energy, sensitivity: see
    ranks.py), in multiples of `rank_multiple`. Except for uniform, keys and values of a split latent get separate
    ranks. A joint latent as wide as the model is exact, and so is a split one of twice that width.

    `method` says what to minimise (see methods.py and factorize.py), with `statistics` of `collect_statistics` where it
    needs them. By default it is the best that they allow, and then `ranks` is sensitivity by default where
    `cache_cut` is given; otherwise uniform. Without statistics the weights alone decide, and a warning says so.
    `sequential` fits each layer to the input that arrives through the layers already converted, and
    `reestimate_batch_norm` corrects the moments of BatchNorm likewise: see sequential.py. `decomposition` and
    `sensitivities` (of `decompose` and `measure_sensitivity`) are computed if they are needed and not given.

    `parts` are those of an encoder-decoder's attention to convert: encoder, decoder, cross. The default is the two that
    keep a cache, decoder and cross. Each of their modules counts as a layer, in this order. With `shared`, one latent
    serves cross-attention of all layers, and one copy of it is cached; as wide as the model it is exact.
    Raises ValueError where the width, the layout, the method or a part is impossible.
    """
    by_weights_alone = method is None and statistics is None and not decomposition
    if method is None and ranks is None and statistics and cache_cut is not None:
        ranks = "sensitivity"
    method, ranks = method or best_method(statistics), ranks or "uniform"
    _check_convertible(model, layout, method)
    parts = chosen_parts(model.config, parts)
    modules = attention_modules(model, parts)
    if sequential or reestimate_batch_norm:
        check_one_stack(model.config)
    if (sequential or reestimate_batch_norm) and statistics is None:
        raise ValueError("sequential and reestimate_batch_norm need calibration speech: see asrlib.collect_statistics")
    if sequential:
        check_follows(method)
    family, width = family_of(model.config), encoder_config(model.config).hidden_size
    of_modules = _by_module(statistics, parts, len(modules))
    if decomposition and decomposition[0][0].layout != layout:
        raise ValueError(f"layout is {layout}, but the decomposition was made for the other one: decompose again")
    if ranks not in RANKS:
        raise ValueError(f"ranks is {ranks!r}: choose one of {', '.join(RANKS)}")
    if shared:
        check_shared(parts, layout)
        decomposition = decomposition or decompose(model, layout, method, statistics, parts, shared)
        first, *others = (decomposition[place][0].directions[0] for place in _latents(model, parts, shared)[-1])
        if any(other is not first for other in others):
            raise ValueError("shared, but in this decomposition each layer has its latent: decompose(..., shared=True)")
    latents = _latents(model, parts, shared)
    widths, budget = _asked(latent_dim, cache_cut, width, latents)
    for latent_width in widths:
        check_latent_dim(latent_width, width, layout)
    if by_weights_alone and min(widths) < exact_latent_dim(model.config, layout):
        warnings.warn(
            "converted by the weights alone (svd), which can ruin a recogniser where calibrated latents as narrow lose "
            "nothing: give statistics of collect_statistics(..., attention=True)",
            stacklevel=2,
        )
    if decomposition and statistics is None and len(decomposition[0]) > 1:
        raise ValueError("this decomposition leaves a choice, and no statistics were given to choose by: give both")
    with on_cpu(model):
        if ranks == "uniform":
            smallest_rank(min(widths), [2 * width], rank_multiple)  # refuses what would be rounded down to nothing
            widths, key_widths = [w // rank_multiple * rank_multiple for w in widths], []
        else:
            if len(set(widths)) > 1:
                raise ValueError(
                    f"latent_dim gives every layer its own width already: ranks={ranks!r} has nothing to spend"
                )
            decomposition = decomposition or decompose(model, layout, method, statistics, parts)
            widths, key_widths = _spend(
                model, budget, layout, ranks, rank_multiple, statistics, decomposition, sensitivities, parts, shared
            )

        where = {"latent_parts": parts, "latent_shared": shared} if family.parts else {}
        config = family.to_latent(
            model.config, latent_dim=widths, latent_layout=layout, latent_key_dim=key_widths, **where
        )
        latent = twin(family.latent_model, config, model)
        replaced = latent.load_state_dict(model.state_dict(), strict=False)
        check_replaced(replaced.missing_keys, replaced.unexpected_keys)
        latent.eval()
        attentions = latent_modules(latent)

        def fit(index: int, layer: LayerStatistics | None) -> None:
            _fill_best([attentions[index]], _candidates([modules[index]], [layer], layout, method), [layer])

        if not sequential:
            for latent_of in tqdm(latents, desc="converting", unit="latent", leave=False):
                layers = [of_modules[i] for i in latent_of]
                if decomposition:
                    candidates = [decomposition[i] for i in latent_of]
                else:
                    candidates = _candidates([modules[i] for i in latent_of], layers, layout, method)
                _fill_best([attentions[i] for i in latent_of], candidates, layers)
        if sequential or reestimate_batch_norm:
            convert_in_sequence(
                model,
                latent,
                statistics.speech,
                fit if sequential else None,
                reestimate_batch_norm,
                attention=sequential and METHODS[method].needs_attention,
            )
    return latent.to("cpu")


def _spend(
    model, budget, layout, ranks, multiple, statistics, decomposition, sensitivities, parts, shared
) -> tuple[list[int], list[int]]:
    """(latent widths, the keys' part of each, empty if joint), one a layer; the latents have `budget` numbers in all.

    See ranks.py. Its groups are joint latents, or a split latent's keys and values, layer by layer.
    """
    if ranks == "sensitivity" and statistics is None:
        raise ValueError("ranks='sensitivity' needs statistics of calibration speech: see asrlib.collect_statistics")
    latents = _latents(model, parts, shared)
    group_widths = [encoder_config(model.config).hidden_size] * len(latents) * (1 if layout == "joint" else 2)
    smallest_rank(budget, group_widths, multiple)  # refuses before anything is measured
    if ranks == "energy":
        middles = (_middle(decomposition[first]) for first, *_ in latents)
        spent = energy([directions.values for middle in middles for directions in middle.directions], budget, multiple)
    else:
        costs = sensitivities or measure_sensitivity(model, layout, statistics, decomposition, parts, shared)
        spent = sensitivity(costs, budget, group_widths, multiple)
    if layout == "joint":
        return [rank for rank, latent in zip(spent, latents, strict=True) for _ in latent], []
    keys, values = spent[::2], spent[1::2]
    return [rank_k + rank_v for rank_k, rank_v in zip(keys, values, strict=True)], keys


def exact_latent_dim(config, layout: str) -> int:
    """The smallest width at which a latent loses nothing."""
    width = encoder_config(config).hidden_size
    return width if layout == "joint" else 2 * width


@torch.no_grad()
def measure_sensitivity(
    model: PreTrainedModel,
    layout: str,
    statistics: Statistics,
    decomposition: Sequence[Candidates],
    parts: Sequence[str] | None = None,
    shared: bool = False,
) -> list[dict[int, float]]:
    """For every group of ranks.py, {rank: KL divergence of the output when this group alone is cut}.

    It is per frame for CTC, per token for an encoder-decoder (given the right tokens before it), and per frame and
    number of labels for a transducer. A joint latent is a group; a split latent is two, keys and values, layer by
    layer. `parts`, `shared`: see `convert`. What comes before a layer is computed once.
    """
    width = encoder_config(model.config).hidden_size
    exact = exact_latent_dim(model.config, layout)
    probe = convert(model, exact, layout=layout, method="svd", parts=parts, shared=shared)
    name = model.main_input_name
    inputs = statistics.inputs | {name: statistics.inputs[name].to(model.dtype)}

    def log_posteriors(any_model, known: dict[nn.Module, object]) -> torch.Tensor:
        with replayed(known), inference(any_model, device=torch.device("cpu")):
            return torch.cat(spoken_logits(any_model, inputs)).float().log_softmax(-1)

    wanted = log_posteriors(model, {})
    probed = sorted({max(1, round(share * width)) for share in PROBED_SHARES})
    groups = [(True, True)] if layout == "joint" else [(True, False), (False, True)]  # are keys, are values cut?
    attentions, costs = latent_modules(probe), []
    latents = _latents(model, chosen_parts(model.config, parts), shared)
    before = [modules_before(probe, attentions[first]) for first, *_ in latents]
    with recorded({module for modules in before for module in modules}) as outputs, KEPT.paused():
        log_posteriors(probe, {})
    for places, modules in tqdm(list(zip(latents, before, strict=True)), "probing", unit="latent", leave=False):
        known = {module: outputs[module] for module in modules}
        of_places = [(attentions[place].latent_kv, _middle(decomposition[place])) for place in places]
        for cut_keys, cut_values in groups:
            cost = {}
            for rank in probed:
                ranks = (rank if cut_keys else width, rank if cut_values else width)
                for layer, middle in of_places:
                    fill(layer, _widened(middle.cut(*ranks, DRAFT), width))
                with KEPT.paused():  # no one asks again for the states of an encoder that is cut
                    ours = log_posteriors(probe, known)
                cost[rank] = torch.nn.functional.kl_div(ours, wanted, log_target=True, reduction="batchmean").item()
            costs.append(cost)
        for layer, middle in of_places:
            fill(layer, middle.cut(width, width))
    return costs


def _middle(candidates: Candidates) -> Decomposition:
    return candidates[len(candidates) // 2]


def _widened(cut: Factors, width: int) -> Factors:
    """The same factors padded with zeros to a latent of `width` numbers for keys and `width` for values."""
    pad = torch.nn.functional.pad
    missing_k, missing_v = width - len(cut.down_k), width - len(cut.down_v)
    return Factors(
        pad(cut.down_k, (0, 0, 0, missing_k)),
        pad(cut.down_v, (0, 0, 0, missing_v)),
        pad(cut.up_k, (0, missing_k)),
        pad(cut.up_v, (0, missing_v)),
        cut.key_bias,
        cut.value_bias,
    )


def _asked(latent_dim, cache_cut: float | None, width: int, latents: list[list[int]]) -> tuple[list[int], int]:
    """(the latent width of each layer that shares the numbers alike, the numbers of all latents together)"""
    if (latent_dim is None) == (cache_cut is None):
        raise ValueError("give latent_dim (a width) or cache_cut (a share to save), one of the two")
    layers, budget = sum(map(len, latents)), None
    if cache_cut is not None:
        latent_dim = latent_dim_for(cache_cut, width)
        if layers > len(latents):  # what is kept once may be wider, and is exact at the width of the model
            budget = min(latent_dim * layers, width * len(latents))
            latent_dim = budget // len(latents)
    ranks = list(latent_dim) if isinstance(latent_dim, Sequence) else [latent_dim] * layers
    if not all(isinstance(rank, Integral) for rank in ranks):
        raise ValueError(f"latent_dim is {latent_dim!r}: it must be a whole number, or one a layer")
    ranks = [int(rank) for rank in ranks]  # numpy's integers too
    if len(ranks) != layers:
        raise ValueError(f"latent_dim has {len(ranks)} widths for {layers} layers: give one number, or one a layer")
    return ranks, budget or sum(ranks[first] for first, *_ in latents)


@torch.no_grad()
def _fill_best(
    attentions: list[nn.Module], candidates: list[Candidates], statistics: list[LayerStatistics | None]
) -> None:
    """Gives the layers of one latent the candidates whose outputs on calibration speech have the smallest error, the
    sum of the layers' squared relative errors. Candidates are in the order of their balance. The one with the smallest
    error without a search and its neighbours are drafted, and so on towards the better neighbour."""
    choices = list(zip(*candidates, strict=True))

    def error(choice: tuple, steps: int) -> float:
        total = 0.0
        for attention, candidate, layer in zip(attentions, choice, statistics, strict=True):
            fill(attention.latent_kv, candidate.cut(*attention.latent_kv.ranks, steps))
            total += (layer.sample.error(attention) / (layer.sample.size or 1.0)) ** 2  # 0: a layer that does nothing
        return total

    best = 0
    if len(choices) > 1:
        best = min(range(len(choices)), key=lambda place: error(choices[place], 0))
        drafted = functools.cache(lambda place: error(choices[place], DRAFT))
        before = None
        while best != before:
            near, before = range(max(0, best - 1), min(len(choices), best + 2)), best
            best = min(near, key=drafted)
    for attention, candidate in zip(attentions, choices[best], strict=True):
        fill(attention.latent_kv, candidate.cut(*attention.latent_kv.ranks))
