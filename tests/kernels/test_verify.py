"""A fast path is used only where it computes what its reference does; the outcome is remembered, and said once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rl_lora.kernels.verify import FastPath, Mismatch, reason_of, require_all_close, require_close


def test_a_path_that_is_right_is_compared_once() -> None:
    path, calls = FastPath("it goes on without"), []
    assert not path.verified
    assert path.verify(lambda: calls.append(1))
    assert path.verify(lambda: calls.append(2))
    assert calls == [1]
    assert path.verified
    assert path.failed is None


def test_a_path_that_is_wrong_is_never_tried_again_and_said_once() -> None:
    path, x = FastPath("it goes on without"), torch.randn(100)
    with pytest.warns(UserWarning, match=r"it goes on without: it differs by 0\.\d+ standard deviations$"):
        assert not path.verify(lambda: require_close("it differs", 1.5 * x, x, 1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not path.verify(lambda: None)
        assert path.attempt(lambda: "made") is None
    assert not path.verified
    assert str(path.failed).startswith("it differs by 0.")


def test_what_works_at_first_may_fail_later() -> None:
    path = FastPath("it goes on without")
    assert path.attempt(lambda: "made") == "made"
    with pytest.warns(UserWarning, match="it goes on without: ZeroDivisionError: division by zero"):
        assert path.attempt(lambda: str(1 / 0)) is None
    assert path.attempt(lambda: "made") is None


def test_what_a_machine_does_not_have_is_not_worth_a_warning() -> None:
    path = FastPath("it goes on without", absent=(ZeroDivisionError,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not path.verify(lambda: 1 / 0)
    assert path.failed == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("comparison", [require_close, require_all_close])
def test_nothing_is_close_to_nan(comparison: Callable[[str, Tensor, Tensor, float], None]) -> None:
    x = torch.randn(10, dtype=torch.float64)
    comparison("it differs", x, x, 0.0)
    for found, expected in ((x, x * math.nan), (x * math.nan, x)):
        with pytest.raises(Mismatch, match=r"it differs by .*nan"):
            comparison("it differs", found, expected, 1e9)


def test_a_reason_names_the_complaint_of_a_compiler() -> None:
    error = RuntimeError(
        "C++ compile error\n\nCommand: g++ a.cpp\n\nOutput:\na.cpp:1:1: error: expected a type\n1 error"
    )
    assert reason_of(error) == "RuntimeError: a.cpp:1:1: error: expected a type"
    assert reason_of(ValueError("no compiler\nat all")) == "ValueError: no compiler"
    assert reason_of(ValueError()) == "ValueError: "
