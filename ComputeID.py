"""Measures the intrinsic dimension (ID) of every layer of a captioner, an NLVR2 model or CLIP.

    python ComputeID.py -n 2000 --Path ID/Blip_coco --cpu          # or --gpu 0
    python ComputeID.py -n 500 --Path ID/demo --config configs/caption_demo.yaml
    python -m torch.distributed.run --nproc_per_node=2 ComputeID.py -n 2000 --Path ID/Blip_coco
    python ComputeID.py --hf openai/clip-vit-base-patch32 --images pictures --texts captions.txt
    python ComputeID.py -s --Path ID/Blip_coco --fraction 0.9      # after --save_distances

Writes to --Path: profile.json (for --id_profile of the training scripts), the original's ID.txt,
result_id.txt, result_bar.txt and dim.txt, and figures. A run that was stopped goes on where it was
when the same command is given again. --hf measures any model of Hugging Face's, by its name or in
a folder, on pictures and, where it takes texts, on a text for each.
"""

import argparse
from pathlib import Path

from configs import COUNT, FROM_ZERO, Number, load_config
from utils import launch, lazy_names, script_parser, user_path

DEFAULT_CONFIG = "configs/caption_coco.yaml"
HUB_ONLY = "images texts decoder_texts max_tokens".split()
OURS_ONLY = "skip keep_padding skip_bad_images pretrained pruned".split()  # not with --hf
__getattr__ = lazy_names({"PartialProfile": "dimension.profile"})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags."""
    parser, path = script_parser(__doc__), user_path
    add = parser.add_argument
    samples = Number(int, 3)  # an ID needs three points
    add("-n", "--nsamples", type=samples, help="training samples (2000; with --hf at most)")
    add("--Path", type=path, help="folder of results (ID/Blip_coco, or ID/ and the model's name)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="the CPU as device")
    device.add_argument("--gpu", type=FROM_ZERO, metavar="N", help="GPU's index (one, if any)")
    add("-s", "--skip", action="store_true", help="other estimates from kept distances, no model")
    add("--save_distances", action="store_true", help="keep distances for -s, 4 n^2 bytes a layer")
    fraction = Number(float, 0, 1)
    add("--fraction", type=fraction, default=1.0, help="share of the points that is fitted")
    estimators = {"choices": ["twonn", "gride", "mle"], "default": "twonn"}
    add("--estimator", **estimators, help="TwoNN, Gride or maximum likelihood")
    one = {"nargs": "?", "type": COUNT, "const": 0, "metavar": "TOKENS"}
    add("--one_length", **one, help="samples with texts of one length only (the commonest)")
    add("--keep_padding", action="store_true", help="a batch's padding counts, like the original's")
    add("--skip_bad_images", action="store_true", help="other samples for unreadable images")
    memory = "GB for outputs, states and matrices of a process (a share of what is free)"
    add("--memory_gb", type=Number(float, 0), help=memory)
    beside = {"nargs": "+", "type": path, "default": [], "metavar": "PROFILE"}
    add("--compare", **beside, help="profiles to draw beside it")
    add("--batch_size", type=COUNT, help="samples in a forward pass (the config's; 8 with --hf)")
    add("--seed", type=FROM_ZERO, default=0, help="seed of the choice of samples and blocks")
    add("--config", type=path, default=DEFAULT_CONFIG, help="YAML file of the model")
    add("--pretrained", type=path, help="weights instead of the config's")
    add("--pruned", type=path, help="pruned weights to measure (a file, or a run's folder)")
    add("--hf", type=path, metavar="NAME_OR_FOLDER", help="a model of Hugging Face's")
    add("--images", type=path, metavar="FOLDER", help="with --hf: pictures, in the order of names")
    add("--texts", type=path, metavar="FILE", help="with --hf: a line of text for each picture")
    add("--decoder_texts", type=path, metavar="FILE", help="with --hf: a decoder's text for each")
    add("--max_tokens", type=COUNT, metavar="N", help="with --hf: no samples with longer texts")
    args = parser.parse_args(argv)
    for flag in HUB_ONLY if args.hf is None else OURS_ONLY:
        if getattr(args, flag):
            how = "goes with --hf" if args.hf is None else "does not go with --hf"
            parser.error(f"argument --{flag} {how}")
    if args.fraction == 0:
        parser.error("argument --fraction: no points are left to fit; 1 takes all")
    if args.one_length is not None and args.skip:
        parser.error("argument --one_length: -s has the samples of the run before")
    if args.hf and args.texts is None and (args.one_length is not None or args.max_tokens):
        parser.error("--one_length and --max_tokens choose by texts: --hf is without --texts")
    if args.Path is None:  # no profile replaces another model's
        name = Path(args.config).stem if args.hf is None else Path(args.hf).resolve().name
        args.Path = f"ID/{'Blip_coco' if name == Path(DEFAULT_CONFIG).stem else name}"
    return args


def main(args: argparse.Namespace) -> None:
    """Checks the config, then measures."""
    overrides = {"pretrained": args.pretrained, "augment": False}
    config = None if args.skip or args.hf else load_config(args.config, overrides)
    from engine.profile import run  # torch, after the mistakes that need none

    run(args, config)


if __name__ == "__main__":
    launch(main, parse_args())
