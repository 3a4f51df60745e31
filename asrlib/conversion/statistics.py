"""Statistics of each attention layer over calibration speech, in one pass; memory does not grow with the speech.

Names: B batch, T queries, S keys, D width, H heads, d_h = D / H, N frames seen. Sums are float64, over unpadded frames.
T and S are the same frames in an encoder's self-attention, tokens in a decoder's, and in cross-attention T are tokens
and S frames. An encoder-decoder is given the transcript's tokens.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from asrlib.attention.names import attends_across, call_arguments, is_rotary, projections
from asrlib.conversion.factorize import InputMoments, Moments
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus, check_corpus
from asrlib.models.inference import attention_weights, choose_device, inference, padding_silenced
from asrlib.models.loading import check_loaded
from asrlib.models.out_of_memory import out_of_memory_explained
from asrlib.models.registry import attention_parts, chosen_parts, family_of, frames_per_second, layer_frame_counts, run

FRAMES_PER_DIMENSION = 10  # with fewer frames for each number of the width, much of the covariance is noise
SHRINKAGE = 1e-6  # of the covariance towards its mean variance, with plenty of speech
SAMPLE_FRAMES = 1000  # queries of a batch that are kept, to measure attention outputs on
SAMPLE_KEYS = 6 * SAMPLE_FRAMES  # the most keys kept, where a few tokens attend to many frames


@dataclass(frozen=True)
class Reading:
    """Inputs and outputs of one call of an attention layer."""

    key_input: torch.Tensor  # of the key projection [B, S, D]; rotated, where positions are rotary
    value_input: torch.Tensor  # of the value projection [B, S, D]
    queries: torch.Tensor  # q_h + u [B, T, H, d_h]
    arguments: dict  # of the call
    output: torch.Tensor  # [B, T, D]
    weights: torch.Tensor | None  # of attention [B, H, T, S], if it is eager


@dataclass(frozen=True)
class Kept:
    """Which queries and which keys of a batch are not padding."""

    queries_BT: torch.Tensor
    keys_BS: torch.Tensor  # the same as the queries, except in cross-attention


@contextmanager
def observed(attention: nn.Module, record: Callable[[Reading], None]) -> Iterator[None]:
    """Calls `record` after every call of `attention`."""
    seen, linears = {}, projections(attention)

    def queries_made(module, args, output_BTD):
        seen["queries"] = args[0], output_BTD

    def called(module, args, arguments, output):
        key_input_BTD, queries_BTD = seen.pop("queries")
        queries_BTHE = queries_BTD.unflatten(-1, (linears.heads, -1))
        if linears.query_bias_HE is not None:
            queries_BTHE = queries_BTHE + linears.query_bias_HE
        arguments = call_arguments(args, arguments)
        value_input_BTD = arguments["hidden_states"]
        if arguments.get("key_value_states") is not None:  # cross-attention
            key_input_BTD = value_input_BTD = arguments["key_value_states"]
        record(Reading(key_input_BTD, value_input_BTD, queries_BTHE, arguments, *output[:2]))

    hooks = [
        linears.query.register_forward_hook(queries_made),
        attention.register_forward_hook(called, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class InputSums:
    """Running sums of a projection's input x, and behind converted layers of the input it should have, `wanted`."""

    def __init__(self, width: int):
        self.frames = 0
        self.total = torch.zeros(width, dtype=torch.float64)  # Σ x [D]
        self.products = torch.zeros(width, width, dtype=torch.float64)  # Σ x xᵀ [D, D]
        self.wanted_total: torch.Tensor | None = None  # Σ wanted [D]
        self.cross: torch.Tensor | None = None  # Σ wanted xᵀ [D, D]

    def add(self, x_ND: torch.Tensor, wanted_ND: torch.Tensor | None = None) -> None:
        x_ND = x_ND.double()
        self.frames += len(x_ND)
        self.total += x_ND.sum(0).cpu()
        self.products += (x_ND.T @ x_ND).cpu()
        if wanted_ND is not None:
            if self.cross is None:
                self.wanted_total, self.cross = torch.zeros_like(self.total), torch.zeros_like(self.products)
            wanted_ND = wanted_ND.double()
            self.wanted_total += wanted_ND.sum(0).cpu()
            self.cross += (wanted_ND.T @ x_ND).cpu()

    def moments(self) -> InputMoments:
        """Σ is shrunk towards tr(Σ)/D · I; fewer frames shrink it more."""
        mean = self.total / self.frames
        covariance = self.products / self.frames - torch.outer(mean, mean)
        covariance = (covariance + covariance.T) / 2
        width = len(mean)
        shrinkage = SHRINKAGE + 0.01 * width / self.frames
        floor = shrinkage * torch.trace(covariance) / width * torch.eye(width, dtype=torch.float64)
        if self.cross is None:
            return InputMoments(mean, covariance + floor)
        wanted_mean = self.wanted_total / self.frames
        # With the same floor: without evidence, the input counts as right.
        cross = self.cross / self.frames - torch.outer(wanted_mean, mean) + floor
        return InputMoments(mean, covariance + floor, wanted_mean, cross)


