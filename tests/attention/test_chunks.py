"""The full pass in chunks is what a stream should hear: by formulas, by masks, and by transformers' own layers."""

import pytest
import tiny
import torch
import written_out
from torch import nn

from asrlib import to_standard_attention
from asrlib.attention.chunks import Chunks
from asrlib.models.blocks import BLOCKS
from asrlib.models.families.wav2vec2_conformer import BlockedSelfAttention
from asrlib.models.registry import attention_modules, family_of, frame_counts
from asrlib.streaming.streams import chunked_pass, chunks_of

VARIANTS = tiny.variants()
ENCODERS = list(BLOCKS)
CLOSE = dict(rtol=0, atol=1e-5)


# ---- who hears whom ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [None, 0, 1, 5, 100])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_a_frame_hears_its_chunk_and_what_is_left_of_it(size, left):
    frames, chunks = 11, Chunks(size, left)
    heard_by = []
    for query in range(frames):
        chunk = [frame for frame in range(frames) if frame // size == query // size]
        before = list(range(chunk[0])) if left is None else list(range(chunk[0]))[max(0, chunk[0] - left) :]
        heard_by.append([frame in before + chunk for frame in range(frames)])
    expected_TT = torch.tensor(heard_by)
    assert expected_TT.diagonal().all()
    for start in range(frames):
        for stop in range(start, frames + 1):
            assert torch.equal(chunks.visible(start, stop, frames), expected_TT[start:stop]), (start, stop)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(size=0), "a chunk of 0 frames holds nothing: give 1 or more"),
        (dict(size=-3), "a chunk of -3 frames"),
        (dict(size=1, left=-1), "left is -1 and lookahead 0: both must be 0 frames or more"),
        (dict(size=1, left=None, lookahead=-2), "left is None and lookahead -2: both"),
    ],
)
def test_chunks_that_hold_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Chunks(**settings)


def test_chunks_of_a_time_are_frames():
    wav2vec2, encoder = tiny.conformer().config, tiny.encoder().config  # 20 and 40 ms a frame
    assert chunks_of(wav2vec2, 320, 10, 80) == Chunks(16, 500, 4) and chunks_of(encoder, 320, 10, 80) == Chunks(
        8, 250, 2
    )
    assert chunks_of(encoder, 320, None) == Chunks(8, None, 0) and chunks_of(encoder, 320, 0).left == 0
    assert chunks_of(encoder, 1).size == 1  # at least
    assert Chunks(8, 250, 2).block == 10


@pytest.mark.parametrize("attention", ["mha", "linear"])
def test_a_mask_of_chunks_is_refused_where_it_would_not_be_what_streams(attention):
    features_BMF = tiny.features()["input_features"]
    for causal, chunks in ((False, Chunks(4)), (True, Chunks(4, None, 1))):
        with pytest.raises(ValueError, match=r"causal convolutions and no lookahead: use streaming\.chunked_pass"):
            tiny.encoder(attention=attention, causal=causal)(features_BMF, chunks=chunks)


# ---- the full pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [Chunks(1, 3), Chunks(3), Chunks(4, 5), Chunks(5, 0), Chunks(50, 2)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_causal_and_without_lookahead_it_is_the_mask(encoder, name, chunks):
    model, heard = tiny.encoder(encoder, causal=True, **VARIANTS[name]), tiny.features()
    features_BMF, mask_BM = heard["input_features"], heard["attention_mask"]
    with torch.no_grad():
        masked_BTV = model(features_BMF, mask_BM, chunks=chunks).logits
        whole_BTV = model(features_BMF, mask_BM).logits
    ours_BTV = chunked_pass(model, features_BMF, chunks, mask_BM)
    kept_BT = torch.arange(14) < torch.tensor([14, 10, 5])[:, None]
    torch.testing.assert_close(ours_BTV[kept_BT], masked_BTV[kept_BT], **CLOSE)
    assert ((ours_BTV - whole_BTV)[kept_BT].abs().max() > 1e-2) == (chunks.size < 14)


