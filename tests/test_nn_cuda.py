"""Networks and the training command on a GPU that is none: see device.py."""

import math
import re
import sys

import numpy as np
import pytest
from reference import assert_same

from fastrelu import cli, nn
from fastrelu.cli import train, training

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")
import device

pytestmark = pytest.mark.filterwarnings("ignore::numba.NumbaPerformanceWarning")

ACTIVATIONS = {
    "relu": lambda xp: nn.ReLU(),
    "leaky_relu": lambda xp: nn.LeakyReLU(-0.5),
    "prelu": lambda xp: nn.PReLU(xp=xp),
    "prelu per channel": lambda xp: nn.PReLU(6, xp=xp),
}


@pytest.fixture
def gpu(monkeypatch):
    with device.machine(monkeypatch) as machine:
        yield machine


@pytest.fixture
def cupy(gpu):
    return sys.modules["cupy"]


class Trained:
    """A small network and its optimiser, on either device"""

    def __init__(self, activation, xp):
        rng = np.random.default_rng(0)
        make = ACTIVATIONS[activation]
        self.xp, options = xp, {"rng": rng, "xp": xp}
        self.model = nn.Sequential(
            nn.Dense(5, 6, **options),
            make(xp),
            nn.Dense(6, 6, **options),
            make(xp),
            nn.Dense(6, 3, negative_slope=1, **options),
        )
        self.optimiser = nn.SGD(self.model.parameters, 0.1, 0.9, 0.01)

    def data(self, n=7):
        rng = np.random.default_rng(1)
        x, labels = rng.standard_normal((n, 5)), rng.integers(0, 3, n)
        return self.xp.asarray(x, dtype=np.float32), self.xp.asarray(labels)

    def step(self, x, labels):
        loss, grad = nn.softmax_cross_entropy(self.model.forward(x), labels)
        dx = self.model.backward(grad)
        self.optimiser.step()
        return [loss, dx, *(p.grad for p in self.model.parameters)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_network_learns_as_on_the_cpu(activation, gpu, cupy):
    ours, theirs = Trained(activation, cupy), Trained(activation, np)
    for n in (7, 5, 7):
        results = ours.step(*ours.data(n)), theirs.step(*theirs.data(n))
        for a, b in zip(*results, strict=True):
            check(activation, a.get(), b)
    for p, q in zip(ours.model.parameters, theirs.model.parameters, strict=True):
        check(activation, p.value.get(), q.value)
    assert gpu.launches


def check(activation, a, b):
    if "prelu" not in activation:
        assert_same(a, np.asarray(b))
    else:  # whose weight gradient is summed in another order
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_waits_for_nothing(activation, gpu, cupy):
    trained = Trained(activation, cupy)
    batch = trained.data()
    gpu.synchronised = gpu.transferred = 0
    for _ in "12":
        trained.step(*batch)
    dead = nn.dead_units(trained.model, batch[0], batch_size=3)
    assert (gpu.synchronised, gpu.transferred) == (0, 0)
    plain = Trained(activation, np)
    expected = nn.dead_units(plain.model, plain.data()[0])
    assert [len(units.get()) for units in dead] == [len(units) for units in expected]


def test_dead_units(cupy):
    trained = Trained("relu", cupy)
    trained.model.layers[0].bias.value[2] = -1e3
    first, _ = nn.dead_units(trained.model, trained.data(20)[0], batch_size=7)
    assert first.tolist() == [i == 2 for i in range(6)]


def test_what_is_not_on_the_device_is_named(cupy):
    trained = Trained("relu", cupy)
    x, labels = trained.data()
    with pytest.raises(TypeError, match="x must be an array of cupy"):
        trained.model.forward(x.get())
    with pytest.raises(TypeError, match="labels must be an array of cupy"):
        nn.softmax_cross_entropy(trained.model.forward(x), labels.get())
    with pytest.raises(TypeError, match="labels must be an array of numpy"):
        nn.softmax_cross_entropy(np.ones((7, 3)), labels)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_names_no_class(label, cupy):
    logits, labels = cupy.ones((4, 3)), cupy.asarray(np.array([0, 2, label, 1]))
    loss, _ = nn.softmax_cross_entropy(logits, labels)
    assert math.isnan(loss.item())
    labels[2] = 1
    loss, _ = nn.softmax_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(math.log(3))


def test_what_is_made_up_is_no_more_than_cupy_has():
    cupy = pytest.importorskip("cupy")
    names = *device.FUNCTIONS, "asarray", "ElementwiseKernel", "get_default_memory_pool"
    assert [name for name in names if not hasattr(cupy, name)] == []
    kinds = {
        device.ndarray: (cupy.ndarray, ["machine", "wrapped"]),
        device.Stream: (cupy.cuda.Stream, ["handles", "current"]),
        device.Event: (cupy.cuda.Event, []),
    }
    for kind, (real, own) in kinds.items():
        public = [name for name in vars(kind) if not name.startswith("_")]
        assert [name for name in public if not hasattr(real, name)] == own
    assert all(hasattr(cupy.ndarray, name) for name in device.METHODS)
    for name in ("Device", "get_current_stream", "get_elapsed_time", "runtime"):
        assert hasattr(cupy.cuda, name)


# The command --------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Make the network of the command one for an emulator"""
    for name in ("sklearn", "rich", "matplotlib", "threadpoolctl"):
        pytest.importorskip(name)
    monkeypatch.setattr(training, "WIDTHS", (16, 8))
    steps = train.time_activations
    monkeypatch.setattr(train, "time_activations", lambda run: steps(run, 2))


def lines(capsys):
    """What was printed, but for times"""
    output = capsys.readouterr()
    assert output.err == ""
    return [line.partition(" in ")[0] for line in output.out.splitlines()]


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
def test_training(activation, small, gpu, cupy, capsys):
    options = ["train", "--epochs", "3", "--activation", activation]
    options += ["--batch-size", "256", "--learning-rate", "0.05", "--threads", "1"]
    assert cli.main(options) == 0
    expected = lines(capsys)
    assert not gpu.launches
    assert cli.main([*options, "--device", "cuda"]) == 0
    got = lines(capsys)
    assert gpu.launches
    assert "It runs on a GPU that is none." in got
    assert [line for line in got if "CuPy idioms" in line]
    # What is learned, and the units of each layer that are never active.
    figures = re.compile(r"epoch|Test accuracy|\s+\d+ +\d+ ")
    kept = [[line for line in all_ if figures.match(line)] for all_ in (expected, got)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3 + 1 + 2


def test_a_run_waits_once_an_epoch(small, gpu, cupy):
    args = cli.parser().parse_args(["train", "--epochs", "2", "--batch-size", "512"])
    run = training.Run(args, training.load_digits(0), cupy)
    gpu.synchronised = gpu.transferred = 0
    assert len(list(run)) == 2 * run.batches
    assert gpu.synchronised == 2 * 3  # training, test and activity
    assert gpu.transferred == 2  # the order of the rows
