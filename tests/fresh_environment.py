"""An exported folder where asrlib is not: a new virtual environment with torch and transformers alone, then removed.

    make fresh-environment                               # of the shipped model, made latent here
    make fresh-environment ARGS=reports/demo/exports/finetuned-hub

Run by hand, for it installs 1 GB. Prints what was loaded and whether its logits, and what it writes where it writes
token by token, are those of the project, bit for bit; exit status 1 where they are not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import soundfile
import torch

import asrlib
from asrlib.data.audio import SAMPLE_RATE
from asrlib.export.folders import write_hub_folder
from asrlib.models.registry import family_of

NEEDED = ("torch", "transformers", "safetensors", "soundfile")
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"

STRANGER = """
import importlib.util, json, sys
assert importlib.util.find_spec("asrlib") is None, "asrlib is here"
import soundfile, torch, transformers
folder, wave, of_project, auto = sys.argv[1:]
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
samples, rate = soundfile.read(wave, dtype="float32")
inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
wanted = torch.load(of_project)
with torch.no_grad():
    logits = model(**inputs, **wanted["told"]).logits
    said = logits.argmax(-1) if auto == "AutoModelForCTC" else model.generate(**inputs)
ids = getattr(said, "sequences", said)
print(json.dumps({
    "model": type(model).__module__ + "." + type(model).__name__,
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "text": processor.batch_decode(ids, **wanted["spelling"])[0].strip(),
    "equal_bit_for_bit": torch.equal(logits, wanted["logits"]) and torch.equal(ids, wanted["ids"]),
    "largest_difference": (logits - wanted["logits"]).abs().max().item(),
}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="made by asrlib.export --to hub or standard")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fresh-") as place:
        return compare(args.folder and args.folder.absolute(), Path(place))


def compare(folder: Path | None, place: Path) -> int:
    utterance = asrlib.open_corpus("synthetic", "test-clean")[0]
    if folder is None:
        folder = place / "model"
        folder.mkdir()
        model, processor = asrlib.load("synthetic-conformer")
        write_hub_folder(asrlib.convert(model, cache_cut=0.75), processor, folder)
    soundfile.write(place / "speech.wav", utterance.audio(), SAMPLE_RATE, subtype="FLOAT")
    model, processor = asrlib.load(folder)
    auto = family_of(model.config).head.auto_model.__name__
    torch.save(said_here(model, processor, utterance), place / "said.pt")
    found = stranger(place, folder, auto)
    say(f"asrlib: {type(model).__module__}.{type(model).__name__}, of {utterance.id}, read from {utterance.text!r}")
    say(json.dumps(found, indent=2))
    return 0 if found["equal_bit_for_bit"] else 1


@torch.no_grad()
def said_here(model, processor, utterance) -> dict:
    """Logits and token ids; `told`, the text that logits are of where they need one, and how ids are spelt."""
    inputs = processor(utterance.audio(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    if not family_of(model.config).head.reads_labels:
        logits = model(**inputs).logits
        return {"logits": logits, "ids": logits.argmax(-1), "told": {}, "spelling": {}}
    said = model.generate(**inputs)
    ids = getattr(said, "sequences", said)
    told = {"decoder_input_ids": ids[:, :4]}
    return {
        "logits": model(**inputs, **told).logits,
        "ids": ids,
        "told": told,
        "spelling": {"skip_special_tokens": True},
    }


def stranger(place: Path, folder: Path, auto: str) -> dict:
    """What a process finds that has a Python, four packages, and none of ours."""
    venv.create(place / "venv", with_pip=True)
    python = place / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", CONSTRAINTS, *NEEDED]
    subprocess.run(install, check=True, cwd=place)
    home = {"PATH": "", "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    call = [python, "-c", STRANGER, folder, place / "speech.wav", place / "said.pt", auto]
    done = subprocess.run(call, cwd=place, env=home, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder} does not load in the new environment:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
