"""Relative attention is its formula, whatever the blocks, and its memory grows with the length alone."""

import math

import pytest
import torch
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import (
    Wav2Vec2ConformerFeatureEncoder,
    Wav2Vec2ConformerRelPositionalEmbedding,
)
from written_out import relative_scores

from asrlib.attention import relative
from asrlib.attention.relative import position_scores, queries_per_block, relative_attention, sinusoids
from asrlib.measuring.timing import peak_memory_bytes
from asrlib.models.families.wav2vec2_conformer import BlockedFeatureEncoder

HEADS, SIZE = 2, 4
LENGTHS = [1, 2, 3, 7, 8, 9, 13, 16]
CLOSE = dict(rtol=0, atol=1e-12)


@pytest.fixture
def blocks_of(monkeypatch):
    """A function that makes every block as many queries long."""

    def set_rows(rows: int) -> None:
        monkeypatch.setattr(relative, "BLOCK_SCORES", 0)
        monkeypatch.setattr(relative, "SMALLEST_BLOCK", rows)

    return set_rows


def arguments(frames: int, batch: int = 2, padded: bool = True, dtype=torch.float64) -> list:
    """Of relative_attention; the second utterance is padded, if there is more than one frame."""
    generator = torch.Generator().manual_seed(frames)
    shapes = [(batch, HEADS, frames, SIZE)] * 3 + [(HEADS, 2 * frames - 1, SIZE)] + [(HEADS, SIZE)] * 2
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    kept_BT = torch.ones(batch, frames, dtype=torch.bool)
    kept_BT[1:, (frames + 1) // 2 :] = False
    return [*tensors, kept_BT if padded else None]


# ---- positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 10])
def test_sinusoids_are_those_of_every_distance_the_largest_first(width):
    frames = 6
    encodings_1PD = sinusoids(frames, width)
    assert encodings_1PD.shape == (1, 2 * frames - 1, width) and encodings_1PD.dtype == torch.float32
    for place, distance in enumerate(range(frames - 1, -frames, -1)):
        for pair in range(width // 2):
            angle = distance * 10_000 ** (-2 * pair / width)
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(encodings_1PD[0, place, 2 * pair : 2 * pair + 2], expected, rtol=0, atol=1e-6)
    assert sinusoids(frames, width, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("frames", [1, 2, 9, 1500])
def test_sinusoids_are_those_of_transformers(frames):
    config = Wav2Vec2ConformerConfig(hidden_size=144, max_source_positions=2000)
    theirs = Wav2Vec2ConformerRelPositionalEmbedding(config)(torch.zeros(1, frames, 144))
    assert torch.equal(sinusoids(frames, 144), theirs)


@pytest.mark.parametrize("frames", LENGTHS)
def test_position_scores_of_any_block_are_aligned_with_the_keys(frames):
    query_BHTE, _, _, positions_HPE, *_ = arguments(frames)
    expected_BHTT = torch.zeros(2, HEADS, frames, frames, dtype=torch.float64)
    for i in range(frames):
        for j in range(frames):
            expected_BHTT[:, :, i, j] = (query_BHTE[:, :, i] * positions_HPE[:, frames - 1 - i + j]).sum(-1)
    for start in range(frames):
        for stop in range(start + 1, frames + 1):
            ours = position_scores(query_BHTE[:, :, start:stop], positions_HPE, start, frames)
            torch.testing.assert_close(ours, expected_BHTT[:, :, start:stop], **CLOSE)


# ---- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_it_is_the_formula(frames, padded, return_weights):
    query, key, value, positions, u, v, kept = arguments(frames, padded=padded)
    output, weights = relative_attention(query, key, value, positions, u, v, kept, return_weights=return_weights)
    assert (weights is not None) == return_weights
    for utterance in range(2):
        kept_T = torch.ones(frames, dtype=torch.bool) if kept is None else kept[utterance]
        for head in range(HEADS):
            of_head = (query[utterance, head], key[utterance, head], positions[head], u[head], v[head])
            expected_TT = relative_scores(*of_head).masked_fill(~kept_T, -math.inf).softmax(-1)
            expected_TE = expected_TT[:, kept_T] @ value[utterance, head][kept_T]
            torch.testing.assert_close(output[utterance, head], expected_TE, **CLOSE)
            if return_weights:
                torch.testing.assert_close(weights[utterance, head], expected_TT, **CLOSE)


def outputs_and_gradients(frames: int, padded: bool, return_weights: bool) -> list[torch.Tensor]:
    *tensors, kept = arguments(frames, padded=padded)
    output, weights = relative_attention(*tensors, kept, return_weights=return_weights)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    (output * direction).sum().backward()
    return [output, *([weights] if return_weights else []), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("frames", LENGTHS)
def test_blocks_change_nothing_and_no_gradient(blocks_of, frames, return_weights):
    for padded in (False, True):
        whole = outputs_and_gradients(frames, padded, return_weights)
        for rows in (1, 2, 3, 4, 8):
            blocks_of(rows)
            for ours, theirs in zip(outputs_and_gradients(frames, padded, return_weights), whole, strict=True):
                torch.testing.assert_close(ours, theirs, **CLOSE)
            blocks_of(1000)


def test_gradients_are_those_of_finite_differences(blocks_of):
    blocks_of(2)
    *tensors, kept = arguments(5)
    assert torch.autograd.gradcheck(lambda *values: relative_attention(*values, kept)[0], tensors)


@pytest.mark.parametrize("return_weights", [False, True])
def test_without_a_single_frame_nothing_is_no_number(return_weights):
    *tensors, kept = arguments(6)
    kept[1] = False
    output, _ = relative_attention(*tensors, kept, return_weights=return_weights)
    assert torch.isfinite(output).all()
    output[0].sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)


@pytest.mark.parametrize("return_weights", [False, True])
def test_dropout_is_of_the_weights_and_right_on_average(return_weights):
    torch.manual_seed(0)
    *tensors, _ = arguments(5, batch=1, padded=False, dtype=torch.float32)
    plain, _ = relative_attention(*tensors)
    many = [tensor.expand(4_000, -1, -1, -1) for tensor in tensors[:3]]
    dropped, weights = relative_attention(*many, *tensors[3:], dropout=0.3, return_weights=return_weights)
    assert (dropped[0] - dropped[1]).abs().max() > 0.1
    torch.testing.assert_close(dropped.mean(0, keepdim=True), plain, rtol=0, atol=0.1)
    kept_share = (dropped.var(0) > 0).float().mean()
    assert kept_share == 1  # no output is spared, as it would be were only some frames dropped
    if return_weights:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))  # as they were before


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 100, 1000, 4096, 50_000])
def test_a_block_is_as_long_as_its_scores_allow(frames):
    rows = queries_per_block(frames)
    assert rows >= relative.SMALLEST_BLOCK
    assert rows * frames <= max(relative.BLOCK_SCORES, relative.SMALLEST_BLOCK * frames)
    assert (rows + 1) * frames > relative.BLOCK_SCORES


