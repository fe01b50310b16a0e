"""Layers, loss and optimiser: against differences, and against PyTorch where it is."""

import copy
import itertools
import math
import pickle
import tracemalloc
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from fastrelu import cli, nn
from fastrelu.cli import training

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "leaky_relu that falls": lambda: nn.LeakyReLU(-0.5),
    "prelu": lambda: nn.PReLU(dtype=np.float64),
    "prelu per channel": lambda: nn.PReLU(6, dtype=np.float64),
}


def small(activation, seed=0):
    rng = np.random.default_rng(seed)
    options = {"rng": rng, "dtype": np.float64}
    return nn.Sequential(
        nn.Dense(5, 6, **options),
        ACTIVATIONS[activation](),
        nn.Dense(6, 6, **options),
        ACTIVATIONS[activation](),
        nn.Dense(6, 3, **options),
    )


def data(n=7, dtype=np.float64):
    rng = np.random.default_rng(1)
    return rng.standard_normal((n, 5)).astype(dtype), rng.integers(0, 3, n)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_central_differences(activation):
    model, (x, labels) = small(activation), data()

    def loss():
        return nn.softmax_cross_entropy(model.forward(x, training=False), labels)[0]

    _, grad = nn.softmax_cross_entropy(model.forward(x), labels)
    grad_x = model.backward(grad)
    step = 1e-6
    for value, gradient in [(x, grad_x)] + [
        (p.value, p.grad) for p in model.parameters
    ]:
        for index in np.ndindex(value.shape):
            kept = value[index]
            value[index] = kept + step
            above = loss()
            value[index] = kept - step
            below = loss()
            value[index] = kept
            # The loss is near 1: its rounding over 2 steps, and the step's square.
            assert abs((above - below) / (2 * step) - gradient[index]) < 1e-8


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
def test_the_network_has_the_gradients_of_pytorch(activation):
    torch = pytest.importorskip("torch")
    model = training.network(activation, np.random.default_rng(0))
    layers = []
    for layer in model.layers:
        if isinstance(layer, nn.Dense):
            layers.append(torch.nn.Linear(layer.in_features, layer.out_features))
        else:
            name = type(layer).__name__
            layers.append(getattr(torch.nn, name)())
    twins = torch.nn.Sequential(*layers).double()
    # In float64, because in float32 about one of the 360,000 units lies so near to 0
    # that the two libraries round it to different sides, and gradients jump there.
    for ours, other in zip(model.parameters, twins.parameters(), strict=True):
        ours.value, ours.grad = ours.value.astype(float), ours.grad.astype(float)
        other.data.copy_(torch.from_numpy(ours.value))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((32, 64))
    labels = rng.integers(0, 10, 32)
    loss, grad = nn.softmax_cross_entropy(model.forward(x), labels)
    model.backward(grad)
    theirs = torch.nn.functional.cross_entropy(
        twins(torch.from_numpy(x)), torch.from_numpy(labels)
    )
    theirs.backward()
    # 14 products forth and 14 back, with a relative error in the norm of at most
    # 1024 eps each; weights drawn for it keep the size of signal and error alike.
    tolerance = 28 * 1024 * np.finfo(np.float64).eps
    assert abs(loss - theirs.item()) <= tolerance * abs(loss)
    for ours, other in zip(model.parameters, twins.parameters(), strict=True):
        expected = other.grad.numpy()
        error = np.linalg.norm(ours.grad - expected)
        assert error <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_the_caller_holds_is_left_alone(activation):
    model, (x, labels) = small(activation), data()
    kept_x = x.copy()
    y = model.forward(x)
    kept_y = y.copy()
    _, grad = nn.softmax_cross_entropy(y, labels)
    kept_grad = grad.copy()
    grad_x = model.backward(grad)
    kept_grad_x = grad_x.copy()
    model.forward(x[:3] + 1)
    model.backward(grad[:3])
    for array, kept in ((x, kept_x), (y, kept_y), (grad, kept_grad)):
        np.testing.assert_array_equal(array, kept)
    np.testing.assert_array_equal(grad_x, kept_grad_x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_buffers_grow_with_the_batch(activation):
    model, (x, labels) = small(activation), data()
    model.backward(model.forward(x[:6]))
    fresh = small(activation)
    loss, grad = nn.softmax_cross_entropy(model.forward(x), labels)
    assert loss == nn.softmax_cross_entropy(fresh.forward(x), labels)[0]
    np.testing.assert_array_equal(model.backward(grad), fresh.backward(grad))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.PReLU])
