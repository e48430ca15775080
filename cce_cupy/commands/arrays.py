"""Files of named arrays: .npz and .safetensors, bfloat16 included.

NumPy has no bfloat16 of its own. In a .npz such an array is stored as two bytes an element
without a meaning, dtype ``|V2``; that is what ``numpy.savez`` makes of ``ml_dtypes.bfloat16``.
Reading takes ``|V2`` for bfloat16, and whoever reads a file written here does the same with
``numpy.load(file)["grad_e"].view(ml_dtypes.bfloat16)``. Safetensors names the dtype itself.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import CommandError

SUFFIXES = (".npz", ".safetensors")

Arrays = dict[str, npt.NDArray[Any]]


def check_suffix(path: Path) -> str:
    """Return the suffix of a file of arrays; CommandError where it is another one."""
    if path.suffix not in SUFFIXES:
        raise CommandError(f"{path}: the name must end in {' or '.join(SUFFIXES)}")
    return path.suffix


def read_arrays(path: Path, names: tuple[str, ...]) -> tuple[Arrays, list[str]]:
    """Read arrays by their names.

    Parameters
    ----------
    path : Path
    names : tuple of str
        Those to read where the file has them.

    Returns
    -------
    arrays : dict of str to ndarray
    others : list of str
        Names in the file that were not asked for.

    Raises
    ------
    CommandError
        Where the file is missing or is not what its name says.
    """
    suffix = check_suffix(path)
    if not path.is_file():
        raise CommandError(f"{path}: no such file")
    read = _read_npz if suffix == ".npz" else _read_safetensors
    try:
        return read(path, names)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays under their names, in the format that the file's suffix says.

    Raises
    ------
    CommandError
        Where the file cannot be written.
    """
    suffix = check_suffix(path)
    # Safetensors takes the bytes as they lie in memory, whatever the strides.
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        if suffix == ".npz":
            with path.open("wb") as file:
                np.savez(file, **plain)  # type: ignore[arg-type]
        else:
            from safetensors.numpy import save_file

            save_file(plain, path)
    except (OSError, _safetensors_error()) as error:
        raise CommandError(f"{path}: cannot be written: {error}") from None


def check_writable(path: Path, source: Path) -> None:
    """Raise CommandError where results cannot go to a file, before they are computed."""
    check_suffix(path)
    if path.exists() and path.samefile(source):
        raise CommandError(f"--out {path}: that is the input file, which is never written to")
    if not path.parent.is_dir():
        raise CommandError(f"--out {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"--out {path}: cannot be written")


def _read_npz(path: Path, names: tuple[str, ...]) -> tuple[Arrays, list[str]]:
    try:
        # Opened here, since numpy.load leaves a file open that is not what it should be.
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise CommandError(f"{path}: one array without a name, not a .npz file")
            present = [name for name in names if name in stored.files]
            arrays = {name: _name_bfloat16(stored[name]) for name in present}
            return arrays, [name for name in stored.files if name not in names]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise CommandError(
                f"{path}: not a .npz file of plain numeric arrays (object arrays and pickles "
                "are not read)"
            ) from None
        raise CommandError(f"{path}: not a valid .npz file ({error})") from None


def _read_safetensors(path: Path, names: tuple[str, ...]) -> tuple[Arrays, list[str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            stored = list(file.keys())
            arrays = {}
            for name in names:
                if name in stored:
                    dtype = file.get_slice(name).get_dtype()
                    try:
                        arrays[name] = file.get_tensor(name)
                    except (AttributeError, TypeError, KeyError):
                        raise CommandError(f"{path}: {name} has dtype {dtype}") from None
            return arrays, [name for name in stored if name not in names]
    except _safetensors_error() as error:
        raise CommandError(f"{path}: not a valid .safetensors file ({error})") from None


def _name_bfloat16(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype == np.dtype("V2"):
        return array.view(ml_dtypes.bfloat16)
    return array


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error
