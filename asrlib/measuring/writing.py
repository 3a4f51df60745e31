"""The cost of writing: the bytes that an encoder-decoder keeps, and the time for a token.

    python -m asrlib tokens --size small --batch 1 8 --cut 0.5 0.75 0.9375 --out tokens.csv

Times decoders of Whisper's published sizes that differ in their attention alone, on ready frames: the encoder's time is
the same for all. Time does not depend on weights, so they are random and shared. Latents are timed in both forms,
absorbed and expanded (see `attention.kinds.LatentMemory`).

Shapes: B utterances, T frames, D width, n tokens.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from asrlib.attention.cache import held_bytes, kv_cache_bytes
from asrlib.data.batches import SpeechCollator, SpeechDataset
from asrlib.data.corpus import Corpus
from asrlib.measuring.random_models import PRECISIONS, WRITER_SIZES, Writer, random_writers, writer_config
from asrlib.measuring.timing import measured_on, quartiles, rounds_of
from asrlib.models.families.whisper import CACHED, generate_and_keep
from asrlib.models.inference import choose_device, inference
from asrlib.models.registry import family_of


def benchmark_writing(
    writers: dict[str, Writer],
    batch: int = 1,
    tokens: int = 64,
    repeats: int = 15,
    device: str | None = None,
) -> pd.DataFrame:
    """One row per writer. Each has written `tokens` of each of `batch` utterances and writes one more, in turns.

    Columns: batch, tokens, writer, cache_bytes (of one utterance, counted after `generate` wrote `tokens`),
    formula_bytes, bytes_ratio (the first writer's bytes over this one's), ms (median time of a step of the decoder, one
    token for each utterance), ms_low and ms_high (the quartiles), time_ratio (this writer's median over the first
    one's). Raises ValueError where there is nothing to measure.
    """
    if not writers or repeats < 1 or batch < 1 or tokens < 1:
        raise ValueError("a benchmark needs at least one writer, one utterance, one token and one repeat")
    first = next(iter(writers.values())).model
    device, dtype = choose_device(device, first), first.dtype
    with inference(*{writer.model: None for writer in writers.values()}, device=device):
        shape = batch, first.config.max_source_positions, first.config.d_model
        frames = torch.randn(shape, device=device, dtype=dtype)
        heard = BaseModelOutput(last_hidden_state=frames)
        cached = {name: _cache_bytes(writer, heard, tokens) for name, writer in writers.items()}
        steps = {name: _step(writer, heard, tokens) for name, writer in writers.items()}
        rounds = rounds_of(steps, repeats, device, desc=f"{batch} utterances", unit="token", leave=False)
    standard = next(iter(writers))
    rows = []
    for name, writer in writers.items():
        ms, formula = rounds[name], kv_cache_bytes(writer.model.config, frames.shape[1], str(dtype)[6:], tokens=tokens)
        rows.append(
            {
                "batch": batch,
                "tokens": tokens,
                "writer": name,
                "cache_bytes": cached[name] // batch,
                "formula_bytes": formula,
                "bytes_ratio": cached[standard] / cached[name],
                **quartiles(ms),
                "time_ratio": float(ms.median() / rounds[standard].median()),
            }
        )
    table = pd.DataFrame(rows)
    table.attrs.update(measured_on(device, "fp32") | {"dtype": str(dtype)[6:]})
    return table


def kept_while_writing(
    systems: dict[str, WhisperForConditionalGeneration], processors: dict[str, object], corpus: Corpus
) -> pd.DataFrame:
    """One row per system: the cache of `generate` for an utterance, counted, mean over `corpus`.

    Columns: system, tokens (cached ones), cross_bytes, decoder_bytes, formula_bytes of both together, and ratio, the
    bytes of the first of `systems` over those of this one.
    """
    rows = []
    for name, model in systems.items():
        counted = []
        for index in tqdm(range(len(corpus)), desc=f"{name} writes", unit="utt", leave=False):
            dataset, device = SpeechDataset(corpus[index : index + 1], processors[name]), choose_device(None, model)
            features_1FS = SpeechCollator(processors[name])([dataset[0]])[model.main_input_name]
            with inference(model, device=device):
                prompt = family_of(model.config).head.prompt(model, processors[name])
                _, cache = generate_and_keep(model, features_1FS.to(device, model.dtype), **prompt)
            tokens = cache.self_attention_cache.get_seq_length()
            formula = kv_cache_bytes(model.config, model.config.max_source_positions, str(model.dtype)[6:], tokens)
            cross, own = map(held_bytes, (cache.cross_attention_cache, cache.self_attention_cache))
            counted.append({"tokens": tokens, "cross_bytes": cross, "decoder_bytes": own, "formula_bytes": formula})
        rows.append({"system": name} | pd.DataFrame(counted).mean().to_dict())
    table = pd.DataFrame(rows)
    both = table["cross_bytes"] + table["decoder_bytes"]
    return table.assign(ratio=both.iloc[0] / both)


def _cache_bytes(writer: Writer, heard: BaseModelOutput, tokens: int) -> int:
    """Bytes held after `generate` wrote `tokens` tokens; the start token is cached, the last one is not."""
    _, cache = generate_and_keep(
        writer.model, None, encoder_outputs=heard, max_new_tokens=tokens, min_new_tokens=tokens
    )
    return held_bytes(cache)


def _step(writer: Writer, heard: BaseModelOutput, tokens: int) -> Callable[[], None]:
    """A function that writes one more token after `tokens`, and can be called again and again."""
    model, cache = writer.model, EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids_Bn = torch.randint(model.config.vocab_size, (len(heard[0]), tokens + 1), device=heard[0].device)
    write = partial(model, encoder_outputs=heard, past_key_values=cache, use_cache=True)
    write(decoder_input_ids=ids_Bn[:, :-1])

    def step() -> None:
        writer.set_form()
        write(decoder_input_ids=ids_Bn[:, -1:])
        cache.crop(-1)  # forgets this token

    return step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib tokens", description="Times a token of a decoder, and counts what it keeps."
    )
    parser.add_argument("--size", choices=WRITER_SIZES, default="tiny")
    parser.add_argument("--cut", type=float, nargs="+", default=[0.5, 0.75, 0.9375], metavar="SHARE")
    parser.add_argument("--parts", nargs="+", choices=CACHED, default=CACHED, help="what is latent")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="UTTERANCES")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="a .csv")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()  # random weights never stop, and transformers warns about the two limits of length
    torch.manual_seed(0)
    writers = random_writers(writer_config(args.size), args.cut, args.parts, args.precision)
    tables = [benchmark_writing(writers, batch, args.tokens, args.repeats, args.device) for batch in args.batch]
    table = pd.concat(tables, ignore_index=True)
    if args.out:
        table.to_csv(args.out, index=False)
    formats = {name: "{:.2f}".format for name in ("bytes_ratio", "ms", "ms_low", "ms_high", "time_ratio")}
    sys.stdout.write(f"{args.size}, {tables[0].attrs}\n{table.to_string(index=False, formatters=formats)}\n")
    return 0