def test_a_step_allocates_less_than_one_activation(activation):
    widths = [8, 512, 512, 512]
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Dense(before, after), activation()]
    model = nn.Sequential(*layers, nn.Dense(512, 3))
    optimiser = nn.SGD(model.parameters, lr=0.01, momentum=0.9, weight_decay=0.01)
    x, labels = np.ones((256, 8), np.float32), np.zeros(256, int)

    def step():
        model.backward(nn.softmax_cross_entropy(model.forward(x), labels)[1])
        optimiser.step()

    step()
    tracemalloc.start()
    try:
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 512 * 4


def test_activations_anywhere_leave_what_the_caller_holds_alone():
    rng = np.random.default_rng(0)
    inner = nn.Sequential(nn.PReLU(dtype=np.float64), nn.ReLU())
    model = nn.Sequential(
        nn.LeakyReLU(0.3), inner, nn.Dense(5, 3, rng=rng, dtype=float), nn.LeakyReLU()
    )
    assert len(model.layers) == 5
    x, _ = data()
    kept_x = x.copy()
    y = model.forward(x)
    kept_y, ones = y.copy(), np.ones_like(y)
    model.backward(ones)
    np.testing.assert_array_equal(x, kept_x)
    np.testing.assert_array_equal(y, kept_y)
    np.testing.assert_array_equal(ones, 1)
    weight = model.layers[3].weight.value
    hidden = np.where(x > 0, x, 0.25 * 0.3 * x)
    scores = np.maximum(hidden, 0) @ weight.T
    np.testing.assert_array_equal(y, np.where(scores > 0, scores, 0.01 * scores))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_evaluation_does_not_disturb_training(activation):
    model, (x, labels) = small(activation), data()
    _, grad = nn.softmax_cross_entropy(model.forward(x), labels)
    expected = model.backward(grad)
    gradients = [p.grad.copy() for p in model.parameters]
    model.zero_grad()
    model.forward(x)
    model.forward(x + 1, training=False)
    np.testing.assert_array_equal(model.backward(grad), expected)
    for parameter, gradient in zip(model.parameters, gradients, strict=True):
        np.testing.assert_array_equal(parameter.grad, gradient)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_forward_pass_serves_one_backward_pass(activation):
    model, (x, _) = small(activation), data()
    y = model.forward(x)
    model.backward(y)
    with pytest.raises(RuntimeError, match="forward pass"):
        model.backward(y)
    with pytest.raises(RuntimeError, match="forward pass"):
        ACTIVATIONS[activation]().backward(x)


