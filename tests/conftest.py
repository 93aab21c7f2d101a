"""A fresh checkout to work in, seeds, golden data, and models at the goldens' sizes."""

import os
import random
import resource
import shutil
from pathlib import Path

import compat  # noqa: F401

import pytest
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
OF_USERS = {"annotation", "datasets", "output", "ID"}  # what the README lays into a checkout


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files and tests in random order")
    parser.addoption("--accelerator", action="store_true", help="scripts take a simulated GPU")


def pytest_collection_modifyitems(config, items):
    """Shuffles files, and the tests of each; the same in every process of a run."""
    seed = config.getoption("--shuffle")
    if seed is not None:
        chance = random.Random(seed)
        files = sorted({item.path for item in items})
        place = {path: chance.random() for path in files}
        items.sort(key=lambda item: (place[item.path], chance.random()))


@pytest.fixture(scope="session", autouse=True)
def checkout(tmp_path_factory):
    """The working folder of all tests: links to what a fresh clone has."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in OF_USERS and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    os.chdir(folder)
    yield folder
    os.chdir(ROOT)


@pytest.fixture(scope="session", autouse=True)
def accelerator(request):
    """With --accelerator, a simulated device for `--device auto` where torch has no real one."""
    if not request.config.getoption("--accelerator") or torch.accelerator.is_available():
        yield
        return
    from tests.simulated import attached

    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with attached(patch):
            yield


@pytest.fixture(autouse=True)
def seeded(checkout):
    """A seed for each test, which leaves nothing in the working folder."""
    torch.manual_seed(0)
    yield
    for path in checkout.iterdir():
        if not path.is_symlink():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def float64(monkeypatch):
    """Trainings in float64, in this process; see `train_in_float64`."""
    from tests.runs import train_in_float64

    train_in_float64(monkeypatch)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def full_disk():
    """A limit of 30 kB on the size of files stands for the disk's end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_segments(monkeypatch):
    """Captures keep segments of a token or a few, and the budget holds nothing but what is kept."""
    from dimension import budget

    monkeypatch.setattr(budget, "SEGMENT_ELEMENTS", 3000)
    for name in ("WORKSPACE", "MATRICES", "BATCH_OUTPUTS"):
        monkeypatch.setattr(budget, name, 0)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A folder of 48 training scenes and 6 in each held-out split, for reading."""
    from tests.runs import make_scenes

    return make_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


def read_golden(name: str, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors of a golden file whose name starts with prefix, which is cut off."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(prefix)]
        return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


@pytest.fixture(scope="session")
def golden_tokenizer(tmp_path_factory) -> str:
    """A folder with a vocabulary of the goldens' size, [SEP] at BERT's 102 and [PAD] at 0."""
    words = [f"word{i}" for i in range(158)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[1:4] = ["a", "picture", "of"]
    folder = tmp_path_factory.mktemp("golden_tokenizer")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)


def tiny_config(tokenizer: str, width: int, layers: int, intermediate: int) -> dict:
    return {
        "image_size": 32,
        "vit": {"patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 4},
        "med_config": {
            "vocab_size": 160,
            "hidden_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "intermediate_size": intermediate,
            "max_position_embeddings": 64,
        },
        "tokenizer": tokenizer,
    }


@pytest.fixture(scope="session")
def caption_tiny_config(golden_tokenizer) -> dict:
    """The sizes of golden/caption_tiny."""
    return tiny_config(golden_tokenizer, 48, 3, 64)


@pytest.fixture(scope="session")
def nlvr_tiny_config(golden_tokenizer) -> dict:
    """The sizes of golden/nlvr_tiny."""
    return tiny_config(golden_tokenizer, 32, 8, 48)
