"""SpecAugment hides what it says and no more, in training alone, and the same at the same seed."""

import pytest
import tiny
import torch
from transformers import set_seed

from asrlib.models.blocks import spec_augment

FRAMES, BINS = 100, 20
LENGTHS = torch.tensor([100, 60, 9, 0])
NOTHING = dict(time_masks=0, time_mask_share=0.1, frequency_masks=0, frequency_mask_bins=5)
SEEDS = range(200)


def hidden(seed: int = 0, **settings) -> torch.Tensor:
    """Which of ones [B, M, F] are 0 afterwards."""
    torch.manual_seed(seed)
    ones_BMF = torch.ones(len(LENGTHS), FRAMES, BINS)
    augmented_BMF = spec_augment(ones_BMF, LENGTHS, **NOTHING | settings)
    assert ones_BMF.all() and set(augmented_BMF.unique().tolist()) <= {0.0, 1.0}
    return augmented_BMF == 0


def runs(hidden_S: torch.Tensor) -> list[int]:
    """The lengths of the stretches that are hidden."""
    parts = "".join("x" if value else " " for value in hidden_S.tolist()).split()
    return [len(part) for part in parts]


@pytest.mark.parametrize("share", [0.1, 0.34])
def test_one_stretch_of_time_of_at_most_its_share_inside_the_utterance(share):
    widths, starts = [set() for _ in LENGTHS], set()
    for seed in SEEDS:
        hidden_BMF = hidden(seed, time_masks=1, time_mask_share=share)
        for utterance, (hidden_MF, length) in enumerate(zip(hidden_BMF, LENGTHS.tolist(), strict=True)):
            assert torch.equal(hidden_MF.any(1), hidden_MF.all(1))  # all bins of a frame, or none
            assert not hidden_MF[length:].any() and len(runs(hidden_MF[:, 0])) <= 1
            widths[utterance] |= {int(hidden_MF[:, 0].sum())}
            if utterance == 0 and hidden_MF.any():
                starts.add(int(hidden_MF[:, 0].int().argmax()))
    for seen, length in zip(widths, LENGTHS.tolist(), strict=True):
        assert max(seen) == int(share * length) and min(seen) == 0
    assert len(widths[0]) >= 0.9 * (int(share * 100) + 1)  # uniform
    assert min(starts) < 5 and max(starts) > 80


@pytest.mark.parametrize("widest", [1, 5])
def test_one_band_of_frequency_of_at_most_its_width(widest):
    widths, places = set(), torch.zeros(BINS, dtype=torch.long)
    for seed in SEEDS:
        hidden_BMF = hidden(seed, frequency_masks=1, frequency_mask_bins=widest)
        assert torch.equal(hidden_BMF.any(1), hidden_BMF.all(1))
        for hidden_F in hidden_BMF[:, 0]:
            assert len(runs(hidden_F)) <= 1
            widths.add(int(hidden_F.sum()))
            places += hidden_F
    assert widths == set(range(widest + 1))
    assert (places > 0).all()  # the first and the last bin too


def test_utterances_are_masked_apart():
    hidden_BMF = hidden(time_masks=1, time_mask_share=0.5, frequency_masks=1, frequency_mask_bins=10)
    assert not torch.equal(hidden_BMF[0, :60, 0], hidden_BMF[1, :60, 0])
    hidden_BF = torch.stack([hidden(seed, frequency_masks=1, frequency_mask_bins=10)[:, 0] for seed in range(5)])
    assert any(not torch.equal(one[0], one[1]) for one in hidden_BF)


def test_several_masks_hide_several_stretches_and_no_more():
    counts = {"time": set(), "frequency": set()}
    for seed in SEEDS:
        both = hidden(seed, time_masks=3, time_mask_share=0.05, frequency_masks=2, frequency_mask_bins=2)[0]
        counts["time"].add(len(runs(both.all(1))))
        counts["frequency"].add(len(runs(both.all(0))))
        assert both.all(1).sum() <= 3 * 5 and both.all(0).sum() <= 2 * 2
    assert max(counts["time"]) == 3 and max(counts["frequency"]) == 2


def test_no_masks_change_nothing():
    x_BMF = torch.randn(4, FRAMES, BINS)
    assert torch.equal(spec_augment(x_BMF, LENGTHS, **NOTHING), x_BMF)


def test_bands_wider_than_there_are_bins_fit():
    widths = {int(hidden(seed, frequency_masks=1, frequency_mask_bins=27)[0, 0].sum()) for seed in SEEDS}
    assert max(widths) == BINS


def test_what_stays_is_left_as_it_is():
    x_BMF = torch.randn(4, FRAMES, BINS, requires_grad=True)
    augmented_BMF = spec_augment(
        x_BMF, LENGTHS, time_masks=2, time_mask_share=0.2, frequency_masks=2, frequency_mask_bins=5
    )
    kept_BMF = augmented_BMF != 0
    assert torch.equal(augmented_BMF[kept_BMF], x_BMF[kept_BMF]) and not kept_BMF.all()
    augmented_BMF.sum().backward()
    assert torch.equal(x_BMF.grad, kept_BMF.float())


# ---- in a model --------------------------------------------------------------------------------------------

MASKS = dict(time_masks=2, time_mask_share=0.4, frequency_masks=2, frequency_mask_bins=8)


def logits(model, seed: int) -> torch.Tensor:
    set_seed(seed)
    with torch.no_grad():
        return model(tiny.features()["input_features"], tiny.features()["attention_mask"]).logits


def heard_by(model) -> torch.Tensor:
    """What reaches the convolutions [B, M, F]."""
    heard = []
    hook = model.subsampling.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    logits(model, 0)
    hook.remove()
    return heard[0]


def test_it_is_off_in_evaluation_and_where_there_are_no_masks():
    masking, plain = tiny.encoder(**MASKS), tiny.encoder()
    assert torch.equal(logits(masking, 0), logits(plain, 1))
    assert torch.equal(heard_by(masking), heard_by(plain))
    assert torch.equal(logits(plain.train(), 0), logits(plain, 1))
    assert not torch.equal(logits(masking.train(), 0), logits(plain, 0))


def test_training_hides_normalised_features_the_same_at_the_same_seed():
    model = tiny.encoder(**MASKS)
    plain = heard_by(model)
    torch.testing.assert_close(plain, (tiny.features()["input_features"] - model.feature_mean) / model.feature_std)
    augmented = heard_by(model.train())
    assert torch.equal(augmented[augmented != 0], plain[augmented != 0])
    assert 0.1 < (augmented == 0).float().mean() < 0.9  # 0 is the mean of what is normalised
    assert torch.equal(logits(model, 3), logits(model, 3))
    assert not torch.equal(logits(model, 3), logits(model, 4))
