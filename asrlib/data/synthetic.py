"""The embedded corpus: sentences from a small grammar, spoken by espeak-ng in many voices.

It needs no download and no system package: the wheel `espeakng-loader` carries the synthesiser. The corpus is written
once into a cache, as a LibriSpeech folder (`SPLIT/SPEAKER/CHAPTER/*.flac` beside `*.trans.txt`), and read back by the
opener of LibriSpeech.

    python -m asrlib.data.synthetic            # make it now, print its folders

Splits share no voice. They share no sentence either, except for the two test splits: a hash of the sentence decides
which split may speak it.
"""

import ctypes
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from asrlib.runs import user_cache

SAMPLE_RATE = 16_000  # Hz, of the corpus
VERSION = 2  # raise it when anything below changes what is spoken: it names the cache folder
SEED = 960
BLOCK = 250  # utterances per worker process, see `_speak_block`

# --- grammar: a form is a row of slots and literal words -------------------------------------------

SLOTS = {
    "who": "the doctor|the teacher|my brother|our neighbour|the old captain|her sister|the farmer|his uncle|"
    "the young painter|your cousin|the baker|the driver",
    "do": "open|close|paint|repair|carry|clean|sell|count|move|watch|find|borrow",
    "did": "opened|closed|painted|repaired|carried|cleaned|sold|counted|moved|watched|found|borrowed",
    "number": "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty",
    "size": "small|large|heavy|narrow|broken|empty|quiet|strange",
    "color": "red|green|blue|yellow|white|black|brown|purple",
    "things": "windows|boxes|tables|bottles|letters|lamps|baskets|chairs|wheels|flowers|horses|clocks",
    "thing": "window|box|table|bottle|letter|lamp|basket|chair|wheel|garden|horse|clock",
    "place": "kitchen|station|harbour|library|market|village|office|forest|castle|bridge|museum|school",
    "near": "in|near|behind|above|under|beside",
    "when": "before noon|after dinner|every morning|last winter|this evening|at midnight|on monday|on friday|"
    "in april|in october|next summer|by tomorrow",
    "month": "january|march|april|july|october|december",
    "city": "london|paris|boston|madrid|cairo|tokyo",
    "weather": "rain|snow|wind|thunder|sunshine|fog",
    "please": "please|kindly|now",
    "how": "slowly|carefully|quickly|often|never|always",
}

FORMS = (
    "{who} {did} {number} {color} {things}",
    "{who} will {do} the {size} {thing} {when}",
    "{please} {do} the {color} {thing} {near} the {place}",
    "there are {number} {size} {things} {near} the {place}",
    "did {who} {do} the {thing} {near} the {place}",
    "{who} {how} {did} the {size} {color} {thing}",
    "we expect {weather} and {weather} in {city} {when}",
    "the train to {city} leaves at {number} from the {place}",
    "call {number} {number} {number} for the {place} in {city}",
    "on the {number} of {month} {who} {did} the {thing}",
    "{who} and {who} {did} the {things} {when}",
    "why is the {color} {thing} {near} the {size} {place}",
    "set the {thing} to {number} and the {thing} to {number}",
    "if there is {weather} {who} will {how} {do} the {things}",
)

# --- voices: espeak-ng's variants, told apart by accent ----------------------------------------------

ACCENTS = ("en-US", "en", "en-GB-scotland", "en-GB-x-rp", "en-US-nyc", "en-029")
VARIANTS = {
    "train": "f1 f3 f4 f5 m1 m2 m4 m5 m6 m7 Alex Alicia Andrea Annie Denis Diogo Gene Gene2 Henrique Hugo "
    "Jacky Lee Marco Mario Mike mike2 RicishayMax RicishayMax2 RicishayMax3 Storm Tweaky adam antonio aunty "
    "benjamin boris caleb ed edward edward2 gustave ian iven iven2 iven3 iven4 john kaukovalta klatt klatt2 "
    "klatt3 klatt4 klatt5 klatt6 linda marcelo max miguel norbert pablo paul pedro robert sandro "
    "steph steph2 steph3 travis zac",
    "validation": "m8 david grandma Nguyen",
    "test-clean": "f2 m3 Andy anika belinda michel quincy shelby",
    "test-other": "Michael Reed grandpa announcer rob victor",
}


@dataclass(frozen=True)
class Split:
    """How one split is spoken."""

    utterances: int
    words_per_minute: tuple[int, int]
    pitch: tuple[int, int]  # espeak-ng's scale, 0 to 99
    noisy: float  # share of utterances with noise under the speech
    snr_db: tuple[float, float]
    sentences: range  # which of ten sentence hashes belong to this split


SPLITS = {
    "train": Split(4000, (130, 225), (20, 80), 0.3, (5.0, 25.0), range(0, 8)),
    "validation": Split(200, (140, 200), (30, 70), 0.0, (0.0, 0.0), range(8, 9)),
    "test-clean": Split(300, (140, 190), (30, 70), 0.0, (0.0, 0.0), range(9, 10)),
    "test-other": Split(300, (190, 230), (25, 75), 1.0, (5.0, 15.0), range(9, 10)),
}


def vocabulary() -> list[str]:
    """All words the grammar can say, sorted."""
    text = " ".join(SLOTS.values()).replace("|", " ") + " " + " ".join(FORMS)
    return sorted({word for word in text.split() if "{" not in word})


@dataclass(frozen=True)
class Spoken:
    """One utterance before it is spoken: everything that decides its samples."""

    split: str
    index: int
    speaker: int
    voice: str
    words_per_minute: int
    pitch: int
    snr_db: float | None
    text: str


