"""An exported folder where asrlib is not: a new virtual environment with torch and transformers alone, then removed.

    make fresh-environment                               # of the shipped model, made latent here
    make fresh-environment ARGS=reports/demo/exports/finetuned-hub

Run by hand, for it installs 1 GB. Prints what was loaded and whether its logits are those of the project, bit for bit;
exit status 1 where they are not.
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

NEEDED = ("torch", "transformers", "safetensors", "soundfile")
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"

STRANGER = """
import importlib.util, json, sys
assert importlib.util.find_spec("asrlib") is None, "asrlib is here"
import soundfile, torch, transformers
from transformers import AutoModelForCTC, AutoProcessor
folder, wave, logits_of_project = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCTC.from_pretrained(folder, trust_remote_code=True).eval()
samples, rate = soundfile.read(wave, dtype="float32")
inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
wanted = torch.load(logits_of_project)
print(json.dumps({
    "model": type(model).__module__ + "." + type(model).__name__,
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "text": processor.batch_decode(logits.argmax(-1))[0],
    "equal_bit_for_bit": torch.equal(logits, wanted),
    "largest_difference": (logits - wanted).abs().max().item(),
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
    with torch.no_grad():
        inputs = processor(utterance.audio(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        torch.save(model(**inputs).logits, place / "logits.pt")
    found = stranger(place, folder)
    say(f"asrlib: {type(model).__module__}.{type(model).__name__} said of {utterance.id}: {utterance.text!r}")
    say(json.dumps(found, indent=2))
    return 0 if found["equal_bit_for_bit"] else 1


def stranger(place: Path, folder: Path) -> dict:
    """What a process finds that has a Python, four packages, and none of ours."""
    venv.create(place / "venv", with_pip=True)
    python = place / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", CONSTRAINTS, *NEEDED]
    subprocess.run(install, check=True, cwd=place)
    home = {"PATH": "", "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    call = [python, "-c", STRANGER, folder, place / "speech.wav", place / "logits.pt"]
    done = subprocess.run(call, cwd=place, env=home, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder} does not load in the new environment:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
