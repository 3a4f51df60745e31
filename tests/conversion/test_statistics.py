"""Statistics are those of unpadded frames alone, whatever the batches."""

import mmap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import family_models
import pytest
import tiny
import torch
from alone import run_alone

from asrlib import collect_statistics, convert
from asrlib.conversion.convert import decompose
from asrlib.conversion.factorize import InputMoments
from asrlib.conversion.methods import METHODS, latent_methods
from asrlib.conversion.quality import analyze_compression_quality
from asrlib.conversion.sums import InputSums, LayerStatistics
from asrlib.data.audio import UnusableAudio
from asrlib.models.registry import attention_modules
from asrlib.models.scratch import new_processor

KINDS = ["relative", "rotary", None]
SUMS = dict(atol=2e-3, rtol=1e-4)  # float32 models, hundreds of frames
COUNT = 12  # utterances, of which a batch holds a few


def collected(model, count: int = COUNT, **options):
    return collect_statistics(model, new_processor(), tiny.corpus(count), **{"batch_seconds": 4.0, **options})


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request):
    return tiny.conformer(request.param)


@pytest.fixture(scope="module")
def statistics(model):
    return collected(model, attention=True)


@pytest.fixture(scope="module")
def seen(model):
    return run_alone(model, tiny.corpus(COUNT))


@pytest.fixture(scope="module")
def relative_statistics():
    return collected(tiny.conformer())


# ---- what the layers read ----------------------------------------------------------------------------------


def test_they_are_those_of_every_utterance_alone(statistics, seen):
    for layer, alone in zip(statistics.layers, seen, strict=True):
        assert layer.frames == sum(map(len, alone["keys_read"])) == statistics.frames
        for sums, x_ND in (
            (layer.key, torch.cat(alone["keys_read"])),
            (layer.value, torch.cat(alone["values_read"])),
        ):
            torch.testing.assert_close(sums.total, x_ND.sum(0), **SUMS)
            torch.testing.assert_close(sums.products, sum(torch.outer(x, x) for x in x_ND), **SUMS)
            assert sums.cross is None and sums.wanted_total is None
        queries_NHE = torch.cat(alone["queries"])
        for head, products in enumerate(layer.queries):
            torch.testing.assert_close(products, sum(torch.outer(q, q) for q in queries_NHE[:, head]), **SUMS)


def test_only_rotary_positions_turn_what_keys_read(model, statistics):
    for layer in statistics.layers:
        turned = not torch.allclose(layer.key.products, layer.value.products, **SUMS)
        assert turned == (model.config.position_embeddings_type == "rotary")


def test_moments_are_around_the_mean_and_hardly_shrunk(statistics, seen):
    for layer, alone in zip(statistics.layers, seen, strict=True):
        moments, frames = layer.moments(), layer.frames
        for inputs, x_ND in ((moments.key, alone["keys_read"]), (moments.value, alone["values_read"])):
            x_ND = torch.cat(x_ND)
            torch.testing.assert_close(inputs.mean, x_ND.mean(0), atol=1e-4, rtol=1e-4)
            expected = torch.cov(x_ND.T, correction=0)
            assert (inputs.covariance - expected).norm() < 1e-3 * expected.norm()
            assert torch.linalg.eigvalsh(inputs.covariance)[0] > 0
        queries_NHE = torch.cat(alone["queries"])
        expected = torch.einsum("nhi,nhj->hij", queries_NHE, queries_NHE) / frames
        torch.testing.assert_close(moments.query, expected, atol=1e-4, rtol=1e-4)


def test_a_direction_in_which_nothing_varies_is_no_obstacle():
    sums = InputSums(4)
    sums.add(torch.eye(4)[1:])
    covariance = sums.moments().covariance
    assert covariance[0, 0] > 0 and torch.linalg.eigvalsh(covariance)[0] > 0


def test_the_covariance_is_shrunk_the_more_the_less_speech_there_is():
    few, many = InputSums(4), InputSums(4)
    x_ND = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    few.add(x_ND)
    for _ in range(100):
        many.add(x_ND)
    exact = torch.cov(x_ND.double().T, correction=0)
    less, more = ((sums.moments().covariance - exact).norm() for sums in (many, few))
    assert 0 < 50 * less < more < 0.01 * exact.norm()


