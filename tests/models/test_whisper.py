"""Whisper with latents in its encoder, its decoder and its cross-attention, each apart."""

import itertools

import family_models
import pytest
import tiny
import torch
from family_models import HEADS, LAYERS, WIDTH, processor_of
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq

import asrlib
from asrlib.attention.cache import cached_numbers, held_bytes
from asrlib.conversion.convert import convert, decompose, measure_sensitivity
from asrlib.conversion.factorize import LayerWeights
from asrlib.conversion.quality import analyze_compression_quality, summarise_quality
from asrlib.conversion.statistics import observed
from asrlib.conversion.twins import factors_of
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.measuring.methods import benchmark, errors_by_width
from asrlib.measuring.recipes import RECIPES, Recipe
from asrlib.models.families.whisper import CACHED, PARTS, generate_and_keep
from asrlib.models.inference import spoken_logits
from asrlib.models.registry import attention_modules, attention_parts, latent_modules

FRAMES = 50  # of the encoder
PROMPT = 4  # tokens that `generate` is given: start, language, task, no timestamps
CHOICES = [parts for count in (1, 2, 3) for parts in itertools.combinations(PARTS, count)]
METHODS = ("svd", "whitened", "two_sided", "attended")
ENGLISH = dict(language="en", task="transcribe")


def batch_of(count: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Noise of different lengths as the model reads it, with labels."""
    processor = processor_of("whisper")
    batch = SpeechCollator(processor)(list(SpeechDataset(tiny.corpus(count), processor)))
    return batch | {"input_features": batch["input_features"].to(dtype)}


@torch.no_grad()
def said(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the tokens that are no padding [N, V]."""
    return model(**batch).logits[batch["labels"] >= 0]


@pytest.fixture(scope="module")
def model():
    return family_models.whisper()


@pytest.fixture(scope="module")
def statistics(model):
    how = dict(attention=True, parts=PARTS)
    return asrlib.collect_statistics(model, processor_of("whisper"), tiny.corpus(24), **how)


def latent_of(model, layout: str, parts=PARTS):
    """Below full rank, all widths of their own."""
    count, least = LAYERS * len(parts), 5 if layout == "joint" else 9
    return convert(model, list(range(least, least + count)), layout=layout, parts=parts)


# ---- the twin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "tolerance"), [("sdpa", 1e-9), ("eager", 1e-9)])
@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
def test_at_full_width_the_twin_says_what_transformers_class_says(parts, implementation, tolerance):
    model, batch = family_models.whisper().double(), batch_of(dtype=torch.float64)
    model.set_attn_implementation(implementation)
    wanted_NV = said(model, batch)
    assert wanted_NV.std() > 0.3
    for layout, width in (("joint", WIDTH), ("split", 2 * WIDTH)):
        latent = convert(model, width, layout=layout, parts=parts)
        assert latent.config.latent_parts == list(parts) and len(latent_modules(latent)) == LAYERS * len(parts)
        torch.testing.assert_close(said(latent, batch), wanted_NV, atol=tolerance, rtol=0)


def test_only_the_chosen_parts_lose_their_projections(model):
    latent = convert(model, 6, parts=["cross"])
    for part, modules in attention_parts(latent).items():
        assert [hasattr(module, "latent_kv") for module in modules] == [part == "cross"] * LAYERS
    for part in ("encoder", "decoder"):
        for ours, theirs in zip(*(attention_parts(one)[part] for one in (latent, model)), strict=True):
            assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight)


def test_without_a_choice_what_keeps_something_is_converted(model):
    assert convert(model, 6).config.latent_parts == list(CACHED)
    with pytest.raises(ValueError, match="are encoder, decoder, cross"):
        convert(model, 6, parts=["crossed"])
    with pytest.raises(ValueError, match="with attention are encoder: give a list"):
        convert(tiny.conformer(), 6, parts=["decoder"])


