"""Selection on a device, in a module that needs what a card has alone."""

import pytest
import torch

from sparsegrad import top_k


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_selection_on_cuda_equals_the_cpu(dtype):
    G = torch.randn(300, 200).mul(8).round().to(dtype)  # many ties
    for k in (1, 600, 30_000, 60_000):
        assert torch.equal(top_k(G.cuda(), k).cpu(), top_k(G, k))
