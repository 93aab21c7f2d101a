"""The image encoder: timm's vision transformer at BLIP's sizes."""

import compat  # noqa: F401

from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.sizes import choose_sizes

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


class VisionEncoder(VisionTransformer):
    """A ViT without head that can recompute its last blocks in the backward pass."""

    checkpointed_blocks = 0

    def embed(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) to what the first block reads: (B, L, D), class token first."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(image))))

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, S, S) to token embeddings (B, 1 + (S / patch)^2, D), class token first."""
        x = self.embed(image)
        plain = len(self.blocks) - (self.checkpointed_blocks if self.training else 0)
        x = self.blocks[:plain](x)
        if plain < len(self.blocks):
            x = checkpoint_seq(self.blocks[plain:], x)
        return self.norm(x)


def build_vision_encoder(config: dict, drop_path_rate: float = 0.0) -> VisionEncoder:
    """A random encoder; `vit_grad_ckpt` recomputes its last `vit_ckpt_layer` blocks (0: all)."""
    heads = {"embed_dim": "num_heads"}
    encoder = VisionEncoder(
        img_size=config["image_size"],
        num_classes=0,
        global_pool="",
        weight_init="jax",  # Xavier: timm's default of 0.02 leaves a narrow ViT slow to learn
        **choose_sizes(config, "vit", SIZES, heads, drop_path_rate=drop_path_rate),
    )
    if config.get("vit_grad_ckpt"):
        encoder.checkpointed_blocks = config.get("vit_ckpt_layer") or len(encoder.blocks)
    return encoder
