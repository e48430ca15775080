"""PyTorch on the CPU: tensors in, tensors out, the same bits as with NumPy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cce_cupy

torch = pytest.importorskip("torch")

SHAPE, DIM, VOCAB = (2, 70), 10, 37
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def sample(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return arguments as tensors that own their memory; a fifth of the tokens is ignored."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(VOCAB, SHAPE, generator=generator)
    targets[torch.rand(SHAPE, generator=generator) < 0.2] = -100
    return {
        "e": torch.randn(*SHAPE, DIM, generator=generator).to(dtype),
        "c": torch.randn(VOCAB, DIM, generator=generator).to(dtype),
        "targets": targets,
        "bias": torch.randn(VOCAB, generator=generator).to(dtype),
        "class_weight": torch.rand(VOCAB, generator=generator),
        "token_weight": torch.rand(SHAPE, generator=generator),
    }


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy as NumPy array; bfloat16, which torch does not convert, bit by bit."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def flat(result: Any) -> list[Any]:
    """Return the arrays of a result, however nested, in order."""
    if isinstance(result, tuple):
        return [array for part in result for array in flat(part)]
    return [] if result is None else [result]


def call(function: str, arguments: dict[str, Any], upstream: Any = None) -> list[Any]:
    """Call a function, and its pullback where it returns one; return all arrays it makes."""
    if function == "token_statistics":
        arguments = {
            k: v for k, v in arguments.items() if k not in ("class_weight", "token_weight")
        }
        return flat(cce_cupy.token_statistics(**arguments))
    result = getattr(cce_cupy, function)(**arguments, return_lse=True, filter_eps=0.01)
    if function == "linear_cross_entropy_vjp":
        result = result[0], result[1](*upstream)
    return flat(result)


def upstream_of(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(0.7), torch.linspace(-1, 1, tensors["targets"].numel()).reshape(SHAPE)


def assert_same_bits(tensors: list[torch.Tensor], arrays: list[np.ndarray]) -> None:
    assert len(tensors) == len(arrays)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert type(tensor) is torch.Tensor
        assert tensor.device == torch.device("cpu")
        assert tensor.layout == torch.strided
        assert not tensor.requires_grad
        assert to_numpy(tensor).dtype == array.dtype
        assert to_numpy(tensor).shape == array.shape
        assert to_numpy(tensor).tobytes() == array.tobytes()


FUNCTIONS = [
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "linear_cross_entropy_vjp",
    "token_statistics",
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_same_bits_as_numpy(function: str, dtype: torch.dtype) -> None:
    tensors = sample(dtype)
    arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    upstream = upstream_of(tensors)
    assert_same_bits(
        call(function, tensors, upstream),
        call(function, arrays, tuple(to_numpy(tensor) for tensor in upstream)),
    )
    # And no tensor of the caller's has changed.
    for name, tensor in tensors.items():
        assert to_numpy(tensor).tobytes() == arrays[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = sample(dtype)
    (loss, lse), gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        **tensors, return_lse=True
    )
    assert (loss.dtype, lse.dtype) == (sums, sums)
    assert (loss.shape, lse.shape) == (torch.Size([]), SHAPE)
    for name in ("e", "c", "bias"):
        assert getattr(gradients, name).dtype == dtype
        assert getattr(gradients, name).shape == tensors[name].shape
    statistics = cce_cupy.token_statistics(tensors["e"], tensors["c"], tensors["targets"])
    assert [array.dtype for array in statistics] == [sums, sums, sums, torch.int64]
    assert isinstance(loss.item(), float)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_target_dtypes(dtype: torch.dtype) -> None:
    tensors = sample()
    tensors["targets"][tensors["targets"] == -100] = 99
    loss = cce_cupy.linear_cross_entropy(**tensors, ignore_index=99)
    tensors["targets"] = tensors["targets"].to(dtype)
    assert torch.equal(cce_cupy.linear_cross_entropy(**tensors, ignore_index=99), loss)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_torch(reduction: str, weighted: bool) -> None:
    tensors = sample(torch.float64)
    del tensors["token_weight"]
    tensors["class_weight"] = tensors["class_weight"].double()
    if not weighted:
        del tensors["class_weight"]
    e, c, bias = (tensors[name].clone().requires_grad_() for name in ("e", "c", "bias"))
    expected = torch.nn.functional.cross_entropy(
        (e @ c.T + bias).flatten(0, 1),
        tensors["targets"].flatten(),
        weight=tensors.get("class_weight"),
        reduction=reduction,
        label_smoothing=0.1,
    )
    expected.sum().backward()
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        **tensors, reduction=reduction, label_smoothing=0.1
    )
    torch.testing.assert_close(loss.flatten(), expected.detach().flatten())
    for gradient, leaf in zip(gradients, (e, c, bias), strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return equal values in memory that holds their negatives and a note to negate them."""
    imaginary = torch.complex(torch.zeros_like(tensor), -tensor)
    view = imaginary.conj().imag
    assert view.is_neg()
    return view