@dataclass(frozen=True)
class Sample:
    """One call of an attention layer over a few utterances, with the output it should give, for trying factors. On the
    CPU."""

    arguments: dict
    kept_BT: torch.Tensor  # queries that are not padding
    wanted_BTD: torch.Tensor

    @classmethod
    def of(cls, arguments: dict, kept: Kept, wanted_BTD: torch.Tensor) -> "Sample":
        """The sample of the first utterances of a batch."""
        kept_BT = kept.queries_BT
        batch, rows = len(kept_BT), _sample_rows(kept)

        def first(name, value):  # all utterances share a table of positions, whatever its number of rows
            if not torch.is_tensor(value):
                return value
            return (value[:rows] if len(value) == batch and "position" not in name else value).cpu()

        arguments = {name: first(name, value) for name, value in arguments.items()}
        return cls(arguments, kept_BT[:rows].cpu(), wanted_BTD[:rows].cpu())

    @property
    def size(self) -> float:
        """‖wanted‖ over unpadded frames."""
        return self.wanted_BTD[self.kept_BT].norm().item()

    def error(self, attention: nn.Module) -> float:
        """‖output − wanted‖ over unpadded frames."""
        device = next(attention.parameters()).device
        arguments = {name: v.to(device) if torch.is_tensor(v) else v for name, v in self.arguments.items()}
        output_BTD = attention(**arguments)[0].cpu()
        return (output_BTD - self.wanted_BTD)[self.kept_BT].norm().item()


