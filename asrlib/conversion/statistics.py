"""Statistics of each attention layer over calibration speech; memory does not grow with the speech, and may be bounded.

Names: B batch, T queries, S keys, D width, H heads, d_h = D / H: see sums.py.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from asrlib.attention.names import attends_across, call_arguments, projections
from asrlib.conversion.sums import Kept, LayerStatistics, Reading, sample_rows
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus, check_corpus
from asrlib.models.inference import attention_weights, choose_device, inference, padding_silenced
from asrlib.models.loading import check_loaded
from asrlib.models.out_of_memory import out_of_memory_explained
from asrlib.models.registry import attention_parts, chosen_parts, family_of, frames_per_second, layer_frame_counts, run

FRAMES_PER_DIMENSION = 10  # with fewer frames for each number of the width, much of the covariance is noise


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
    passes: int = 1  # over the speech; after several, the sums are on disk

    @property
    def layers(self) -> list[LayerStatistics]:
        return [layer for layers in self.parts.values() for layer in layers]

    @property
    def with_attention(self) -> bool:
        return self.layers[0].attention is not None

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
        return [torch.linalg.cond(layer.key.moments().covariance).item() for layer in self.layers]


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
    memory: float | None = None,
) -> Statistics:
    """Statistics of every attention layer of `model` over about `max_seconds` of `corpus`, first layer first.

    Take the training split. Raises ValueError for a test split or for fewer frames than the model is wide; warns where
    there is too little speech for the width, and says how much is enough. `device`: where to run, see
    `models.inference.choose_device`; the model ends on the device where it was. `attention`: also the statistics under
    attention that the method `attended` needs. 24 layers of width 1024 take 0.3 GB, and with attention of 16 heads
    3.6 GB. `memory` bounds this, in GiB: layers then take turns, each group with a pass of its own over the speech, and
    sums of groups before are on disk, where TMPDIR says. One layer is always held. `parts`: see `convert`.
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
    named = [(part, module) for part, of_part in modules.items() for module in of_part]
    groups = _groups([LayerStatistics.size(module, attention) for _, module in named], memory)
    layers: dict[str, list[LayerStatistics]] = {part: [] for part in modules}
    inputs: dict[str, torch.Tensor] = {}

    def one_pass(group: list[tuple[str, nn.Module, LayerStatistics]]) -> None:
        for indices, batch in zip(sampler, speech, strict=True):
            heard = [(corpus[i].id, corpus[i].seconds) for i in indices]
            with kept_frames(model, batch) as kept, ExitStack() as watching:
                for part, module, layer in group:
                    watching.enter_context(observed(module, partial(layer.add, kept=kept[part])))
                with out_of_memory_explained("calibration", heard, limits):
                    run(model, batch)
            rows = min(sample_rows(kept[part]) for part in modules)
            if not inputs:
                inputs.update({name: value[:rows].cpu() for name, value in batch.items()})

    try:
        with inference(model, device=device), attention_weights(*([model] if attention else [])):
            for places in groups:
                group = [(*named[place], LayerStatistics.of(named[place][1], attention)) for place in places]
                one_pass(group)
                for part, _, layer in group:
                    layers[part].append(layer)
                    if len(groups) > 1:
                        layer.to_disk()
    finally:
        model.to(home)
    for part, (first, *_) in layers.items():
        rate = first.frames / corpus.seconds if attends_across(model.config) else frames_per_second(model.config)
        _check_amount(first, "tokens" if part == "decoder" else "frames", rate)
    return Statistics(layers, speech, inputs, len(groups))


def _groups(sizes: Sequence[int], memory: float | None) -> list[list[int]]:
    """Places in a row, of so many that their bytes fit into `memory` GiB together, but at least one."""
    groups, left = [], 0.0
    for place, size in enumerate(sizes):
        if not groups or (memory is not None and size > left):
            groups.append([])
            left = memory * 2**30 if memory is not None else 0.0
        groups[-1].append(place)
        left -= size
    return groups


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
