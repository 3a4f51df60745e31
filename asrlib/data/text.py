"""Transcripts in the form that a tokenizer needs.

`processor` is a model's processor, or its tokenizer alone. The tokenizer's vocabulary decides what can be spelt: it
has single characters, with a special token (usually "|") for the space, or pieces of words, or bytes.
"""

import json
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from asrlib.data.audio import SAMPLE_RATE

ENGLISH = ("en", "english", "<|en|>")
COMPOSITIONS = ("NFC", "NFD")  # é as one character, or as e and an accent: the same text in Unicode's view


def normalise_text(text: str, processor) -> str:
    """Fit each character to the vocabulary's case and accents, and make every run of white space one space.

    LibriSpeech is upper case, many vocabularies are lower case. An accent becomes part of its letter or a character of
    its own, whichever leaves fewer unknown characters. Unknown characters stay, for `unknown_characters` to name.
    """
    if _spells_everything(_tokenizer(processor)):
        return " ".join(text.split())
    known = _characters(processor)
    forms = [text] if text.isascii() else [unicodedata.normalize(form, text) for form in COMPOSITIONS]
    spelt = [" ".join("".join(_fit(character, known) for character in form).split()) for form in forms]
    return min(spelt, key=lambda form: len(set(form) - known))


def folded(text: str) -> str:
    """`text` as error rates see it, without regard to case, repeated white space and the composition of accents."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def normaliser_of(processor, language: str | None = None) -> str | None:
    """The name, of NORMALISERS, of what makes transcripts comparable that are written with this vocabulary.

    None: a bare alphabet is compared as it stands. A vocabulary of both cases and a comma writes what references may
    lack: such text is judged as Whisper's authors do, by rules of English where the text is English, and by those of
    every language otherwise. `language` is that of the text, by default the tokenizer's.
    """
    tokenizer = _tokenizer(processor)
    if not _spells_everything(tokenizer):
        letters = _characters(tokenizer)
        if "," not in letters or not any(map(str.islower, letters)) or not any(map(str.isupper, letters)):
            return None
    writes = language or getattr(tokenizer, "language", "unknown")  # a Whisper's; None where it writes English alone
    return "english" if writes is None or writes.lower() in ENGLISH else "basic"


def as_counted(prediction: dict, side: str) -> str:
    """The `reference` or the `hypothesis` of a transcript as word errors see it, by the normaliser that it names."""
    if not (name := prediction.get("normaliser")):
        return folded(prediction[side])
    return NORMALISERS[name](prediction[side])


@lru_cache(1 << 16)  # references are counted once for every model
def whisper_normalised(text: str) -> str:
    """English as Whisper's authors compare it (Radford et al. 2022, appendix C): lower case, contractions written out,
    numbers in digits, American spelling, no hesitations, no punctuation."""
    return _english_normaliser()(text)


@lru_cache(1 << 16)
def basic_normalised(text: str) -> str:
    """Any language as Whisper's authors compare it: lower case, and neither punctuation nor what stands in brackets.
    Accents stay, since they part words."""
    return " ".join(_basic_normaliser()(text).split())


NORMALISERS = {"english": whisper_normalised, "basic": basic_normalised}


@cache
def _english_normaliser():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings = Path(__file__).with_name("english_spellings.json")  # of openai-whisper, MIT licence
    return EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")))


@cache
def _basic_normaliser():
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


def unknown_characters(text: str, processor) -> list[str]:
    """The characters of normalised text that the vocabulary lacks, sorted, each once."""
    if _spells_everything(_tokenizer(processor)):
        return []
    return sorted(set(text) - _characters(processor))


def label_ids(text: str, processor, language: str | None = None) -> list[int]:
    """Token ids of normalised text, without begin or end marks. Text like <s> is spelt, and is no special token.

    If the tokenizer has a prompt, as Whisper's has, the ids stand between the prompt, without its first token, and the
    end mark. The prompt names `language`, or else the tokenizer's.
    """
    tokenizer = _tokenizer(processor)
    prompt = getattr(tokenizer, "prefix_tokens", None)
    # Whisper was trained on text that begins with a space: without it, its own transcripts surprise it.
    spoken = text if prompt is None else f" {text}"
    ids = tokenizer(spoken, add_special_tokens=False, split_special_tokens=True).input_ids
    if prompt is None:
        return ids
    told = [_language_id(language, tokenizer), *prompt[2:]] if language and len(prompt) > 2 else prompt[1:]
    return [*told, *ids, tokenizer.eos_token_id]


def languages_told(labels: Sequence[Sequence[int]], processor) -> list[str | None]:
    """The language's token that each row of `label_ids` begins with, as <|de|>; None where the prompt names none."""
    tokenizer = _tokenizer(processor)
    told = len(getattr(tokenizer, "prefix_tokens", ())) > 2
    return [tokenizer.convert_ids_to_tokens(int(row[0])) if told else None for row in labels]