BAD_GRADIENTS = {
    "one row more": lambda g: np.vstack([g, g[:1]]),
    "a row less": lambda g: g[1:],
    "a column less": lambda g: g[:, 1:],
    "no dimensions": lambda g: g[0, 0],
    "a list": lambda g: g.tolist(),
    "integers": lambda g: g.astype(int),
    "gaps": np.ma.masked_array,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("what", BAD_GRADIENTS)
def test_a_backward_pass_that_fails_may_be_tried_again(activation, what):
    model, twin, (x, _) = small(activation), small(activation), data()
    g = model.forward(x)
    for layer in (model, model.layers[-1]):  # the first is where it fails
        with pytest.raises((TypeError, ValueError), match="grad_output"):
            layer.backward(BAD_GRADIENTS[what](g))
    twin.forward(x)
    np.testing.assert_array_equal(model.backward(g), twin.backward(g))
    for ours, theirs in zip(model.parameters, twin.parameters, strict=True):
        np.testing.assert_array_equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_that_fails_may_be_tried_again(activation):
    layer, x = ACTIVATIONS[activation](), data()[0] - 0.5
    if "per channel" in activation:
        x = np.hstack([x, x[:, :1]])
    layer.forward(x)
    with pytest.raises(ValueError, match="grad_output"):
        layer.backward(x[1:])
    with pytest.raises(TypeError, match="x"):
        layer.forward("x")
    assert layer.backward(x).shape == x.shape
    assert layer._saved is None


def test_a_target_that_does_not_fit_is_told_before_gradients_are_added():
    layer, (x, _) = nn.Dense(5, 4, dtype=np.float64), data()
    g = layer.forward(x)
    for out, error in ((x[1:], ValueError), (x.astype("f4"), TypeError)):
        with pytest.raises(error, match="out must have"):
            layer.backward(g, out=out)
    layer.backward(g)
    np.testing.assert_array_equal(layer.bias.grad, g.sum(0))


def test_prelu_starts_at_a_quarter_and_learns():
    layer = nn.PReLU(dtype=np.float64)
    assert layer.weight.value.tolist() == [0.25]
    layer.forward(np.array([[-2.0, 1.0]]))
    layer.backward(np.array([[1.0, 1.0]]))
    nn.SGD(layer.parameters, lr=0.1).step()
    assert layer.weight.value.tolist() == [0.25 + 0.1 * 2.0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_takes_the_steps_of_pytorch(momentum, weight_decay):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = rng.standard_normal(50)
    ours, theirs = nn.Parameter(start.copy()), torch.nn.Parameter(torch.tensor(start))
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    optimiser, other = nn.SGD([ours], **options), torch.optim.SGD([theirs], **options)
    for _ in range(10):
        grad = rng.standard_normal(50)
        ours.grad[:] = grad
        theirs.grad = torch.tensor(grad)
        optimiser.step()
        other.step()
    # Ten steps of a few roundings each, on values of the order of 1 to 10.
    np.testing.assert_allclose(ours.value, theirs.detach().numpy(), rtol=0, atol=1e-13)


def test_a_buffer_follows_the_shape_of_a_row():
    model = nn.Sequential(nn.ReLU(), nn.LeakyReLU(0.5))
    for columns in (3, 5, 4):
        x = np.random.default_rng(columns).standard_normal((4, columns))
        np.testing.assert_array_equal(model.forward(x), np.maximum(x, 0))


def test_sgd_takes_steps_that_can_be_told_by_hand():
    parameter = nn.Parameter(np.array([2.0]))
    optimiser = nn.SGD([parameter], lr=0.5, momentum=0.5, weight_decay=0.25)
    parameter.grad[:] = 1
    for value in (1.25, 0.21875):  # with velocities of 1.5 and 2.0625
        optimiser.step()
        assert parameter.value.tolist() == [value]


@pytest.mark.parametrize(
    "half", [np.float32(0.5), np.array(0.5), Fraction(1, 2), np.float64(0.5)]
)
def test_any_real_number_will_do(half):
    assert nn.PReLU(1, half).weight.value == 0.5
    assert nn.LeakyReLU(half).forward(np.array([-2.0], np.float32)) == -1
    p = nn.Parameter(np.ones(1, np.float32))
    optimiser = nn.SGD([p], half, half, half)
    p.add_grad(np.ones(1))
    optimiser.step()
    assert p.value == 1 - 0.5 * (1 + 0.5)


def test_slopes_take_no_weight_decay():
    layer = nn.PReLU()
    nn.SGD(layer.parameters, lr=0.1, weight_decay=0.5).step()
    assert layer.weight.value.tolist() == [0.25]


def test_cross_entropy_of_large_scores():
    loss, grad = nn.softmax_cross_entropy(
        np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0])
    )
    assert loss == 5e3
    np.testing.assert_array_equal(grad, [[0, 0], [-0.5, 0.5]])


def test_cross_entropy_of_rows_that_lie_far_apart():
    scores = np.array([[0.0, 0.0], [1e4, 1e4]])
    loss, grad = nn.softmax_cross_entropy(scores, np.array([0, 1]))
    assert loss == np.log(2)
    np.testing.assert_array_equal(grad, [[-0.25, 0.25], [0.25, -0.25]])


def scaled(slope):
    """x times a number, with its slope as the only parameter that has a gradient"""
    layer = nn.Dense(1, 1, dtype=np.float64)
    layer.weight.value[:] = slope
    return layer


