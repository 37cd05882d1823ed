"""GEMMs with float32 results: exact products of half-precision inputs, float32 sums."""

import pytest
import torch

from real_megatron.head.gemm import add_mm, mm

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_of_half_precision_inputs_are_not_rounded_to_it(dtype: torch.dtype, device: str) -> None:
    # Sums of 40 products of order 1: a few eps of float32 each, where one rounding to bfloat16 would be 2^-9.
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((30, 40), (40, 50)))
    exact = a.double() @ b.double()
    bound = 32 * torch.finfo(torch.float32).eps * exact.abs().max()
    out = torch.full((30, 50), torch.nan, device=device)
    mm(a.to(device), b.to(device), out=out)
    assert (out.cpu() - exact).abs().max() <= bound
    for _ in range(2):
        add_mm(out, a.to(device), b.to(device))
    assert (out.cpu() - 3 * exact).abs().max() <= 3 * bound