def test_widths_are_one_for_each_module_of_the_chosen_parts(model):
    latent = latent_of(model, "joint")
    widths = {part: [module.latent_kv.ranks[0] for module in found] for part, found in attention_parts(latent).items()}
    assert widths == {"encoder": [5, 6], "decoder": [7, 8], "cross": [9, 10]}
    assert latent_of(model, "joint", ["cross", "encoder"]).config.latent_parts == ["encoder", "cross"]
    with pytest.raises(Exception, match="3 widths for 4 attention modules"):
        AutoConfig.for_model("whisper-mla", d_model=16, encoder_layers=2, decoder_layers=2, latent_dim=[5] * 3)
    assert AutoConfig.for_model("whisper-mla", latent_parts=["cross", "decoder"]).latent_parts == ["decoder", "cross"]
    with pytest.raises(Exception, match="one or more of encoder, decoder, cross"):
        AutoConfig.for_model("whisper-mla", latent_parts=["encoders"])


@pytest.mark.parametrize(("implementation", "masked"), [("sdpa", True), ("sdpa", False), ("eager", False)])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_absorbed_is_expanded(model, layout, implementation, masked):
    latent, batch = latent_of(model, layout).double(), batch_of(dtype=torch.float64)
    latent.set_attn_implementation(implementation)
    outputs, weights = {}, {}
    for form in ("expanded", "absorbed"):
        for module in latent_modules(latent):
            module.form, module.latent_kv.up_k.bias.data[:] = form, 0.3  # softmax cancels it
        with torch.no_grad():
            mask = {"decoder_attention_mask": (batch["labels"] >= 0).long()} if masked else {}
            output = latent(**batch, **mask, output_attentions=True)
        outputs[form], weights[form] = output.logits[batch["labels"] >= 0], output.cross_attentions
    torch.testing.assert_close(outputs["absorbed"], outputs["expanded"], atol=1e-9, rtol=0)
    if implementation == "eager":
        assert weights["absorbed"][0].shape == (4, HEADS, batch["labels"].shape[1], FRAMES)
        torch.testing.assert_close(weights["absorbed"], weights["expanded"], atol=1e-9, rtol=0)


def test_one_query_is_absorbed_and_many_are_not(model):
    latent, used = latent_of(model, "joint"), []
    for part, modules in attention_parts(latent).items():
        for module in modules:
            attend = module._absorbed
            module._absorbed = lambda *args, part=part, attend=attend, **how: used.append(part) or attend(*args, **how)
    batch = batch_of(1)
    with torch.no_grad():
        latent(batch["input_features"], decoder_input_ids=batch["labels"][:, :1])
    assert used == ["cross"] * LAYERS  # a single token to attend to is expanded at less cost
    generate_and_keep(latent, batch["input_features"], max_new_tokens=20, min_new_tokens=20, **ENGLISH)
    assert "decoder" in used and "encoder" not in used


# ---- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_it_writes_what_its_standard_twin_writes(model, layout, beams):
    latent, features = latent_of(model, layout), batch_of()["input_features"]
    standard = asrlib.to_standard_attention(latent)
    assert type(standard) is type(model) and type(standard.config) is type(model.config)
    written = [one.generate(features, num_beams=beams, **ENGLISH) for one in (latent, standard, model)]
    assert torch.equal(written[0], written[1])
    assert written[0].shape != written[2].shape or not torch.equal(written[0], written[2])  # it is below full rank
    assert len(written[0].unique(dim=0)) > 1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("parts", [("cross",), ("decoder",), PARTS], ids="+".join)
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_the_cache_of_generate_is_the_latent_to_the_byte(model, layout, parts, beams):
    latent, features = latent_of(model, layout, parts), batch_of(3)["input_features"]
    hypotheses = 3 * beams
    for one in (latent, model):
        ids, cache = generate_and_keep(one, features, num_beams=beams, max_new_tokens=6, min_new_tokens=6, **ENGLISH)
        tokens = PROMPT + ids.shape[1] - 1  # what is written last is not read
        bytes_each = asrlib.kv_cache_bytes(one.config, FRAMES, tokens=tokens)
        assert held_bytes(cache) == hypotheses * bytes_each > 0
    widths = dict(zip([(part, i) for part in parts for i in range(LAYERS)], latent.config.latent_dim, strict=True))
    kept = [widths.get((part, i), 2 * WIDTH) for part in CACHED for i in range(LAYERS)]
    numbers = tokens * sum(kept[:LAYERS]) + FRAMES * sum(kept[LAYERS:])
    assert asrlib.kv_cache_bytes(latent.config, FRAMES, tokens=tokens) == 4 * numbers
    assert asrlib.kv_cache_bytes(latent.config, FRAMES, "float16", tokens=tokens) == 2 * numbers


