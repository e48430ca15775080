"""Launches, with a stub for the driver's library."""

import ctypes
import struct
import threading
from types import SimpleNamespace

import pytest

from cce_cupy import driver
from cce_cupy.driver import Layout


@pytest.fixture
def launched(monkeypatch):
    """Let a stub launch: what it was given, with the bytes of each argument; a status to set."""
    seen = SimpleNamespace(status=0, calls=[], sizes=[], cooperative=[])

    def launch_kernel(function, *rest):
        *rest, extra = rest
        assert extra is None
        return launch_cooperative(function, *rest, cooperative=False)

    def launch_cooperative(function, *rest, cooperative=True):
        *sizes, shared, stream, pointers = rest
        arguments = [
            ctypes.string_at(pointer, size)
            for pointer, size in zip(pointers, seen.sizes, strict=True)
        ]
        seen.calls.append((function, sizes, shared, stream, arguments))
        seen.cooperative.append(cooperative)
        return seen.status

    def name_of(status, text):
        text._obj.value = b"CUDA_ERROR_OF_%d" % status
        return 0

    library = SimpleNamespace(
        cuLaunchKernel=launch_kernel,
        cuLaunchCooperativeKernel=launch_cooperative,
        cuGetErrorName=name_of,
    )
    monkeypatch.setattr(driver, "library", lambda: library)
    return seen


def launch(layout, *values, **options):
    driver.launch(7, (3, 2), (128, 1), 64, 0x1234, layout, values, **options)


def test_arguments_lie_as_the_c_compiler_puts_them(launched):
    layout = Layout(["i", "Pqi0P", "d", "128s", "i"])
    assert layout.sizes == [4, 24, 8, 128, 4]
    assert layout.offsets == [0, 8, 32, 40, 168]
    starts = [("i", 0), ("P", 8), ("q", 16), ("i", 24), ("d", 32), ("128s", 40), ("i", 168)]
    assert layout.scalars == starts
    launched.sizes = layout.sizes
    launch(layout, -5, 2**40, -(2**33), True, 0.5, b"map", 9)
    ((function, sizes, shared, stream, arguments),) = launched.calls
    assert (function, shared, stream) == (7, 64, 0x1234)
    assert sizes == [3, 2, 1, 128, 1, 1]
    assert struct.unpack("i", arguments[0]) == (-5,)
    assert struct.unpack("Qqi4x", arguments[1]) == (2**40, -(2**33), 1)
    assert struct.unpack("d", arguments[2]) == (0.5,)
    assert arguments[3] == b"map".ljust(128, b"\0")
    assert struct.unpack("i", arguments[4]) == (9,)


def test_blocks_that_wait_for_each_other_are_launched_so(launched):
    layout = Layout(["q"])
    launched.sizes = layout.sizes
    launch(layout, 1)
    launch(layout, 1, cooperative=True)
    assert launched.cooperative == [False, True]
    assert launched.calls[0] == launched.calls[1]
    launched.status = 720
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OF_720"):
        launch(layout, 1, cooperative=True)


def test_threads_have_arguments_of_their_own(launched):
    layout = Layout(["q"])
    launched.sizes = layout.sizes
    addresses = []

    def work():
        launch(layout, 1)
        addresses.append(ctypes.addressof(driver._of_thread.rooms[layout].buffer))

    # Both are alive at once, so neither can have taken the other's memory over.
    both = threading.Barrier(2)
    threads = [threading.Thread(target=lambda: (work(), both.wait())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(addresses)) == 2


def test_a_refused_launch_says_why(launched):
    launched.status = 719
    launched.sizes = [8]
    with pytest.raises(RuntimeError, match="refused to launch a kernel: CUDA_ERROR_OF_719"):
        launch(Layout(["q"]), 1)


def test_wrong_arguments_are_not_launched(launched):
    with pytest.raises(struct.error):
        launch(Layout(["q", "i"]), 1)
    assert not launched.calls
