"""The parts of our own encoders: subsampling, the blocks of Conformer and Branchformer, and SpecAugment, which hides
parts of the input in training.

Each `config` is a SpeechEncoderConfig.
Shapes: B batch, M mel frames, F mel bins, N masks, T encoder frames (about M / 4), D width, C channels.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from asrlib.attention.kinds import attention_kind


def spec_augment(
    features_BMF: torch.Tensor,
    lengths_B: torch.Tensor,
    time_masks: int,
    time_mask_share: float,
    frequency_masks: int,
    frequency_mask_bins: int,
) -> torch.Tensor:
    """`features_BMF` with stretches of time and bands of frequency at 0, which is the mean of normalised features.

    Each utterance has `time_masks` stretches of at most `time_mask_share` of its own length and `frequency_masks` bands
    of at most `frequency_mask_bins`, uniform in width and place (Park et al. 2019 and 2020, arXiv 1904.08779 and
    1912.05533, without time warping).
    """
    _, frames, bins = features_BMF.shape
    longest_B = (time_mask_share * lengths_B).long()
    widest_B = torch.full_like(longest_B, min(frequency_mask_bins, bins))
    hidden_BM = _spans(time_masks, longest_B, lengths_B, frames)
    hidden_BF = _spans(frequency_masks, widest_B, torch.full_like(lengths_B, bins), bins)
    return features_BMF.masked_fill(hidden_BM[:, :, None] | hidden_BF[:, None, :], 0)


def _spans(count: int, widest_B: torch.Tensor, length_B: torch.Tensor, size: int) -> torch.Tensor:
    """Which of `size` places lie in one of `count` spans of at most `widest_B`, inside `length_B`: bool [B, size]."""
    draws_2BN = torch.rand(2, len(widest_B), count, device=widest_B.device)
    width_BN = (draws_2BN[0] * (widest_B[:, None] + 1)).long()
    start_BN = (draws_2BN[1] * (length_B[:, None] - width_BN + 1)).long()
    place_S = torch.arange(size, device=widest_B.device)
    inside_BNS = (place_S >= start_BN[..., None]) & (place_S < (start_BN + width_BN)[..., None])
    return inside_BNS.any(1)


class Subsampling(nn.Module):
    """Two convolutions of stride 2 and a projection of all bins of a frame to one vector: [B, M, F] → [B, T, D].

    They pad nothing: a frame needs all of its 7 mel frames, T = ((M − 1) // 2 − 1) // 2, and padding behind an
    utterance reaches none of its frames.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        channels = config.subsampling_channels
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        self.linear = nn.Linear(channels * self.length(config.num_mel_bins), config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @staticmethod
    def length(mel_frames):
        """int → int, or integer tensor → tensor."""
        return ((mel_frames - 1) // 2 - 1) // 2

    def forward(self, features_BMF: torch.Tensor) -> torch.Tensor:
        if self.length(features_BMF.shape[1]) < 1:
            raise ValueError(f"{features_BMF.shape[1]} mel frames are too few for an encoder frame: give at least 7")
        x_BCTF = self.conv2(self.conv1(features_BMF[:, None]).relu()).relu()
        return self.dropout(self.linear(x_BCTF.transpose(1, 2).flatten(2)))


class FrameBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose moments, in training, leave padding out."""

    def forward(self, x_BCT: torch.Tensor, kept_BT: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x_BCT)
        x_BTC = x_BCT.transpose(1, 2)
        return (
            torch.zeros_like(x_BTC).masked_scatter(kept_BT[..., None], super().forward(x_BTC[kept_BT])).transpose(1, 2)
        )


class DepthwiseConvolution(nn.Conv1d):
    """One filter per channel over time, [B, C, T] → [B, C, T]; beyond the ends of an utterance it reads zeros.

    `reach` is the number of earlier frames it reads: half of its width, or all but one if it is causal.
    """

    def __init__(self, channels: int, kernel_size: int, causal: bool):
        super().__init__(channels, channels, kernel_size, groups=channels)
        self.reach = kernel_size - 1 if causal else kernel_size // 2

    def forward(self, x_BCT: torch.Tensor, kept_BT: torch.Tensor) -> torch.Tensor:
        around = (self.reach, self.kernel_size[0] - 1 - self.reach)
        return super().forward(nn.functional.pad(x_BCT.masked_fill(~kept_BT[:, None], 0), around))


class GateConvolution(DepthwiseConvolution):
    """Initialised to return one for any input, so that the gate is open, as in gMLP (arXiv 2105.08050, 2.1)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1e-6)
        nn.init.ones_(self.bias)


class FeedForward(nn.Sequential):
    def __init__(self, config: PreTrainedConfig):
        super().__init__(
            nn.LayerNorm(config.hidden_size),
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.SiLU(),
            nn.Dropout(config.hidden_dropout),
            nn.Linear(config.intermediate_size, config.hidden_size),
            nn.Dropout(config.hidden_dropout),
        )


class ConvolutionModule(nn.Module):
    """The Conformer's (arXiv 2005.08100, 2.2): pointwise and GLU, depthwise, BatchNorm, swish, pointwise."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        width = config.hidden_size
        self.layer_norm = nn.LayerNorm(width)
        self.pointwise1 = nn.Linear(width, 2 * width)
        self.depthwise = DepthwiseConvolution(width, config.conv_depthwise_kernel_size, config.causal)
        self.batch_norm = FrameBatchNorm(width)
        self.pointwise2 = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x_BTD: torch.Tensor, kept_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = nn.functional.glu(self.pointwise1(self.layer_norm(x_BTD)))
        x_BDT = self.batch_norm(self.depthwise(x_BTD.transpose(1, 2), kept_BT), kept_BT)
        return self.dropout(self.pointwise2(nn.functional.silu(x_BDT).transpose(1, 2)))


class ConvolutionalGatingMLP(nn.Module):
    """The Branchformer's local branch (Peng et al. 2022, arXiv 2207.02971, 3.3): half of the channels, convolved over
    time, gate the other half."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        half = config.intermediate_size
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.linear1 = nn.Linear(config.hidden_size, 2 * half)
        self.gate_norm = nn.LayerNorm(half)
        self.depthwise = GateConvolution(half, config.conv_depthwise_kernel_size, config.causal)
        self.linear2 = nn.Linear(half, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x_BTD: torch.Tensor, kept_BT: torch.Tensor) -> torch.Tensor:
        x_BTC, gate_BTC = nn.functional.gelu(self.linear1(self.layer_norm(x_BTD))).chunk(2, dim=-1)
        gate_BCT = self.depthwise(self.gate_norm(gate_BTC).transpose(1, 2), kept_BT)
        return self.dropout(self.linear2(self.dropout(x_BTC * gate_BCT.transpose(1, 2))))


class ConformerBlock(GradientCheckpointingLayer):
    """½ feed-forward, attention, convolution, ½ feed-forward, one after the other (arXiv 2005.08100, 2)."""

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        self.ffn1, self.ffn2 = FeedForward(config), FeedForward(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = attention_kind(config.attention)(config, layer)
        self.conv_module = ConvolutionModule(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states, attention_mask, relative_position_embeddings=None, chunks=None):
        x_BTD = hidden_states
        x_BTD = x_BTD + 0.5 * self.ffn1(x_BTD)
        attended_BTD, _ = self.self_attn(
            hidden_states=self.self_attn_layer_norm(x_BTD),
            attention_mask=attention_mask,
            relative_position_embeddings=relative_position_embeddings,
            chunks=chunks,
        )
        x_BTD = x_BTD + self.dropout(attended_BTD)
        x_BTD = x_BTD + self.conv_module(x_BTD, attention_mask)
        x_BTD = x_BTD + 0.5 * self.ffn2(x_BTD)
        return self.final_layer_norm(x_BTD)


class BranchformerBlock(GradientCheckpointingLayer):
    """Attention beside cgMLP, concatenated and projected (arXiv 2207.02971, 3.1 and 3.4.1)."""

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = attention_kind(config.attention)(config, layer)
        self.cgmlp = ConvolutionalGatingMLP(config)
        self.merge = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states, attention_mask, relative_position_embeddings=None, chunks=None):
        x_BTD = hidden_states
        attended_BTD, _ = self.self_attn(
            hidden_states=self.self_attn_layer_norm(x_BTD),
            attention_mask=attention_mask,
            relative_position_embeddings=relative_position_embeddings,
            chunks=chunks,
        )
        branches_BTC = torch.cat([self.dropout(attended_BTD), self.cgmlp(x_BTD, attention_mask)], dim=-1)
        return self.final_layer_norm(x_BTD + self.dropout(self.merge(branches_BTC)))


BLOCKS = {"conformer": ConformerBlock, "branchformer": BranchformerBlock}