def test_an_encoder_keeps_nothing(model):
    standard = asrlib.kv_cache_bytes(model.config, FRAMES, tokens=9)
    assert asrlib.kv_cache_bytes(convert(model, 5, parts=["encoder"]).config, FRAMES, tokens=9) == standard
    with pytest.raises(ValueError, match="tokens is -1"):
        asrlib.kv_cache_bytes(model.config, FRAMES, tokens=-1)


def test_what_is_kept_stands_in_the_place_of_keys(model):
    for layout, keys, values in (("joint", 10, 0), ("split", 7, 7)):
        _, cache = generate_and_keep(latent_of(model, layout), batch_of(2)["input_features"], **ENGLISH)
        crossed = cache.cross_attention_cache.layers[-1]
        assert crossed.keys.shape == (2, 1, FRAMES, keys) and crossed.values.shape == (2, 1, FRAMES, values)


# ---- conversion --------------------------------------------------------------------------------------------


def test_statistics_are_of_tokens_and_of_the_frames_that_they_attend_to(model, statistics):
    batch, readings = batch_of(24), []
    with observed(attention_parts(model)["cross"][1], readings.append):
        said(model, batch)
    keys_ND, queries_NHE = readings[0].key_input.flatten(0, 1), readings[0].queries[batch["labels"] >= 0]
    assert keys_ND.shape == (24 * FRAMES, WIDTH)
    layer = statistics.parts["cross"][1]
    torch.testing.assert_close(layer.key.moments().mean, keys_ND.double().mean(0), atol=1e-5, rtol=1e-5)
    wanted = torch.einsum("nhi,nhj->hij", queries_NHE, queries_NHE).double() / len(queries_NHE)
    torch.testing.assert_close(layer.moments().query, wanted, atol=1e-4, rtol=1e-4)
    tokens = int((batch["labels"] >= 0).sum())
    assert [part[0].frames for part in statistics.parts.values()] == [24 * FRAMES, tokens, 24 * FRAMES]


def test_attended_sums_are_of_what_each_token_makes_of_the_frames(model, statistics):
    batch, readings = batch_of(24), []
    eager = family_models.whisper()
    eager.set_attn_implementation("eager")
    for part in CACHED:
        readings.clear()
        with observed(attention_parts(eager)[part][0], readings.append):
            said(eager, batch)
        reading, kept_BL = readings[0], batch["labels"] >= 0
        means_BLHD = torch.einsum("bhts,bsd->bthd", reading.weights, reading.value_input)[kept_BL].double()
        for head, sums in enumerate(statistics.parts[part][0].attention.values):
            torch.testing.assert_close(sums.moments().mean, means_BLHD[:, head].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["joint", "split"])
@pytest.mark.parametrize("part", PARTS)
def test_each_method_lowers_the_error_that_it_is_about(model, statistics, part, layout):
    batch, found = batch_of(), {}
    for method in METHODS:
        width = 6 if layout == "joint" else 12
        latent = convert(model, width, layout=layout, method=method, statistics=statistics, parts=[part])
        table = analyze_compression_quality(model, latent, batch)
        assert list(table["part"]) == [part] * LAYERS and list(table["layer"]) == [0, 1]
        found[method] = summarise_quality(table)
    errors = {method: quality["output_error"] for method, quality in found.items()}
    assert all(0 < error < 1 for error in errors.values())
    assert found["whitened"]["value_error"] < found["svd"]["value_error"]
    assert max(errors["two_sided"], errors["attended"]) < errors["svd"]


