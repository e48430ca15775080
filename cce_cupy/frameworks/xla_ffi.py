"""XLA's foreign function interface in ctypes: the C declarations and the frame of a call.

The declarations are those of ``xla/ffi/api/c_api.h``, which jaxlib installs below
``jax.ffi.include_dir()``; each mirror names the struct it mirrors. What is mirrored here has been
the same since version 0.1 of that interface. Of structs that grew at their end only the fields
that all versions have are declared.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

_OLDEST = 0, 1  # XLA_FFI_API_MAJOR and _MINOR of what is mirrored here
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_METADATA = 1  # XLA_FFI_Extension_Metadata
_COMMAND_BUFFER_COMPATIBLE = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE
_BUFFER = 1  # XLA_FFI_ArgType_BUFFER and XLA_FFI_RetType_BUFFER
_SCALAR, _STRING = 3, 4  # XLA_FFI_AttrType_SCALAR and _STRING
_INVALID_ARGUMENT, _RESOURCE_EXHAUSTED, _INTERNAL = 3, 8, 13  # XLA_FFI_Error_Code

# XLA_FFI_DataType
_DTYPES = {
    1: "bool",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "uint8",
    7: "uint16",
    8: "uint32",
    9: "uint64",
    10: "float16",
    11: "float32",
    12: "float64",
    16: "bfloat16",
}


class _Extension(Structure):
    """XLA_FFI_Extension_Base: ``{ size_t struct_size; enum type; struct* next; }``."""

    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


class _ApiVersion(Structure):
    """XLA_FFI_Api_Version: ``{ ...; int major_version; int minor_version; }``."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("major_version", c_int),
        ("minor_version", c_int),
    )


class _Metadata(Structure):
    """XLA_FFI_Metadata, up to ``XLA_FFI_Handler_Traits traits`` (a uint32_t).

    Later versions add ``XLA_FFI_TypeId state_type_id``, of handlers that have a state.
    """

    _fields_ = (("struct_size", c_size_t), ("api_version", _ApiVersion), ("traits", c_uint32))


class _MetadataExtension(Structure):
    """XLA_FFI_Metadata_Extension."""

    _fields_ = (("extension_base", _Extension), ("metadata", POINTER(_Metadata)))


class _ErrorCreateArgs(Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("message", c_char_p),
        ("errc", c_int),
    )


class _StreamGetArgs(Structure):
    """XLA_FFI_Stream_Get_Args: ``stream`` is written by XLA."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("ctx", c_void_p),
        ("stream", c_void_p),
    )


class _Api(Structure):
    """XLA_FFI_Api, up to the last function that is called here."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("api_version", _ApiVersion),
        ("internal_api", c_void_p),
        # XLA_FFI_Error* XLA_FFI_Error_Create(XLA_FFI_Error_Create_Args*)
        ("error_create", CFUNCTYPE(c_void_p, POINTER(_ErrorCreateArgs))),
        ("error_get_message", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        # XLA_FFI_Error* XLA_FFI_Stream_Get(XLA_FFI_Stream_Get_Args*)
        ("stream_get", CFUNCTYPE(c_void_p, POINTER(_StreamGetArgs))),
    )


class _Buffer(Structure):
    """XLA_FFI_Buffer; ``dims`` has ``rank`` elements."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(Structure):
    """XLA_FFI_Args and XLA_FFI_Rets: ``size`` kinds and ``size`` pointers."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("buffers", POINTER(POINTER(_Buffer))),
    )


class _ByteSpan(Structure):
    """XLA_FFI_ByteSpan: bytes that no zero ends."""

    _fields_ = (("ptr", c_void_p), ("len", c_size_t))

    def text(self) -> str:
        return ctypes.string_at(self.ptr, self.len).decode()


class _Scalar(Structure):
    """XLA_FFI_Scalar."""

    _fields_ = (("dtype", c_int), ("value", c_void_p))


class _Attributes(Structure):
    """XLA_FFI_Attrs, sorted by name; what ``attrs`` points to depends on the type."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", POINTER(POINTER(_ByteSpan))),
        ("attrs", POINTER(c_void_p)),
    )


class _CallFrame(Structure):
    """XLA_FFI_CallFrame, without ``future`` at its end."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension_start", POINTER(_MetadataExtension)),
        ("api", POINTER(_Api)),
        ("ctx", c_void_p),
        ("stage", c_int32),
        ("args", _Buffers),
        ("rets", _Buffers),
        ("attrs", _Attributes),
    )


# XLA_FFI_Error* XLA_FFI_Handler(XLA_FFI_CallFrame*)
_HANDLER = CFUNCTYPE(c_void_p, POINTER(_CallFrame))


class Buffer(NamedTuple):
    """An argument or result of a call: dense and row-major, there for the length of the call."""

    pointer: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * _numpy_dtype(self.dtype).itemsize

    def on_host(self) -> npt.NDArray[Any]:
        """Return a NumPy array over the buffer, which must be in host memory."""
        dtype = _numpy_dtype(self.dtype)
        if self.nbytes == 0:
            return np.empty(self.shape, dtype)
        memory = (ctypes.c_char * self.nbytes).from_address(self.pointer)
        return np.ndarray(self.shape, dtype, memory)  # type: ignore[arg-type]