def test_sums_of_what_should_be_read_tell_it_from_what_is():
    generator = torch.Generator().manual_seed(0)
    wanted_ND = torch.randn(5_000, 4, generator=generator) + 1
    x_ND = wanted_ND @ torch.randn(4, 4, generator=generator) + torch.randn(5_000, 4, generator=generator)
    sums = InputSums(4)
    for wanted, x in zip(wanted_ND.split(1_000), x_ND.split(1_000), strict=True):
        sums.add(x, wanted)
    moments = sums.moments()
    torch.testing.assert_close(moments.wanted_mean, wanted_ND.double().mean(0))
    expected = sum(torch.outer(w, x) for w, x in zip(wanted_ND - wanted_ND.mean(0), x_ND, strict=True)) / 5_000
    torch.testing.assert_close(moments.cross, expected.double(), atol=1e-3, rtol=0)


def test_the_right_input_is_taken_for_what_it_is_however_little_there_is_of_it():
    x_ND = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    sums = InputSums(4)
    sums.add(x_ND, x_ND)
    assert torch.equal(sums.moments().cross, sums.moments().covariance)
    assert torch.equal(sums.moments().wanted_mean, sums.moments().mean)


# ---- what attention makes of it ----------------------------------------------------------------------------


def test_sums_of_attention_are_a_loop_over_utterances_heads_and_queries(statistics, seen):
    for layer, alone in zip(statistics.layers, seen, strict=True):
        heads, width = len(layer.queries), tiny.WIDTH
        around = torch.zeros(width, width, dtype=torch.float64)
        totals, products = torch.zeros(heads, width).double(), torch.zeros(heads, width, width).double()
        queries = 0
        for x_TD, values_TD, weights_HTT in zip(
            alone["keys_read"], alone["values_read"], alone["weights"], strict=True
        ):
            for head in range(heads):
                for weights_T in weights_HTT[head]:
                    apart_TD = x_TD - weights_T @ x_TD
                    around += (weights_T[:, None] * apart_TD).T @ apart_TD
                    mean = weights_T @ values_TD
                    totals[head] += mean
                    products[head] += torch.outer(mean, mean)
                    queries += 1
        assert layer.attention.key.frames == queries
        torch.testing.assert_close(layer.attention.key.products, around, **SUMS)
        for head, sums in enumerate(layer.attention.values):
            assert sums.frames == queries // heads
            torch.testing.assert_close(sums.total, totals[head], **SUMS)
            torch.testing.assert_close(sums.products, products[head], **SUMS)