def test_gradients_add_up_until_a_step():
    dense, prelu = scaled(-1), nn.PReLU(dtype=np.float64)
    model = nn.Sequential(dense, prelu)
    weight, bias, slope = model.parameters
    optimiser = nn.SGD(model.parameters, lr=0.5)

    def backward(x):
        model.forward(np.array([[float(x)]]))
        model.backward(np.array([[1.0]]))

    # At -x, which is not active, the slope is 1/4.
    backward(4)
    assert [p.grad.item() for p in model.parameters] == [1, 0.25, -4]
    backward(8)
    assert [p.grad.item() for p in model.parameters] == [3, 0.5, -12]
    optimiser.step()
    assert [p.value.item() for p in (weight, bias, slope)] == [-2.5, -0.25, 6.25]
    for _ in range(2):  # what a step has used is replaced
        slope.value[:] = 0.25
        backward(4)
        assert [p.grad.item() for p in (weight, bias)] == [1, 0.25]
        optimiser.lr = 0
        optimiser.step()


@pytest.mark.parametrize("of", ["model", "optimiser", "parameters"])
def test_gradients_are_forgotten_with_zero_grad(of):
    model, (x, labels) = small("prelu"), data()
    optimiser = nn.SGD(model.parameters, lr=0.1)
    _, grad = nn.softmax_cross_entropy(model.forward(x), labels)
    model.backward(grad)
    expected = [p.grad.copy() for p in model.parameters]
    owners = {"model": [model], "optimiser": [optimiser]}
    for owner in owners.get(of, model.parameters):
        owner.zero_grad()
    assert not any(p.grad.any() for p in model.parameters)
    model.forward(x)
    model.backward(grad)
    for parameter, gradient in zip(model.parameters, expected, strict=True):
        np.testing.assert_array_equal(parameter.grad, gradient)


def test_two_halves_of_a_batch_make_one_step():
    models, (x, labels) = [small("prelu"), small("prelu")], data(8)
    for model, parts in zip(models, (1, 2), strict=True):
        optimiser = nn.SGD(model.parameters, lr=0.1, momentum=0.9)
        for _ in range(3):
            pairs = zip(np.split(x, parts), np.split(labels, parts), strict=True)
            for rows, classes in pairs:
                y = model.forward(rows)
                model.backward(nn.softmax_cross_entropy(y, classes)[1] / parts)
            optimiser.step()
    for one, other in zip(*(model.parameters for model in models), strict=True):
        # Sums of a few numbers of the order of 1, in another order.
        np.testing.assert_allclose(one.value, other.value, rtol=0, atol=1e-14)


def test_a_parameter_of_two_layers_is_stepped_once():
    first, second = scaled(3), scaled(0)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert model.parameters == [first.weight, first.bias, second.bias]
    optimiser = nn.SGD([first.weight, *model.parameters], lr=0.5)
    for _ in range(2):
        first.weight.value[:] = 3
        assert model.forward(np.array([[2.0]])) == 18
        model.backward(np.array([[1.0]]))
        assert first.weight.grad == 12  # 3 * 2 from either side
        optimiser.step()
        assert first.weight.value == 3 - 0.5 * 12
        for layer in model.layers:
            layer.bias.value[:] = 0
    twin = copy.deepcopy(model)
    assert twin.layers[0].weight is twin.layers[1].weight


def test_warming_up_teaches_nothing(monkeypatch):
    monkeypatch.setattr(training, "WIDTHS", (16, 8))
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((20, 64), np.float32), rng.integers(0, 10, 20)
    digits = training.Digits(x, labels, x, labels)
    args = cli.parser().parse_args(["train", "--activation", "prelu"])
    warm, cold = (training.Run(args, digits) for _ in "12")
    warm.warm_up()
    for run in (warm, cold):
        run.step(np.arange(20))
    for one, other in zip(warm.model.parameters, cold.model.parameters, strict=True):
        np.testing.assert_array_equal(one.value, other.value)


