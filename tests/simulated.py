"""An accelerator `sim:0` in Python, for machines that have none.

A tensor on it wraps one in the CPU's memory. The device refuses what a GPU refuses (CPU tensors
among its own, the CPU's generator), and counts what costs time on a GPU: copies, and waits of the
CPU. It has a generator and an autocast to bfloat16. It does not simulate streams, other arithmetic,
several devices, NCCL, DistributedDataParallel or torch.compile.

Import this module at the top of a test module: torch must know the device before the process's
first backward pass, when autograd starts a thread for each device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE_TYPE = "sim"
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXING |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
ANSWERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the CPU waits for
# torch makes them empty, then resizes: a wrapper cannot follow
MAKE_AND_RESIZE = "arange arange.start arange.start_step eye eye.m linspace randperm".split()
# CUDA's lists of autocast, as far as transformers call them
IN_BFLOAT16 = "linear matmul mm bmm addmm baddbmm conv2d scaled_dot_product_attention".split()
IN_FLOAT32 = "layer_norm softmax.int log_softmax.int cross_entropy_loss nll_loss".split()


class SimTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE_TYPE, 0),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return DEVICE.run(func, args, kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        """Into a file as a CPU tensor, whose copy the device must wait for."""
        DEVICE.note_transfer("to cpu", self, waits=True)
        return self.inner.__reduce_ex__(protocol)


class Simulation:
    """The device's state, and what was counted since `clear`."""

    def __init__(self):
        self.present = False  # until then torch takes it for absent
        self.has_float64 = True  # GPUs of Apple have none
        self.seed(0)
        self.clear()

    def clear(self) -> None:
        self.rng_reads = 0
        self.waits: list[str] = []
        self.transfers: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def seed(self, seed: int) -> None:
        self.rng_state = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device=DEVICE_TYPE) -> torch.Tensor:
        self.rng_reads += 1
        return self.rng_state.clone()

    def set_rng_state(self, state: torch.Tensor, device=DEVICE_TYPE) -> None:
        self.rng_state = state.clone()

    def note_transfer(self, direction: str, tensor: torch.Tensor, waits: bool) -> None:
        self.transfers.append((direction, tuple(tensor.shape), tensor.dtype))
        if waits:
            self.waits.append(f"copy {direction}")

    def run(self, func, args: tuple, kwargs: dict):
        """Computes an operation in the CPU's memory as the device would."""
        leaves = tree_leaves((args, kwargs))
        own = [x for x in leaves if isinstance(x, SimTensor)]
        device = kwargs.get("device")
        here = bool(own) if device is None else torch.device(device).type == DEVICE_TYPE
        self._check(func, args, leaves, own, here)
        if func in COPIES:
            self._note_copy(func, args, kwargs, here)
        elif waits_for_answer(func, args):
            self.waits.append(str(func))
        options = kwargs | ({"device": torch.device("cpu")} if device is not None else {})
        options |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        inner, inner_options = tree_map(inner_of, (args, options))
        with self._generator(func, here):
            result = func(*inner, **inner_options)
        if func is aten.copy_.default:
            return args[0]
        if not here:
            return result
        by_inner = {id(x.inner): x for x in own}  # in-place operations return what they were given
        return tree_map(lambda x: self._wrap(x, by_inner), result)

    def _wrap(self, inner, by_inner: dict[int, SimTensor]):
        if not isinstance(inner, torch.Tensor):
            return inner
        if inner.dtype == torch.float64 and not self.has_float64:
            raise TypeError("the device has no float64")
        if id(inner) in by_inner:
            assert by_inner[id(inner)].shape == inner.shape, "resized in place: not simulated"
            return by_inner[id(inner)]
        return SimTensor(inner)

    def _check(self, func, args: tuple, leaves: list, own: list, here: bool) -> None:
        """Refuses CPU tensors among the device's, and the CPU's generator."""
        if here and any(isinstance(x, torch.Generator) for x in leaves):
            raise RuntimeError(f"{func}: expected a generator of the device, but found the CPU's")
        others = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, SimTensor)]
        if not own or not others or func in COPIES:
            return
        if func in INDEXING and isinstance(args[0], SimTensor):
            indices = {id(x) for x in args[1]}
            for index in (x for x in others if id(x) in indices):
                self.note_transfer("to sim", index, waits=True)
            others = [x for x in others if id(x) not in indices]
        if torch.Tag.pointwise in func.tags or func in INDEXING:
            others = [x for x in others if x.dim()]
        if others:
            raise RuntimeError(f"{func}: expected tensors on one device, but found sim:0 and cpu")

    def _note_copy(self, func, args: tuple, kwargs: dict, here: bool) -> None:
        """Notes a copy between the memories; one inside a memory is computing."""
        in_place = func is aten.copy_.default
        source = args[1] if in_place else args[0]
        here = isinstance(args[0], SimTensor) if in_place else here
        if isinstance(source, SimTensor) == here:
            return
        waits = not (here and (args[2:3] == (True,) or kwargs.get("non_blocking", False)))
        self.note_transfer("to sim" if here else "to cpu", source, waits)

    @contextmanager
    def _generator(self, func, here: bool) -> Iterator[None]:
        """Inside the block an operation draws from the device's generator."""
        if not here or torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        before = torch.get_rng_state()
        torch.set_rng_state(self.rng_state)
        try:
            yield
        finally:
            self.rng_state = torch.get_rng_state()
            torch.set_rng_state(before)


