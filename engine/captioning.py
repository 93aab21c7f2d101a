"""A captioner ready for pictures: model, transform, device."""

from collections.abc import Callable

from PIL import Image

from data.transforms import build_transform
from engine.loading import EvalOptions
from engine.processes import choose_device, computes_bf16
from models.captioner import build_captioner
from models.checkpoint import load_trained
from sparse.linear import sparsify_


def load_captioner(
    config: dict, sparse: bool, tell: Callable[[str], None]
) -> Callable[[Image.Image], str]:
    """The function from a picture to its caption; `tell` gets lines on the model."""
    model = build_captioner(config).eval()
    tell(str(load_trained(model, config["pretrained"])))
    if sparse:
        tell(str(sparsify_(model)))
    device = choose_device("cpu" if sparse else "auto", processes=1)
    model.to(device)
    options = EvalOptions(config, device, computes_bf16(device))
    transform = build_transform(config["image_size"], augment=False)
    lengths = config["num_beams"], config["max_length"], config["min_length"]

    def caption(image: Image.Image) -> str:
        with options.autocast():
            return model.generate(transform(image)[None].to(device), *lengths)[0]

    return caption