def copies(model):
    """A model as others get it"""
    buffers = []
    data = pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield pickle.loads(data, buffers=[bytearray(b.raw()) for b in buffers])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_copy_works_and_holds_parameters_alone(activation):
    model, (x, labels) = small(activation), data(1000)
    optimiser = nn.SGD(model.parameters, lr=0.1, momentum=0.9)

    def step(model, optimiser):
        loss, grad = nn.softmax_cross_entropy(model.forward(x), labels)
        model.backward(grad)
        optimiser.step()
        return loss

    step(model, optimiser)
    model.forward(x)
    size = sum(p.value.nbytes for p in model.parameters)
    assert len(pickle.dumps(model)) < size + 3000
    assert len(pickle.dumps(optimiser)) < 2 * size + 3000
    for other, its_optimiser in copies((model, optimiser)):
        assert not any(p.grad.any() for p in other.parameters)
        with pytest.raises(RuntimeError, match="forward pass"):
            other.backward(np.ones((1000, 3)))
        np.testing.assert_array_equal(
            other.forward(x, training=False), model.forward(x, training=False)
        )
        ours, theirs = copy.deepcopy((model, optimiser)), (other, its_optimiser)
        assert step(*ours) == step(*theirs)
        assert step(*ours) == step(*theirs)


HALVES = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])


@HALVES
def test_gradients_of_half_floats_are_summed_in_float32(dtype):
    rows = 5000
    layer = nn.Dense(1, 2, dtype=dtype)
    layer.forward(np.ones((rows, 1), dtype))
    layer.backward(np.ones((rows, 2), dtype))
    for parameter in layer.parameters:
        assert parameter.grad.dtype == dtype
        np.testing.assert_array_equal(parameter.grad, dtype(rows))


@HALVES
def test_cross_entropy_of_half_floats(dtype):
    rows, classes = 3000, 4096
    labels = np.arange(rows)
    loss, grad = nn.softmax_cross_entropy(np.zeros((rows, classes), dtype), labels)
    assert (loss.dtype, grad.dtype) == (dtype, dtype)
    assert loss == dtype(np.log(classes))
    share = np.float32(1 / classes)
    assert grad[0, 0] == dtype((share - 1) / rows)
    np.testing.assert_array_equal(grad[0, 1:], dtype(share / rows))


def test_scores_may_lie_farther_apart_than_half_floats_reach():
    scores = np.array([[6e4, -6e4]], np.float16)
    loss, grad = nn.softmax_cross_entropy(scores, np.array([0]))
    assert loss == 0
    np.testing.assert_array_equal(grad, [[0, 0]])


@HALVES
def test_layers_of_half_floats_keep_their_dtype(dtype):
    model = nn.Sequential(
        nn.Dense(3, 4, dtype=dtype), nn.PReLU(dtype=dtype), nn.Dense(4, 2, dtype=dtype)
    )
    x = np.ones((5, 3), dtype)
    y = model.forward(x)
    assert y.dtype == model.forward(x, training=False).dtype == dtype
    assert model.backward(y).dtype == dtype


@HALVES
def test_momentum_of_half_floats_reaches_its_limit(dtype):
    parameter = nn.Parameter(np.zeros(1, dtype))
    optimiser = nn.SGD([parameter], lr=0, momentum=0.99)
    parameter.grad[:] = 1
    for _ in range(2000):
        optimiser.step()
    optimiser.lr = 1
    optimiser.step()
    assert parameter.value.dtype == dtype
    assert parameter.value == -100


@HALVES
def test_a_step_of_half_floats_rounds_once(dtype):
    eps = float(ml_dtypes.finfo(dtype).eps)
    parameter = nn.Parameter(np.ones(1, dtype))
    parameter.grad[:] = 1
    # From below the tie of 1 - eps / 2 and 1 - eps to above it, because of the decay.
    lr = 0.75 * eps / (1 + eps / 6)
    nn.SGD([parameter], lr=lr, weight_decay=eps / 3).step()
    assert parameter.value == 1 - eps
    tiny = nn.Parameter(np.full(1, 2.0**-14, dtype))
    nn.SGD([tiny], lr=2.0**12, weight_decay=2.0**-12).step()
    assert tiny.value == 0


def test_dead_units():
    model, (x, _) = small("relu"), data(50)
    model.layers[0].bias.value[2] = -1e3
    first, second = nn.dead_units(model, x, batch_size=7)
    assert first.tolist() == [i == 2 for i in range(6)]
    hidden = model.layers[2].forward(
        model.layers[1].forward(model.layers[0].forward(x, training=False)),
        training=False,
    )
    np.testing.assert_array_equal(second, (hidden <= 0).all(axis=0))