def test_moments_of_attention_are_its_sums_per_query(statistics, seen):
    for layer, alone in zip(statistics.layers, seen, strict=True):
        moments, sums = layer.moments(), layer.attention
        expected = sums.key.products / sums.key.frames
        assert (moments.attended_key.covariance - expected).norm() < 1e-3 * expected.norm()
        torch.testing.assert_close(moments.attended_key.mean, moments.key.mean)  # of frames: softmax knows none
        for head, inputs in enumerate(moments.attended_values):
            means_ND = torch.cat(
                [weights[head] @ x_TD for weights, x_TD in zip(alone["weights"], alone["values_read"], strict=True)]
            )
            torch.testing.assert_close(inputs.mean, means_ND.mean(0), atol=1e-4, rtol=1e-4)
            expected = torch.cov(means_ND.T, correction=0)
            assert (inputs.covariance - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("attention", [False, True])
def test_attention_is_looked_at_only_where_asked(tiny_model, attention):
    ways = set()  # to compute it: only the slow one shows its weights
    tiny_model.register_forward_pre_hook(lambda model, args: ways.add(model.config._attn_implementation))
    layer = collected(tiny_model, attention=attention).layers[0]
    assert ways == {"eager" if attention else "sdpa"}
    moments = layer.moments()
    assert [part is not None for part in (layer.attention, moments.attended_key, moments.attended_values)] == [
        attention
    ] * 3


# ---- batches -----------------------------------------------------------------------------------------------


def held(thing) -> dict[str, torch.Tensor]:
    """All tensors in the sums of a layer, by where they are; not the sample."""
    if torch.is_tensor(thing):
        return {"": thing}
    parts = dict(enumerate(thing)) if isinstance(thing, list) else getattr(thing, "__dict__", {})
    return {
        f".{name}{rest}": tensor
        for name, part in parts.items()
        if name != "sample"
        for rest, tensor in held(part).items()
    }


def test_the_size_of_a_batch_changes_nothing(model, statistics):
    alone = collected(model, attention=True, batch_seconds=0.01)
    for ours, theirs in zip(statistics.layers, alone.layers, strict=True):
        assert ours.frames == theirs.frames
        expected = held(theirs)
        for name, tensor in held(ours).items():
            torch.testing.assert_close(tensor, expected[name], **SUMS, msg=lambda m, name=name: f"{name}: {m}")


def test_more_speech_takes_no_more_memory(monkeypatch):
    monkeypatch.setattr("asrlib.conversion.sums.SAMPLE_FRAMES", 100)
    few, many = (collected(tiny.conformer(), count, attention=True) for count in (6, 24))
    for less, more in zip(few.layers, many.layers, strict=True):
        assert more.frames > 3 * less.frames
        sizes = {name: tensor.shape for name, tensor in held(less).items()}
        assert len(sizes) > 5 and sizes == {name: tensor.shape for name, tensor in held(more).items()}
        assert more.sample.kept_BT.numel() <= 100
    assert len(many.inputs["input_values"]) == len(many.layers[0].sample.kept_BT)


@pytest.mark.parametrize("sample_frames", [1, 100, 1000])
def test_the_sample_tells_how_far_an_output_is_off_over_unpadded_frames(monkeypatch, model, seen, sample_frames):
    monkeypatch.setattr("asrlib.conversion.sums.SAMPLE_FRAMES", sample_frames)
    for batch_seconds in (1.9, 4.0):  # two utterances a batch, and more
        statistics = collected(model, batch_seconds=batch_seconds)
        longest_first = sorted(range(COUNT), key=lambda i: -tiny.corpus(COUNT)[i].seconds)
        other = tiny.conformer(model.config.position_embeddings_type)
        for layer, attention, alone in zip(statistics.layers, attention_modules(other), seen, strict=True):
            with torch.no_grad():
                assert layer.sample.error(attention) < 1e-3
                attention.linear_out.weight.zero_()
                attention.linear_out.bias.zero_()
                utterances = longest_first[: len(layer.sample.kept_BT)]
                expected = torch.cat([alone["attended"][i] for i in utterances]).norm().item()
                assert layer.sample.error(attention) == pytest.approx(expected, rel=1e-4)


def test_the_speech_comes_the_same_again(relative_statistics):
    first, second = list(relative_statistics.speech), list(relative_statistics.speech)
    assert len(first) > 1
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys() == {"input_values", "attention_mask"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    taken = len(relative_statistics.inputs["input_values"])
    assert torch.equal(relative_statistics.inputs["input_values"], first[0]["input_values"][:taken])


# ---- the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_came(implementation, broken):
    model = tiny.conformer(attention=implementation).train()
    model.wav2vec2_conformer.feature_extractor.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    *others, last = tiny.corpus(COUNT).utterances
    corpus = replace(tiny.corpus(COUNT), utterances=(*others, replace(last, source=no_file) if broken else last))
    with pytest.raises(UnusableAudio) if broken else nullcontext():
        collect_statistics(model, new_processor(), corpus, batch_seconds=1.0, attention=True)
    assert model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == modes
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and value.device.type == "cpu", name
    model(**tiny.padded_batch()).loss.backward()  # can still be trained


def no_file():
    raise OSError("gone")


# ---- impossible, and too little ----------------------------------------------------------------------------


def test_calibration_on_a_test_split_is_refused(tiny_model):
    with pytest.raises(ValueError, match="would spoil the test"):
        collect_statistics(tiny_model, new_processor(), tiny.corpus(4, split="test-clean"))


def test_too_little_speech_is_refused_and_little_warned_of():
    wide = tiny.conformer(hidden_size=64, intermediate_size=64)
    with pytest.raises(ValueError, match="give at least 13 s"):
        collected(wide, 1)
    with pytest.warns(UserWarning, match="13 s are enough"):
        collected(wide, 6)


def test_only_as_much_speech_as_asked_is_taken(tiny_model):
    some = collected(tiny_model, 40, max_seconds=7.0)
    assert 4.0 < some.frames / 50 < 7.5


# ---- conversion with them ----------------------------------------------------------------------------------


def test_two_sided_takes_the_balance_that_serves_the_output_best(tiny_model, relative_statistics):
    batch = {name: value for name, value in tiny.padded_batch().items() if name != "labels"}
    latents = {
        method: convert(tiny_model, 5, method=method, statistics=relative_statistics) for method in ("svd", "two_sided")
    }
    mean = {
        method: analyze_compression_quality(tiny_model, latent, batch)["output_error"].mean()
        for method, latent in latents.items()
    }
    assert mean["two_sided"] < mean["svd"]


def test_attended_needs_statistics_of_attention(tiny_model, relative_statistics):
    with pytest.raises(ValueError, match=r"collect_statistics\(..., attention=True\)"):
        convert(tiny_model, 5, method="attended", statistics=relative_statistics)


@pytest.mark.parametrize("method", latent_methods())
def test_every_method_is_exact_at_full_rank(model, statistics, method):
    batch = tiny.padded_batch()
    widths = {"joint": tiny.WIDTH, "split": 2 * tiny.WIDTH}
    if model.config.position_embeddings_type == "rotary" or "joint" not in METHODS[method].layouts:
        del widths["joint"]
    with torch.no_grad():
        wanted = model(**batch).logits
        for layout, width in widths.items():
            latent = convert(model, width, layout=layout, method=method, statistics=statistics)
            torch.testing.assert_close(latent(**batch).logits, wanted, atol=1e-4, rtol=0)


# ---- bounded memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conformer", "rotary", "whisper"])
def test_layers_take_turns_where_memory_is_short(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    whisper = kind == "whisper"
    model = family_models.whisper() if whisper else tiny.conformer("rotary" if kind == "rotary" else "relative")
    processor = family_models.processor_of("whisper") if whisper else new_processor()
    how = dict(batch_seconds=4.0, attention=True)
    whole = collect_statistics(model, processor, tiny.corpus(COUNT), **how)
    parted = collect_statistics(model, processor, tiny.corpus(COUNT), **how, memory=1e-9)
    sizes = [LayerStatistics.size(module, True) for module in attention_modules(model, parted.parts)]
    assert (whole.passes, parted.passes) == (1, len(whole.layers))
    assert parted.frames == whole.frames and parted.parts.keys() == whole.parts.keys()
    for ours, theirs, size in zip(parted.layers, whole.layers, sizes, strict=True):
        for one, other in zip(inputs_of(ours), inputs_of(theirs), strict=True):
            assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance)
        assert size == sum(one.covariance.numel() * 8 for one in inputs_of(theirs))
    half = collect_statistics(model, processor, tiny.corpus(COUNT), **how, memory=2.5 * sizes[0] / 2**30)
    assert half.passes == -(-len(sizes) // 2)
    layout = "split" if kind == "rotary" else "joint"
    settings = dict(cache_cut=0.75, layout=layout, method="attended", ranks="sensitivity")
    ours, theirs = (convert(model, statistics=each, **settings).state_dict() for each in (parted, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(tmp_path.iterdir())  # nothing is left, whatever becomes of this process


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the memory of a process is read as Linux tells it")
def test_what_is_on_disk_leaves_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    x_ND, before, kept = torch.randn(4, 1024), resident(), []
    for _ in range(4):
        group = [InputSums(1024) for _ in range(8)]  # 64 MiB
        for sums in group:
            sums.add(x_ND)
        assert resident() - before > 60 * 2**20
        for sums in group:
            sums.to_disk()
        kept += group
        assert resident() - before < 24 * 2**20  # what was allocated on the way


def inputs_of(layer) -> list[InputMoments]:
    moments = layer.moments()
    apart = [] if layer.value is layer.key else [moments.value]
    return [moments.key, *apart, moments.attended_key, *moments.attended_values]


def test_decompositions_on_demand_are_those_at_once():
    model, processor = family_models.whisper(), family_models.processor_of("whisper")
    parts = ["decoder", "cross"]
    how = dict(batch_seconds=4.0, attention=True, parts=parts)
    whole, parted = (collect_statistics(model, processor, tiny.corpus(COUNT), **how, memory=m) for m in (None, 1e-9))
    settings = dict(cache_cut=0.75, method="attended", ranks="energy", parts=parts, shared=True)
    ours, theirs = (convert(model, statistics=each, **settings).state_dict() for each in (parted, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    asked = decompose(model, "joint", "two_sided", parted, parts, shared=True)
    assert len(asked) == len(parted.layers) and asked[-1][0].directions[0] is asked[-2][0].directions[0]
    assert asked[0] is asked[0] and asked[0] is not asked[len(asked) - 1]
