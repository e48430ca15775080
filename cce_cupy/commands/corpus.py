"""Real text that comes with every Python, and a byte-pair tokenizer learnt from it.

The text is the language reference in ``pydoc_data.topics`` and the docstrings of the standard
library. Both are read from the sources, parsed but never imported or run.
"""

from __future__ import annotations

import ast
import gc
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CommandError

END_OF_DOCUMENT = "<|end|>"

# Installed packages are not the standard library, and its tests are not installed everywhere.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}

_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

Report = Callable[[int, int], None]
"""Called with the units of work done and their total."""


@dataclass(frozen=True)
class Corpus:
    """Text as the numbers of its tokens.

    Attributes
    ----------
    ids : ndarray of int32, shape (tokens,)
        All documents in a row, each followed by the end-of-document token.
    vocab : int
        Number of different tokens that the tokenizer knows.
    characters : int
        Length of the text.
    documents : int
    """

    ids: npt.NDArray[np.int32]
    vocab: int
    characters: int
    documents: int

    @property
    def unigram_entropy(self) -> float:
        """Loss in nats of the best model that sees no context: a mark to beat."""
        counts = np.bincount(self.ids)
        p = counts[counts > 0] / len(self.ids)
        return float(-(p * np.log(p)).sum())


def read_documents(report: Report, folder: Path | None = None) -> list[str]:
    """Collect the text, in an order that depends on the Python installation alone.

    Parameters
    ----------
    report : callable
        Told the files read and their number.
    folder : Path, optional
        The standard library's folder; that of the running Python by default.

    Returns
    -------
    list of str
        The topics, then the docstrings in the order of their files; each text once.

    Raises
    ------
    CommandError
        Where the sources of the standard library are not installed as files.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    paths = sorted(_sources(folder))
    documents: dict[str, None] = {}
    for number, path in enumerate(paths):
        documents.update(dict.fromkeys(_docstrings(path)))
        report(number + 1, len(paths))
    topics = dict.fromkeys(_topics(folder / "pydoc_data" / "topics.py"))
    if not documents:
        raise CommandError(
            f"found no docstrings in {folder}: the demo reads the standard library's sources, "
            "which this Python does not have as files"
        )
    return list(topics | documents)


def check_tokenizers() -> None:
    """Raise CommandError where `tokenizers` is not installed, before any work."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise CommandError("the demo needs tokenizers: pip install 'cce-cupy[demo]'") from None


def learn_corpus(documents: list[str], vocab: int) -> Corpus:
    """Learn a byte-level byte-pair encoding of the documents and encode them with it.

    Parameters
    ----------
    documents : list of str
    vocab : int
        Tokens to learn, the 256 bytes and the end of a document among them.

    Returns
    -------
    Corpus

    Raises
    ------
    CommandError
        Where `tokenizers` is not installed, or the text has too few different words for a
        vocabulary of that size.
    """
    check_tokenizers()
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer: Any = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        documents,
        BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learnt = tokenizer.get_vocab_size()
    if learnt < vocab:
        raise CommandError(
            f"the text of this Python's standard library yields {learnt} byte-pair tokens, "
            f"fewer than --vocab {vocab}"
        )
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    pieces = [
        np.array([*encoding.ids, end], np.int32) for encoding in tokenizer.encode_batch(documents)
    ]
    return Corpus(
        ids=np.concatenate(pieces),
        vocab=learnt,
        characters=sum(map(len, documents)),
        documents=len(documents),
    )


def _sources(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py"):
                yield Path(parent, name)


def _parse(path: Path) -> ast.Module | None:
    """Parse a source; None where it is no valid Python (some installations hold templates)."""
    try:
        source = path.read_bytes()
    except OSError:
        return None
    # A syntax tree is no garbage; the collector would walk it over and over while it grows.
    collected = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences are not our business
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    finally:
        if collected:
            gc.enable()


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a source file in their order."""
    tree = _parse(path)
    remaining: list[ast.AST] = [tree] if tree else []
    while remaining:
        node = remaining.pop()
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield docstring
        # Definitions stand in bodies of statements alone: expressions, most of a tree, are left.
        statements: list[ast.AST] = []
        for part in ("body", "handlers", "orelse", "finalbody"):
            value = getattr(node, part, None)
            if isinstance(value, list):
                statements += value
        remaining += reversed(statements)


def _topics(path: Path) -> Iterator[str]:
    """Yield the texts of pydoc's topics, the values of the one dict in that file."""
    tree = _parse(path)
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for value in statement.value.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value
