"""Running sums over calibration speech of what one attention layer reads, and the moments that they give.

Names: B batch, T queries, S keys, D width, H heads, d_h = D / H, N frames seen. Sums are float64, over unpadded frames.
T and S are the same frames in an encoder's self-attention, tokens in a decoder's, and in cross-attention T are tokens
and S frames. An encoder-decoder is given the transcript's tokens.
"""

import mmap
from dataclasses import dataclass, field, replace
from tempfile import NamedTemporaryFile

import torch
from torch import nn

from asrlib.attention.names import is_rotary, projections
from asrlib.conversion.factorize import InputMoments, Moments

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


class InputSums:
    """Running sums of a projection's input x, and behind converted layers of the input it should have, `wanted`."""

    def __init__(self, width: int):
        self.frames = 0
        self.total = torch.zeros(width, dtype=torch.float64)  # Σ x [D]
        # Σ x xᵀ [D, D], in pages of its own: what an allocator takes back from between others it may never give away.
        pages = mmap.mmap(-1, 8 * width**2)
        self.products = torch.frombuffer(pages, dtype=torch.float64).view(width, width)
        self.wanted_total: torch.Tensor | None = None  # Σ wanted [D]
        self.cross: torch.Tensor | None = None  # Σ wanted xᵀ [D, D]

    def to_disk(self) -> None:
        """Keeps Σ x xᵀ in a temporary file, of which memory holds what is read just now. Raises OSError where the disk
        is full. The file has no name, so that nothing is left of it when this process ends, however it does."""
        with NamedTemporaryFile(prefix="asrlib-sums-") as file:
            self.products.numpy().tofile(file.name)
            kept = torch.from_file(file.name, shared=True, size=self.products.numel(), dtype=self.products.dtype)
        self.products = kept.view_as(self.products)

    def add(self, x_ND: torch.Tensor, wanted_ND: torch.Tensor | None = None) -> None:
        x_ND = x_ND.double()
        self.frames += len(x_ND)
        self.total += x_ND.sum(0).cpu()
        if x_ND.device == self.products.device:
            self.products.addmm_(x_ND.T, x_ND)
        else:
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
        batch, rows = len(kept_BT), sample_rows(kept)

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


def sample_rows(kept: Kept) -> int:
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
    device: torch.device | str = "cpu"  # of what was read; the sums are on the CPU

    @classmethod
    def of(cls, attention: nn.Module, weights: bool = False) -> "LayerStatistics":
        """Empty sums; with `weights`, also those of AttentionSums."""
        linears = projections(attention)
        width, heads = linears.query.in_features, linears.heads
        key = InputSums(width)
        value = InputSums(width) if is_rotary(attention) else key
        queries = torch.zeros(heads, width // heads, width // heads, dtype=torch.float64)
        return cls(key, value, queries, attention=AttentionSums(width, heads) if weights else None)

    @staticmethod
    def size(attention: nn.Module, weights: bool = False) -> int:
        """The bytes that `of` takes."""
        linears = projections(attention)
        matrices = 1 + is_rotary(attention) + weights * (1 + linears.heads)
        return 8 * matrices * linears.query.in_features**2

    def to_disk(self) -> None:
        """Keeps the largest sums in files."""
        attended = [self.attention.key, *self.attention.values] if self.attention else []
        for sums in (self.key, *([] if self.value is self.key else [self.value]), *attended):
            sums.to_disk()

    @property
    def frames(self) -> int:
        return self.key.frames

    def add(self, reading: Reading, kept: Kept, wanted: Reading | None = None) -> None:
        """Adds a call. Behind converted layers, `wanted` is the same call in the unconverted model."""
        keys_BS, self.device = kept.keys_BS, reading.key_input.device
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
            return Moments(key, value, query, device=self.device)
        # Softmax cancels the mean of the keys; the mean over all frames keeps them comparable.
        attended_key = replace(self.attention.key.moments(), mean=key.mean, wanted_mean=key.wanted_mean)
        values = tuple(sums.moments() for sums in self.attention.values)
        return Moments(key, value, query, attended_key, values, self.device)


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