def script(split: str) -> Iterator[Spoken]:
    """The utterances of `split`, with their voices: a pure function of the seed."""
    plan = SPLITS[split]
    speakers = [f"gmw/{accent}+{variant}" for variant in VARIANTS[split].split() for accent in ACCENTS]
    first_id = 1000 * (1 + list(SPLITS).index(split))
    for index in range(plan.utterances):
        rng = np.random.default_rng([SEED, first_id, index])
        speaker = int(rng.integers(len(speakers)))
        noisy = rng.random() < plan.noisy
        yield Spoken(
            split=split,
            index=index,
            speaker=first_id + speaker,
            voice=speakers[speaker],
            words_per_minute=int(rng.integers(*plan.words_per_minute)),
            pitch=int(rng.integers(*plan.pitch)),
            snr_db=float(rng.uniform(*plan.snr_db)) if noisy else None,
            text=_sentence(rng, plan.sentences),
        )


def _sentence(rng: np.random.Generator, allowed: range) -> str:
    while True:
        words = []
        for slot in FORMS[rng.integers(len(FORMS))].split():
            if slot.startswith("{"):
                choices = SLOTS[slot.strip("{}")].split("|")
                slot = choices[rng.integers(len(choices))]
            words.append(slot)
        text = " ".join(words)
        if hashlib.sha256(text.encode()).digest()[0] % 10 in allowed:
            return text


# --- speaking ----------------------------------------------------------------------------------------

_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_RETRIEVAL, _RATE, _PITCH, _UTF8 = 2, 1, 3, 1  # speak_lib.h: AUDIO_OUTPUT_SYNCHRONOUS, espeakRATE, …


class Espeak:
    """The synthesiser, in its synchronous mode. Raises OSError where it is not installed."""

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise OSError('the synthetic corpus is spoken by espeak-ng: pip install "asrlib[notebooks]"') from None

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate = self._library.espeak_Initialize(_RETRIEVAL, 0, data, 0)  # Hz
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng did not start from {data.decode()}: reinstall espeakng-loader")
        # Some voices breathe noise, and espeak-ng seeds it by the clock.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
        self._samples: list[np.ndarray] = []
        self._callback = _SYNTH_CALLBACK(self._collect)  # must live on: C holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count, _events) -> int:
        if samples and count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """float32 samples [S] in −1…1 at `self.sample_rate`."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._samples.clear()
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._samples).astype(np.float32) / 32768


def add_noise(audio: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Adds pink noise at the given signal-to-noise ratio (dB) to `audio` [S]."""
    spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
    noise = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), len(audio))
    gain = np.sqrt(np.mean(audio**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
    return audio + (gain * noise).astype(np.float32)


def _speak_block(folder: Path, block: list[Spoken]) -> int:
    """Speaks one block into `folder`, in a process of its own: espeak-ng carries state from one utterance to the next,
    which no call resets, so equal bytes need an equal history."""
    import soundfile
    import soxr

    espeak = Espeak()
    for spoken in block:
        audio = espeak.say(spoken.text, spoken.voice, spoken.words_per_minute, spoken.pitch)
        audio = soxr.resample(audio, espeak.sample_rate, SAMPLE_RATE)
        rng = np.random.default_rng([SEED, spoken.speaker, spoken.index])
        audio = audio * (0.1 / max(np.sqrt(np.mean(audio**2)), 1e-4)) * 10 ** rng.uniform(-0.3, 0.1)
        if spoken.snr_db is not None:
            audio = add_noise(audio, spoken.snr_db, rng)
        chapter = folder / spoken.split / str(spoken.speaker) / "1"
        chapter.mkdir(parents=True, exist_ok=True)
        soundfile.write(chapter / f"{_utterance_id(spoken)}.flac", np.clip(audio, -1, 1), SAMPLE_RATE, "PCM_16")
    return len(block)


def _utterance_id(spoken: Spoken) -> str:
    return f"{spoken.speaker}-1-{spoken.index:04d}"


def cache_folder() -> Path:
    """The corpus' folder in the user's cache."""
    return user_cache() / f"synthetic-{VERSION}"


def make_split(split: str, root: Path) -> Path:
    """Makes `root/split` unless it is there. It is written under another name and renamed: whole or absent."""
    from tqdm import tqdm

    if (root / split).is_dir():
        return root / split
    beside = root / f".{split}-{os.getpid()}"
    everything = list(script(split))
    blocks = [everything[i : i + BLOCK] for i in range(0, len(everything), BLOCK)]
    try:
        pool = ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1)
        with pool, tqdm(total=len(everything), desc=f"speaking {split}", unit="utt") as progress:
            for done in as_completed([pool.submit(_speak_block, beside, block) for block in blocks]):
                progress.update(done.result())
        for chapter in (beside / split).glob("*/*"):
            lines = sorted(
                f"{_utterance_id(spoken)} {spoken.text.upper()}\n"
                for spoken in everything
                if str(spoken.speaker) == chapter.parent.name
            )
            transcript = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
            transcript.write_text("".join(lines), encoding="utf-8")
        try:
            os.replace(beside / split, root / split)
        except OSError:  # another process made it meanwhile: the same bytes
            if not (root / split).is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return root / split


def open_synthetic(split: str = "train"):
    """A `split` of the embedded corpus as a `Corpus`; it is spoken first if the cache lacks it."""
    from asrlib.data.librispeech import open_librispeech

    if split not in SPLITS:
        raise ValueError(f"the synthetic corpus has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return open_librispeech(make_split(split, cache_folder()))


if __name__ == "__main__":
    for name in SPLITS:
        print(make_split(name, cache_folder()))  # noqa: T201  it is the command's output