def test_parameters_are_in_the_machine_s_byte_order():
    swapped = np.dtype(np.float32).newbyteorder()
    for layer in (nn.Dense(2, 2, dtype=swapped), nn.PReLU(2, dtype=swapped)):
        y = layer.forward(np.ones((3, 2), np.float32))
        assert layer.backward(y).dtype == np.float32
        assert all(p.value.dtype == np.float32 for p in layer.parameters)


def test_the_shape_of_an_output():
    model = small("prelu")
    assert model.output_shape((7, 5)) == model.forward(np.ones((7, 5))).shape


def test_a_layer_has_both_passes():
    for call in (nn.Layer().forward, nn.Layer().backward):
        with pytest.raises(NotImplementedError):
            call(np.ones(3))


REPRESENTATIONS = {
    "Dense(784, 512)": lambda: nn.Dense(784, 512),
    "ReLU()": nn.ReLU,
    "LeakyReLU(0.2)": lambda: nn.LeakyReLU(0.2),
    "PReLU(512, axis=-1)": lambda: nn.PReLU(512, axis=-1),
    "Sequential(Dense(2, 16), PReLU(1, axis=1), ReLU())": lambda: nn.Sequential(
        nn.Dense(2, 16), nn.Sequential(nn.PReLU(), nn.ReLU())
    ),
    "Parameter(shape=(2, 1), dtype=float16)": lambda: nn.Parameter(
        np.ones((2, 1), np.float16)
    ),
}


@pytest.mark.parametrize("text", REPRESENTATIONS)
def test_layers_say_what_they_are(text):
    assert repr(REPRESENTATIONS[text]()) == text


def test_cross_entropy_when_all_errors_are_raised():
    scores = np.array([[0, -1e3, -88], [1e-20, -1e2, -87]], np.float32)
    with np.errstate(all="raise"):
        loss, grad = nn.softmax_cross_entropy(scores, np.array([0, 0]))
    assert loss == 0
    assert grad[0, 1] == 0
    np.testing.assert_allclose(grad[:, 2], np.exp([-88, -87]) / 2, rtol=1e-5)


def test_read_only_parameters_are_refused_before_anything_changes():
    model, (x, _) = small("prelu"), data()
    buffers = []
    saved = pickle.dumps(model, protocol=5, buffer_callback=buffers.append)
    model = pickle.loads(saved, buffers=[bytes(buffer.raw()) for buffer in buffers])
    first = model.parameters[0]
    first.value = first.value.copy()
    optimiser = nn.SGD(model.parameters, lr=0.1, momentum=0.9)
    model.backward(model.forward(x))
    kept = copy.deepcopy([p.value for p in model.parameters])
    with pytest.raises(ValueError, match=r"parameters\[1\] must be writeable"):
        optimiser.step()
    for p, value in zip(model.parameters, kept, strict=True):
        np.testing.assert_array_equal(p.value, value)
        p.value = p.value.copy()
    gradient = first.grad.copy()
    optimiser.step()  # with nothing in its momentum but this step's gradient
    np.testing.assert_array_equal(first.value, kept[0] - 0.1 * gradient)


def dense(in_features=3, out_features=2, **options):
    return nn.Dense(in_features, out_features, **options)


def parameter(**options):
    return nn.Parameter(np.ones(3), **options)