def _sample_rows(kept: Kept) -> int:
    return max(1, min(SAMPLE_FRAMES // kept.queries_BT.shape[1], SAMPLE_KEYS // kept.keys_BS.shape[1]))


@dataclass
class LayerStatistics:
    """Running sums of one attention layer; factorisations read its `moments`."""

    key: InputSums
    value: InputSums  # the same object as `key`, unless positions are rotary
    queries: torch.Tensor  # Σ (q_h + u)(q_h + u)ᵀ [H, d_h, d_h]
    queries_seen: int = 0
    attention: "AttentionSums | None" = None
    sample: Sample | None = field(default=None, repr=False)

    @classmethod
    def of(cls, attention: nn.Module, weights: bool = False) -> "LayerStatistics":
        """Empty sums; with `weights`, also those of AttentionSums."""
        linears = projections(attention)
        width, heads = linears.query.in_features, linears.heads
        key = InputSums(width)
        value = InputSums(width) if is_rotary(attention) else key
        queries = torch.zeros(heads, width // heads, width // heads, dtype=torch.float64)
        return cls(key, value, queries, attention=AttentionSums(width, heads) if weights else None)

    @property
    def frames(self) -> int:
        return self.key.frames

    def add(self, reading: Reading, kept: Kept, wanted: Reading | None = None) -> None:
        """Adds a call. Behind converted layers, `wanted` is the same call in the unconverted model."""
        keys_BS = kept.keys_BS
        self.key.add(reading.key_input[keys_BS], wanted and wanted.key_input[keys_BS])
        if self.value is not self.key:
            self.value.add(reading.value_input[keys_BS], wanted and wanted.value_input[keys_BS])
        queries_NHE = reading.queries[kept.queries_BT].double()
        self.queries += torch.einsum("nhi,nhj->hij", queries_NHE, queries_NHE).cpu()
        self.queries_seen += len(queries_NHE)
        if self.attention:
            self.attention.add(reading, kept, wanted or reading)
        if self.sample is None:
            self.sample = Sample.of(reading.arguments, kept, (wanted or reading).output)

    def moments(self) -> Moments:
        """μ, Σ and Q, and the moments of AttentionSums if there are any."""
        key = self.key.moments()
        value = key if self.value is self.key else self.value.moments()
        query = self.queries / self.queries_seen
        if self.attention is None:
            return Moments(key, value, query)
        # Softmax cancels the mean of the keys; the mean over all frames keeps them comparable.
        attended_key = replace(self.attention.key.moments(), mean=key.mean, wanted_mean=key.wanted_mean)
        return Moments(key, value, query, attended_key, tuple(sums.moments() for sums in self.attention.values))


class AttentionSums:
    """Running sums of a layer's inputs, weighed by its attention: see attended.py.

    Behind converted layers the attention weights are those of the unconverted model: the layer at hand has none yet.
    """

    def __init__(self, width: int, heads: int):
        self.key = InputSums(width)  # around each query's mean, by its weights; all heads together
        self.values = [InputSums(width) for _ in range(heads)]  # means by the weights

    def add(self, reading: Reading, kept: Kept, wanted: Reading) -> None:
        behind = wanted is not reading
        for utterance, (queries_T, keys_S) in enumerate(zip(kept.queries_BT, kept.keys_BS, strict=True)):
            weights_HTS = wanted.weights[utterance][:, queries_T][:, :, keys_S].float()
            inputs = [
                (call.key_input[utterance][keys_S].float(), call.value_input[utterance][keys_S].float())
                for call in ((reading, wanted) if behind else (reading,))
            ]
            self._add_keys(weights_HTS, *(key_SD for key_SD, _ in inputs))
            means = [weights_HTS @ value_SD for _, value_SD in inputs]  # [H, T, D]
            for head, sums in enumerate(self.values):
                sums.add(*(mean_HTD[head] for mean_HTD in means))

    def _add_keys(self, weights_HTS: torch.Tensor, x_SD: torch.Tensor, wanted_SD: torch.Tensor | None = None) -> None:
        attended_S = weights_HTS.sum((0, 1)).double()

        def covariance(a_SD, b_SD):  # Σ_hi Σ_j a_hij (a_j − ā_hi)(b_j − b̄_hi)ᵀ
            a_mean, b_mean = ((weights_HTS @ input_SD).flatten(0, 1).double() for input_SD in (a_SD, b_SD))
            a_SD, b_SD = a_SD.double(), b_SD.double()
            return ((a_SD * attended_S[:, None]).T @ b_SD - a_mean.T @ b_mean).cpu()

        self.key.frames += weights_HTS.shape[0] * weights_HTS.shape[1]
        self.key.products += covariance(x_SD, x_SD)
        if wanted_SD is not None:
            if self.key.cross is None:
                self.key.wanted_total = torch.zeros_like(self.key.total)
                self.key.cross = torch.zeros_like(self.key.products)
            self.key.cross += covariance(wanted_SD, x_SD)


@dataclass(frozen=True)
class CalibrationSpeech:
    """Batches of speech for a model to run on, in the same order each time."""

    batches: Iterable[dict[str, torch.Tensor]] = field(repr=False)
    device: torch.device
    without: frozenset[str] = frozenset({"labels"})  # parts of a batch that the model does not read

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """The model's inputs of each batch, its attention_mask included, on the device."""
        for batch in tqdm(self.batches, desc="calibration speech", unit="batch", leave=False):
            yield {name: values.to(self.device) for name, values in batch.items() if name not in self.without}


@dataclass(frozen=True)
class Statistics:
    """One `LayerStatistics` for each attention module, and the speech that they come from."""

    parts: dict[str, list[LayerStatistics]]  # of the model, as `registry.attention_parts` names them
    speech: CalibrationSpeech = field(repr=False)
    inputs: dict[str, torch.Tensor] = field(repr=False)  # a few utterances of it, on the CPU

    @property
    def layers(self) -> list[LayerStatistics]:
        return [layer for layers in self.parts.values() for layer in layers]

    @property
    def frames(self) -> int:
        return self.layers[0].frames

    def of(self, parts: Sequence[str]) -> list[LayerStatistics]:
        """The statistics of some parts of the model. Raises ValueError where they were not collected."""
        if missing := ", ".join(part for part in parts if part not in self.parts):
            raise ValueError(
                f"the statistics do not cover attention in {missing}: collect_statistics(..., parts={list(parts)})"
            )
        return [layer for part in parts for layer in self.parts[part]]

    @property
    def condition_numbers(self) -> list[float]:
        """Largest over smallest eigenvalue of each layer's covariance."""
        return [torch.linalg.cond(layer.moments().key.covariance).item() for layer in self.layers]


@contextmanager
def kept_frames(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Iterator[dict[str, Kept]]:
    """What of a batch is not padding, by part of `model`. Inside, padding does not leak through its convolutions."""
    if not attends_across(model.config):
        with unpadded(model, layer_frame_counts(model, inputs["attention_mask"].sum(-1))) as kept_BT:
            yield {"encoder": Kept(kept_BT, kept_BT)}
        return
    # The decoder attends to the encoder's frames after the end of speech too, so they count.
    tokens_BT, features = inputs["labels"] >= 0, inputs[model.main_input_name]
    count = int(layer_frame_counts(model, torch.tensor(features.shape[-1])))
    frames_BS = tokens_BT.new_ones(len(tokens_BT), count)
    yield {
        "encoder": Kept(frames_BS, frames_BS),
        "decoder": Kept(tokens_BT, tokens_BT),
        "cross": Kept(tokens_BT, frames_BS),
    }


@contextmanager
def unpadded(model: nn.Module, frames_B: torch.Tensor) -> Iterator[torch.Tensor]:
    """Which frames [B, T] are not padding. Inside, padding does not leak through `model`'s convolutions."""
    with padding_silenced(model, frames_B):
        yield torch.arange(int(frames_B.max()), device=frames_B.device) < frames_B[:, None]


def check_calibration(split: str) -> None:
    """Raises ValueError for a test split."""
    if "test" in split:
        raise ValueError(f"calibration on {split!r} would spoil the test: give a training split")


def collect_statistics(
    model: PreTrainedModel,
    processor,
    corpus: Corpus,
    max_seconds: float = 600.0,
    batch_seconds: float = 60.0,
    device: str | None = None,
    attention: bool = False,
    parts: Sequence[str] | None = None,
) -> Statistics:
    """Statistics of every attention layer of `model` over about `max_seconds` of `corpus`, first layer first.

    Take the training split. Raises ValueError for a test split or for fewer frames than the model is wide; warns where
    there is too little speech for the width, and says how much is enough. `device`: where to run, see
    `models.inference.choose_device`; the model ends on the device where it was. `attention`: also the statistics under
    attention that the method `attended` needs. 24 layers of width 1024 take 0.3 GB, and with attention of 16 heads
    3.6 GB. `parts`: see `convert`.
    """
    check_loaded(model, processor)
    check_corpus(corpus)
    check_calibration(corpus.split)
    home, device = choose_device(None, model), choose_device(device, model)
    corpus = corpus.excerpt(max_seconds)
    dataset = SpeechDataset(corpus, processor)
    sampler = dataset.batches(batch_seconds, shuffle=False)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=SpeechCollator(processor))
    unread = set() if family_of(model.config).head.reads_labels else {"labels"}
    speech = CalibrationSpeech(loader, device, frozenset(unread))
    limits = {"batch_seconds": batch_seconds, "attention": attention}
    modules = {part: attention_parts(model)[part] for part in chosen_parts(model.config, parts)}
    layers = {part: [LayerStatistics.of(module, attention) for module in of_part] for part, of_part in modules.items()}
    inputs: dict[str, torch.Tensor] = {}
    try:
        with inference(model, device=device), attention_weights(*([model] if attention else [])):
            for indices, batch in zip(sampler, speech, strict=True):
                named = [(corpus[i].id, corpus[i].seconds) for i in indices]
                with kept_frames(model, batch) as kept, ExitStack() as watching:
                    for part, of_part in modules.items():
                        for module, layer in zip(of_part, layers[part], strict=True):
                            watching.enter_context(observed(module, partial(layer.add, kept=kept[part])))
                    with out_of_memory_explained("calibration", named, limits):
                        run(model, batch)
                rows = min(_sample_rows(kept[part]) for part in modules)
                inputs = inputs or {name: value[:rows].cpu() for name, value in batch.items()}
    finally:
        model.to(home)
    for part, (first, *_) in layers.items():
        rate = first.frames / corpus.seconds if attends_across(model.config) else frames_per_second(model.config)
        _check_amount(first, "tokens" if part == "decoder" else "frames", rate)
    return Statistics(layers, speech, inputs)


def _check_amount(layer: LayerStatistics, what: str, per_second: float) -> None:
    width = len(layer.key.total)
    enough = FRAMES_PER_DIMENSION * width
    seconds = enough / per_second
    if layer.frames < width:
        raise ValueError(
            f"{layer.frames} {what} of calibration speech say too little about inputs of width {width}: give at least "
            f"{seconds:.0f} s"
        )
    if layer.frames < enough:
        warnings.warn(
            f"{layer.frames} {what} of calibration speech are few for inputs of width {width}, whose covariance is "
            f"shrunk: {seconds:.0f} s are enough",
            stacklevel=3,
        )
