"""A captioner ready for pictures: model, transform, device."""

from collections.abc import Callable

import torch
from PIL import Image

from data.transforms import build_transform
from engine.processes import choose_device
from models.captioner import build_captioner
from models.checkpoint import load_trained
from sparse.linear import sparsify_


def load_captioner(
    config: dict, sparse: bool, tell: Callable[[str], None]
) -> Callable[[Image.Image], str]:
    """The function from a picture to its caption, on the device and in the type of evaluation.

    Args:
        config: of a captioner, with `pretrained` weights.
        sparse: whether to skip the zeros of the weights, on the CPU.
        tell: gets what was loaded and what became sparse.
    """
    model = build_captioner(config).eval()
    tell(str(load_trained(model, config["pretrained"])))
    if sparse:
        tell(str(sparsify_(model)))
    device = choose_device("cpu" if sparse else "auto", processes=1)
    model.to(device)
    transform = build_transform(config["image_size"], augment=False)
    lengths = config["num_beams"], config["max_length"], config["min_length"]

    def caption(image: Image.Image) -> str:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            return model.generate(transform(image)[None].to(device), *lengths)[0]

    return caption