def test_an_exact_latent_has_no_error_in_any_column(model, statistics):
    latent = convert(model, WIDTH, method="whitened", statistics=statistics, parts=PARTS)
    table = analyze_compression_quality(model, latent, batch_of())
    assert len(table) == 3 * LAYERS and table.filter(regex="_error$|_tv$").to_numpy().max() < 1e-4


def test_scores_are_compared_where_a_token_may_look(model):
    """A causal mask hides most of a short text; what it hides is no score."""
    latent = convert(model, 4, parts=["decoder"])
    whole, first = batch_of(1), batch_of(1)
    first["labels"] = first["labels"][:, :1]
    assert analyze_compression_quality(model, latent, first)["score_error"].isna().all()  # one score of one is none
    assert (analyze_compression_quality(model, latent, whole)["score_error"] > 0.1).all()


def test_no_token_of_a_comparison_hears_those_behind_it(model):
    """Output errors are those of the calls that a decoder makes, which hides them, as `eager` says in a mask."""
    latent, batch, readings = convert(model, 6, parts=["decoder"]), batch_of(1), []
    table, eager = analyze_compression_quality(model, latent, batch), family_models.whisper()
    for one in (eager, latent):
        one.set_attn_implementation("eager")
    with observed(attention_parts(eager)["decoder"][1], readings.append):
        said(eager, batch)
    with torch.no_grad():
        ours = attention_parts(latent)["decoder"][1](**readings[0].arguments | {"past_key_values": None})[0]
    theirs = readings[0].output
    assert table["output_error"][1] == pytest.approx(((ours - theirs).norm() / theirs.norm()).item(), rel=1e-3)


