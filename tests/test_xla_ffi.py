"""XLA's foreign function interface: the mirrors against the C header, and a handler's manners."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cce_cupy.frameworks import xla_ffi

jax = pytest.importorskip("jax")

MIRRORS = {
    "XLA_FFI_Api_Version": xla_ffi._ApiVersion,
    "XLA_FFI_Metadata": xla_ffi._Metadata,
    "XLA_FFI_Metadata_Extension": xla_ffi._MetadataExtension,
    "XLA_FFI_Error_Create_Args": xla_ffi._ErrorCreateArgs,
    "XLA_FFI_Stream_Get_Args": xla_ffi._StreamGetArgs,
    "XLA_FFI_Api": xla_ffi._Api,
    "XLA_FFI_Buffer": xla_ffi._Buffer,
    "XLA_FFI_Args": xla_ffi._Buffers,
    "XLA_FFI_Rets": xla_ffi._Buffers,
    "XLA_FFI_ByteSpan": xla_ffi._ByteSpan,
    "XLA_FFI_Scalar": xla_ffi._Scalar,
    "XLA_FFI_Attrs": xla_ffi._Attributes,
    "XLA_FFI_CallFrame": xla_ffi._CallFrame,
}
C_NAMES = {
    ("XLA_FFI_Args", "buffers"): "args",
    ("XLA_FFI_Rets", "buffers"): "rets",
    ("XLA_FFI_Api", "error_create"): "XLA_FFI_Error_Create",
    ("XLA_FFI_Api", "stream_get"): "XLA_FFI_Stream_Get",
    # Between these two stands one slot; newer headers give it another name.
    ("XLA_FFI_Api", "error_get_message"): None,
    ("XLA_FFI_Api", "error_destroy"): "XLA_FFI_Error_Destroy",
    ("XLA_FFI_Api", "handler_register"): "XLA_FFI_Handler_Register",
}
CONSTANTS = {
    "XLA_FFI_ExecutionStage_EXECUTE": xla_ffi._EXECUTE,
    "XLA_FFI_Extension_Metadata": xla_ffi._METADATA,
    "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE": xla_ffi._COMMAND_BUFFER_COMPATIBLE,
    "XLA_FFI_ArgType_BUFFER": xla_ffi._BUFFER,
    "XLA_FFI_RetType_BUFFER": xla_ffi._BUFFER,
    "XLA_FFI_AttrType_SCALAR": xla_ffi._SCALAR,
    "XLA_FFI_AttrType_STRING": xla_ffi._STRING,
    "XLA_FFI_Error_Code_INVALID_ARGUMENT": xla_ffi._INVALID_ARGUMENT,
    "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED": xla_ffi._RESOURCE_EXHAUSTED,
    "XLA_FFI_Error_Code_INTERNAL": xla_ffi._INTERNAL,
}
LETTERS = {"bool": "PRED", "bfloat16": "BF16", "int": "S", "uint": "U", "float": "F"}


def c_dtype(name):
    kind, bits = re.fullmatch(r"([a-z]+?)(\d*)", name).groups()
    return f"XLA_FFI_DataType_{LETTERS.get(name) or LETTERS[kind] + bits}"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_mirrors_of_the_header(tmp_path):
    lines, expected = [], []
    for struct, mirror in MIRRORS.items():
        for field, *_ in mirror._fields_:
            name = C_NAMES.get((struct, field), field)
            if name is not None:
                found = f"offsetof(struct {struct}, {name}), sizeof(((struct {struct}*)0)->{name})"
                lines.append(f'printf("%zu %zu\\n", {found});')
                place = getattr(mirror, field)
                expected.append(f"{place.offset} {place.size}")
    constants = CONSTANTS | {c_dtype(name): code for code, name in xla_ffi._DTYPES.items()}
    for name, value in constants.items():
        lines.append(f'printf("%d\\n", (int){name});')
        expected.append(str(value))
    (tmp_path / "print.c").write_text(
        '#include <stdio.h>\n#include "xla/ffi/api/c_api.h"\n'
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    folder = jax.ffi.include_dir()
    subprocess.run(["cc", "print.c", "-I", folder, "-o", "print"], cwd=tmp_path, check=True)
    printed = subprocess.check_output([tmp_path / "print"], text=True).split("\n")
    assert printed[:-1] == expected


class Xla:
    """What XLA hands to a handler."""

    def __init__(self):
        self.message = self.code = None
        kind = dict(xla_ffi._Api._fields_)
        self.api = xla_ffi._Api()
        self.api.api_version.major_version, self.api.api_version.minor_version = 4, 2
        self.api.error_create = kind["error_create"](self.create)
        self.api.stream_get = kind["stream_get"](self.stream)
        self.frame = xla_ffi._CallFrame(stage=xla_ffi._EXECUTE, api=ctypes.pointer(self.api))

    def create(self, arguments):
        self.message = arguments.contents.message.decode()
        self.code = arguments.contents.errc
        return 4711

    def stream(self, arguments):
        assert arguments.contents.struct_size == ctypes.sizeof(xla_ffi._StreamGetArgs)
        return 815

    def call(self, function, command_buffer=False):
        kept = xla_ffi.handler(function, command_buffer=command_buffer)
        assert xla_ffi.address(kept)
        return kept(ctypes.pointer(self.frame))


@pytest.mark.parametrize("command_buffer", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_metadata(command_buffer, older):
    """Versions of XLA before 2026 ask without saying who asks."""
    xla = Xla()
    metadata = xla_ffi._Metadata(traits=99)
    extension = xla_ffi._MetadataExtension(
        xla_ffi._Extension(0, xla_ffi._METADATA, None), ctypes.pointer(metadata)
    )
    xla.frame.extension_start = ctypes.pointer(extension)
    if older:
        xla.frame.api = None
    assert not xla.call(lambda call: 1 / 0, command_buffer)
    version = metadata.api_version
    assert (version.major_version, version.minor_version) == ((0, 1) if older else (4, 2))
    assert metadata.traits == command_buffer


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_do_nothing(stage):
    xla = Xla()
    xla.frame.stage = stage
    assert not xla.call(lambda call: 1 / 0)


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ValueError("targets: ü"), "targets: ü", 3),
        (TypeError("c"), "c", 3),
        (MemoryError("no room"), "no room", 8),
        (KeyError("x"), "KeyError: 'x'", 13),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", 13),
    ],
)
def test_exceptions_become_errors(error, message, code):
    def fail(call):
        raise error

    xla = Xla()
    assert xla.call(fail) == 4711
    assert (xla.message, xla.code) == (message, code)


def test_errors_of_xla_go_back_to_it():
    """Not created anew: the error that XLA made is XLA's to destroy."""
    xla = Xla()
    assert xla.call(lambda call: call.stream()) == 815
    assert xla.message is None