WRONG = {
    "x's columns": (ValueError, "x", lambda: small("relu").forward(np.ones((2, 4)))),
    "x's dtype": (
        TypeError,
        "x",
        lambda: small("relu").forward(np.ones((2, 5), np.float32)),
    ),
    "no layers": (ValueError, "layers", lambda: nn.Sequential()),
    "a layer twice": (ValueError, "layers", lambda: twice(nn.ReLU())),
    "a layer twice, inside": (
        ValueError,
        "layers",
        lambda: twice(nn.Sequential(nn.Dense(2, 2))),
    ),
    "a label": (
        ValueError,
        "labels",
        lambda: nn.softmax_cross_entropy(np.ones((2, 3)), np.array([0, 3])),
    ),
    "labels' dtype": (
        TypeError,
        "labels",
        lambda: nn.softmax_cross_entropy(np.ones((2, 3)), np.array([0.0, 1.0])),
    ),
    "no samples": (
        ValueError,
        "x",
        lambda: nn.dead_units(small("relu"), np.ones((0, 5))),
    ),
    "no batch": (
        ValueError,
        "batch_size",
        lambda: nn.dead_units(small("relu"), np.ones((2, 5)), batch_size=0),
    ),
    "logits' shape": (
        ValueError,
        "logits",
        lambda: nn.softmax_cross_entropy(np.ones(3), np.array([0])),
    ),
    "labels' shape": (
        ValueError,
        "labels",
        lambda: nn.softmax_cross_entropy(np.ones((2, 3)), np.array([[0], [1]])),
    ),
    **{
        f"{what} {name}={value!r}": (
            error,
            name,
            lambda make=make, options={name: value}: make(**options),
        )
        for error, what, make, name, value in [
            (TypeError, "Parameter", nn.Parameter, "value", [1.0]),
            (TypeError, "Parameter", nn.Parameter, "value", np.float64(1)),
            (TypeError, "Parameter", nn.Parameter, "value", np.arange(3)),
            (TypeError, "Parameter", nn.Parameter, "value", np.ma.array([1.0])),
            (TypeError, "Parameter", parameter, "decay", 1),
            (ValueError, "Dense", dense, "in_features", 0),
            (ValueError, "Dense", dense, "out_features", -1),
            (TypeError, "Dense", dense, "in_features", True),
            (TypeError, "Dense", dense, "out_features", 2.0),
            (TypeError, "Dense", dense, "negative_slope", "0"),
            (ValueError, "Dense", dense, "negative_slope", float("inf")),
            (TypeError, "Dense", dense, "rng", "seed"),
            (TypeError, "Dense", dense, "dtype", int),
            (TypeError, "Dense", dense, "dtype", "real"),
            (TypeError, "Dense", dense, "xp", "numpy"),
            (TypeError, "Dense", dense, "xp", math),
            (TypeError, "PReLU", nn.PReLU, "num_parameters", True),
            (ValueError, "PReLU", nn.PReLU, "num_parameters", 0),
            (TypeError, "PReLU", nn.PReLU, "init", None),
            (ValueError, "PReLU", nn.PReLU, "init", 1e39),
            (TypeError, "PReLU", nn.PReLU, "axis", 1.0),
            (TypeError, "PReLU", nn.PReLU, "dtype", bool),
            (TypeError, "PReLU", nn.PReLU, "xp", None),
            (TypeError, "LeakyReLU", nn.LeakyReLU, "negative_slope", "steep"),
            (ValueError, "LeakyReLU", nn.LeakyReLU, "negative_slope", float("nan")),
        ]
    },
    "x's kind": (TypeError, "x", lambda: dense().forward([[1.0, 2.0, 3.0]])),
    "x's gaps": (TypeError, "x", lambda: dense().forward(np.ma.ones((1, 3), "f4"))),
    **{
        f"a gradient of shape {np.shape(grad)}": (
            ValueError,
            "grad",
            lambda grad=grad: parameter().add_grad(grad),
        )
        for grad in (np.array(1.0), np.ones(1), np.ones((1, 3)))
    },
    **{
        f"a gradient that is {shown}": (
            TypeError,
            "grad",
            lambda grad=grad: parameter().add_grad(grad),
        )
        for shown, grad in {
            "none": None,
            "a list": [1.0, 2.0],
            "complex": np.ones(2, complex),
            "text": np.array(["a", "b"]),
        }.items()
    },
    **{
        f"an output that is {shown}": (
            error,
            "out",
            lambda out=out: dense().forward(np.ones((2, 3), "f4"), out=out),
        )
        for shown, (error, out) in {
            "double": (TypeError, np.ones((2, 2))),
            "longer": (ValueError, np.ones((3, 2), "f4")),
            "of integers": (TypeError, np.ones((2, 2), int)),
            "a list": (TypeError, [1]),
            "read-only": (ValueError, np.broadcast_to(np.float32(1), (2, 2))),
        }.items()
    },
    **{
        f"whether {layer} is training": (
            TypeError,
            "training",
            lambda layer=layer: layer.forward(np.ones((2, 3), "f4"), training="no"),
        )
        for layer in (dense(), nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), small("relu"))
    },
    "a layer's kind": (TypeError, "layers", lambda: nn.Sequential([nn.ReLU()])),
    "a layer's class": (TypeError, "layers", lambda: nn.Sequential(nn.ReLU)),
    "logits' kind": (
        TypeError,
        "logits",
        lambda: nn.softmax_cross_entropy([[1.0, 2.0]], np.array([0])),
    ),
    "logits' dtype": (
        TypeError,
        "logits",
        lambda: nn.softmax_cross_entropy(np.ones((1, 2), int), np.array([0])),
    ),
    "labels' kind": (
        TypeError,
        "labels",
        lambda: nn.softmax_cross_entropy(np.ones((1, 2)), [0]),
    ),
    "a number for samples": (
        ValueError,
        "x",
        lambda: nn.dead_units(small("relu"), np.array(1.0)),
    ),
    "no Sequential": (TypeError, "model", lambda: nn.dead_units(dense(), np.ones(3))),
    "samples' kind": (TypeError, "x", lambda: nn.dead_units(small("relu"), [])),
    "parameters' kind": (
        TypeError,
        "parameters",
        lambda: nn.SGD(small("relu"), 0.1),
    ),
    "a parameter's kind": (TypeError, "parameters", lambda: nn.SGD(np.ones(3), 0.1)),
    "a rate's kind": (
        TypeError,
        "lr",
        lambda: nn.SGD(small("relu").parameters, "0.1"),
    ),
    "PReLU in place": (ValueError, "out", lambda: in_place(nn.PReLU())),
    "PReLU on a view": (ValueError, "out", lambda: in_place(nn.PReLU(), np.s_[:])),
    "PReLU on a row": (ValueError, "out", lambda: in_place(nn.PReLU(), np.s_[1:], 1)),
    "Dense in place": (ValueError, "out", lambda: in_place(nn.Dense(2, 2, rng=0))),
    "no parameters": (ValueError, "parameters", lambda: nn.SGD([], 0.1)),
    **{
        f"{name} {number}": (
            ValueError,
            name,
            lambda setting={"lr": 0.1, name: number}: nn.SGD(
                small("relu").parameters, **setting
            ),
        )
        for name in ("lr", "momentum", "weight_decay")
        for number in (-1, float("inf"), float("nan"))
    },
}


