"""CUDA graphs of a function give the function's results."""

import pytest
import torch

from loglinear.training.graphs import Graphs


@pytest.mark.gpu
def test_graphs_equal_the_function_for_every_shape_and_after_the_weights_change():
    weight = torch.randn(5, 5, device="cuda", dtype=torch.float64, requires_grad=True)

    def function(batch):
        y = ((batch["x"] @ weight).tanh() * batch["scale"]).square().sum()
        return y.detach(), *torch.autograd.grad(y, [weight])

    graphs = Graphs(function)
    for rows in (3, 7, 3, 7, 7):
        batch = {"x": torch.randn(rows, 5, device="cuda", dtype=torch.float64), "scale": torch.rand((), device="cuda")}
        for result, expected in zip(graphs(batch), function(batch), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
        with torch.no_grad():
            weight += 0.1 * torch.randn_like(weight)
    assert len(graphs.recordings) == 2
