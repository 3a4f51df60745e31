"""Models in the form that is traced to a graph: over whole utterances, or for one step of streams.

Both use the layers of `asrlib.streaming.streams`, which find the past in a memory. The memory's tensors become inputs
and outputs of the graph; a whole utterance is a stream without a past. Models that cannot stream are traced unchanged,
over whole utterances alone.

Shapes: B streams, S samples or frames of features, n frames of a step, t frames kept, T = t + n, D width, V tokens,
C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCTC, PreTrainedModel

from asrlib.attention.chunks import Chunks
from asrlib.attention.formats import cache_format
from asrlib.attention.kinds import LatentMemory, absorbing_pays
from asrlib.attention.relative import sinusoids
from asrlib.models.registry import attention_modules, family_of, frame_counts
from asrlib.streaming.memory import LayerMemory, Tensors
from asrlib.streaming.streams import prepared, through_layers

USUAL_FRAMES = 500  # of an utterance: a graph has the form of attention that multiplies less for this many


def check_head(config) -> None:
    """Raises ValueError unless a model of this config has CTC."""
    if family_of(config).head.auto_model is not AutoModelForCTC:
        raise ValueError(f"graphs need CTC, and {config.model_type} writes token by token: use --to hub or standard")


class GraphMemory(LayerMemory):
    """The memory of one layer. It takes kept tensors from `past`, in the order in which the layer asks, and puts the
    tensors to keep into `present`, with their `names`. `past` None is the start of a stream."""

    def __init__(self, chunks: Chunks, past: Iterator[torch.Tensor] | None):
        super().__init__(chunks, cache_format("float32"))
        self.past, self.present, self.names = past, [], []

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.names.append(name)
        self.present.append(tensor)

    def frames(self, new: Tensors) -> tuple[Tensors, torch.Tensor]:
        before = [x_BnN[:, :0] if self.past is None else next(self.past) for x_BnN in new]
        both = tuple(torch.cat(pair, dim=1) for pair in zip(before, new, strict=True))
        for number, (past_BtN, new_BnN) in enumerate(zip(before, new, strict=True)):
            kept_BtN = torch.cat([past_BtN, new_BnN[:, : self.central]], dim=1)
            if self.chunks.left is not None:
                kept_BtN = kept_BtN[:, torch.sym_max(kept_BtN.shape[1] - self.chunks.left, 0) :]
            self._keep(f"frames{number}", kept_BtN)
        return both, torch.cat([self.kept_Bn.new_ones(before[0].shape[:2]), self.kept_Bn], dim=1)

    def sums(self, central: Tensors) -> Tensors:
        before = tuple(torch.zeros_like(chunk) if self.past is None else next(self.past) for chunk in central)
        for number, (earlier, chunk) in enumerate(zip(before, central, strict=True)):
            self._keep(f"sums{number}", earlier + chunk)
        return before

    def before(self, convolution: nn.Module, x_BCn: torch.Tensor, reach: int) -> torch.Tensor:
        before_BCr = x_BCn.new_zeros(*x_BCn.shape[:2], reach) if self.past is None else next(self.past)
        kept_BCt = torch.cat([before_BCr, x_BCn[..., : self.central]], dim=2)
        self._keep("convolution", kept_BCt[..., kept_BCt.shape[2] - reach :])
        return before_BCr

    def positions(self, attention, frames: int) -> torch.Tensor:
        """See LayerMemory. Where a stream keeps a limited number of frames, they are a constant of the graph."""
        queries, left = self.kept_Bn.shape[1], self.chunks.left
        if self.past is not None and left is not None:
            most = left + self.chunks.block
            return _distances(attention, most, self.chunks.block)[:, most - frames :]
        return _distances(attention, frames, queries)


def _distances(attention, frames: int, queries: int) -> torch.Tensor:
    """[H, P, E]: projected encodings of the distances `frames` − 1 … −(`queries` − 1)."""
    weight = attention.linear_pos.weight
    encoded_1PD = sinusoids(frames, weight.shape[1], weight.device, weight.dtype, queries - 1)
    return attention.heads(attention.linear_pos(encoded_1PD))[0]


class OfflineGraph(nn.Module):
    """Inputs [B, S(, F)] and which of them are speech [B, S] → logits [B, n, V], and how many frames are speech [B].

    Changes `model`: its attention works in blocks, and in one form. Padding reaches no frame of speech, so a batch
    gives the same as its utterances alone. The exception are models with `one_at_a_time`, whose feature encoder
    normalises over a whole row. Raises ValueError where an adapter after the encoder reduces the frames, and for other
    heads than CTC.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        check_head(model.config)
        if getattr(model.config, "add_adapter", False):
            raise ValueError("graphs do not support an adapter behind the encoder yet: use --to hub or standard")
        self.model = family_of(model.config).work_in_blocks(model).eval()
        self.streams = can_stream(model.config)
        self.one_at_a_time = getattr(model.config, "feat_extract_norm", "layer") == "group"
        fix_form(model, USUAL_FRAMES, USUAL_FRAMES)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.streams:
            return _pass(self.model, inputs, attention_mask, None)[:2]
        frames_B = frame_counts(self.model, attention_mask.sum(-1))
        with _padding_silenced(self.model, frames_B):
            return self.model(inputs, attention_mask=attention_mask.long()).logits, frames_B


