"""Digests of what a result depends on: files count by their content, not by their names."""

from hashlib import sha256

import torch
from torch import nn

from configs import read_med_config
from models.clip import OPENAI_TOKENIZER
from models.text import vocabulary_file


def content_hash(content) -> str:
    """SHA-256 of plain values, the same whatever file they came from."""
    digest = sha256()
    for part in content if isinstance(content, list) else [content]:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def model_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters, the same whatever file they came from."""
    digest = sha256()
    for name, value in sorted(model.named_parameters(remove_duplicate=False)):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def data_digests(config: dict, records: list[dict]) -> dict[str, str]:
    """SHA-256 of a config's files and of the training annotation, by what they hold."""
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
