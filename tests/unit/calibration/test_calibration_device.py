"""Arrays on the device and back, memory figures, and the thread limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import ml_dtypes
import numpy as np
import pytest

from gs_dist.calibration.device import Device, open_device
from gs_dist.errors import ClusterError
from gs_dist.model.device_kind import DeviceKind


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device("cpu")


def test_without_a_card_auto_is_the_cpu(device: Device) -> None:
    """On a host without an Ascend card the automatic choice is the CPU."""
    if any(Path("/dev").glob("davinci[0-9]*")):
        pytest.skip("this host has an Ascend card")
    assert open_device("auto") == device == Device(kind=DeviceKind.CPU)


def test_asking_for_a_missing_card_names_the_setting() -> None:
    """Asking for Ascend where there is none is the user's mistake, and the message says what to change."""
    if any(Path("/dev").glob("davinci[0-9]*")):
        pytest.skip("this host has an Ascend card")
    with pytest.raises(ClusterError, match=r"parallel\.device"):
        open_device("ascend")


def test_compute_dtype_is_float32_on_cpu_and_the_checkpoints_on_ascend(device: Device) -> None:
    """A CPU computes in float32 whatever the checkpoint holds; a card computes in the checkpoint's dtype."""
    for name, dtype in {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}.items():
        assert device.compute_dtype(name) == ms.float32
        assert Device(kind=DeviceKind.ASCEND).compute_dtype(name) == dtype


def test_float32_arrays_are_shared_both_ways(device: Device) -> None:
    """A float32 array becomes a tensor and comes back without being copied, read-only ones too."""
    for writeable in (True, False):
        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        array.flags.writeable = writeable
        tensor = device.to_tensor(array, ms.float32)
        assert np.shares_memory(device.to_numpy(tensor), array)
        np.testing.assert_array_equal(device.to_numpy(tensor), array)


def test_unaligned_and_strided_arrays_are_copied(device: Device) -> None:
    """An array that MindSpore cannot use where it lies is copied first."""
    unaligned = np.frombuffer(b"\0" + np.arange(6, dtype=np.float32).tobytes(), dtype=np.uint8)[1:].view(np.float32)
    strided = np.arange(12, dtype=np.float32).reshape(3, 4).T
    for array in (unaligned, strided):
        np.testing.assert_array_equal(device.to_numpy(device.to_tensor(array)), array)


@pytest.mark.parametrize("dtype", [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)])
def test_half_precision_widens_exactly(dtype: np.dtype, device: Device) -> None:
    """Every finite bfloat16 and float16 value turns into the same float32 value."""
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    values = values[np.isfinite(values.astype(np.float32))]
    tensor = device.to_tensor(values, ms.float32)
    assert tensor.dtype == ms.float32
    np.testing.assert_array_equal(device.to_numpy(tensor), values.astype(np.float32))


def test_bfloat16_tensors_come_back_as_bfloat16(device: Device) -> None:
    """A bfloat16 tensor turns into an array of the dtype that `ml_dtypes` gives NumPy."""
    array = device.to_numpy(device.to_tensor(np.array([1.0, -2.5], np.float32), ms.bfloat16))
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), [1.0, -2.5])


def test_peak_memory_grows_with_what_the_process_touches(device: Device) -> None:
    """The peak counts bytes of resident memory and never falls."""
    before = device.peak_memory()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) * 1024
    size = before - resident + (64 << 20)
    if size > device.free_memory() // 2:
        pytest.skip("too little free memory to move the peak")
    block = np.ones(size // 8, np.float64)
    grown = device.peak_memory()
    assert before + (32 << 20) < grown < before + (128 << 20)
    del block
    assert device.peak_memory() >= grown


_CHILD = """
import hashlib, os
import numpy as np
from gs_dist.calibration.device import open_device, _product
cores = os.sched_getaffinity(0)
device = open_device("cpu", threads={threads})
assert open_device("cpu", threads={threads}) == open_device("cpu") == device
try:
    open_device("cpu", threads={threads} + 1)
except RuntimeError:
    pass
else:
    raise SystemExit("a second thread count was taken")
assert all(os.sched_getaffinity(int(thread)) == cores for thread in os.listdir("/proc/self/task"))
x = device.to_tensor(np.random.default_rng(0).standard_normal((700, 700)).astype(np.float32))
print(hashlib.sha256(device.to_numpy(_product(x))).hexdigest())
"""


def test_the_thread_limit_gives_cores_back_and_changes_no_bit() -> None:
    """A limited process gets its cores back, refuses another limit, and multiplies to the same bits."""
    digests = set()
    for threads in (1, 2):
        child = subprocess.run(
            [sys.executable, "-c", _CHILD.format(threads=threads)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        assert child.returncode == 0, child.stderr
        digests.add(child.stdout.splitlines()[-1])
    assert len(digests) == 1
