"""The networks of bench/steps.py: both sets of activations learn the same."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parent.parent / "bench" / "steps.py"
if not FILE.exists():
    pytest.skip("bench is not installed", allow_module_level=True)
spec = importlib.util.spec_from_file_location("steps", FILE)
steps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(steps)


@pytest.mark.parametrize("kind", ["relu", "prelu"])
@pytest.mark.parametrize("image", [None, (5, 6)])
def test_the_same_is_learned(kind, image):
    networks = [
        steps.Network(lib, kind, (3, 8, 4, 2), image) for lib in ("numpy", "fastrelu")
    ]
    before = [weight.copy() for weight in networks[0].weights]
    for network in networks:
        network()
        network()
    for a, b, old in zip(networks[0].weights, networks[1].weights, before, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6)
        assert not np.array_equal(a, old)
    for a, b in zip(networks[0].slopes, networks[1].slopes, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-6)
        assert (a == 0.25).all() == (kind == "relu")


@pytest.mark.parametrize("image", [None, (5, 6)])
def test_the_gradient_is_that_of_the_loss(image):
    """By the loss's change along each of some weights"""
    network = steps.Network("fastrelu", "prelu", (3, 6, 2), image)
    weights = [weight.astype(np.float64) for weight in network.weights]
    slopes, x = network.slopes[0].astype(np.float64), network.x.astype(np.float64)

    def loss():
        z = (steps.patches(x) if image else x) @ weights[0]
        y = np.where(z > 0, z, slopes * z).reshape(*x.shape[:-1], -1)
        return 0.5 * np.square((steps.patches(y) if image else y) @ weights[1]).mean()

    network()
    for k, weight in enumerate(weights):
        for i in range(3):
            start, h = weight[i, i % 2], 1e-5
            weight[i, i % 2] = start + h
            above = loss()
            weight[i, i % 2] = start - h
            slope = (above - loss()) / (2 * h)
            weight[i, i % 2] = start
            learned = (start - float(network.weights[k][i, i % 2])) / 1e-3
            assert learned == pytest.approx(slope, rel=0.02, abs=1e-4)