def test_ranks_by_sensitivity_keep_the_budget(model, statistics):
    how = dict(method="two_sided", statistics=statistics)
    latent = convert(model, 6, ranks="sensitivity", parts=["cross"], **how)
    assert sum(latent.config.latent_dim) == 6 * LAYERS
    decomposition = decompose(model, "joint", "two_sided", statistics, ["cross"])
    costs = measure_sensitivity(model, "joint", statistics, decomposition, ["cross"])
    assert len(costs) == LAYERS and all(cost[1] > cost[WIDTH // 2] > 0 for cost in costs)


def test_what_can_not_be_converted_says_so_in_one_sentence(model, statistics):
    for how in (dict(sequential=True), dict(reestimate_batch_norm=True)):
        with pytest.raises(ValueError, match=r"an encoder-decoder \(whisper\) has two: leave them out"):
            convert(model, 6, method="whitened", statistics=statistics, **how)
    few = asrlib.collect_statistics(model, processor_of("whisper"), tiny.corpus(24), parts=["cross"])
    with pytest.raises(ValueError, match=r"do not cover attention in decoder: collect_statistics\(\.\.\., parts="):
        convert(model, 6, method="whitened", statistics=few)
    with pytest.raises(ValueError, match="windows of 1 s as a whole"):
        next(asrlib.stream(model, processor_of("whisper"), []))


# ---- on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_it_is_saved_and_loaded_back(model, layout, tmp_path):
    latent, batch = latent_of(model, layout, ("encoder", "cross")), batch_of()
    latent.save_pretrained(tmp_path)
    processor_of("whisper").save_pretrained(tmp_path)
    for again in (asrlib.load(tmp_path)[0], AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()):
        assert type(again) is type(latent) and again.config.latent_parts == ["encoder", "cross"]
        assert torch.equal(said(again, batch), said(latent, batch))
        features = batch["input_features"]
        assert torch.equal(again.generate(features, **ENGLISH), latent.generate(features, **ENGLISH))
    assert len(attention_modules(again)) == 3 * LAYERS


# ---- one latent for all layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "whitened", "two_sided", "attended"])
def test_as_wide_as_the_model_one_latent_for_all_layers_is_exact(model, statistics, method):
    how = dict(statistics=statistics, method=method, shared=True)
    for parts in (["cross"], list(CACHED), list(PARTS)):
        latent, batch = convert(model, WIDTH, parts=parts, **how), batch_of()
        torch.testing.assert_close(said(latent, batch), said(model, batch), atol=2e-3, rtol=1e-3)
        downs = {module.latent_kv.down.weight.data_ptr() for module in attention_parts(latent)["cross"]}
        assert len(downs) == 1


@pytest.mark.parametrize("beams", [1, 3])
def test_one_copy_of_a_shared_latent_is_kept(model, beams):
    latent, features = convert(model, 9, parts=["cross"], shared=True), batch_of(3)["input_features"]
    how = dict(num_beams=beams, max_new_tokens=6, min_new_tokens=6, **ENGLISH)
    ids, cache = generate_and_keep(latent, features, **how)
    tokens = PROMPT + ids.shape[1] - 1
    numbers = tokens * LAYERS * 2 * WIDTH + FRAMES * 9
    assert asrlib.kv_cache_bytes(latent.config, FRAMES, tokens=tokens) == 4 * numbers
    assert held_bytes(cache) == 3 * beams * 4 * numbers
    assert torch.equal(ids, asrlib.to_standard_attention(latent).generate(features, **how))
    assert not torch.equal(ids, model.generate(features, **how))


def test_a_shared_latent_is_chosen_by_what_all_layers_lose(model, statistics):
    batch, errors = batch_of(), {}
    for method in ("svd", "whitened", "two_sided", "attended"):
        latent = convert(model, 6, method=method, statistics=statistics, parts=["cross"], shared=True)
        errors[method] = summarise_quality(analyze_compression_quality(model, latent, batch))["output_error"]
    alone = convert(model, 6, method="two_sided", statistics=statistics, parts=["cross"])
    assert errors["attended"] < errors["two_sided"] < errors["svd"]
    assert summarise_quality(analyze_compression_quality(model, alone, batch))["output_error"] < errors["two_sided"]


def test_of_a_shared_latent_each_layer_has_its_regression(model, statistics):
    latent = convert(model, 6, method="attended", statistics=statistics, parts=["cross"], shared=True)
    for module, layer in zip(attention_parts(latent)["cross"], statistics.of(["cross"]), strict=True):
        factors, moments = factors_of(module.latent_kv), layer.moments()
        seen = factors.down_k @ moments.attended_key.covariance
        weights = LayerWeights.of(attention_parts(model)["cross"][module.layer_idx])
        up = torch.linalg.solve(seen @ factors.down_k.T, seen @ weights.key.T).T
        torch.testing.assert_close(factors.up_k, up, atol=1e-5, rtol=1e-4)


def test_a_shared_latent_is_saved_once_and_loaded_back(model, tmp_path):
    latent, batch = convert(model, 9, parts=["cross"], shared=True), batch_of()
    latent.save_pretrained(tmp_path)
    processor_of("whisper").save_pretrained(tmp_path)
    again = asrlib.load(tmp_path)[0]
    assert again.config.latent_shared and torch.equal(said(again, batch), said(latent, batch))
    first, second = attention_parts(again)["cross"]
    assert first.latent_kv.down.weight is second.latent_kv.down.weight
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in latent.parameters())


@pytest.mark.parametrize("ranks", ["uniform", "energy", "sensitivity"])
def test_what_is_kept_once_counts_once(model, statistics, ranks):
    how = dict(method="attended", statistics=statistics, ranks=ranks, shared=True)
    for cut, budget in ((0.75, WIDTH // 2 * 2 * LAYERS), (0.5, WIDTH * (LAYERS + 1))):  # the second is exact
        latent = convert(model, cache_cut=cut, **how)
        assert budget - LAYERS <= sum(cached_numbers(latent.config, 1, 1)) <= budget
        cross = attention_parts(latent)["cross"]
        assert len({module.latent_kv.ranks for module in cross}) == 1 and len(latent_modules(latent)) == 2 * LAYERS
    torch.testing.assert_close(said(latent, batch_of()), said(model, batch_of()), atol=2e-3, rtol=1e-3)


def test_the_sensitivity_of_a_shared_latent_is_that_of_all_its_layers_cut_together(model, statistics):
    decomposition = decompose(model, "joint", "two_sided", statistics, shared=True)
    costs = measure_sensitivity(model, "joint", statistics, decomposition, shared=True)
    assert len(costs) == LAYERS + 1
    rank = sorted(costs[-1])[1]
    whole = [WIDTH] * LAYERS + [rank] * LAYERS
    middle = [(candidates[2],) for candidates in decomposition]
    latent = convert(model, whole, method="two_sided", statistics=statistics, decomposition=middle, shared=True)
    inputs = statistics.inputs
    ours, wanted = (torch.cat(spoken_logits(each, inputs)).log_softmax(-1) for each in (latent, model))
    cost = torch.nn.functional.kl_div(ours, wanted, log_target=True, reduction="batchmean").item()
    assert costs[-1][rank] == pytest.approx(cost, rel=1e-2, abs=1e-6)


def test_a_decomposition_of_each_layer_alone_is_not_shared(model, statistics):
    alone = decompose(model, "joint", "two_sided", statistics)
    with pytest.raises(ValueError, match="each layer has its latent"):
        convert(model, 6, method="two_sided", statistics=statistics, decomposition=alone, shared=True)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (dict(latent_dim=6, parts=["decoder"]), "joint latent of cross-attention, not a joint latent of decoder"),
        (dict(latent_dim=12, layout="split"), "not a split latent of decoder, cross"),
        (dict(cache_cut=0.5, parts=["decoder"], ranks="energy"), "not a joint latent of decoder"),
        (dict(latent_dim=[6, 6, 6, 5]), "give cross-attention the same in all"),
    ],
)
def test_what_layers_can_not_share_is_refused(model, statistics, how, reason):
    with pytest.raises(Exception, match=reason):
        convert(model, statistics=statistics, shared=True, **how)
    with pytest.raises(ValueError, match="of cross-attention"):
        convert(tiny.conformer(), 6, shared=True)


# ---- ways to convert side by side --------------------------------------------------------------------------


def test_rows_count_what_is_kept_of_tokens_and_of_frames(model):
    processor, speech = processor_of("whisper"), tiny.corpus(4)
    for parts in (CACHED, ["cross"]):
        statistics = asrlib.collect_statistics(model, processor, tiny.corpus(24), parts=parts)
        rows = benchmark(model, processor, speech, {"test": speech}, [0.5], [RECIPES["svd"]], statistics=statistics)
        kept = {row.recipe: (row.latent_dim, row.cut_reached) for row in rows}
        standard, latents = 2 * WIDTH, len(parts) * LAYERS
        left = (standard,) * (2 * LAYERS - latents)  # of the decoder's
        assert kept.pop("svd") == (left + (WIDTH,) * latents, len(parts) / 4)
        assert sorted(kept.values()) == [((0,) * 2 * LAYERS, 1.0), ((standard,) * 2 * LAYERS, 0.0)]


def test_a_recipe_of_a_shared_latent_gives_a_row_and_refuses_other_parts(model):
    processor, speech = processor_of("whisper"), tiny.corpus(4)
    statistics = asrlib.collect_statistics(model, processor, tiny.corpus(24), attention=True)
    names = ["two_sided, shared", "attended, sensitivity, shared"]
    given = [0.75], [RECIPES[name] for name in names]
    rows = list(benchmark(model, processor, speech, {"test": speech}, *given, statistics=statistics))[2:]
    assert [row.recipe for row in rows] == names
    for row in rows:
        assert row.cut_reached == pytest.approx(0.75, abs=0.05) and row.latent_dim[LAYERS + 1 :] == (0,) * (LAYERS - 1)
    for recipe in (RECIPES[names[0]], RECIPES["GQA, mean of heads"]):
        assert recipe.obstacle(model.config, 0.5, ["decoder"])
    errors = errors_by_width(model, batch_of(), RECIPES[names[0]], statistics)
    alone = errors_by_width(model, batch_of(), RECIPES["two_sided"], statistics)
    assert not errors["output_error"].equals(alone["output_error"])


def test_a_recipe_for_one_stack_of_layers_is_out_of_reach(model):
    for way in (Recipe("s", sequential=True, method="two_sided"), Recipe("b", batch_norm=True)):
        assert "an encoder-decoder (whisper) has two" in way.obstacle(model.config, 0.5)
        assert way.obstacle(tiny.conformer().config, 0.5) is None