Attribute = bool | int | float | str


class Call:
    """One call of a handler.

    Attributes
    ----------
    arguments, results : tuple of Buffer
    attributes : tuple of (name, value)
        Sorted by name.
    """

    def __init__(self, frame: Any) -> None:
        self._frame = frame
        self.arguments = _buffers(frame.args)
        self.results = _buffers(frame.rets)
        self.attributes = _attributes(frame.attrs)

    def stream(self) -> int:
        """Return the handle of the CUDA stream that the call's work belongs on."""
        api = self._frame.api.contents
        arguments = _StreamGetArgs(ctypes.sizeof(_StreamGetArgs), None, self._frame.ctx, None)
        if error := api.stream_get(ctypes.byref(arguments)):
            raise _ErrorOfXla(error)
        return arguments.stream or 0


class _ErrorOfXla(Exception):
    """An error that XLA made, by its address: returned to XLA, who takes it back."""


def handler(function: Callable[[Call], None], *, command_buffer: bool) -> Any:
    """Return a C function pointer for a handler in Python.

    It must be kept for as long as XLA may call it: for good. It may be called on any thread, and
    on several at a time; ctypes takes the interpreter's lock for it.

    Parameters
    ----------
    function : callable
        Does the work of a `Call`. What it raises becomes an error of the computation, with the
        exception's text.
    command_buffer : bool
        Whether a call always launches the same work, so that XLA may record it in a CUDA graph.
    """

    def callback(pointer: Any) -> int | None:
        with _ACTIVITY:
            return answer(pointer)

    def answer(pointer: Any) -> int | None:
        frame = pointer.contents
        try:
            if frame.extension_start:
                extension = frame.extension_start.contents
                if extension.extension_base.type == _METADATA:
                    _describe(frame.api, extension.metadata.contents, command_buffer)
                    return None
            if frame.stage == _EXECUTE:
                function(Call(frame))
        except _ErrorOfXla as error:
            return int(error.args[0])
        except BaseException as error:  # nothing may leave a callback
            return _create_error(frame.api.contents, error)
        return None

    return _HANDLER(callback)


class _Activity:
    """How many handlers are running."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._begun = 0

    def __enter__(self) -> None:
        with self._changed:
            self._running += 1
            self._begun += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def drain(self, quiet: float) -> None:
        begun, busy = -1, True
        while begun != self._begun or busy:
            with self._changed:
                self._changed.wait_for(lambda: not self._running)
            begun, used = self._begun, time.process_time()
            time.sleep(quiet)
            # What comes before a call of ours in its program may still be computed.
            busy = time.process_time() - used > 0.1 * quiet


_ACTIVITY = _Activity()


def drain(quiet: float = 0.25) -> None:
    """Wait until no handler is running, and for so many seconds none was called and all was idle.

    XLA cannot be asked whether more calls will come.
    """
    _ACTIVITY.drain(quiet)


def address(function: Any) -> int:
    """Return the address of what `handler` returned."""
    found = ctypes.cast(function, c_void_p).value
    assert found is not None
    return found


def _describe(api: Any, metadata: Any, command_buffer: bool) -> None:
    """Answer XLA's question about a handler: its version, XLA's own if known, and its traits."""
    version = api.contents.api_version if api else _ApiVersion(0, None, *_OLDEST)
    metadata.api_version.major_version = version.major_version
    metadata.api_version.minor_version = version.minor_version
    metadata.traits = _COMMAND_BUFFER_COMPATIBLE if command_buffer else 0


def _create_error(api: Any, error: BaseException) -> int:
    code = _INTERNAL
    if isinstance(error, ValueError | TypeError):
        code = _INVALID_ARGUMENT
    elif isinstance(error, MemoryError):
        code = _RESOURCE_EXHAUSTED
    text = str(error)
    if code == _INTERNAL:
        text = f"{type(error).__name__}: {text}"
    arguments = _ErrorCreateArgs(ctypes.sizeof(_ErrorCreateArgs), None, text.encode(), code)
    return int(api.error_create(ctypes.byref(arguments)))


def _buffers(found: Any) -> tuple[Buffer, ...]:
    buffers = []
    for i in range(found.size):
        if found.types[i] != _BUFFER:
            raise TypeError(f"a buffer was expected, XLA hands over one of kind {found.types[i]}")
        buffer = found.buffers[i].contents
        shape = tuple(buffer.dims[: buffer.rank]) if buffer.rank else ()
        buffers.append(Buffer(buffer.data or 0, _DTYPES[buffer.dtype], shape))
    return tuple(buffers)


def _attributes(found: Any) -> tuple[tuple[str, Attribute], ...]:
    attributes: list[tuple[str, Attribute]] = []
    for i in range(found.size):
        name, kind, at = found.names[i].contents.text(), found.types[i], found.attrs[i]
        if kind == _STRING:
            attributes.append((name, _ByteSpan.from_address(at).text()))
        elif kind == _SCALAR:
            scalar = _Scalar.from_address(at)
            one = Buffer(scalar.value, _DTYPES[scalar.dtype], ())
            attributes.append((name, one.on_host().item()))
        else:
            raise TypeError(f"attribute {name} is of kind {kind}; scalars and strings are known")
    return tuple(attributes)


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
