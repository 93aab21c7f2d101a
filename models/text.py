"""The text transformer's configuration and tokenizer."""

from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from transformers import BertTokenizer
from transformers.activations import ACT2FN
from transformers.models.blip.configuration_blip import BlipTextConfig

from configs import read_med_config
from models.sizes import check_sizes
from models.weight_files import fetch
from utils import UserError, mistaken_for

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_BERT_BASE = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
_FRACTIONS = tuple(name for name, value in _BERT_BASE.items() if isinstance(value, float))
# BERT's fields that BLIP's text model fixes itself
_FIXED = set("architectures model_type type_vocab_size encoder_width".split())
_FIXED |= {"add_cross_attention", "pad_token_id"}


def text_config(med_config: str | dict, encoder_width: int, tokenizer) -> BlipTextConfig:
    """The configuration of a text transformer that cross-attends to embeddings of a width.

    `med_config` is a mapping, or a JSON file, with BERT's field names; a field that is not there is
    BERT base's.
    """
    fields = read_med_config(med_config)
    unknown = sorted(set(fields) - set(_BERT_BASE) - _FIXED)
    if unknown:
        raise UserError(f"med_config: unknown fields {unknown}; known are {sorted(_BERT_BASE)}")
    sizes = {key: fields.get(key, default) for key, default in _BERT_BASE.items()}
    activation = sizes.pop("hidden_act")
    check_sizes("med_config", sizes, {"hidden_size": "num_attention_heads"}, _FRACTIONS)
    if str(activation) not in ACT2FN:
        raise UserError(f"med_config: hidden_act {activation!r} is none of {sorted(ACT2FN)}")
    size, tokens = sizes["vocab_size"], len(tokenizer)
    if tokens > size:
        raise UserError(f"med_config: vocab_size {size} is below the tokenizer's {tokens} tokens")
    return BlipTextConfig(
        **sizes,
        hidden_act=activation,
        encoder_hidden_size=encoder_width,
        is_decoder=True,  # gives a layer of the library's BLIP its cross-attention
        label_smoothing=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_tokenizer(name: str) -> BertTokenizer:
    """BERT's WordPiece tokenizer, by folder or hub name, with BLIP's [DEC] (`bos_token`) and [ENC].

    Raises:
        UserError: the vocabulary cannot be read, or is not BERT's.
    """
    file = vocabulary_file(name)
    try:
        # a byte order mark at the start would make another token of the first
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: cannot read {file}: {error}") from error
    vocabulary = {token: i for i, token in enumerate(lines)}
    twice = [token for i, token in enumerate(lines) if vocabulary[token] != i]
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if twice or missing:
        why = f"it names {twice[0]!r} twice" if twice else f"it lacks {' '.join(missing)}"
        why = mistaken_for(file) or why
        raise UserError(f"tokenizer: {file} is no vocabulary of BERT: {why}")
    tokenizer = BertTokenizer(vocab=vocabulary)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    ids = tokenizer("a picture of ").input_ids
    base = tokenizer.bos_token_id == 30522  # the size of bert-base-uncased
    if tokenizer.unk_token_id in ids or (base and ids != [101, 1037, 3861, 1997, 102]):
        raise UserError(f"tokenizer: {name!r} reads 'a picture of' as {ids}; wrong vocab.txt?")
    return tokenizer


def vocabulary_file(name: str) -> Path:
    """The `vocab.txt` of a local folder or of a name on the hub, which is downloaded once."""
    remedy = f"For BLIP's weights take {_address('bert-base-uncased')}"
    if Path(name).is_dir():
        file = Path(name, "vocab.txt")
        if not file.is_file():
            raise UserError(f"tokenizer: there is no vocab.txt in the folder {name}. {remedy}")
        return file
    reason = "HF_HUB_OFFLINE is set"
    try:
        return Path(hf_hub_download(name, "vocab.txt", local_files_only=True))
    except HFValidationError:
        reason = "there is no such folder"
    except OSError:  # not in the cache
        if not constants.HF_HUB_OFFLINE:
            try:
                return fetch(_address(name))  # hf_hub_download would try for minutes
            except UserError as error:
                reason = str(error.__cause__)
    raise UserError(
        f"tokenizer: cannot load {name!r} ({reason}). Set `tokenizer` to a folder with vocab.txt. "
        f"{remedy}; for the demo configs run `python -m data.scenes`"
    )


def _address(name: str) -> str:
    return f"{constants.ENDPOINT}/{name}/resolve/main/vocab.txt"


def write_vocabulary(tokenizer: BertTokenizer, folder: Path) -> None:
    """Writes the `vocab.txt` that `load_tokenizer` reads."""
    words = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