def language_problem(language: str | None, processor) -> str | None:
    """Why a model with this processor cannot write `language`, or None. A model that is told no language writes any."""
    tokenizer = _tokenizer(processor)
    prompt = getattr(tokenizer, "prefix_tokens", None)
    if language is None or prompt is None:
        return None
    if len(prompt) <= 2:
        return None if language.lower() in ENGLISH else f"language is {language!r}, and this model writes English alone"
    known = _language_id(language, tokenizer) not in (None, tokenizer.unk_token_id)
    return None if known else f"language is {language!r}, which this model does not know"


def _language_id(language: str, tokenizer) -> int | None:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    return tokenizer.convert_tokens_to_ids(f"<|{code}|>")


def ctc_length(ids: list[int]) -> int:
    """The fewest frames CTC can emit these labels in: one each, and a blank between equal neighbours."""
    return len(ids) + sum(left == right for left, right in pairwise(ids))


def ctc_problem(ids: list[int], samples: int, frames: int) -> str | None:
    """Why CTC cannot emit these labels in `frames` frames, made of `samples` samples, or None."""
    needed, seconds = ctc_length(ids), samples / SAMPLE_RATE
    if needed <= frames:
        return None
    return f"text too long for its audio: CTC needs {needed} frames, {seconds:.2f} s give {frames}"


def _tokenizer(processor):
    return getattr(processor, "tokenizer", processor)


def _characters(processor) -> frozenset[str]:
    """The characters that the vocabulary can write."""
    tokenizer = _tokenizer(processor)
    spelt_by = _pieced if getattr(tokenizer, "is_fast", False) else _single
    return spelt_by(tokenizer, len(tokenizer))


@lru_cache(8)
def _spells_everything(tokenizer) -> bool:
    """Whether the vocabulary is made of bytes: then even characters that no corpus holds survive a round trip."""
    rare = ("\U0001f600", "\u4e00")
    return getattr(tokenizer, "is_fast", False) and all(_comes_back(character, tokenizer) for character in rare)


@lru_cache(8)
def _pieced(tokenizer, size: int) -> frozenset[str]:
    """Of a vocabulary of pieces of words, the characters that survive a round trip."""
    characters = {character for piece in tokenizer.get_vocab() for character in piece}
    return frozenset({character for character in characters if _comes_back(character, tokenizer)} | {" "})


def _comes_back(character: str, tokenizer) -> bool:
    ids = tokenizer(character, add_special_tokens=False, split_special_tokens=True).input_ids
    return tokenizer.unk_token_id not in ids and tokenizer.decode(ids, group_tokens=False).strip() == character


@lru_cache(8)
def _single(tokenizer, size: int) -> frozenset[str]:
    """Of a vocabulary of single characters; the space is known if its delimiter is."""
    # The tokenizer adds special tokens that the vocabulary lacks, and the model has no output for their ids.
    tokens = {token for token, id in tokenizer.get_vocab().items() if id < tokenizer.vocab_size}
    delimiter = getattr(tokenizer, "word_delimiter_token", " ")
    letters = {token for token in tokens if len(token) == 1} - {*tokenizer.all_special_tokens, delimiter}
    return frozenset(letters | {" "} if delimiter in tokens else letters)


def _fit(character: str, known: frozenset[str]) -> str:
    for form in (character, character.upper(), character.lower()):
        if known.issuperset(form):
            return form
    return character