def can_stream(config) -> bool:
    try:
        family_of(config).check_streaming(config)
    except ValueError:
        return False
    return True


@contextmanager
def _padding_silenced(model: PreTrainedModel, frames_B: torch.Tensor) -> Iterator[None]:
    """`models.inference.padding_silenced` of the layers, for symbolic lengths. Convolutions without own padding
    get zeros on their left and read no later frame."""

    def silence(convolution: nn.Conv1d, inputs: tuple) -> tuple:
        x_BCT, *others = inputs
        beyond_BT = torch.arange(x_BCT.shape[-1], device=x_BCT.device) >= frames_B[:, None]
        return x_BCT.masked_fill(beyond_BT[:, None], 0), *others

    modules = [module for layer in family_of(model.config).layers(model) for module in layer.modules()]
    wide = [module for module in modules if isinstance(module, nn.Conv1d) and module.padding[0]]
    handles = [module.register_forward_pre_hook(silence) for module in wide]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StreamGraph(nn.Module):
    """A step of streams: the inputs of a chunk and its lookahead, which of them are speech, and the kept tensors →
    logits [B, c, V] of the chunk, how many of its frames are speech [B], and the tensors to keep.

    Changes `model`. `first_state` gives the names and shapes of the kept tensors, layer by layer. Raises ValueError
    where the model cannot stream.
    """

    def __init__(self, model: PreTrainedModel, chunks: Chunks):
        super().__init__()
        self.model, self.chunks = prepared(model), chunks
        frames = chunks.block + (USUAL_FRAMES if chunks.left is None else chunks.left)
        fix_form(model, chunks.block, frames)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor, *state: torch.Tensor) -> tuple:
        logits_BcV, frames_B, memories = _pass(self.model, inputs, attention_mask, self.chunks, iter(state))
        return logits_BcV, frames_B, *(tensor for memory in memories for tensor in memory.present)

    @torch.no_grad()
    def first_state(self, inputs: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """{name: kept tensor} at the start of streams with this batch: no frames, and zeros."""
        memories = _pass(self.model, inputs, attention_mask, self.chunks)[2]
        return {
            f"layer{layer}_{name}": tensor[:, :0] if name.startswith("frames") else torch.zeros_like(tensor)
            for layer, memory in enumerate(memories)
            for name, tensor in zip(memory.names, memory.present, strict=True)
        }


def _pass(model, inputs, attention_mask, chunks: Chunks | None, past: Iterator[torch.Tensor] | None = None):
    family = family_of(model.config)
    x_BnD = family.frames(model, inputs)
    frames_B = frame_counts(model, attention_mask.sum(-1))
    kept_Bn = torch.arange(x_BnD.shape[1], device=x_BnD.device) < frames_B[:, None]
    x_BnD = x_BnD.masked_fill(~kept_Bn[..., None], 0)
    central = x_BnD.shape[1]
    if chunks is not None and chunks.lookahead:
        central = torch.sym_min(chunks.size, central)
    memories = [GraphMemory(chunks or Chunks(1), past) for _ in attention_modules(model)]
    for memory in memories:
        memory.central, memory.kept_Bn = central, kept_Bn
    x_BnD = through_layers(model, x_BnD, kept_Bn, memories)
    return family.logits(model, x_BnD[:, :central]), frames_B.clamp(max=central), memories


def fix_form(model: PreTrainedModel, queries: int, frames: int) -> None:
    """Sets latent attention of `model` to the form that multiplies less at these sizes: a graph has one form."""
    for attention in attention_modules(model):
        if isinstance(attention, LatentMemory):
            sizes = queries, frames, attention.num_heads, attention.head_size, attention.latent_kv.ranks
            attention.form = "absorbed" if absorbing_pays(*sizes) else "expanded"