LAYOUTS = {
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "offset": lambda tensor: torch.cat([tensor, tensor])[len(tensor) :],
    "negated": negated_view,
    "inference": lambda tensor: _in_inference_mode(tensor),
}


def _in_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("name", ["e", "c"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_layouts(function: str, layout: str, name: str) -> None:
    tensors = sample()
    odd = {**tensors, name: LAYOUTS[layout](tensors[name])}
    assert torch.equal(odd[name], tensors[name])
    upstream = upstream_of(tensors)
    plain = [to_numpy(tensor) for tensor in call(function, tensors, upstream)]
    assert_same_bits(call(function, odd, upstream), plain)


def test_expanded() -> None:
    tensors = sample()
    odd = {**tensors, "e": tensors["e"][:1, :1].expand(*SHAPE, DIM)}
    odd["token_weight"] = torch.tensor(0.5).expand(SHAPE)
    plain = {name: tensor.contiguous() for name, tensor in odd.items()}
    function = "linear_cross_entropy_value_and_grad"
    assert_same_bits(call(function, odd), [to_numpy(t) for t in call(function, plain)])


@pytest.mark.parametrize("name", ["class_weight", "token_weight"])
def test_weights_that_require_grad_are_refused(name: str) -> None:
    """Rather than a loss that looks differentiable by them and silently is not."""
    tensors = sample()
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"\b{name}\b.*requires.grad") as caught:
        cce_cupy.linear_cross_entropy(**tensors)
    assert "detach" in str(caught.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(mode: Any) -> None:
    tensors = sample()
    expected = cce_cupy.linear_cross_entropy(**tensors)
    tensors["e"].requires_grad_()
    tensors["c"] = torch.nn.Parameter(tensors["c"])
    with mode():
        assert torch.equal(cce_cupy.linear_cross_entropy(**tensors), expected)


def test_detached() -> None:
    tensors = sample()
    expected = cce_cupy.linear_cross_entropy(**tensors)
    leaf = tensors["e"].requires_grad_()
    assert torch.equal(cce_cupy.linear_cross_entropy(**{**tensors, "e": leaf.detach()}), expected)


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_tensors_that_require_grad_are_plain_data_elsewhere(function: str) -> None:
    tensors = sample()
    upstream = upstream_of(tensors)
    plain = [to_numpy(tensor) for tensor in call(function, tensors, upstream)]
    parameters = {
        name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    upstream = tuple(tensor.requires_grad_() for tensor in upstream)
    assert_same_bits(call(function, parameters, upstream), plain)
    # A tensor that is no leaf, too: its graph is left alone.
    doubled = {**parameters, "e": parameters["e"] / 2 * 2}
    assert_same_bits(call(function, doubled, upstream), plain)
    assert all(parameter.grad is None for parameter in parameters.values())


def test_training_by_hand() -> None:
    """The results do what a training loop asks of them, with an optimiser of torch's."""
    tensors = sample()
    e, c, bias = (torch.nn.Parameter(tensors[name]) for name in ("e", "c", "bias"))
    optimizer = torch.optim.SGD([e, c, bias], lr=0.5)
    losses = []
    for _ in range(5):
        loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
            e, c, tensors["targets"], bias
        )
        e.grad, c.grad, bias.grad = gradients
        optimizer.step()
        losses.append(loss.item())
    assert sorted(losses, reverse=True) == losses
    # A gradient may also enter a graph from outside.
    hidden = torch.nn.Linear(DIM, DIM)
    output = hidden(tensors["e"])
    _, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        output, tensors["c"], tensors["targets"]
    )
    output.backward(gradients.e)
    assert hidden.weight.grad.abs().sum() > 0


def test_pullback_twice_and_results_that_share_nothing() -> None:
    tensors = sample()
    _, pullback = cce_cupy.linear_cross_entropy_vjp(**tensors)
    first = pullback(torch.tensor(1.0))
    copies = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    second = pullback(torch.tensor(1.0))
    assert all(torch.equal(*pair) for pair in zip(second, copies, strict=True))


def test_default_dtype_and_device_do_not_matter() -> None:
    tensors = sample(torch.bfloat16)
    arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    upstream = upstream_of(tensors)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = {function: call(function, tensors, upstream) for function in FUNCTIONS}
    finally:
        torch.set_default_dtype(before)
    for function, result in found.items():
        expected = call(function, arrays, tuple(to_numpy(tensor) for tensor in upstream))
        assert_same_bits(result, expected)


def test_no_tokens_and_one_token() -> None:
    c = sample()["c"]
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        torch.ones(0, DIM), c, torch.ones(0, dtype=torch.int64)
    )
    assert loss.item() == 0
    assert gradients.e.shape == (0, DIM)
    assert not gradients.c.any()
    loss, gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        torch.ones(DIM), c, torch.tensor(3), reduction="none"
    )
    assert (loss.shape, gradients.e.shape) == ((), (DIM,))


