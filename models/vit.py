"""The image encoder: timm's vision transformer at BLIP's sizes."""

import compat  # noqa: F401

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer

from models.sizes import check_sizes
from utils import UserError

SIZES = {
    "tiny": {"patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 4},
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {
        "patch_size": 16,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "drop_path_rate": 0.1,
    },
}
_SIZE_KEYS = {"patch_size", "embed_dim", "depth", "num_heads", "drop_path_rate"}


class VisionEncoder(VisionTransformer):
    """A ViT without head that can recompute its last blocks in the backward pass."""

    checkpointed_blocks = 0

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) to what the first block reads: (B, L, D), class token first."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(image))))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) to token embeddings (B, 1 + (S / patch)^2, D), class token first."""
        x = self.embed(image)
        plain = len(self.blocks) - (self.checkpointed_blocks if self.training else 0)
        x = self.blocks[:plain](x)
        if plain < len(self.blocks):
            x = checkpoint_seq(self.blocks[plain:], x)
        return self.norm(x)


def build_vision_encoder(config: dict, drop_path_rate: float = 0.0) -> VisionEncoder:
    """Builds the image encoder of a config.

    Args:
        config: `vit` ("tiny", "base", "large" or a mapping with patch_size, embed_dim, depth,
            num_heads and, if wanted, drop_path_rate), `image_size` in pixels, `vit_grad_ckpt`
            and `vit_ckpt_layer` (how many of the last blocks are recomputed; 0 is all).
        drop_path_rate: where the size does not name its own.

    Raises:
        UserError: unknown size or keys, a value that cannot be, or an image size that is no
            multiple of the patch size.
    """
    vit = config["vit"]
    if isinstance(vit, str):
        if vit not in SIZES:
            raise UserError(f"vit: {vit!r} is none of {sorted(SIZES)} and no mapping of sizes")
        vit = SIZES[vit]
    missing = _SIZE_KEYS - {"drop_path_rate"} - set(vit)
    if missing or set(vit) - _SIZE_KEYS:
        raise UserError(f"vit: a mapping needs {sorted(_SIZE_KEYS)}; got {sorted(vit)}")
    sizes = {"drop_path_rate": drop_path_rate, **vit}
    counts = ("patch_size", "embed_dim", "depth", "num_heads")
    check_sizes("vit", sizes, counts, ("drop_path_rate",), "embed_dim", "num_heads")
    if config["image_size"] < 1 or config["image_size"] % vit["patch_size"]:
        raise UserError(
            f"image_size: {config['image_size']} is no multiple of patch_size {vit['patch_size']}"
        )
    encoder = VisionEncoder(
        img_size=config["image_size"],
        num_classes=0,
        global_pool="",
        weight_init="jax",  # Xavier: timm's default of 0.02 leaves a narrow ViT slow to learn
        **sizes,
    )
    if config.get("vit_grad_ckpt"):
        encoder.checkpointed_blocks = config.get("vit_ckpt_layer") or len(encoder.blocks)
    return encoder
