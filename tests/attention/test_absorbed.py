"""Absorbed latents are the expanded ones with less work; positions are projected once as long as nothing changes."""

import copy

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from asrlib.attention import kinds
from asrlib.attention.chunks import Chunks
from asrlib.attention.formats import cache_format
from asrlib.attention.kinds import LatentMemory, absorbing_pays, attention_kind
from asrlib.attention.relative import sinusoids
from asrlib.models.encoder import SpeechEncoderConfig
from asrlib.models.registry import attention_modules
from asrlib.streaming.memory import StreamMemory

WIDTH, HEADS = 16, 4
LATENTS = {
    "joint": dict(latent_dim=[5]),
    "wide": dict(latent_dim=[30]),
    "split": dict(latent_dim=[9], latent_layout="split", latent_key_dim=[6]),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def layer(
    latent: str = "joint", kind: str = "mla_simple", implementation: str = "sdpa", dtype=torch.float64, **changes
):
    """Random, and no bias is zero."""
    settings = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, attention_dropout=0.0)
    config = SpeechEncoderConfig(attention=kind, **settings | LATENTS[latent] | changes)
    config._attn_implementation = implementation
    attention = attention_kind(kind)(config, 0).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return attention.to(dtype)


def inputs(frames: int, batch: int = 3, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x_BTD = torch.randn(batch, frames, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return x_BTD.to(dtype), sinusoids(frames, WIDTH, dtype=dtype)


def in_form(attention: LatentMemory, form: str, function):
    attention.form = form
    with torch.no_grad():
        return function()


def close(ours, theirs, dtype):
    """Of the largest number."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(theirs.abs().max())))


# ---- absorbed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunks", [None, Chunks(1, 2), Chunks(3, 1), Chunks(4)], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("latent", LATENTS)
def test_absorbed_is_expanded(latent, implementation, chunks, dtype):
    for kind in ("mla_simple", "mla"):
        attention = layer(latent, kind, implementation, dtype)
        for frames in (1, 2, 9):
            x_BTD, positions_1PD = inputs(frames, dtype=dtype)
            lengths_B1 = torch.tensor([[frames], [max(1, frames - 2)], [1]])
            for kept_BT in (None, torch.arange(frames) < lengths_B1):
                outcomes = [
                    in_form(attention, form, lambda: attention(x_BTD, kept_BT, positions_1PD, chunks))  # noqa: B023
                    for form in ("absorbed", "expanded")
                ]
                close(outcomes[0][0], outcomes[1][0], dtype)
                assert (outcomes[0][1] is None) == (implementation == "sdpa")
                if implementation == "eager":
                    close(outcomes[0][1], outcomes[1][1], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chunks", [Chunks(1, 3), Chunks(3), Chunks(2, 5, 2), Chunks(4, 0, 1)], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("latent", LATENTS)
def test_absorbed_is_expanded_whatever_the_past(latent, implementation, chunks, dtype):
    attention = layer(latent, "mla_simple", implementation, dtype)
    x_BTD, _ = inputs(11, dtype=dtype)

    def heard() -> list[torch.Tensor]:
        memory, outputs = StreamMemory(chunks, cache_format("float32" if dtype == torch.float32 else "bfloat16")), []
        for first in range(0, 11, chunks.size):
            block_BnD = x_BTD[:, first : first + chunks.block]
            memory.central = min(chunks.size, block_BnD.shape[1])
            memory.kept_Bn = torch.ones(block_BnD.shape[:2], dtype=torch.bool)
            memory.kept_Bn[1, 2:] = False
            output_BnD, weights_BHnT = attention(block_BnD, past=memory)
            assert weights_BHnT is None or weights_BHnT.shape[2:] == (
                block_BnD.shape[1],
                memory_length(first, block_BnD),
            )
            outputs.append(output_BnD)
        return outputs

    def memory_length(first: int, block_BnD: torch.Tensor) -> int:
        return block_BnD.shape[1] + (first if chunks.left is None else min(first, chunks.left))

    for ours, theirs in zip(in_form(attention, "absorbed", heard), in_form(attention, "expanded", heard), strict=True):
        close(ours, theirs, dtype)


def multiplications(attention: LatentMemory, form: str, queries: int, frames: int) -> int:
    """Counted as they are made, those of the scores of positions too."""
    x_1TD, _ = inputs(frames, batch=1)
    positions_HPE = torch.zeros(HEADS, 2 * frames - 1, WIDTH // HEADS, dtype=torch.float64)
    settings = dict(bias_u_HE=attention.pos_bias_u, bias_v_HE=attention.pos_bias_v, return_weights=True)
    query_1HnE = attention.heads(attention.linear_q(x_1TD))[:, :, frames - queries :]
    held = attention.remembered(x_1TD)
    with FlopCounterMode(display=False) as counter:
        in_form(
            attention,
            form,
            lambda: attention.attend(query_1HnE, held, positions_HPE=positions_HPE, start=frames - queries, **settings),
        )
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("latent", LATENTS)
def test_absorbing_pays_where_it_multiplies_less(latent):
    attention = layer(latent)
    outcomes = set()
    for queries in (1, 2, 4, 13, 40):
        for frames in (1, 5, 40, 70):
            if queries <= frames:
                absorbed, expanded = (
                    multiplications(attention, form, queries, frames) for form in ("absorbed", "expanded")
                )
                pays = absorbing_pays(queries, frames, HEADS, WIDTH // HEADS, attention.latent_kv.ranks)
                assert pays == (absorbed < expanded), (queries, frames, absorbed, expanded)
                outcomes.add(pays)
    assert outcomes == {False, True}


@pytest.mark.parametrize("pays", [False, True])
def test_the_form_is_the_cheaper_and_never_absorbed_in_training(pays, monkeypatch):
    """Where weights of attention are dropped, they do not add up to one, and the bias of values would be too much."""
    monkeypatch.setattr(kinds, "absorbing_pays", lambda *args: pays)
    attention = layer()
    forms = []
    real = kinds.relative_attention

    def watched(*args, absorbed_HER=None, **how):
        forms.append("expanded" if absorbed_HER is None else "absorbed")
        return real(*args, absorbed_HER=absorbed_HER, **how)

    monkeypatch.setattr(kinds, "relative_attention", watched)
    x_BTD, positions_1PD = inputs(4)
    assert attention.form == "auto"
    for mode in (False, True):
        attention.train(mode)(x_BTD, None, positions_1PD)
    assert forms == ["absorbed" if pays else "expanded", "expanded"]


def test_what_the_choice_looks_at_is_what_is_worked(monkeypatch):
    asked = []
    monkeypatch.setattr(kinds, "absorbing_pays", lambda *args: asked.append(args) or False)
    attention, memory = layer("split"), StreamMemory(Chunks(3, 5), cache_format("float32"))
    x_BTD, _ = inputs(9)
    with torch.no_grad():
        for first in (0, 3, 6):
            attention(x_BTD[:, first : first + 3], past=memory)
    assert asked == [(3, frames, HEADS, WIDTH // HEADS, (6, 3)) for frames in (3, 6, 8)]


# ---- projected positions -----------------------------------------------------------------------------------


def counted(attention) -> list[int]:
    """Grows by one, the number of distances, whenever positions are projected."""
    calls = []
    attention.linear_pos.register_forward_hook(lambda _, args, output: calls.append(args[0].shape[1]))
    return calls


@pytest.mark.parametrize(
    "make", [lambda: layer(), lambda: attention_modules(tiny.latent_conformer("joint"))[0].double()]
)
def test_positions_are_projected_once_a_length(make):
    attention = make()
    calls = counted(attention)
    with torch.no_grad():
        for frames in (4, 4, 7, 7, 4, 4):
            x_BTD, positions_1PD = inputs(frames)
            output_BTD = attention(x_BTD, None, positions_1PD)[0]
        assert calls == [7, 13, 7]
        fresh = make()
        assert torch.equal(fresh(x_BTD, None, positions_1PD)[0], output_BTD)


def test_a_long_recordings_positions_are_not_kept():
    attention = layer()
    calls = counted(attention)
    many = kinds.KEPT_POSITIONS // 2 + 2
    with torch.no_grad():
        for _ in range(2):
            attention.project_positions(torch.zeros(1, 2 * many - 1, WIDTH, dtype=torch.float64))
    assert len(calls) == 2 and not hasattr(attention, "_projected")


def replace(attention):
    attention.linear_pos.weight = torch.nn.Parameter(attention.linear_pos.weight.detach() * 2)


def train_fused(attention):
    """As the Trainer does it; this optimiser does not count the weight's version up."""
    attention.train()
    attention.project_positions(inputs(5)[1])
    torch.optim.AdamW([attention.linear_pos.weight], lr=0.5, fused=True).step()
    attention.eval()


CHANGES = {
    "trained, fused": train_fused,
    "in place": lambda attention: attention.linear_pos.weight.mul_(2),
    "replaced": replace,
    "loaded": lambda attention: attention.load_state_dict({k: 2 * v for k, v in attention.state_dict().items()}),
    "assigned": lambda attention: attention.load_state_dict(
        {k: 2 * v for k, v in attention.state_dict().items()}, assign=True
    ),
    "trained": lambda attention: torch.optim.SGD([attention.linear_pos.weight], lr=0.5).step(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_positions_are_projected_anew_where_the_weight_has_changed(change):
    attention = layer()
    embeddings_1PD = inputs(5)[1]
    attention.linear_pos.weight.grad = torch.ones_like(attention.linear_pos.weight)
    with torch.no_grad():
        before_HPE = attention.project_positions(embeddings_1PD).clone()
        CHANGES[change](attention)
        after_HPE = attention.project_positions(embeddings_1PD)
        assert torch.equal(after_HPE, attention.heads(attention.linear_pos(embeddings_1PD))[0])
    assert not torch.allclose(after_HPE, before_HPE)


def test_a_weight_that_moved_into_the_place_of_the_old_is_another():
    """Same address, same version: memory that was freed is soon given out again."""
    attention = layer()
    embeddings_1PD, start = inputs(5)[1], attention.linear_pos.weight.detach().clone()
    with torch.no_grad():
        attention.linear_pos.weight = torch.nn.Parameter(start.clone())
        attention.project_positions(embeddings_1PD)
        place = attention.linear_pos.weight.data_ptr()
        attention.linear_pos.weight = None
        others = [start * factor for factor in range(2, 500)]
        for other in [*(one for one in others if one.data_ptr() == place), others[0]]:
            attention.linear_pos.weight = torch.nn.Parameter(other)
            kept_HPE = attention.project_positions(embeddings_1PD)
            assert torch.equal(kept_HPE, attention.heads(attention.linear_pos(embeddings_1PD))[0])


def test_another_precision_is_another_projection():
    attention = layer()
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64):
            attention.to(dtype)
            x_BTD, positions_1PD = inputs(5, dtype=dtype)
            assert attention(x_BTD, None, positions_1PD)[0].dtype == dtype
            projected_HPE = attention.project_positions(positions_1PD)
            assert projected_HPE.dtype == dtype
            assert torch.equal(projected_HPE, attention.heads(attention.linear_pos(positions_1PD))[0])


def test_autocast_and_full_precision_take_turns():
    model, features_BMF = tiny.encoder(), tiny.features()["input_features"]
    with torch.no_grad():
        exact_BTV = tiny.encoder()(features_BMF).logits
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                rough_BTV = model(features_BMF).logits
            assert torch.equal(model(features_BMF).logits, exact_BTV)
            assert not torch.equal(rough_BTV.float(), exact_BTV)


def test_gradients_reach_the_projection():
    attention = layer()
    x_BTD, positions_1PD = inputs(5)
    with torch.no_grad():
        attention(x_BTD, None, positions_1PD)  # and keeps the projection, without gradients
    for mode in (False, True):
        attention.zero_grad()
        attention.train(mode)(x_BTD, None, positions_1PD)[0].square().sum().backward()
        assert attention.linear_pos.weight.grad.abs().max() > 1e-6
    with torch.inference_mode():
        attention(*inputs(6)[:1], None, inputs(6)[1])
    attention.zero_grad()
    attention(inputs(6)[0], None, inputs(6)[1])[0].square().sum().backward()
    assert attention.linear_pos.weight.grad.abs().max() > 1e-6


def test_a_copy_of_a_model_projects_for_itself():
    attention = layer()
    embeddings_1PD = inputs(5)[1]
    with torch.no_grad():
        attention.project_positions(embeddings_1PD)
        other = copy.deepcopy(attention)
        other.linear_pos.weight.mul_(3)
        torch.testing.assert_close(
            other.project_positions(embeddings_1PD), 3 * attention.project_positions(embeddings_1PD)
        )
    assert "_projected" not in str(list(other.state_dict()))