REFUSED = [
    ("e", lambda tensor: tensor.to(torch.complex64), TypeError, "complex64"),
    ("e", lambda tensor: tensor.to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    ("e", lambda tensor: tensor.to("meta"), ValueError, "meta"),
    ("c", lambda tensor: tensor.int(), TypeError, "int32"),
    ("c", lambda tensor: tensor.to("meta"), ValueError, "meta"),
    ("c", lambda tensor: tensor.double(), TypeError, "float64"),
    ("c", lambda tensor: tensor.to_sparse(), (TypeError, ValueError), "sparse"),
    ("c", to_numpy, TypeError, "NumPy"),
    ("targets", lambda tensor: tensor.float(), TypeError, "float32"),
    ("targets", lambda tensor: tensor.to("meta"), ValueError, "meta"),
    ("targets", lambda tensor: tensor.tolist(), TypeError, "list"),
    ("bias", lambda tensor: tensor.half(), TypeError, "float16"),
    ("token_weight", lambda tensor: -tensor, ValueError, "-0.*token_weight.0, 0."),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("name", "spoil", "error", "given"), REFUSED, ids=[f"{row[0]} {row[3]}" for row in REFUSED]
)
def test_refused(function: str, name: str, spoil: Any, error: Any, given: str) -> None:
    if function == "token_statistics" and name == "token_weight":
        pytest.skip("token_statistics has no such argument")
    tensors = sample()
    tensors[name] = spoil(tensors[name])
    with pytest.raises(error, match=rf"(?s)(?=.*\b{name}\b).*{given}"):
        call(function, tensors, upstream_of(sample()))


def test_option_that_is_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"softcap must be .*, got Tensor tensor\(5"):
        cce_cupy.linear_cross_entropy(**sample(), softcap=torch.tensor(5.0))
