"""What BLIP's two models share: image encoder, tokenizer, and limits of texts."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.checkpoint import blip_name
from models.text import load_tokenizer, text_config
from models.vit import build_vision_encoder
from utils import UserError


class Blip(nn.Module):
    """BLIP (Li et al., ICML 2022) without its text transformer, under the checkpoints' names."""

    official_name = staticmethod(blip_name)

    def __init__(self, config, first_token, max_tokens=None, prompt="", drop_path_rate=0.0):
        """Makes random weights. Raises a UserError if a value cannot be.

        Args:
            config: `vit`, `image_size`, `med_config`, `tokenizer`, and optionally `max_tokens`,
                `vit_grad_ckpt` and `vit_ckpt_layer`.
            first_token: takes the place of [CLS].
            max_tokens: where the config has none; by default all positions.
            prompt: begins every text.
            drop_path_rate: where `vit` gives none.
        """
        super().__init__()
        self.tokenizer = load_tokenizer(config["tokenizer"])
        self.visual_encoder = build_vision_encoder(config, drop_path_rate)
        width = self.visual_encoder.embed_dim
        self.text_config = text_config(config["med_config"], width, self.tokenizer)
        self.first_id = self.tokenizer.convert_tokens_to_ids(first_token)
        self.prompt = prompt
        self.prompt_length = len(self.tokenizer(prompt).input_ids) - 1  # [SEP] is no part
        positions, least = self.text_config.max_position_embeddings, self.prompt_length + 2
        self.max_tokens = config.get("max_tokens", max_tokens or positions)
        if not least <= self.max_tokens <= positions:
            raise UserError(
                f"max_tokens: {self.max_tokens} must be from {least} (one word) to {positions} "
                "(the text transformer's positions, `max_position_embeddings` of med_config)"
            )

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, both (B, L), of B texts, cut at `max_tokens`."""
        limit = {"padding": True, "truncation": True, "max_length": self.max_tokens}
        tokens = self.tokenizer(texts, **limit, return_tensors="pt")
        tokens.input_ids[:, 0] = self.first_id
        return tokens.input_ids, tokens.attention_mask

    def count_cut(self, texts: Sequence[str]) -> int:
        """Number of texts that `max_tokens` cuts."""
        batches = (texts[i : i + 1000] for i in range(0, len(texts), 1000))  # memory: 1 KB a token
        ids = (row for batch in batches for row in self.tokenizer(batch).input_ids)
        return sum(len(row) > self.max_tokens for row in ids)
