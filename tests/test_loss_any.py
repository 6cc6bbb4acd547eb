"""ferkd_loss on problems that hypothesis makes up, against the dense oracle; apart from the others, which do without that package."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import IMPLS, assert_close, loss_and_gradient, oracle

from ferkd import RegionPolicy

pytestmark = pytest.mark.usefixtures("poisoned")


@st.composite
def _problems(draw):
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(2, 40))
    k = draw(st.integers(1, min(classes, 8)))
    probability = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-7, 0.99999]), st.floats(0, 1, width=32))
    ids = torch.tensor([[draw(st.integers(0, classes - 1)) for _ in range(k)] for _ in range(batch)])
    probs = torch.tensor([[draw(probability) for _ in range(k)] for _ in range(batch)])
    probs = probs / probs.sum(dim=1, keepdim=True).clamp_min(1.0)
    target = torch.tensor([draw(st.integers(0, classes - 1)) for _ in range(batch)])
    x = torch.tensor([[draw(st.floats(-30, 30, width=32)) for _ in range(classes)] for _ in range(batch)])
    low, high = sorted((draw(st.floats(0, 0.875, width=32)), draw(st.floats(0, 0.875, width=32))))
    policy = RegionPolicy(low, draw(st.sampled_from([0.0, high])), draw(st.floats(high, 1, width=32)), draw(st.floats(0, 1, width=32)))
    rule = {
        "policy": policy,
        "temperature": draw(st.sampled_from([0.5, 1.0, 1.0, 7.0])),
        "tail": draw(st.sampled_from(["smooth", "renorm"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "mix": draw(st.sampled_from([None, (torch.arange(batch).flip(0), torch.linspace(0, 1, batch))])),
    }
    return x, ids, probs, target, rule


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None)
@given(problem=_problems())
def test_any_problem_equals_the_oracle(impl, problem):
    x, ids, probs, target, rule = problem
    assert_close(*loss_and_gradient(x, (ids, probs), target, impl=impl, **rule), *oracle(x, ids, probs, target, **rule)[:2], x.dtype)