SOME = [Chunks(4, 3, 2), Chunks(1, 2, 1), Chunks(3, None, 4), Chunks(5, 0), Chunks(2, 7, 3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("encoder", "name", "chunks"),
    [
        *[("conformer", name, SOME[0]) for name in VARIANTS],
        *[("conformer", name, chunks) for name in ("mha", "linear", "mla split") for chunks in SOME[1:]],
        *[("branchformer", name, chunks) for name in ("mha", "linear", "mla_simple") for chunks in SOME[:2]],
    ],
    ids=str,
)
def test_it_is_what_a_stream_should_hear(encoder, name, chunks, causal):
    model = tiny.encoder(encoder, causal=causal, **VARIANTS[name]).double()
    features_1MF = tiny.features(torch.float64)["input_features"][:1, :52]  # 12 encoder frames
    weights = model.state_dict()
    with torch.no_grad():
        x_TD = model.frames(features_1MF)[0]
    size, left, ahead = chunks.size, chunks.left, chunks.lookahead
    reference = written_out.StreamedEncoder(weights, encoder, 4, tiny.LAYERS, size, left, ahead, causal)
    expected_TV = written_out.linear(weights, "lm_head", reference(x_TD))
    ours_TV = chunked_pass(model, features_1MF, chunks)[0]
    torch.testing.assert_close(ours_TV, expected_TV, rtol=0, atol=2e-6)  # positions are float32


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_one_chunk_of_everything_is_the_model(encoder, name):
    model, features_BMF = tiny.encoder(encoder, **VARIANTS[name]), tiny.features()["input_features"]
    with torch.no_grad():
        expected_BTV = model(features_BMF).logits
    for chunks in (Chunks(14), Chunks(100, 0), Chunks(9, 0, 5)):
        ours_BTV = chunked_pass(model, features_BMF, chunks)
        heard_all = slice(0, chunks.size)
        torch.testing.assert_close(ours_BTV[:, heard_all], expected_BTV[:, heard_all], **CLOSE)


@pytest.mark.parametrize("layout", [None, "joint", "split"])
def test_one_chunk_of_everything_is_the_model_of_transformers(layout):
    make = tiny.conformer if layout is None else lambda: tiny.latent_conformer(layout)
    samples_BS = tiny.padded_batch()["input_values"][:, :4_000]
    with torch.no_grad():
        expected_BTV = make()(samples_BS).logits
    torch.testing.assert_close(chunked_pass(make(), samples_BS, Chunks(100)), expected_BTV, **CLOSE)


@pytest.mark.parametrize("chunks", [Chunks(1, 4), Chunks(4, 6), Chunks(5), Chunks(6, 0)], ids=str)
@pytest.mark.parametrize("layout", [None, "joint", "split"])
def test_it_is_transformers_own_layers_where_chunks_are_masked(layout, chunks):
    """Attention by a mask of all frames with all, convolutions once a chunk with the frames they reach."""
    latent = None if layout is None else tiny.latent_conformer(layout)
    model = tiny.conformer() if layout is None else to_standard_attention(latent)
    model.set_attn_implementation("eager")
    samples_1S = tiny.padded_batch()["input_values"][:1, :8_000]
    encoder = model.wav2vec2_conformer.encoder
    with torch.no_grad():
        x_1TD = family_of(model.config).frames(model, samples_1S)
        frames = x_1TD.shape[1]
        heard_TT = torch.tensor([[hears(i, j, chunks) for j in range(frames)] for i in range(frames)])
        beyond_11TT = torch.zeros(1, 1, frames, frames).masked_fill(~heard_TT, -1e30)
        positions = encoder.embed_positions(x_1TD)
        for layer in encoder.layers:
            assert not isinstance(layer.self_attn, BlockedSelfAttention)
            x_1TD = x_1TD + 0.5 * layer.ffn1(layer.ffn1_layer_norm(x_1TD))
            x_1TD = x_1TD + layer.self_attn(layer.self_attn_layer_norm(x_1TD), beyond_11TT, positions)[0]
            reach, convolved = layer.conv_module.depthwise_conv.kernel_size[0] // 2, []
            for begin in range(0, frames, chunks.size):
                first = max(0, begin - reach)
                convolved.append(layer.conv_module(x_1TD[:, first : begin + chunks.size])[:, begin - first :])
            x_1TD = x_1TD + torch.cat(convolved, dim=1)
            x_1TD = layer.final_layer_norm(x_1TD + 0.5 * layer.ffn2(layer.ffn2_layer_norm(x_1TD)))
        expected_1TV = model.lm_head(encoder.layer_norm(x_1TD))
    torch.testing.assert_close(chunked_pass(latent or model, samples_1S, chunks), expected_1TV, rtol=0, atol=2e-5)


def hears(query: int, key: int, chunks: Chunks) -> bool:
    begin = query // chunks.size * chunks.size
    return (chunks.left is None or key >= begin - chunks.left) and key < begin + chunks.size


# ---- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [Chunks(3, 4, 2), Chunks(4), Chunks(1, 0, 1)], ids=str)
@pytest.mark.parametrize("name", [*VARIANTS, "wav2vec2", "wav2vec2 split"])
def test_of_a_batch_each_is_as_if_alone(name, chunks):
    if name in VARIANTS:
        model, heard = tiny.encoder(**VARIANTS[name]), tiny.features()
    else:
        model, heard = tiny.latent_conformer("split") if "split" in name else tiny.conformer(), tiny.padded_batch()
    inputs, mask = heard[model.main_input_name], heard["attention_mask"].bool()
    lengths_B = mask.sum(-1)
    junk = 1e3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(2))
    filled = torch.where(mask if inputs.dim() == 2 else mask[..., None], inputs, junk)
    ours_BTV = chunked_pass(model, filled, chunks, heard["attention_mask"])
    assert torch.isfinite(ours_BTV).all()
    for one, count in enumerate(frame_counts(model, lengths_B).tolist()):
        alone_1TV = chunked_pass(model, inputs[one, None, : lengths_B[one]], chunks)
        assert alone_1TV.shape[1] == count
        torch.testing.assert_close(ours_BTV[one, :count], alone_1TV[0], rtol=0, atol=2e-5)


