"""Downloads a published corpus to this machine.

    python -m asrlib data prepare librispeech --root DIR
    python -m asrlib data prepare librispeech --root DIR --splits train-clean-100 train-clean-360 dev-clean

If it is interrupted or killed, the same command resumes. Splits that are there already are not downloaded again.
"""

import argparse
import sys
from pathlib import Path

import yaml

from asrlib.data.download import HUB_FOLDERS, prepare_librispeech
from asrlib.data.opening import open_corpus

SPLITS = ["train-clean-100", "dev-clean", "test-clean", "test-other"]  # those of params/quick.yaml and params/full.yaml
SIZES = "dev and test 0.3 GB each, train-clean-100 6.4, train-clean-360 23, train-other-500 31"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asrlib data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    prepare = parser.add_subparsers(required=True, metavar="prepare").add_parser("prepare", help="download a corpus")
    add = prepare.add_argument
    add("corpus", choices=["librispeech"])
    add("--root", required=True, type=Path, metavar="DIR", help="the folder of the splits")
    add(
        "--splits",
        nargs="+",
        default=SPLITS,
        metavar="SPLIT",
        help=f"of {', '.join(HUB_FOLDERS)} (default: {' '.join(SPLITS)}). Sizes: {SIZES}",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    root = args.root.expanduser().absolute()
    prepare_librispeech(root, args.splits)
    corpora = [open_corpus(root, split) for split in dict.fromkeys(args.splits)]
    for corpus in corpora:
        rejected = f", {len(corpus.rejected):,} rejected" if corpus.rejected else ""
        sys.stdout.write(f"{corpus.split}: {len(corpus):,} utterances, {corpus.hours:.2f} hours{rejected}\n")
    line = yaml.safe_dump({"corpus": str(root)}, allow_unicode=True, width=sys.maxsize)
    sys.stdout.write(f"\nFor params/NAME.yaml:\n{line}")
    return 0
