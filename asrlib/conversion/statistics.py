"""What calibration speech says about each attention layer: one streaming pass, memory independent of its length.

Names: B batch, T frames, D width, H heads, d_h = D / H, N frames seen. Sums are float64, over unpadded frames alone.
"""

import warnings
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from asrlib.conversion.factorize import Moments
from asrlib.data.batches import BucketBatchSampler, CTCCollator, CTCDataset
from asrlib.data.corpus import SAMPLE_RATE, Corpus
from asrlib.models.families import attention_modules, frame_counts
from asrlib.models.inference import choose_device, inference, padding_silenced

FRAMES_PER_DIMENSION = 10  # fewer frames than so many times the width, and the covariance is noise to a good part
SHRINKAGE = 1e-6  # of the covariance towards its mean variance, with speech in plenty
SAMPLE_SECONDS = 20.0  # of the batch that is kept, to measure attention outputs on


@dataclass
class LayerStatistics:
    """Running sums of one attention layer; `moments` is what the factorisations read."""

    frames: int
    total: torch.Tensor  # Σ x [D]
    products: torch.Tensor  # Σ x xᵀ [D, D]
    queries: torch.Tensor  # Σ (q_h + u)(q_h + u)ᵀ [H, d_h, d_h]
    sample: tuple[tuple, dict] | None = field(default=None, repr=False)  # arguments of one call, and which frames count

    def moments(self) -> Moments:
        """μ, Σ and Q. Σ is shrunk towards tr(Σ)/D · I, the more the fewer frames there are for its D² numbers."""
        mean = self.total / self.frames
        covariance = self.products / self.frames - torch.outer(mean, mean)
        covariance = (covariance + covariance.T) / 2
        width = len(mean)
        shrinkage = SHRINKAGE + 0.01 * width / self.frames
        floor = shrinkage * torch.trace(covariance) / width
        return Moments(mean, covariance + floor * torch.eye(width, dtype=torch.float64), self.queries / self.frames)


@dataclass(frozen=True)
class Statistics:
    """One `LayerStatistics` a layer, and a batch of the speech they come from to try things on."""

    layers: list[LayerStatistics]
    inputs: dict[str, torch.Tensor] = field(repr=False)  # input_values, attention_mask [B, S]

    @property
    def frames(self) -> int:
        return self.layers[0].frames

    @property
    def condition_numbers(self) -> list[float]:
        """Of each layer's covariance: largest over smallest eigenvalue."""
        return [torch.linalg.cond(layer.moments().covariance).item() for layer in self.layers]


def collect_statistics(
    model: PreTrainedModel,
    processor,
    corpus: Corpus,
    max_seconds: float = 600.0,
    batch_seconds: float = 60.0,
    device: str | None = None,
) -> Statistics:
    """Statistics of every attention layer of `model` over about `max_seconds` of `corpus`, first layer first.

    Take the training split. Raises ValueError for a test split or for fewer frames than the model is wide; warns where
    there is too little speech for the width and says how much is enough. `device`: where to run, see
    `models.inference.choose_device`; the model ends where it was. 24 layers of width 1024 take 0.3 GB.
    """
    if "test" in corpus.split:
        raise ValueError(f"calibration on {corpus.split!r} would spoil the test: give a training split")
    home, device = choose_device(None, model), choose_device(device, model)
    corpus = corpus.excerpt(max_seconds)
    modules = attention_modules(model)
    layers = [_empty(module) for module in modules]
    sampler = BucketBatchSampler([u.seconds for u in corpus], batch_seconds, shuffle=False)
    loader = DataLoader(CTCDataset(corpus, processor), batch_sampler=sampler, collate_fn=CTCCollator(processor))
    inputs: dict[str, torch.Tensor] = {}
    kept_BT: torch.Tensor  # of the batch at hand: which frames are no padding

    def watch(module, args, kwargs, layer):
        _accumulate(layer, module, kwargs["hidden_states"], kept_BT, kwargs)

    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: watch(module, args, kwargs, layer), with_kwargs=True
        )
        for module, layer in zip(modules, layers, strict=True)
    ]
    try:
        with inference(model, device=device):
            for batch in tqdm(loader, desc="collecting statistics", unit="batch", leave=False):
                mask_BS = batch["attention_mask"].to(device)
                rows = _sample_rows(batch["input_values"].shape[1] / SAMPLE_RATE)
                inputs = inputs or {name: batch[name][:rows] for name in ("input_values", "attention_mask")}
                frames_B = frame_counts(model, mask_BS.sum(-1))
                kept_BT = torch.arange(int(frames_B.max()), device=device) < frames_B[:, None]
                with padding_silenced(model, frames_B):
                    model(batch["input_values"].to(device), attention_mask=mask_BS)
    finally:
        model.to(home)
        for hook in hooks:
            hook.remove()
    _check_amount(layers[0], model.config)
    return Statistics(layers, inputs)


def _sample_rows(seconds: float) -> int:
    return max(1, int(SAMPLE_SECONDS / seconds))


def _empty(module) -> LayerStatistics:
    width, heads = module.linear_q.in_features, module.num_heads
    size = width // heads
    return LayerStatistics(
        0,
        torch.zeros(width, dtype=torch.float64),
        torch.zeros(width, width, dtype=torch.float64),
        torch.zeros(heads, size, size, dtype=torch.float64),
    )


def _accumulate(layer: LayerStatistics, module, x_BTD: torch.Tensor, kept_BT: torch.Tensor, kwargs: dict) -> None:
    if module.position_embeddings_type == "rotary":
        raise ValueError(
            "statistics of rotary positions are not there yet, whose keys read another input: use method: svd"
        )
    x_ND = x_BTD[kept_BT]
    queries_NHE = module.linear_q(x_ND).unflatten(-1, (module.num_heads, -1))
    if module.position_embeddings_type == "relative":
        queries_NHE = queries_NHE + module.pos_bias_u
    x_ND, queries_NHE = x_ND.double(), queries_NHE.double()
    layer.frames += len(x_ND)
    layer.total += x_ND.sum(0).cpu()
    layer.products += (x_ND.T @ x_ND).cpu()
    layer.queries += torch.einsum("nhi,nhj->hij", queries_NHE, queries_NHE).cpu()
    if layer.sample is None:
        rows = _sample_rows(x_BTD.shape[1] / 50)
        sample = {
            name: (value[:rows] if len(value) == len(x_BTD) else value).cpu() if torch.is_tensor(value) else value
            for name, value in kwargs.items()
        }
        layer.sample = (kept_BT[:rows].cpu(), sample)  # on the CPU, where models are converted


def _check_amount(layer: LayerStatistics, config) -> None:
    width, enough = len(layer.total), FRAMES_PER_DIMENSION * len(layer.total)
    seconds = enough * config.inputs_to_logits_ratio / 16_000
    if layer.frames < width:
        raise ValueError(
            f"{layer.frames} frames of calibration speech say too little about inputs of width {width}: give at least "
            f"{seconds:.0f} s"
        )
    if layer.frames < enough:
        warnings.warn(
            f"{layer.frames} frames of calibration speech are few for inputs of width {width}, whose covariance is "
            f"shrunk: {seconds:.0f} s are enough",
            stacklevel=3,
        )
