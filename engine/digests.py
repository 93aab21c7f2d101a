"""SHA-256 of what a result depends on: files count by their content, not by their names."""

from hashlib import sha256

import torch
from torch import nn

from configs import read_med_config
from models.clip import OPENAI_TOKENIZER
from models.text import vocabulary_file


def content_hash(content) -> str:
    """SHA-256 of plain values; a list's items are hashed one after the other."""
    digest = sha256()
    for part in content if isinstance(content, list) else [content]:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def model_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters."""
    digest = sha256()
    for name, value in sorted(model.named_parameters(remove_duplicate=False)):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def data_digests(config: dict, records: list[dict]) -> dict[str, str]:
    """SHA-256 of the training annotation's records and of the files that a config names."""
    tokenizer = config["tokenizer"]
    if tokenizer != OPENAI_TOKENIZER:  # which comes with its library
        tokenizer = content_hash(vocabulary_file(tokenizer).read_bytes())
    digests = {
        "content of the tokenizer": tokenizer,
        "content of the training annotation": content_hash(records),
    }
    if "med_config" in config:
        fields = sorted(read_med_config(config["med_config"]).items())
        digests["content of med_config"] = content_hash(fields)
    return digests
