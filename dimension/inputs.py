"""A foreign model's inputs: batches of any usual form, the same in every pass."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from utils import UserError

MASK = "attention_mask"  # Hugging Face's name: 1 for a text's own tokens, 0 for padding
EMBEDDED = "inputs_embeds"  # and for what may stand for token ids


def call(model: nn.Module, batch) -> None:
    """Runs a model on a batch: a tensor, a tuple or list of arguments, or a mapping of them."""
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def count_samples(batch) -> int:
    """The length of a batch's first tensor.

    Raises:
        UserError: it holds none, or no sample.
    """
    tensors = [value for value in _values(batch) if isinstance(value, Tensor) and value.dim()]
    if not tensors or not len(tensors[0]):
        raise UserError(
            f"batches: {type(batch).__name__} is no batch; give tensors, or tuples or mappings "
            "that hold some, with samples in the first dimension"
        )
    return len(tensors[0])


def first_samples(batch, count: int):
    """The batch with what has a row for each sample, tensors and lists, cut to `count` rows."""
    samples = count_samples(batch)

    def cut(value):
        listed = isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.dim())
        return value[:count] if listed and len(value) == samples else value

    return _changed(batch, cut)


def shorter_texts(batch: Mapping) -> dict:
    """The batch without the last column of its attention mask and of what belongs to its tokens.

    These are the arguments of whole numbers, such as ids or boxes, that begin with the mask's
    (B, L), for floating-point ones may belong to as many regions of an image.
    """
    size = batch[MASK].shape

    def of_tokens(name: str, value) -> bool:
        if not isinstance(value, Tensor) or value.shape[:2] != size:
            return False
        return name in (MASK, EMBEDDED) or not value.is_floating_point()

    return {name: x[:, :-1] if of_tokens(name, x) else x for name, x in batch.items()}


def padding_mask(batch) -> Tensor | None:
    """The batch's attention mask as bool (B, L); None where it has none."""
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


class Batches:
    """Iterates the batches anew for each pass, on the model's device.

    Attributes:
        first: the first batch, on that device.
        once: whether there can be one pass only, as over a generator.
    """

    def __init__(self, batches: Iterable, device: torch.device):
        """Takes the first batch.

        Args:
            batches: yields tensors, tuples or lists of a model's arguments, or mappings of them.
            device: the model's.

        Raises:
            UserError: there is no batch, or it is none.
        """
        if isinstance(batches, Tensor | Mapping):
            raise UserError(
                f"batches: a {type(batches).__name__} is one batch; give a list of them, "
                "for instance tensor.split(8)"
            )
        self.batches, self.device = batches, device
        self.iterator = iter(batches)
        self.once = self.iterator is batches
        self.marks: list[int] = []  # of the first pass's batches
        for batch in self.iterator:
            self.untouched = batch
            self.first = _moved(batch, device)
            self.batch_size = count_samples(batch)
            return
        raise UserError("batches: there are none to measure with")

    def most_samples(self) -> int | None:
        """How many samples there are, at most if no batch is larger than the first; None: unknown.

        A list is counted. The batches of what else has a length are not read for that.
        """
        if isinstance(self.batches, list | tuple):
            return sum(count_samples(batch) for batch in self.batches)
        try:
            return len(self.batches) * self.batch_size
        except TypeError:
            return None

    def __iter__(self) -> Iterator:
        """One pass.

        Raises:
            UserError: a batch is not what it was in the first pass.
        """
        begun, self.iterator = self.iterator, None
        source = iter(self.batches) if begun is None else chain([self.untouched], begun)
        for number, batch in enumerate(source):
            mark = _mark(batch)
            if begun is not None:
                self.marks.append(mark)
            elif self.marks[number : number + 1] != [mark]:
                raise UserError(
                    f"batches: batch {number} is not what it was in the first pass; every pass "
                    "must see the same samples in the same order (shuffle=False, no augmentation)"
                )
            yield _moved(batch, self.device)


def _values(batch) -> list:
    """A batch's arguments."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, tuple | list) else [batch]


def _moved(batch, device: torch.device):
    """The batch with its tensors on a device."""
    return _changed(batch, lambda x: x.to(device) if isinstance(x, Tensor) else x)


def _changed(batch, change: Callable):
    """The batch, each of whose arguments is what `change` makes of it."""
    if isinstance(batch, Mapping):
        return {name: change(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [change(value) for value in batch]
    return change(batch)


def _mark(batch) -> int:
    """A checksum of the batch's tensors."""
    mark = 0
    for value in _values(batch):
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            mark = zlib.crc32(data, mark)
    return mark
