"""Encoders trained from scratch on log-mel features, with any kind of attention: Conformer and Branchformer.

They work with transformers: `save_pretrained`, `from_pretrained`, `AutoModelForCTC`, `Trainer`, gradient checkpointing.
Shapes: B batch, M mel frames, F mel bins, T encoder frames (about M / 4), D width, V tokens.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from asrlib.attention.chunks import Chunks
from asrlib.attention.kinds import KINDS, GroupedQueryAttention, LatentAttention, SimpleLatentAttention, attention_kind
from asrlib.attention.latent import check_latent_widths
from asrlib.attention.relative import sinusoids
from asrlib.attention.widths import split_ranks
from asrlib.models.blocks import BLOCKS, Subsampling, spec_augment
from asrlib.models.family import Family
from asrlib.models.latent_twin import settings

SUBSAMPLING = 4  # mel frames per encoder frame


@strict
class SpeechEncoderConfig(PreTrainedConfig):
    """Sizes of an encoder; the defaults are those of a medium Conformer.

    `attention` is one of `attention.kinds.KINDS`, and some kinds have sizes of their own: gqa `num_key_value_heads`;
    mla and mla_simple `latent_dim` (one width a layer; empty: a quarter of the 2·D of mha), `latent_layout` and
    `latent_key_dim`, as in Wav2Vec2ConformerMLAConfig; mla `query_latent_dim` (None: D / 2). `hop_length` and
    `win_length` are samples of 16 kHz audio. Raises huggingface_hub's StrictDataclassClassValidationError where sizes
    contradict each other.
    """

    model_type = "speech-encoder"

    encoder: str = "conformer"
    attention: str = "mha"
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    latent_dim: list[int] | tuple[int, ...] = ()
    latent_layout: str = "joint"
    latent_key_dim: list[int] | tuple[int, ...] = ()
    query_latent_dim: int | None = None
    intermediate_size: int = 2048  # of the Conformer's feed-forward, or of the Branchformer's cgMLP after the gate
    conv_depthwise_kernel_size: int = 31  # encoder frames
    causal: bool = False  # convolutions read no later frame
    largest_chunk: int = 0  # encoder frames: half of the training batches are in chunks of up to this size; 0: none
    subsampling_channels: int = 256
    num_mel_bins: int = 80
    hop_length: int = 160
    win_length: int = 400
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    time_masks: int = 0  # of SpecAugment, in training
    time_mask_share: float = 0.05  # of an utterance, the longest such mask
    frequency_masks: int = 0
    frequency_mask_bins: int = 27  # the widest such mask
    vocab_size: int = 32
    pad_token_id: int | None = 0  # also the CTC blank
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = True

    def __post_init__(self, **kwargs):
        if issubclass(KINDS.get(self.attention, object), SimpleLatentAttention):
            self.latent_dim = self.latent_dim or [max(2, self.hidden_size // 2)] * self.num_hidden_layers
            if self.latent_layout == "split" and not self.latent_key_dim:
                self.latent_key_dim = [split_ranks(width)[0] for width in self.latent_dim]
        if issubclass(KINDS.get(self.attention, object), LatentAttention) and self.query_latent_dim is None:
            self.query_latent_dim = max(1, self.hidden_size // 2)
        self.latent_dim, self.latent_key_dim = list(self.latent_dim), list(self.latent_key_dim)
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        """Part of `@strict`'s validation."""
        if self.encoder not in BLOCKS:
            raise ValueError(f"encoder is {self.encoder!r}: choose one of {', '.join(BLOCKS)}")
        kind = attention_kind(self.attention)
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be even and divide into {self.num_attention_heads} heads"
            )
        groups = self.num_key_value_heads
        if issubclass(kind, GroupedQueryAttention) and (groups < 1 or self.num_attention_heads % groups):
            raise ValueError(
                f"{self.num_attention_heads} heads do not fall into {groups} equal groups: choose "
                "num_key_value_heads that divides them"
            )
        if not self.conv_depthwise_kernel_size % 2:
            raise ValueError(f"conv_depthwise_kernel_size is {self.conv_depthwise_kernel_size}: it must be odd")
        if self.largest_chunk < 0 or (self.largest_chunk and not self.causal):
            raise ValueError(
                f"largest_chunk is {self.largest_chunk}: training in chunks takes 1 frame or more, and causal "
                "convolutions, since others read beyond the chunk"
            )
        if Subsampling.length(self.num_mel_bins) < 1:
            raise ValueError(f"num_mel_bins is {self.num_mel_bins}: the two convolutions need at least 7")
        if self.query_latent_dim is not None and not 1 <= self.query_latent_dim <= self.hidden_size:
            raise ValueError(
                f"query_latent_dim is {self.query_latent_dim}: it must lie between 1 and hidden_size {self.hidden_size}"
            )
        if issubclass(kind, SimpleLatentAttention):
            check_latent_widths(self)
        elif self.latent_dim or self.latent_key_dim:
            raise ValueError(f"latent widths are given, but attention {self.attention!r} has no latent: use mla")
        if self.query_latent_dim is not None and not issubclass(kind, LatentAttention):
            raise ValueError(f"query_latent_dim is given, but attention {self.attention!r} has none: use mla")

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples of audio per encoder frame."""
        return self.hop_length * SUBSAMPLING

    @property
    def position_embeddings_type(self) -> str | None:
        return attention_kind(self.attention).position_embeddings_type

    def mel_frames(self, samples: int) -> int:
        """The mel frames of `samples` samples of audio; only whole windows count."""
        return max(0, 1 + (samples - self.win_length) // self.hop_length)

    def key_dim(self, layer: int) -> int | None:
        """How many of a latent's numbers are the keys'; None in a joint latent, where keys and values share all."""
        return self.latent_key_dim[layer] if self.latent_key_dim else None


def is_latent(config: SpeechEncoderConfig) -> bool:
    return issubclass(attention_kind(config.attention), SimpleLatentAttention)


def check_layout(config: SpeechEncoderConfig, layout: str) -> None:
    """Raises ValueError unless the attention is multi-head attention, which either layout can replace."""
    if config.attention != "mha":
        raise ValueError(f"the model's attention is {config.attention!r}: only 'mha' can be made latent")


class SpeechEncoderForCTC(PreTrainedModel):
    """Log-mel features [B, M, F] → logits [B, T, V]. Features are normalised with `feature_mean` and `feature_std`,
    which are saved with the weights: `normalise_by` sets them."""

    config_class = SpeechEncoderConfig
    config: SpeechEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SpeechEncoderConfig):
        super().__init__(config)
        self.register_buffer("feature_mean", torch.zeros(config.num_mel_bins))
        self.register_buffer("feature_std", torch.ones(config.num_mel_bins))
        self.subsampling = Subsampling(config)
        block = BLOCKS[config.encoder]
        self._no_split_modules = {block.__name__}
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
        self.made = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises what a checkpoint lacks. Modules initialise themselves when they are made, and must not twice."""
        if hasattr(self, "made") and hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def normalise_by(self, mean_F: torch.Tensor, std_F: torch.Tensor) -> None:
        self.feature_mean.copy_(mean_F)
        self.feature_std.copy_(std_F)

    def _get_feat_extract_output_lengths(self, mel_frames: torch.Tensor) -> torch.Tensor:
        return Subsampling.length(mel_frames).clamp(min=0)

    def frames(self, input_features: torch.Tensor) -> torch.Tensor:
        """The layers' input: log-mel frames [B, M, F] → [B, T, D]."""
        return self.subsampling(self.normalised(input_features))

    def normalised(self, input_features: torch.Tensor) -> torch.Tensor:
        return (input_features - self.feature_mean) / self.feature_std

    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        chunks: Chunks | None = None,
    ) -> CausalLMOutput:
        """`attention_mask` [B, M] says which mel frames are speech; `labels` [B, L] are padded with −100.

        `chunks` limits attention to chunks, as streaming does. In training it is drawn at random if the config sets
        `largest_chunk`. Raises ValueError for chunks with a lookahead, or with convolutions that are not causal.
        """
        if attention_mask is None:
            attention_mask = input_features.new_ones(input_features.shape[:2], dtype=torch.bool)
        lengths_B = attention_mask.sum(-1)
        x_BMF = self.normalised(input_features)
        if self.training:
            masks = ("time_masks", "time_mask_share", "frequency_masks", "frequency_mask_bins")
            x_BMF = spec_augment(x_BMF, lengths_B, *(getattr(self.config, name) for name in masks))
            chunks = chunks or self._drawn_chunks()
        if chunks is not None and (chunks.lookahead or not self.config.causal):
            raise ValueError("a mask of chunks takes causal convolutions and no lookahead: use streaming.chunked_pass")
        x_BTD = self.subsampling(x_BMF)
        frames_B = self._get_feat_extract_output_lengths(lengths_B)
        frames = x_BTD.shape[1]
        kept_BT = torch.arange(frames, device=x_BTD.device) < frames_B[:, None]
        positions_1PD = sinusoids(frames, self.config.hidden_size, x_BTD.device, x_BTD.dtype)
        hidden_states = [x_BTD]
        for layer in self.layers:
            x_BTD = layer(x_BTD, attention_mask=kept_BT, relative_position_embeddings=positions_1PD, chunks=chunks)
            hidden_states = [*hidden_states, x_BTD] if output_hidden_states else []
        logits_BTV = self.lm_head(x_BTD)
        loss = None if labels is None else self._ctc_loss(logits_BTV, frames_B, labels)
        return CausalLMOutput(
            loss=loss, logits=logits_BTV, hidden_states=tuple(hidden_states) if output_hidden_states else None
        )

    def _drawn_chunks(self) -> Chunks | None:
        """None (full context) half of the time, otherwise chunks of any size up to the largest, so that one model
        serves all latencies (Zhang et al. 2020, "U2", arXiv 2012.05481, 3.2)."""
        if not self.config.largest_chunk or torch.rand(()) < 0.5:
            return None
        return Chunks(int(torch.randint(1, self.config.largest_chunk + 1, ())))

    def _ctc_loss(self, logits_BTV: torch.Tensor, frames_B: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
        if (labels_BL >= self.config.vocab_size).any():  # ctc_loss would silently read beyond the logits
            raise ValueError(
                f"label {int(labels_BL.max())} is beyond the {self.config.vocab_size} symbols of the model"
            )
        counted_BL = labels_BL >= 0
        with torch.autocast(logits_BTV.device.type, enabled=False):
            return nn.functional.ctc_loss(
                logits_BTV.float().log_softmax(-1).transpose(0, 1),
                labels_BL[counted_BL],
                frames_B,
                counted_BL.sum(-1),
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )


SPEECH_ENCODER = Family(
    standard_model=SpeechEncoderForCTC,
    latent_model=SpeechEncoderForCTC,
    standard_settings={"attention": "mha"},
    latent_settings={"attention": "mla_simple"},
    to_grouped=lambda config, kv_heads: type(config)(
        **settings(config) | {"num_key_value_heads": kv_heads}, attention="gqa"
    ),
    is_latent=is_latent,
    layers=lambda model: list(model.layers),
    check_layout=check_layout,
    check_streaming=lambda config: None,
    frames=SpeechEncoderForCTC.frames,
    logits=lambda model, x_BTD: model.lm_head(x_BTD),
    input_length=lambda config, samples: config.mel_frames(samples),
)
