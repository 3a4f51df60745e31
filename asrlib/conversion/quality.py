"""How far a latent model's keys, values and attention outputs are from those of the model it came from."""

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from transformers import PreTrainedModel

from asrlib.models.families import attention_modules


@contextmanager
def _recorded_calls(modules: list[torch.nn.Module]) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of each module's next call, in order of `modules`."""
    calls: dict[int, tuple[tuple, dict]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: calls.__setitem__(index, (args, kwargs)), with_kwargs=True
        )
        for index, module in enumerate(modules)
    ]
    recorded: list = []
    try:
        yield recorded
        recorded.extend(calls[index] for index in range(len(modules)))
    finally:
        for hook in hooks:
            hook.remove()


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()  # inference_mode would leave position tables behind that no model can be trained with
def analyze_compression_quality(
    mha: PreTrainedModel, mla: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> pd.DataFrame:
    """Relative error ‖ours − theirs‖ / ‖theirs‖ of keys, values and attention output, one row per layer.

    `inputs` is one batch as the collator makes it (input_values [B, S], attention_mask [B, S]). Every layer
    of `mla` is given what that layer of `mha` reads, so that its error is its own and not its
    predecessors'. Padded frames are left out. Columns: layer, latent_dim, key_error, value_error,
    output_error.
    """
    theirs, ours = attention_modules(mha.eval()), attention_modules(mla.eval())
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    key_projections = [attention.linear_k for attention in theirs]  # rotary positions turn what these read
    with _recorded_calls(theirs) as calls, _recorded_calls(key_projections) as key_calls:
        mha(**inputs)
    rows = []
    for index, (standard, latent, (args, kwargs), ((turned_BTD,), _)) in enumerate(
        zip(theirs, ours, calls, key_calls, strict=True)
    ):
        x_BTD = kwargs.get("hidden_states", args[0] if args else None)
        kept_BT = _unpadded(mha, x_BTD, inputs.get("attention_mask"))
        outputs = [module(*args, **kwargs)[0][kept_BT] for module in (latent, standard)]
        rows.append(
            {
                "layer": index,
                "latent_dim": mla.config.latent_dim[index],
                "key_error": _relative_error(
                    latent.linear_k(turned_BTD)[kept_BT], standard.linear_k(turned_BTD)[kept_BT]
                ),
                "value_error": _relative_error(latent.linear_v(x_BTD)[kept_BT], standard.linear_v(x_BTD)[kept_BT]),
                "output_error": _relative_error(*outputs),
            }
        )
    return pd.DataFrame(rows)


def _unpadded(model: PreTrainedModel, x_BTD: torch.Tensor, mask_BS: torch.Tensor | None) -> torch.Tensor:
    batch, frames = x_BTD.shape[:2]
    if mask_BS is None:
        return torch.ones(batch, frames, dtype=torch.bool, device=x_BTD.device)
    return model._get_feature_vector_attention_mask(frames, mask_BS).bool()
