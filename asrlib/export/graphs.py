"""Models as they are traced to graphs: of whole utterances, or a step of streams, whose past comes in and goes out.

Both are what `asrlib.streaming.streams` works with, layers that find the past in a memory: here its tensors are inputs
and outputs of the graph, and a whole utterance is a stream that has no past. Models that cannot stream are traced as
they are, over whole utterances alone.

Shapes: B streams, S samples or frames of features, n frames worked on at once, t frames kept, T = t + n, D width,
V tokens, C channels.
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

USUAL_FRAMES = 500  # of an utterance, for which the form of attention is chosen: whichever multiplies less


def check_head(config) -> None:
    """Raises ValueError unless a model of such a config writes by CTC."""
    if family_of(config).head.auto_model is not AutoModelForCTC:
        raise ValueError(
            f"a graph is made of models with CTC, and {config.model_type} writes token by token: use --to hub or "
            "standard"
        )


class GraphMemory(LayerMemory):
    """Of one layer: takes what is kept from `past`, in the order in which the layer asks, and leaves what is to be kept
    in `present`, of which `names` says what it is. Without a past, nothing came before."""

    def __init__(self, chunks: Chunks, past: Iterator[torch.Tensor] | None):
        super().__init__(chunks, cache_format("float32"))
        self.past, self.present, self.names = past, [], []

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.names.append(name)
        self.present.append(tensor)

    def frames(self, new: Tensors) -> tuple[Tensors, torch.Tensor]:
        before = [one[:, :0] if self.past is None else next(self.past) for one in new]
        both = tuple(torch.cat(pair, dim=1) for pair in zip(before, new, strict=True))
        for number, (past_BtN, new_BnN) in enumerate(zip(before, new, strict=True)):
            kept_BtN = torch.cat([past_BtN, new_BnN[:, : self.central]], dim=1)
            if self.chunks.left is not None:
                kept_BtN = kept_BtN[:, torch.sym_max(kept_BtN.shape[1] - self.chunks.left, 0) :]
            self._keep(f"frames{number}", kept_BtN)
        return both, torch.cat([self.kept_Bn.new_ones(before[0].shape[:2]), self.kept_Bn], dim=1)

    def sums(self, central: Tensors) -> Tensors:
        before = tuple(torch.zeros_like(one) if self.past is None else next(self.past) for one in central)
        for number, (earlier, one) in enumerate(zip(before, central, strict=True)):
            self._keep(f"sums{number}", earlier + one)
        return before

    def before(self, convolution: nn.Module, x_BCn: torch.Tensor, reach: int) -> torch.Tensor:
        before_BCr = x_BCn.new_zeros(*x_BCn.shape[:2], reach) if self.past is None else next(self.past)
        kept_BCt = torch.cat([before_BCr, x_BCn[..., : self.central]], dim=2)
        self._keep("convolution", kept_BCt[..., kept_BCt.shape[2] - reach :])
        return before_BCr

    def positions(self, attention, frames: int) -> torch.Tensor:
        """Of any number of frames; a constant of the graph where a stream keeps no more than so many."""
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

    Takes `model` over: its attention works in blocks, and in one form. What is beyond an utterance reaches no other
    frame, so that a batch gives what its utterances give alone; but for `one_at_a_time`, whose feature encoder
    normalises over all that is in a row. Raises ValueError where an adapter behind the encoder thins its frames out,
    and where something else than CTC writes.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        check_head(model.config)
        if getattr(model.config, "add_adapter", False):
            raise ValueError("an adapter behind the encoder does not go into a graph yet: use --to hub or standard")
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
    """`models.inference.padding_silenced` of the layers, where lengths are symbols. Convolutions that pad nothing
    themselves were given zeros on their left, and hear no later frame."""

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
    """A step of streams: inputs of the frames of a chunk and of its lookahead, which of them are speech, and what was
    kept → logits [B, c, V] of the chunk, how many of its frames are speech [B], and what is to be kept.

    Takes `model` over. `state_names` and `state` (of streams that begin) say what is kept, layer by layer. Raises
    ValueError where the model cannot stream.
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
        """By name, what streams of this batch begin with: no frames, and zeros."""
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
    """Latent attention of `model` in the form that multiplies less for so many: a graph has but one."""
    for attention in attention_modules(model):
        if isinstance(attention, LatentMemory):
            sizes = queries, frames, attention.num_heads, attention.head_size, attention.latent_kv.ranks
            attention.form = "absorbed" if absorbing_pays(*sizes) else "expanded"
