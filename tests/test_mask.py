"""What a mask is for its users: an array of one bit each, counted, packed and kept."""

import copy
import pickle

import numpy as np
import pytest
from conftest import LAYOUTS, place, sample
from reference import assert_same

import fastrelu as F

float32 = np.dtype(np.float32)


def masks():
    """Masks of arrays that end within a byte and at its end, in several orders"""
    for shape in ((), (0, 3), (8,), (13,), (2, 1, 3), (3, 5, 4)):
        x = sample(shape, float32)
        for each in (x, x.T, np.moveaxis(x, 0, -1) if x.ndim else x):
            yield each, F.relu(each, return_mask=True)[1]


def test_a_mask_goes_where_numpy_takes_an_array():
    for x, mask in masks():
        active = x > 0
        assert_same(np.asarray(mask), active)
        assert_same(np.where(mask, x, 0), np.where(active, x, 0))
        assert np.count_nonzero(mask) == np.count_nonzero(active)
        assert_same(np.asarray(mask, np.float32), active.astype(np.float32))
        with pytest.raises(ValueError, match="is always a copy"):
            np.asarray(mask, copy=False)


def test_a_mask_is_not_one_bool():
    for _, mask in masks():
        with pytest.raises(ValueError, match="not one for all"):
            bool(mask)


def test_how_many_were_active():
    for x, mask in masks():
        active = x > 0
        assert type(mask.count()) is int
        assert mask.count() == active.sum()
        for axis in [*range(-x.ndim, x.ndim), tuple(range(x.ndim))]:
            assert_same(np.asarray(mask.count(axis)), np.asarray(active.sum(axis)))
    with pytest.raises(ValueError, match="axis"):
        mask.count(3)


@pytest.mark.parametrize("axis", [1.5, "a", [0], True, (0, 0.5)])
def test_axes_to_count_along_are_integers(axis):
    with pytest.raises(TypeError, match="axis must be an integer or a tuple"):
        F.Mask.pack(np.ones((2, 3), bool)).count(axis)


def test_a_shape_is_no_bool():
    with pytest.raises(TypeError, match="shape must be an integer"):
        F.Mask(np.zeros(1, np.uint8), True)


def test_bits_behind_the_last_element_are_not_counted():
    assert F.Mask(np.array([0xFF, 0xFF], np.uint8), 13).count() == 13
    assert F.Mask(np.array([0xFF], np.uint8), ()).count() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bools_are_packed_as_they_lie(layout):
    x = sample((3, 5, 4), float32)
    x, active = place(x, layout)[0], place(x > 0, layout)[0]
    mask = F.Mask.pack(active)
    assert_same(mask.unpack(), active)
    g = sample(active.shape, float32, seed=1)
    for grad in (g, np.asfortranarray(g)):
        assert_same(F.relu_backward(grad, mask), np.where(active, g, np.float32(0)))
    if x.flags.c_contiguous:
        _, own = F.relu(x, return_mask=True)
        assert_same(mask.bits, own.bits)
        assert mask.axes == own.axes


def test_bools_of_another_predicate():
    x = np.linspace(-1, 7, 13)
    active, g = (x > 0) & (x < 6), np.ones(13)
    mask = F.Mask.pack(active, "0 < x < 6")
    assert_same(F.relu6_backward(g, mask), active.astype(float))
    with pytest.raises(ValueError, match="a mask of x > 0"):
        F.relu_backward(g, mask)


@pytest.mark.parametrize("wrong", [np.ones(3), [1, 0], "no", np.ones(3, np.uint8)])
def test_only_bools_are_packed(wrong):
    with pytest.raises(TypeError, match="bools must be an array of bool"):
        F.Mask.pack(wrong)


def test_what_is_more_than_bools_is_not_packed():
    with pytest.raises(TypeError, match=r"bools must be .* fill its gaps first"):
        F.Mask.pack(np.ma.array([True, False], mask=[False, True]))
    with pytest.raises(TypeError, match=r"bools must be .* inhomogeneous"):
        F.Mask.pack([[True], [True, False]])


def test_bools_with_labels_are_not_packed():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"bools must be .* take its \.to_numpy\(\)"):
        F.Mask.pack(pandas.Series([True, False], index=["a", "b"]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_masks_are_kept(protocol):
    for x, mask in masks():
        kept = pickle.loads(pickle.dumps(mask, protocol))
        for each in (kept, copy.deepcopy(mask), copy.copy(mask)):
            assert (each.shape, each.axes) == (mask.shape, mask.axes)
            assert each.predicate == mask.predicate
            assert_same(each.unpack(), x > 0)
            assert_same(F.relu_backward(x, each), F.relu_backward(x, mask))
        assert kept.bits is not mask.bits


def test_bits_of_a_tensor_in_the_host_s_memory():
    torch = pytest.importorskip("torch")
    bits = torch.tensor([0b110], dtype=torch.uint8)
    mask = F.Mask(bits, 3)
    assert_same(np.asarray(mask), np.array([False, True, True]))
    bits[0] = 1  # the same memory
    assert mask.count() == 1
    assert_same(F.relu_backward(np.ones(3), mask), np.array([1.0, 0, 0]))
    with pytest.raises(TypeError, match="bits must be an array of uint8, got int8"):
        F.Mask(bits.view(torch.int8), 3)
    with pytest.raises(TypeError, match=r"bits must be .* a tensor of layout"):
        F.Mask(bits.to_sparse(), 3)


def test_axes_of_length_1_are_in_any_order():
    bits = np.zeros(1, np.uint8)
    assert F.Mask(bits, (2, 1, 3), (1, 0, 2)).axes == (0, 1, 2)
    assert F.Mask(bits, (2, 1, 3), (2, 1, 0)).axes == (2, 1, 0)


def test_masks_and_bools_of_a_gpu():
    """What NumPy cannot read is said"""

    class OnGpu:
        def __dlpack_device__(self):
            return 2, 0

    with pytest.raises(
        TypeError, match="bools must be in the host's memory, got OnGpu"
    ):
        F.Mask.pack(OnGpu())
    with pytest.raises(TypeError, match="on a GPU: unpack it there"):
        np.asarray(F.Mask._make(OnGpu(), (3,), None, "x > 0"))
