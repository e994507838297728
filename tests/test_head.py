"""The tiled head against a full float64 softmax: any chunk, extreme logits, bfloat16, memory."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egrsd import VOCAB_TILE, logprob_and_entropy, logprob_and_gradient
from test_egrsd import full_softmax, head_case

TILE = VOCAB_TILE["cpu"]


@pytest.mark.parametrize("chunk", [3, 10**6])
@pytest.mark.parametrize("rising", [True, False])
def test_head_is_finite_and_right_for_logits_up_to_a_thousand(chunk: int, rising: bool) -> None:
    V = 20011
    # powers of two, so that the logits are exact in float32 and only the softmax is on trial
    head = (
        torch.stack([torch.arange(V) % 1001, torch.full((V,), 1024)], 1).sort(0).values.float()
        / 1024
    )
    head = head if rising else head.flip(0)
    # the largest logit: 1000; 0, above -1000; flat at 1000; flat at -1000; moderate; 0, above -500
    hidden = torch.tensor([[1024.0, 0], [-1024, 0], [0, 1000], [0, -1000], [4, 0], [512, -500]])
    for y in (0, V - 1, 5000):
        targets = torch.full((6,), y)
        logp, entropy, grad = full_softmax(hidden, head, targets)
        mine, H = logprob_and_entropy(hidden, head, targets, chunk)
        again, dlogp = logprob_and_gradient(hidden, head, targets, chunk)
        for got, want, atol in (
            (mine, logp, 5e-4),
            (again, logp, 5e-4),
            (H, entropy, 5e-3),
            (dlogp, grad, 2e-5),
        ):
            torch.testing.assert_close(
                got.double(), want, atol=atol, rtol=1e-5
            )  # one ulp at 1000 is 6e-5


@pytest.mark.parametrize("chunk", [100, 10**6])
def test_head_in_bfloat16_has_no_bias_against_float64(chunk: int) -> None:
    hidden, head, targets = head_case(N=600, V=20011, d=32, scale=2.0)
    hidden, head = hidden.bfloat16(), (head * 1.5).bfloat16()
    targets[300:] = (hidden[300:].float() @ head.float().T).argmax(
        1
    )  # half of them likely, as sampled tokens are
    logp, entropy, grad = full_softmax(hidden, head, targets)
    mine, H = logprob_and_entropy(hidden, head, targets, chunk)
    again, dlogp = logprob_and_gradient(hidden, head, targets, chunk)
    assert all(x.dtype == torch.float32 for x in (mine, H, again, dlogp))
    expected = head.double()[targets] - grad  # E_softmax[W]: its length shows a loss of small terms
    shrink = ((dlogp.double() - grad) * expected).sum(1) / expected.square().sum(1)
    errors = {
        "logp": mine - logp,
        "logp of the gradient pass": again - logp,
        "entropy": H - entropy,
        "shrink": shrink,
    }
    errors |= {f"gradient {j}": (dlogp - grad)[:, j] for j in range(grad.shape[1])}
    for name, error in errors.items():
        standard_error = error.std() / len(error) ** 0.5
        assert error.mean().abs() <= max(4 * standard_error, 1e-5), (
            name,
            error.mean(),
            standard_error,
        )
        assert error.abs().max() < 0.1, (
            name
        )  # unbiased, and no more than rounding the logits once may cost


def test_head_in_bfloat16_accumulates_in_float32() -> None:
    head = (torch.randn(20011, 16, generator=torch.Generator().manual_seed(1)) / 4).bfloat16()
    hidden = (
        2 * torch.eye(16).bfloat16()
    )  # one-hot rows: logits exact in bfloat16, so what is left is the summation
    targets = torch.arange(16) * 1300
    logp, entropy, grad = full_softmax(hidden, head, targets)
    for function, other in ((logprob_and_entropy, entropy), (logprob_and_gradient, grad)):
        for mine, want in zip(function(hidden, head, targets, 7), (logp, other)):
            torch.testing.assert_close(
                mine.double(), want, atol=5e-5, rtol=0
            )  # one bfloat16 rounding is 5e-4


def far_logits(N: int, V: int, d: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five likely tokens from row `first` on; all others 70 to 110 nats below: e^-87 underflows."""
    noise = torch.Generator().manual_seed(2)
    head = torch.randn(V, d, generator=noise)
    head[:, 0] = -70 - 40 * torch.rand(V, generator=noise)
    head[first : first + 5, 0] = 0.0
    hidden = torch.randn(N, d, generator=noise)
    hidden[:, 0] = 1.0
    return hidden, head, torch.randint(V, (N,), generator=noise)


@pytest.mark.parametrize("first", [0, TILE - 2, 3 * TILE])
def test_head_is_right_where_most_logits_underflow(first: int) -> None:
    hidden, head, targets = far_logits(40, 3 * TILE + 100, 6, first)
    targets[::2] = first + targets[::2] % 5
    logp, entropy, gradient = full_softmax(hidden, head, targets)
    mine, H = logprob_and_entropy(hidden, head, targets, 7)
    again, dlogp = logprob_and_gradient(hidden, head, targets, 7)
    for got, want in ((mine, logp), (again, logp), (H, entropy), (dlogp, gradient)):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("function", [logprob_and_entropy, logprob_and_gradient])
def test_head_is_no_slower_where_most_logits_underflow(function: Callable) -> None:
    hidden, head, targets = far_logits(256, 2 * TILE, 6, 0)

    def seconds(states: Tensor) -> float:
        began = time.thread_time()
        function(states, head, targets, 256)
        return time.thread_time() - began

    far = []
    near = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that this thread's own time is all of it, however busy the rest
    for _ in range(6):
        far.append(seconds(hidden))
        near.append(seconds(hidden / 100))
    torch.set_num_threads(threads)
    assert min(far) < 2 * min(near), (far, near)  # without the clamp 3.5 times


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest storage of any operator's result has."""

    largest = 0

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("function", [logprob_and_entropy, logprob_and_gradient])
@pytest.mark.parametrize("chunk, limit", [(64, 64 * 50_000), (10**6, 512 * 50_000 // 2 - 1)])
def test_head_never_makes_an_n_by_v_tensor_nor_a_graph(
    function: Callable, chunk: int, limit: int
) -> None:
    hidden, head, targets = head_case(N=512, V=50_000, d=16)
    with LargestTensor() as seen:
        full_softmax(hidden[:9], head, targets[:9])
    assert seen.largest >= 9 * 50_000  # the meter works
    with LargestTensor() as seen:
        out = function(
            hidden.requires_grad_(function is logprob_and_gradient), head, targets, chunk
        )
    assert seen.largest <= limit and not any(x.requires_grad for x in out)
