"""What a window takes that a model keeps of its own past, as Nemotron does: bytes, and time for a chunk.

    python -m asrlib steps --windows

One layer of the published size, with random weights: time does not depend on them, and all layers are alike. What makes
frames of audio is the same for all, and not measured.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from transformers import DynamicCache, NemotronAsrStreamingConfig, NemotronAsrStreamingForRNNT, PreTrainedModel

from asrlib.attention.cache import held_bytes, kv_cache_bytes
from asrlib.measuring.speed import measured_on, multiplications, take_turns
from asrlib.models.inference import choose_device, inference
from asrlib.models.registry import family_of, frames_per_second


def window_models(latent_dims: Sequence[int] = (1024, 512, 128), **encoder) -> dict[str, PreTrainedModel]:
    """{name: a model of one layer}: transformers' own, the same with its attention worked in blocks and projected
    positions kept, as the latent twins have it, and these. `encoder` are settings of its encoder, else as published."""
    torch.manual_seed(0)
    small = {"vocab_size": 8, "blank_token_id": 7, "decoder_hidden_size": 8, "num_decoder_layers": 1}  # not measured
    encoder = {"num_hidden_layers": 1, "subsampling_conv_channels": 8} | encoder
    config = NemotronAsrStreamingConfig(encoder_config=encoder, **small)
    standard, family = NemotronAsrStreamingForRNNT(config), family_of(config)
    blocked = family.work_in_blocks(copy.deepcopy(standard))
    latents = {f"MLA {dim}": family.latent_model(family.to_latent(config, latent_dim=[dim])) for dim in latent_dims}
    return {"MHA": standard, "MHA in blocks": blocked, **latents}


def benchmark_windows(
    models: dict[str, PreTrainedModel],
    lookaheads: Sequence[int] = (0, 1, 6, 13),
    repeats: int = 15,
    device: str | None = None,
) -> pd.DataFrame:
    """One row per lookahead, in encoder frames, and model, the models taking turns, once their windows are full.

    lookahead, chunk_ms, system, window_bytes (counted, of one stream), formula_bytes, reserved_bytes (with the last
    chunk, which the window was cut from and which goes with the next), millions (of multiplications of one chunk in the
    first layer, all of it), ms (the same, median), ratio (of ms to that of the first model in the same round, median).
    """
    device = choose_device(device, next(iter(models.values())))
    rows = []
    with inference(*models.values(), device=device):
        for turn, ahead in enumerate(lookaheads):
            filled = {name: full_window(model, ahead) for name, model in models.items()}
            steps = {name: step for name, (step, _) in filled.items()}
            take_turns(steps, turn, device)  # to warm up
            rounds = pd.DataFrame([take_turns(steps, turn + repeat, device) for repeat in range(repeats)])
            for name, model in models.items():
                window = filled[name][1]
                tensors = [tensor for layer in window.layers for tensor in (layer.keys, layer.values)]
                rows.append(
                    {
                        "lookahead": ahead,
                        "chunk_ms": 1000 * (ahead + 1) / frames_per_second(model.config),
                        "system": name,
                        "window_bytes": held_bytes(window),
                        "formula_bytes": kv_cache_bytes(model.config, model.config.encoder_config.sliding_window - 1),
                        "reserved_bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
                        "millions": multiplications(steps[name]) / 1e6,
                        "ms": rounds[name].median(),
                        "ratio": (rounds[name] / rounds[next(iter(models))]).median(),
                    }
                )
    table = pd.DataFrame(rows)
    table.attrs.update(measured_on(device, "fp32"))
    return table


@torch.no_grad()
def full_window(model: PreTrainedModel, ahead: int) -> tuple[Callable[[], object], DynamicCache]:
    """(a chunk's pass through the first layer of a stream that heard noise until its window was full, the window)"""
    encoder, config, call = model.encoder, model.config.encoder_config, {}
    hook = encoder.layers[0].register_forward_pre_hook(
        lambda layer, args, arguments: call.update(args=args, arguments=arguments), with_kwargs=True
    )
    caches = {"past_key_values": None, "padding_cache": None}
    frames = 1 + config.subsampling_factor * ahead  # of features: the first chunk is shorter
    full = config.sliding_window + ahead + 1  # before the last chunk already
    try:
        while caches["past_key_values"] is None or caches["past_key_values"].get_seq_length() < full:
            noise_1SF = torch.randn(1, frames, config.num_mel_bins, device=model.device)
            output = encoder(noise_1SF, use_cache=True, num_lookahead_tokens=ahead, **caches)
            caches = {name: output[name] for name in caches}
            frames = config.subsampling_factor * (ahead + 1)
    finally:
        hook.remove()
    return partial(encoder.layers[0], *call["args"], **call["arguments"]), caches["past_key_values"]
