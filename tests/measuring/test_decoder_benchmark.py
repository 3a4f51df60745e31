"""What a decoder's benchmark says of bytes is what the cache holds; of time there is no test."""

import family_models
import pytest
import tiny
import torch
from commands import command
from family_models import LAYERS, WIDTH

import asrlib
from asrlib.attention.kinds import LatentMemory
from asrlib.measuring.random_models import SHARED, STANDARD, WRITER_SIZES, random_writers
from asrlib.measuring.writing import benchmark_writing, kept_while_writing
from asrlib.models.registry import latent_modules

main = command("tokens")

CUTS = [0.5, 0.75]


@pytest.fixture(scope="module")
def writers():
    torch.manual_seed(0)
    return random_writers(family_models.whisper().config, CUTS)


def test_bytes_are_counted_and_are_those_of_the_formula(writers):
    table = benchmark_writing(writers, batch=2, tokens=7, repeats=1).set_index("writer")
    assert list(table.index) == list(writers) and len(table) == 2 + 2 * len(CUTS)
    assert (table["cache_bytes"] == table["formula_bytes"]).all()
    assert table["cache_bytes"][STANDARD] == asrlib.kv_cache_bytes(writers[STANDARD].model.config, 50, tokens=7)
    assert list(table["bytes_ratio"])[:-1] == [1.0, 2.0, 2.0, 4.0, 4.0]
    assert table["bytes_ratio"][SHARED] == (7 + 50) * 2 * LAYERS / (7 * LAYERS + 50)
    assert table["time_ratio"][STANDARD] == 1.0


def test_numbers_of_half_the_bits_take_half_the_bytes(writers):
    half = random_writers(family_models.whisper().config, CUTS, precision="bf16")
    tables = [benchmark_writing(each, tokens=3, repeats=1) for each in (writers, half)]
    assert list(tables[0]["cache_bytes"]) == [2 * each for each in tables[1]["cache_bytes"]]
    assert [table.attrs["dtype"] for table in tables] == ["float32", "bfloat16"]


def test_writers_share_all_weights_but_those_of_latents(writers):
    first = writers[STANDARD].model.state_dict()
    for name, writer in writers.items():
        own = writer.model.state_dict()
        assert all(own[key].data_ptr() == first[key].data_ptr() for key in own if "latent_kv" not in key), name
        assert len(own.keys() - first.keys()) == (0 if name == STANDARD else 5 * len(latent_modules(writer.model)))
    shared = {module.latent_kv.down.weight.data_ptr() for module in latent_modules(writers[SHARED].model)}
    assert len(shared) == LAYERS + 1


def test_what_is_kept_while_writing_is_counted_and_is_that_of_the_formula():
    model, processor = family_models.whisper(), family_models.processor_of("whisper")
    latent = asrlib.convert(model, 4)
    systems = {"MHA": model, "MLA": latent, "shared": asrlib.convert(model, 4, parts=["cross"], shared=True)}
    table = kept_while_writing(systems, dict.fromkeys(systems, processor), tiny.corpus(3)).set_index("system")
    assert (table["cross_bytes"] + table["decoder_bytes"] == table["formula_bytes"]).all()
    assert table["cross_bytes"]["MHA"] == 4 * 50 * LAYERS * 2 * WIDTH
    assert table["cross_bytes"]["MLA"] == 4 * 50 * LAYERS * 4 and table["cross_bytes"]["shared"] == 4 * 50 * 4
    for name, width in {"MHA": 2 * WIDTH, "MLA": 4, "shared": 2 * WIDTH}.items():
        assert table["decoder_bytes"][name] == pytest.approx(4 * table["tokens"][name] * LAYERS * width)
        both = table["cross_bytes"] + table["decoder_bytes"]
        assert table["ratio"][name] == both["MHA"] / both[name]
    assert (table["tokens"] > 4).all()  # the prompt


def test_both_forms_of_one_latent_are_timed(writers):
    forms = {name: writer.form for name, writer in writers.items()}
    assert forms == {
        "MHA": "auto", "MLA −50 %, absorbed": "absorbed", "MLA −50 %, expanded": "expanded",
        "MLA −75 %, absorbed": "absorbed", "MLA −75 %, expanded": "expanded", SHARED: "absorbed",
    }  # fmt: skip
    for name, writer in writers.items():
        if name != STANDARD:
            writer.set_form()
            assert {module.form for module in latent_modules(writer.model)} == {writer.form}
    assert LatentMemory.form == "auto"


def test_published_sizes_have_heads_of_64():
    assert all(width == 64 * heads for width, _, heads in WRITER_SIZES.values()) and WIDTH < 64


def test_nothing_to_measure_is_a_sentence(writers, capsys):
    for how in (dict(batch=0), dict(repeats=0), dict(tokens=0)):
        with pytest.raises(ValueError, match="one utterance, one token and one repeat"):
            benchmark_writing(writers, **how)
    assert main(["--cut", "1.5"]) == 1
    assert "cache_cut is 1.5: it must lie between 0 and 1" in capsys.readouterr().err
