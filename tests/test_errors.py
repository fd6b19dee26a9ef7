"""The one scan for NaN and infinity, against asking each entry."""

import math

import pytest
import torch

from pondera.errors import BadInput, all_finite, not_finite, require_finite

WIDE = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
BYTES = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", WIDE + BYTES)
@pytest.mark.parametrize("bad", [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf), (math.nan, math.inf)])
@pytest.mark.parametrize("n", [3, 1000])
def test_what_is_bad_is_seen_and_counted(dtype, bad, n):
    if dtype == torch.float8_e4m3fn:
        bad = tuple(math.nan for _ in bad)  # it has no infinity
    x = torch.linspace(-1, 1, n)
    assert all_finite(x.to(dtype)) and not_finite(x.to(dtype)) == 0
    x[: len(bad)] = torch.tensor(bad)
    assert not all_finite(x.to(dtype)) and not_finite(x.to(dtype)) == len(bad)


@pytest.mark.parametrize("part", [complex(0, math.nan), complex(math.inf, 0), complex(0, -math.inf)])
def test_either_part_of_a_complex_number_counts(part):
    x = torch.ones(5, dtype=torch.complex64)
    x[2] = part
    assert not_finite(x) == not_finite(x.conj()) == 1
    assert not all_finite(x) and not all_finite(x.conj()) and all_finite(x[:2].conj())


@pytest.mark.parametrize("dtype", WIDE[:4])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_overflows_is_no_infinity(dtype, sign):
    x = torch.full((5000,), sign * torch.finfo(dtype).max, dtype=dtype)
    assert not x.sum().isfinite()
    assert all_finite(x) and not_finite(x) == 0 and require_finite(x, "this", "weight") is x
    x[7] = math.nan
    assert not all_finite(x) and not_finite(x) == 1


def test_views_gradients_and_empty_ones():
    x = torch.zeros(6, 8)
    x[1, 1] = math.nan
    assert not_finite(x.T) == 1 and all_finite(x.T[::2]) and all_finite(x[:, ::2]) and not all_finite(x[1::2, 1::2])
    assert not all_finite(x.expand(3, 6, 8)) and not_finite(x.expand(3, 6, 8)) == 3
    w = torch.nn.Parameter(torch.ones(3))
    assert all_finite(w) and all_finite(w * 2)
    for dtype in (torch.float32, torch.float16, torch.complex64, torch.float8_e5m2, torch.int64):
        assert all_finite(torch.empty(0, 3, dtype=dtype)) and not_finite(torch.empty(0, 3, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_integers_and_truth_values_are_finite(dtype):
    x = torch.ones(4, dtype=dtype)
    assert all_finite(x) and not_finite(x) == 0


@pytest.mark.parametrize("x", [torch.eye(3).to_sparse(), torch.ones(3, device="meta")], ids=["sparse", "meta"])
def test_what_holds_no_plain_numbers_is_not_taken_for_finite(x):
    with pytest.raises((RuntimeError, NotImplementedError)):
        all_finite(x)


def test_the_sentence_counts():
    x = torch.ones(2, 3)
    x[0] = torch.tensor([math.nan, math.inf, -math.inf])
    with pytest.raises(BadInput, match=r"^here needs finite numbers, got 3 NaN or infinite of 6 in its w$"):
        require_finite(x, "here", "w")
    with pytest.raises(BadInput, match="floating-point w, got a int64"):
        require_finite(torch.ones(2, dtype=torch.int64), "here", "w")
    with pytest.raises(BadInput, match="meta device"):
        require_finite(torch.ones(2, device="meta"), "here", "w")