def inner_of(value):
    return value.inner if isinstance(value, SimTensor) else value


def waits_for_answer(func, args: tuple) -> bool:
    """Whether the CPU must know values to go on: `.item()`, `nonzero()`, a mask as an index."""
    if func in INDEXING:
        masks = (torch.bool, torch.uint8)
        return any(x.dtype in masks for x in args[1] if isinstance(x, torch.Tensor))
    return bool(ANSWERS & set(func.tags)) or func is aten.bincount.default


# What torch asks of a device's module, which it finds as `torch.sim`.
MODULE = SimpleNamespace(
    _initialized=True,  # so that recomputed blocks restore the generator
    _is_in_bad_fork=lambda: False,
    is_available=lambda: DEVICE.present,
    is_initialized=lambda: True,
    device_count=lambda: int(DEVICE.present),
    current_device=lambda: 0,
    device=lambda index: torch.device(DEVICE_TYPE, index),
    manual_seed_all=lambda seed: DEVICE.seed(seed),
    get_rng_state=lambda *device: DEVICE.get_rng_state(),
    set_rng_state=lambda state, *device: DEVICE.set_rng_state(state),
    get_amp_supported_dtype=lambda: [torch.bfloat16],
)


def register() -> list[torch.library.Library]:
    """Makes the device known; returns what must live as long as it is used."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE_TYPE, MODULE)
    every = torch.library.Library("_", "IMPL")
    every.fallback(making, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    some = torch.library.Library("aten", "IMPL")
    for name in MAKE_AND_RESIZE:
        some.impl(name, partial(making, operation(name)), "PrivateUse1")
    for names, dtype in ((IN_BFLOAT16, torch.bfloat16), (IN_FLOAT32, torch.float32)):
        for name in names:
            some.impl(name, partial(casting, operation(name), dtype), "AutocastPrivateUse1")
    return [every, some]


def making(func, *args, **kwargs):
    """An operation without tensors of the device among its arguments, such as `torch.zeros`."""
    return DEVICE.run(func, args, kwargs)


def operation(name: str):
    """An operation by name, with its overload behind a dot."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def casting(func, dtype: torch.dtype, *args, **kwargs):
    """An operation under autocast: its floating-point tensors in a type, itself as ever."""

    def cast(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    own_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(own_key):
        return func(*tree_map(cast, args), **kwargs)


@contextmanager
def attached(monkeypatch) -> Iterator[Simulation]:
    """Inside the block torch finds the device, also where its C++ knows its own devices only."""
    if KEPT is None:
        pytest.skip("a real accelerator is there, or this torch takes none from Python")
    with torch.device("cpu"):  # torch now notes, for good, which functions such a block rules
        torch.empty(0)
    memory = {"get_memory_info": (2**30, 2**31), "max_memory_allocated": 2**29}
    for name, value in memory.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "tensor", partial(tensor_on, torch.tensor))
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay tied
    DEVICE.clear()
    DEVICE.present = DEVICE.has_float64 = True
    try:
        yield DEVICE
    finally:
        DEVICE.present = False
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def pin(tensor: torch.Tensor, device=None) -> torch.Tensor:
    """A copy that says it is pinned."""
    copy = tensor.clone()
    copy.pinned = True
    return copy


def tensor_on(make_tensor, data, *, device=None, **options) -> torch.Tensor:
    """`torch.tensor`, which makes a tensor in the CPU's memory and copies it to the device."""
    here = device is not None and torch.device(device).type == DEVICE_TYPE
    made = make_tensor(data, device="cpu" if here else device, **options)
    return made.to(device) if here else made


DEVICE = Simulation()
POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
KEPT = register() if POSSIBLE and not torch.accelerator.is_available() else None