def test_through_xla():
    """Buffers and attributes of every kind arrive, and results return."""
    seen = []

    def double(call):
        seen.append((call.arguments, call.results, call.attributes))
        for given, result in zip(call.arguments, call.results, strict=True):
            result.on_host()[...] = 2 * given.on_host()

    kept = xla_ffi.handler(double, command_buffer=False)
    capsule = jax.ffi.pycapsule(xla_ffi.address(kept))
    jax.ffi.register_ffi_target("cce_cupy_test_double", capsule)
    arrays = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.int8(3),
        np.zeros((0, 4), np.uint16),
        np.ones(5, jax.numpy.bfloat16),
    ]
    call = jax.ffi.ffi_call(
        "cce_cupy_test_double", [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    )
    options = {"flag": np.bool_(True), "number": np.int64(-(2**40))}
    options |= {"real": np.float64(0.1), "text": "a b"}
    found = jax.jit(lambda *x: call(*x, **options))(*arrays)
    for x, y in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(2 * x, y)
    ((arguments, results, attributes),) = seen
    assert attributes == (("flag", True), ("number", -(2**40)), ("real", 0.1), ("text", "a b"))
    assert [b.shape for b in arguments] == [b.shape for b in results] == [x.shape for x in arrays]
    assert [b.dtype for b in arguments] == ["float32", "int8", "uint16", "bfloat16"]
    assert Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").is_file()
