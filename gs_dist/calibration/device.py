"""Where the decoder runs: the only module that knows what differs between a CPU and an Ascend card."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
import numpy as np
import numpy.typing as npt
from mindspore import Tensor, ops

from gs_dist.errors import ClusterError
from gs_dist.model.device_kind import DeviceKind
from gs_dist.model.dtypes import BFLOAT16, FLOATS
from gs_dist.processor import multiplies_bfloat16

__all__ = ["DTYPE_NAMES", "VISIBLE_CARDS", "Device", "current_device", "open_device"]

Array = npt.NDArray[Any]

# Numbers of the cards that a process sees, read when it first uses one; it takes the first of them.
VISIBLE_CARDS = "ASCEND_RT_VISIBLE_DEVICES"

_STRICT_MODE, _BFLOAT16_MODE = 0, 1  # `dnnl_fpmath_mode_t` of oneDNN 3

_MS_DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
DTYPE_NAMES: Mapping[Any, str] = {dtype: name for name, dtype in _MS_DTYPES.items()}
"""MindSpore's float dtypes to their names in config.json."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of this process. Made by `open_device`, which also selects it for MindSpore."""

    kind: DeviceKind

    def compute_dtype(self, checkpoint_dtype: str) -> Any:
        """MindSpore dtype of weights and activations for a checkpoint of that dtype.

        float32 on a CPU, for which MindSpore has no products of bfloat16 or a fast float16 (but see `open_device`);
        the checkpoint's own dtype on Ascend.
        """
        return ms.float32 if self.kind.on_host else _MS_DTYPES[checkpoint_dtype]

    def to_tensor(self, array: Array, dtype: Any = None) -> Tensor:
        """The array as a tensor, converted to `dtype` (a MindSpore float dtype) where it differs.

        On a CPU the tensor shares the array's memory when nothing had to be converted and the array is
        contiguous, writable or not: nobody may write to either afterwards.
        """
        wanted = array if dtype is None else array.astype(FLOATS[DTYPE_NAMES[dtype]], copy=False)
        ready = np.require(wanted, requirements=("C_CONTIGUOUS", "ALIGNED"))
        return Tensor.from_numpy(ready) if self.kind.on_host else Tensor(ready)

    def to_numpy(self, tensor: Tensor) -> Array:
        """The tensor's values; on a CPU they share its memory, bfloat16 comes as `ml_dtypes.bfloat16`."""
        array: Array = tensor.asnumpy()
        # MindSpore gives NumPy a bfloat16 of its own, which knows no other library's.
        return array.view(np.uint16).view(BFLOAT16) if tensor.dtype == ms.bfloat16 else array

    def peak_memory(self) -> int:
        """Largest memory use so far in bytes: resident set of the process on a CPU, device memory on Ascend."""
        if self.kind.on_host:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        return int(ms.runtime.max_memory_allocated())  # Ascend only

    def free_memory(self) -> int:
        """Bytes that can still be allocated: the host's available memory on a CPU, the card's on Ascend."""
        if self.kind.on_host:
            with open("/proc/meminfo", encoding="ascii") as lines:
                fields = dict(line.split(":", 1) for line in lines)
            return int(fields["MemAvailable"].split()[0]) * 1024  # the kernel counts in KiB
        return int(ms.hal.get_device_properties(ms.get_current_device().device_id).free_memory)  # Ascend only


def current_device() -> Device:
    """The one that MindSpore is set to."""
    return Device(kind=DeviceKind.ASCEND if ms.get_context("device_target") == "Ascend" else DeviceKind.CPU)


def open_device(
    kind: DeviceKind | Literal["auto", "cpu", "ascend"] = "auto",
    *,
    threads: int | None = None,
    bfloat16_products: bool = False,
) -> Device:
    """Selects this process's device for MindSpore. Call it before anything else runs there.

    Args:
        kind: "auto" takes an Ascend card where MindSpore finds one.
        threads: CPU threads of MindSpore's kernels in this process; None leaves MindSpore its default,
            all cores. NumPy's threads are another matter: OMP_NUM_THREADS, set before the process starts.
        bfloat16_products: on a CPU that has them, products of float32 matrices read both factors rounded to bfloat16
            and sum in float32, in half the time. It is this process's, until the next call.

    Raises:
        ClusterError: Ascend was asked for and MindSpore finds no card.
        RuntimeError: `threads` differs from an earlier call in this process.
    """
    # The driver's device nodes are asked first: MindSpore complains on stderr where its Ascend libraries are absent.
    cards = any(Path("/dev").glob("davinci[0-9]*"))
    ascend = kind != DeviceKind.CPU and cards and bool(ms.hal.is_available("Ascend"))
    if kind == DeviceKind.ASCEND and not ascend:
        raise ClusterError("parallel.device is ascend, and MindSpore finds no Ascend card here: set it to cpu or auto")
    if ascend:
        ms.set_device("Ascend")  # Ascend only
        ms.set_deterministic(True)  # Ascend only
        return Device(kind=DeviceKind.ASCEND)  # Ascend only
    # Otherwise the calling thread hands each kernel to another and spins until it is done, which takes a core from
    # the neighbouring worker. MindSpore reads this at its first operation (`AsyncRQueue::Push`, async_r_queue.cc).
    os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")
    ms.set_device("CPU")
    _set_products(bfloat16_products and multiplies_bfloat16())
    if threads is not None:
        _limit_threads(threads)
    return Device(kind=DeviceKind.CPU)


def _set_products(bfloat16: bool) -> None:
    """Tells oneDNN, which multiplies matrices for MindSpore, what it may round factors to.

    Source: oneDNN's guide, "Primitive attributes: floating-point math mode"; MindSpore leaves it at its default.
    """
    library = Path(ms.__file__).parent / "lib" / "libdnnl.so.3"
    if library.exists():  # where MindSpore is built without it, products stay in float32
        ctypes.CDLL(str(library)).dnnl_set_default_fpmath_mode(_BFLOAT16_MODE if bfloat16 else _STRICT_MODE)


@ms.jit
def _product(x: Tensor) -> Tensor:
    return ops.MatMul()(x, x)


@functools.lru_cache(maxsize=1)
def _limit_threads(threads: int) -> None:
    """Keeps MindSpore's CPU kernels to so many threads.

    Its own kernels follow a setting. oneDNN, which multiplies matrices, does not: it counts the cores that
    its first caller may use and keeps that count. So the first product runs while this process may use
    `threads` cores only, and afterwards every thread gets its cores back.
    """
    ms.device_context.cpu.op_tuning.threads_num(threads)  # a RuntimeError when called twice
    allowed = sorted(os.sched_getaffinity(0))
    try:
        _allow_cores(allowed[:threads])
        _product(Tensor(np.ones((256, 256), np.float32))).asnumpy()
    finally:
        _allow_cores(allowed)


def _allow_cores(cores: list[int]) -> None:
    """Lets every thread of this process run on these cores only; threads started later inherit it."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
            os.sched_setaffinity(int(thread), cores)
