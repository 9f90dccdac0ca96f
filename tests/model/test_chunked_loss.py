"""The cross entropy in chunks, compared with PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from llava_simplified.model import chunked_loss
from llava_simplified.model.chunked_loss import token_cross_entropy


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_chunked_cross_entropy_equals_that_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_SIZE", 7 * 50)  # 7 rows, and 2 in the last chunk
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(23, 50, generator=generator)).to(dtype)
    labels = torch.randint(0, 50, (23,), generator=generator)
    results = []
    # Each row has another weight. With a constant, such as 1 / (trained tokens), an error could stay hidden.
    weights = torch.linspace(-1, 2, 23, dtype=torch.float64)
    for function in (
        token_cross_entropy,
        lambda x, y: cross_entropy(x.double(), y, reduction="none"),
    ):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, labels)
        (grad,) = torch.autograd.grad((weights * loss).sum(), leaf)
        results.append((loss, grad))
    (loss, grad), (expected_loss, expected_grad) = results
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert grad.dtype == dtype
    # The loss is computed in float32 even from bfloat16 logits.
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        grad.double(), expected_grad.double(), rtol=tolerance, atol=tolerance
    )


def test_chunked_cross_entropy_holds_one_chunk_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_SIZE", 10 * 64)
    largest = 0
    logsumexp = torch.Tensor.logsumexp

    def recorded(self: torch.Tensor, *args: int, **kwargs: bool) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return logsumexp(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "logsumexp", recorded)
    logits = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    token_cross_entropy(logits, torch.zeros(100, dtype=torch.long)).sum().backward()
    assert largest == 10 * 64