def twice(layer):
    return nn.Sequential(layer, nn.PReLU(), nn.Sequential(layer))


def in_place(layer, part=None, start=0):
    x = np.ones((3, 2), np.float32)
    given = x[: len(x) - start]
    return layer.forward(given, out=given if part is None else x[part])


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what):
    error, name, call = WRONG[what]
    with pytest.raises(error, match=rf"\b{name}\b"):
        call()


def test_an_output_may_lie_on_an_input_that_nobody_keeps():
    x = -np.ones((2, 4), np.float32)
    columns = np.ones((2, 8), np.float32)
    for layer in nn.PReLU(), nn.Dense(4, 4, rng=0):
        columns[:, ::2] = x
        y = layer.forward(x)
        layer.forward(columns[:, ::2], out=columns[:, 1::2])  # beside each other
        np.testing.assert_array_equal(columns[:, 1::2], y)
    given = x.copy()
    y = nn.PReLU().forward(given, training=False, out=given)
    assert y is given
    assert (y == -0.25).all()


def test_a_parameter_is_native():
    p = nn.Parameter(np.ones(2, ">f4"))
    assert p.value.dtype.isnative
    p.add_grad(np.ones(2, np.float32))
    assert p.grad.dtype.isnative


def test_text_is_told_from_what_it_names():
    for options, said in (
        ({"xp": "numpy"}, "xp must be the module numpy or cupy, got 'numpy'"),
        ({"dtype": "real"}, "dtype must be float16, .* got 'real'"),
        ({"xp": math}, "xp must be the module numpy or cupy, got <module 'math'"),
    ):
        with pytest.raises(TypeError, match=said):
            dense(**options)
