"""The command line: ``python -m cce_cupy``, or ``cce-cupy``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands.errors import CommandError
from .problem import FLOAT_DTYPES, GRADIENT_FILTERS, REDUCTIONS, Options
from .version import VERSION

BENCH_CASES = ("gemma2-2b", "wide", "llama3-8b", "smollm2", "gemma3-like")
SMALLEST_DEMO_VOCABULARY = 16384

STATUS_IMPOSSIBLE = 2
STATUS_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the command line by default.

    Returns
    -------
    int
        Exit status: 0; 1 when a check of the demo failed; 2 when what was asked for cannot be
        done, after one line on the standard error.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return _run(parsed)
    except CommandError as error:
        print(f"cce-cupy {parsed.command}: {error}", file=sys.stderr)
        return STATUS_IMPOSSIBLE
    except MemoryError as error:
        print(f"cce-cupy {parsed.command}: out of memory: {error}", file=sys.stderr)
        return STATUS_IMPOSSIBLE
    except KeyboardInterrupt:
        print(f"cce-cupy {parsed.command}: interrupted", file=sys.stderr)
        return STATUS_INTERRUPTED


def _run(parsed: argparse.Namespace) -> int:
    # Each command is imported when it is run: none pays for what another one needs.
    if parsed.command == "info":
        from .commands import info

        return info.run()
    if parsed.command == "demo":
        from .commands import demo

        return demo.run(parsed.steps, parsed.seed, parsed.out, parsed.vocab)
    if parsed.command == "warmup":
        from .commands import warmup

        return warmup.run(parsed.dtype, parsed.processes)
    if parsed.command == "bench":
        from .commands import bench

        return bench.run(parsed.case, parsed.tokens)
    from .commands import loss

    options = Options(
        ignore_index=parsed.ignore_index,
        softcap=parsed.softcap,
        reduction=parsed.reduction,
        shift=parsed.shift,
        filter_eps=parsed.filter_eps,
        gradient_filter=None if parsed.filter == "none" else parsed.filter,
        seed=parsed.seed,
        logit_scale=parsed.logit_scale,
        label_smoothing=parsed.label_smoothing,
        z_loss=parsed.z_loss,
        workspace_bytes=parsed.workspace_bytes,
    )
    return loss.run(parsed.file, parsed.out, not parsed.no_grad, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cce-cupy",
        description="Cut cross-entropy: the loss of a linear classifier over a huge vocabulary, "
        "without the logits.",
    )
    parser.add_argument("--version", action="version", version=f"cce_cupy {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info",
        help="versions, devices and tiers",
        description="Print versions, devices, which tier would serve each dtype, and what is "
        "missing for the GPU.",
    )
    _add_demo(commands)
    _add_loss(commands)
    warmup = commands.add_parser(
        "warmup",
        help="compile the kernels for this machine's GPUs",
        description="Compile and load every kernel for each GPU, so that no later call has to. "
        "Status 1 when CuPy, a GPU or the compiler is missing.",
    )
    warmup.add_argument(
        "--dtype",
        nargs="+",
        choices=FLOAT_DTYPES,
        default=FLOAT_DTYPES,
        help="of the arrays to come (default: all)",
    )
    warmup.add_argument(
        "--processes",
        type=_at_least(1),
        default=os.cpu_count() or 1,
        help="files that are compiled at a time (default: the number of processors)",
    )
    bench = commands.add_parser(
        "bench",
        help="time the loss on this machine's GPU",
        description="Time forward and gradients on a GPU against the vendor's product of the "
        "same size, on random data whose softmax is peaked, and print the fraction of columns "
        "that the gradient filter keeps of it. The product writes N x V logits of 2 bytes.",
    )
    bench.add_argument("--case", choices=BENCH_CASES, required=True, help="sizes to time")
    bench.add_argument("--tokens", type=_at_least(1), help="N, instead of the case's own")
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small language model with and without CCE",
        description="Train a small language model on the documentation that comes with Python, "
        "once with Cut Cross-Entropy and once with the full softmax, and compare loss, speed "
        "and memory. Status 1 when the losses differ by more than float32 rounding explains.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=_at_least(1), default=80, help="training steps")
    demo.add_argument(
        "--seed", type=_at_least(0), default=0, help="of the start and the order of the text"
    )
    demo.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write")
    demo.add_argument(
        "--vocab",
        type=_at_least(SMALLEST_DEMO_VOCABULARY),
        default=SMALLEST_DEMO_VOCABULARY,
        help="byte-pair tokens to learn from the text",
    )


def _add_loss(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    loss = commands.add_parser(
        "loss",
        help="loss and gradients of your own arrays",
        description="Compute loss and gradients of arrays in a file, in bounded memory, and "
        "write loss, lse, grad_e, grad_c and grad_bias to another. FILE is a .npz or "
        ".safetensors with e (..., D), c (V, D) and targets (...), and where wanted bias (V,), "
        "class_weight (V,) and token_weight (...). bfloat16 in a .npz is dtype |V2, as "
        "numpy.savez stores ml_dtypes.bfloat16.",
    )
    add = loss.add_argument
    add("file", type=Path, metavar="FILE")
    add("--out", type=Path, help="file to write, .npz or .safetensors (default: FILE's name.grad)")
    add("--no-grad", action="store_true", help="loss and lse only")
    add("--reduction", choices=REDUCTIONS, default="mean", help="default: mean")
    add("--ignore-index", type=int, default=-100, help="default: -100")
    add("--shift", type=int, default=0, help="pair e[..., :-SHIFT, :] with targets[..., SHIFT:]")
    add("--softcap", type=float, help="bound on the absolute logits")
    add("--logit-scale", type=float, default=1.0, help="factor of e . c, default: 1")
    add("--label-smoothing", type=float, default=0.0, help="in [0, 1], default: 0")
    add("--z-loss", type=float, default=0.0, help="factor of lse^2, default: 0")
    add(
        "--filter",
        choices=(*GRADIENT_FILTERS, "none"),
        default="unbiased",
        help="gradient filter, default: unbiased",
    )
    add(
        "--filter-eps",
        type=_auto_or_number,
        default="auto",
        help="auto (default: filters bfloat16 and float16 only) or a number in [0, 1)",
    )
    add("--seed", type=int, help="of the unbiased filter; by default it derives from targets")
    add("--workspace-bytes", type=int, help="most memory to work in, default: 128 MiB")


class _at_least:
    """An argparse type: an integer with a lower bound."""

    def __init__(self, low: int) -> None:
        self._low = low
        self.__name__ = f"integer of at least {low}"  # what argparse calls it in its messages

    def __call__(self, text: str) -> int:
        number = int(text)
        if number < self._low:
            raise argparse.ArgumentTypeError(f"must be at least {self._low}, got {number}")
        return number


def _auto_or_number(text: str) -> float | str:
    return text if text == "auto" else float(text)


_auto_or_number.__name__ = "'auto' or number"


if __name__ == "__main__":
    sys.exit(main())