def test_what_comes_later_than_the_lookahead_is_not_heard():
    """In no frame, however many layers: what is ahead does not add up."""
    chunks = Chunks(3, 4, 2)
    for model in (tiny.encoder(), tiny.encoder("branchformer", "linear"), tiny.encoder(num_hidden_layers=3)):
        features_1MF = tiny.features()["input_features"][:1].clone().requires_grad_()
        with torch.no_grad():
            before_TV = chunked_pass(model, features_1MF, chunks)[0]
            for frame in range(14):
                changed_1MF = features_1MF.clone()
                changed_1MF[:, 4 * frame + 6] += 1  # mel frames 4·t … 4·t + 6 make frame t: changes t and t + 1 alone
                changed_T = (chunked_pass(model, changed_1MF, chunks)[0] - before_TV).abs().amax(-1) > 1e-6
                may_T = torch.tensor([t // 3 * 3 + 3 + 2 > frame for t in range(14)])
                assert not changed_T[~may_T].any() and changed_T.any()


# ---- attention of our own in transformers' model ----------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_working_in_blocks_changes_nothing(positions, implementation, tmp_path):
    theirs, ours = (tiny.conformer(positions, implementation) for _ in range(2))
    names = list(ours.state_dict())
    plain = type(attention_modules(theirs)[0])
    blocked = family_of(ours.config).work_in_blocks(ours)
    assert blocked is ours and list(ours.state_dict()) == names
    assert all(type(module) is BlockedSelfAttention for module in attention_modules(ours))
    assert all(type(module) is plain for module in attention_modules(theirs))
    heard = tiny.padded_batch()
    with torch.no_grad():
        for mask in (heard["attention_mask"], None):
            expected_BTV = theirs(heard["input_values"], attention_mask=mask).logits
            ours_BTV = ours(heard["input_values"], attention_mask=mask).logits
            torch.testing.assert_close(ours_BTV, expected_BTV, rtol=0, atol=0 if positions != "relative" else 1e-5)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert all(type(module) is plain for module in attention_modules(again))
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_working_in_blocks_leaves_gradients_as_they_are():
    theirs, ours = (tiny.conformer(mask_time_prob=0.0).train() for _ in range(2))
    family_of(ours.config).work_in_blocks(ours)
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_dropout = 0.0
        model(**tiny.padded_batch()).loss.backward()
    for (name, ours_one), theirs_one in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if theirs_one.grad is not None:
            torch.testing.assert_close(ours_one.grad, theirs_one.grad, rtol=1e-3, atol=1e-5, msg=name)
