"""What all latent twins of transformers' classes share: their configs, and keys and values from a latent."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from asrlib.attention.latent import LatentKV, check_latent_widths
from asrlib.attention.names import encoder_config, latent_count
from asrlib.attention.widths import split_ranks

OWN = {  # settings in which twins differ
    "model_type",
    "architectures",
    "auto_map",
    "attention",  # of our own encoder, whose config has one class for all kinds
    "query_latent_dim",
    "latent_dim",
    "latent_layout",
    "latent_key_dim",
    "latent_parts",
    "latent_shared",
}


@dataclass(kw_only=True)
class LatentConfig:
    """The settings that a latent twin's config adds to its parent's: `latent_dim`, one cached width per layer, and
    `latent_layout`.

    An empty `latent_dim` means an exact latent: a joint one as wide as the model in every layer, a split one as wide as
    keys and values together. `latent_key_dim`, of a split latent alone, says how many of each layer's numbers are the
    keys'; empty means half of them, as `split_ranks` rounds it. Raises huggingface_hub's
    StrictDataclassClassValidationError where a width is impossible, and where a joint latent meets rotary positions or
    key widths.
    """

    latent_dim: list[int] | tuple[int, ...] = ()
    latent_layout: str = "joint"
    latent_key_dim: list[int] | tuple[int, ...] = ()

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        encoder = encoder_config(self)
        if not self.latent_dim:
            exact = encoder.hidden_size if self.latent_layout == "joint" else 2 * encoder.hidden_size
            self.latent_dim = [exact] * latent_count(self)
        if self.latent_layout == "split" and not self.latent_key_dim:
            self.latent_key_dim = [split_ranks(width)[0] for width in self.latent_dim]
        self.latent_dim, self.latent_key_dim = list(self.latent_dim), list(self.latent_key_dim)

    def validate_latent(self):
        """Part of `@strict`'s validation."""
        check_layout(self, self.latent_layout)
        check_latent_widths(self)

    def key_dim(self, layer: int) -> int | None:
        """How many of a layer's numbers are the keys'; None in a joint latent, where keys and values share all."""
        return self.latent_key_dim[layer] if self.latent_key_dim else None


def check_layout(config: PreTrainedConfig, layout: str) -> None:
    """Raises ValueError for a joint latent where keys and values read different inputs."""
    if layout == "joint" and getattr(config, "position_embeddings_type", None) == "rotary":
        raise ValueError(
            "rotary positions turn the input of the keys but not that of the values, so one joint latent cannot "
            "serve both: use layout: split"
        )


def settings(config: PreTrainedConfig) -> dict:
    """The settings that a config shares with that of its twin."""
    return {key: value for key, value in config.to_dict().items() if key not in OWN}


def latent_kv(config: LatentConfig, layer: int) -> LatentKV:
    """The latent of one layer, or of one attention module, with random weights."""
    width = encoder_config(config).hidden_size
    return LatentKV(width, config.latent_dim[layer], config.latent_layout, config.key_dim(layer))


def with_classes(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """`model` itself. Its modules of exactly these classes become instances of the given subclasses, which add methods
    alone."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module) in classes:
                setattr(parent, name, _recast(module, classes[type(module)]))
    return model


def _recast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """`module` as an instance of `kind`, with the same parameters, buffers, submodules and hooks. Python cannot assign
    `__class__` here, because the layouts of the classes differ."""
    twin = kind.__new__(kind)
    twin.__dict__ = module.__dict__
    return twin


class LatentProjections(nn.Module):
    """A mixin before an attention class of transformers. The class keeps its forward, and its key and value projections
    become those through the latent. Each goes through the latent by itself, so a pass multiplies by a joint `down`
    twice; a stream would keep the latent."""

    def use_latent(self, config: LatentConfig, layer: int) -> None:
        """Replaces the parent's two projections by a latent."""
        key, value = ("k_proj", "v_proj") if "k_proj" in self._modules else ("linear_k", "linear_v")
        delattr(self, key)
        delattr(self, value)
        self.latent_kv = latent_kv(config, layer)

    def k_proj(self, x_BTD):
        return self.latent_kv.keys(x_BTD)

    def v_proj(self, x_BTD):
        return self.latent_kv.values(x_BTD)

    linear_k, linear_v = k_proj, v_proj