def peak(frames: int) -> int:
    *tensors, kept = arguments(frames, batch=1, dtype=torch.float32)
    with torch.no_grad():
        return peak_memory_bytes(lambda: relative_attention(*tensors, kept), torch.device("cpu"))


def test_memory_grows_with_the_length_and_not_with_its_square(blocks_of):
    assert peak(4000) < 2 * peak(1000)  # a block has as many scores, the keys are four times as many
    assert peak(8000) < 3 * peak(4000)  # and from here on a block is as long as the shortest may be
    blocks_of(4000)
    assert peak(1000) > 10 * peak(250)  # what it would be in one block


@pytest.mark.parametrize("samples", [400, 719, 720, 16_000, 81_920 + 80, 82_240, 200_000])
def test_a_feature_encoder_in_blocks_gives_what_transformers_does(samples):
    """Blocks of 256 frames of 320 samples, that end on a sample, or one before or after it."""
    config = Wav2Vec2ConformerConfig(feat_extract_norm="layer", conv_dim=[8] * 7, conv_bias=True)
    torch.manual_seed(0)
    whole = Wav2Vec2ConformerFeatureEncoder(config).eval()
    blocked = BlockedFeatureEncoder(config).eval()
    blocked.load_state_dict(whole.state_dict())
    x_BS = torch.randn(2, samples)
    with torch.no_grad():
        torch.testing.assert_close(blocked(x_BS), whole(x_BS), rtol=0, atol=2e-6)
    blocked.train()(x_BS[:, :400]).sum().backward()  # in training it is transformers' own
    assert all(parameter.grad is not None for parameter in blocked.parameters())
