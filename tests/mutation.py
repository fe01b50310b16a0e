"""Faults, planted one at a time in a copy of the package: the tests must catch each.

    python tests/mutation.py              # all of them
    python tests/mutation.py pool 17-20   # those of cpu/pool.py, and some by number

The tests named with a fault run first on the copy as it is, where they must pass.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).parent.parent


class Fault(NamedTuple):
    """A text that is in its file once, and what it is replaced by"""

    text: str
    new: str
    why: str  # what goes wrong
    tests: str
    ends: str = ""  # "hangs" or "crashes", where that is how it shows


FAULTS = {
    "cuda/launch.py": [
        Fault(
            "driver.cuCtxPopCurrent()",
            "pass",
            "a call leaves another device the current one",
            "test_driver.py::test_streams_and_devices",
        ),
    ],
    "cuda/compiled.py": [
        Fault(
            "        decref(w[_STEPS])\n        decref(w[_BITS])\n",
            "        decref(w[_STEPS])\n",
            "a mask's bits live for ever",
            "test_cuda_quick.py::test_no_reference_is_lost",
        ),
        Fault(
            "w[place + _ON] == w[_X + _ON]",
            "w[place + _ON] >= 0",
            "a kernel gets the address of another device's memory",
            "test_cuda_quick.py::test_another_device",
        ),
        Fault(
            "return w[_FIRST] == table[row + CONTEXT]",
            "return w[_FIRST] != 0",
            "a kernel is launched on another device than the current one",
            "test_cuda_quick.py::test_another_device",
        ),
        Fault(
            "    if (start | target) % BYTES != 0:\n",
            "    if start % BYTES != 0:\n",
            "vectors are written to where none may start",
            "test_cuda_quick.py::test_what_is_left",
        ),
        Fault(
            "if axis < 0 or w[_ELEMENTS] >= INT32:",
            "if axis < 0:",
            "indices of 32 bits for more elements than these can count",
            "test_cuda_quick.py::test_what_is_left",
        ),
        Fault(
            "if words(mask)[MASK_PREDICATE] != table[PREDICATE] or bits == 0:",
            "if bits == 0:",
            "the mask of another activation is taken",
            "test_cuda_quick.py::test_what_is_wrong",
        ),
        Fault(
            "return 0 if handle == 1 else handle",
            "return handle",
            "one stream has two handles, and waits for itself",
            "test_cuda_quick.py::test_the_legacy_stream_has_two_handles",
        ),
        Fault(
            "own = _ask(table, question, value, w) if items != 0 else 0",
            "own = _ask(table, question, value, w)",
            "a library is asked with an error on its way",
            "test_cuda_quick.py::test_a_shape_that_raises",
        ),
        Fault(
            "if stream >= 0 and not _is_captured(table, stream, w):",
            "if stream >= 0:",
            "a graph writes to memory that is another array's by now",
            "test_cuda_quick.py::test_what_a_graph_needs_is_kept",
        ),
        Fault(
            "if level != table[OUTSIDE]:",
            "if level == 0:",
            "a tangent is lost",
            "test_cuda_quick.py::test_within_forward_mode",
        ),
        Fault(
            "if taken and _is_written(table, target, w):",
            "if taken:",
            "a backward pass uses what was overwritten",
            "test_cuda_quick.py::test_what_is_written_to_is_told",
        ),
        Fault(
            "if length == NO_INTEGER or length",
            "if length",
            "two lengths that are no ints pass for the same",
            "test_cuda_quick.py::test_numbers_that_are_no_ints",
        ),
        Fault(
            "return step == unit * w[_ELEMENTS]",
            "return step > 0",
            "elements between those of an array are written, too",
            "test_cuda_quick.py::test_what_is_left",
        ),
        Fault(
            "return w[model + _IN_C] != 0 or _has_items(",
            "return w[model + _IN_C] != 0 or w[_STEPS] != 0 or _has_items(",
            "two orders that are not C's pass for one",
            "test_cuda_quick.py::test_what_is_left",
        ),
        Fault(
            "return w[_PLACE] == PLAIN or w[_X + _IN_C] != 0",
            "return True",
            "bits are in another order than their mask says",
            "test_cuda_quick.py::test_what_is_left",
        ),
        Fault(
            "return _item(table, w[_STEPS], axis) // w[_UNIT]",
            "return _item(table, w[_STEPS], axis)",
            "bytes are counted as elements, and slopes are other channels'",
            "test_cuda_host.py::test_all_ways_queue_the_same",
        ),
        Fault(
            "return -1 if taken == -1 else _refused(table, taken, w)",
            "return -1",
            "a gradient in place is taken for what it was, once more",
            "test_cuda_quick.py::test_a_driver_that_fails_half_way",
        ),
        Fault(
            "is_seen_so and table[row + VIEW] == outer:",
            "is_seen_so:",
            "rows are cut up as those of another array",
            "test_cuda_quick.py::test_what_is_left",
        ),
    ],
    "_torch.py": [
        Fault(
            "forward.unpack_dual(tensor).tangent is not None",
            "False",
            "a tangent is lost",
            "test_users.py::TestTensors",
        ),
        Fault(
            "if _address(tensor) == 0 and tensor.numel():",
            "if False:",
            "a kernel runs over the null pointer",
            "test_users.py::TestTensors",
        ),
        Fault(
            'sys.modules["torch"].autograd.graph.increment_version(tensor)',
            "pass",
            "a backward pass uses what was overwritten",
            "test_users.py::TestTensors",
        ),
    ],
    "cuda/arrays.py": [
        Fault(
            "if launch.is_capturing(stream):",
            "if False:",
            "a graph writes to memory that is another array's by now",
            "test_cuda_quick.py::test_what_a_graph_needs_is_kept",
        ),
    ],
    "cuda/__init__.py": [
        Fault(
            "return [compute(value) for",
            "return [float(compute(value)) for",
            "numbers come to a kernel twice as wide as it reads them",
            "test_driver.py::test_what_reaches_the_driver",
        ),
        Fault(
            "for stream in streams:\n                launch.wait(stream, work.stream)",
            "for stream in ():\n                launch.wait(stream, work.stream)",
            "another stream goes on before its array is written",
            "test_driver.py::test_streams_and_devices",
        ),
    ],
    "activations.py": [
        Fault(
            "return type(x)(0) if x <= 0 else x  # not",
            "return x if x > 0 else type(x)(0)  # not",
            "relu(NaN) is 0",
            "test_values.py::test_definitions_by_hand",
        ),
        Fault(
            "return type(x)(0) if x <= 0 else x  # not",
            "return type(x)(0) if x < 0 else x  # not",
            "relu(-0.0) is -0.0",
            "test_values.py::test_definitions_by_hand",
        ),
        Fault(
            "    return x > 0\n",
            "    return x >= 0\n",
            "the derivative at 0 is 1",
            "test_values.py::test_definitions_by_hand",
        ),
        Fault(
            "return g if passes else type(g)(0)  # a",
            "return g * type(g)(passes)  # a",
            "a product, so that an infinite gradient gives NaN",
            "test_values.py::test_definitions_by_hand",
        ),
        Fault(
            "return x if x > 0 else slope * x",
            "return x if x >= 0 else slope * x",
            "no product at 0, whose sign a negative slope turns",
            "test_values.py::test_every_pair_of_specials_and_every_slope[float32--0.5]",
        ),
        Fault(
            "else type(x)(6) if x >= 6 else x",
            "else x",
            "relu6 has no upper end",
            "test_values.py::test_forward_of_every_type[numpy-relu6-float32]",
        ),
        Fault(
            "return x > 0 and x < 6",
            "return x > 0 and x <= 6",
            "relu6's derivative at 6 is 1",
            "test_values.py::test_what_may_be_saved[relu6-c-1]",
        ),
        Fault(
            "    kept=1,\n",
            "    kept=0,\n",
            "threshold's gradient is not told the threshold",
            "test_values.py::test_what_may_be_saved[threshold-c-1]",
        ),
    ],
    "mask.py": [
        Fault(
            "longer = [axis for axis in axes or () if shape[axis] != 1]",
            "longer = [*(axes or ())]",
            "an axis of length 1 makes C order another",
            "test_mask.py::test_axes_of_length_1_are_in_any_order",
        ),
        Fault(
            "        if rest:  # what",
            "        if False:  # what",
            "elements of the last byte are not counted",
            "test_mask.py::test_how_many_were_active",
        ),
        Fault(
            "& ((1 << rest) - 1)).bit",
            "& 255).bit",
            "what is behind the last element is counted",
            "test_mask.py::test_bits_behind_the_last_element_are_not_counted",
        ),
        Fault(
            "array.transpose(order), None",
            "array, None",
            "bools are not packed as they lie",
            "test_mask.py::test_bools_are_packed_as_they_lie",
        ),
        Fault(
            "(self.bits, self.shape, self.axes, self.predicate)",
            "(self.bits, self.shape, None, self.predicate)",
            "a pickle forgets the order",
            "test_mask.py::test_masks_are_kept",
        ),
        Fault(
            "size = -(-math.prod(checked) // 8)",
            "size = math.prod(checked) // 8",
            "the bits of the last elements are not asked for",
            "test_arguments.py::test_mask_that_was_changed",
        ),
        Fault(
            "return -(-math.prod(self.shape) // 8)",
            "return math.prod(self.shape) // 8",
            "nbytes is rounded down",
            "test_values.py::test_mask[relu-float32]",
        ),
        Fault(
            'count=size, bitorder="little"',
            'count=size, bitorder="big"',
            "unpack begins at the other end of each byte",
            "test_values.py::test_mask[relu-float32]",
        ),
        Fault(
            "flags.view(np.bool_).reshape(lengths).transpose(back)",
            "flags.view(np.bool_).reshape(self.shape)",
            "unpack takes all bits for those of C order",
            "test_values.py::test_mask_of_another_layout[relu-fortran]",
        ),
        Fault(
            "back = sorted(range(len(axes)), key=axes.__getitem__)",
            "back = axes",
            "unpack turns the axes the wrong way",
            "test_values.py::test_mask_of_another_layout[relu-permuted]",
        ),
    ],
    "_arguments.py": [
        Fault(
            "        fits = np.isfinite(value) == np.isfinite(given)\n",
            "        fits = True\n",
            "1e39 is an infinite weight in float32",
            "test_users.py::test_weights_that_are_refused",
        ),
        Fault(
            "and not _is(value, (bool, np.generic))",
            "and not _is(value, bool)",
            "a weight of NumPy's float64 passes for a number of Python's",
            "test_users.py::test_weights_that_are_refused",
        ),
        Fault(
            "if not places.flags.writeable:",
            "if False:",
            "read-only memory is written",
            "test_arguments.py::test_out",
            "crashes",
        ),
        Fault(
            "        if not math.isfinite(value):",
            "        if math.isnan(value):",
            "a slope that float32 has not is taken for an infinity",
            "test_arguments.py::test_slopes_that_float32_has_not",
        ),
        Fault(
            "ctypes.c_float(_odd(nearest, value)).value",
            "ctypes.c_float(nearest).value",
            "a slope is rounded twice",
            "test_arguments.py::test_a_slope_is_rounded_once",
        ),
        Fault(
            "return [x if x is None else engine.hold(x) for x in arrays]",
            "return arrays",
            "what is used is not what was checked",
            "test_arguments.py::test_an_argument_changes_after_the_checks",
            "crashes",
        ),
        Fault(
            "if given.size != x.shape[position]:",
            "if given.size > x.shape[position]:",
            "a weight may have too few elements",
            "test_arguments.py::test_weights_of_the_wrong_shape",
        ),
        Fault(
            "not -x.ndim <= position < x.ndim and",
            "not -x.ndim <= position <= x.ndim and",
            "an axis may lie beyond the last",
            "test_arguments.py::test_axes",
        ),
        Fault(
            "if not _is(value, (bool, np.bool_)):\n        msg",
            "if not _is(value, (bool, np.bool_, int)):\n        msg",
            "a flag may be a number",
            "test_arguments.py::test_flags",
        ),
        Fault(
            'x.astype(x.dtype.newbyteorder("="))',
            'x.view(x.dtype.newbyteorder("="))',
            "swapped bytes are read as they lie",
            "test_values.py::test_forward_of_every_layout[numpy-relu-float32-swapped]",
        ),
        Fault(
            "np.shares_memory(_places(first), _places(second))",
            "first is second",
            "outputs that overlap are taken for two",
            "test_arguments.py::test_out_of_two",
        ),
        Fault(
            "size not in (1, length) for size",
            "size > length for size",
            "a weight need not fit an axis",
            "test_arguments.py::test_weights_of_the_wrong_shape",
        ),
        Fault(
            "return Mask(mask.bits, mask.shape, mask._axes, mask.predicate)",
            "return mask",
            "a mask is not looked at again",
            "test_arguments.py::test_mask_that_was_changed",
            "crashes",
        ),
        Fault(
            "    if mask.predicate != predicate:",
            "    if False:",
            "a mask of another predicate is taken the long way",
            "test_arguments.py::test_mask_of_another_function",
        ),
    ],
    "_dtypes.py": [
        Fault(
            "    bits -= np.abs(single) > np.abs(given)\n",
            "",
            "what a weight lost is put on the wrong side",
            "test_users.py::test_a_weight_is_rounded_to_bfloat16_once",
        ),
        Fault(
            "    bits |= single != given\n",
            "",
            "a weight is rounded to bfloat16 twice",
            "test_users.py::test_a_weight_is_rounded_to_bfloat16_once",
        ),
        Fault(
            "row is None and _is_bfloat16(dtype)",
            "row is None and dtype.itemsize == 2",
            "any other dtype of two bytes is taken for bfloat16",
            "test_dtypes.py",
        ),
        Fault(
            "row = _BY_NUMBER.get(dtype.num)",
            "row = _BY_NUMBER.get(np.dtype(dtype.char).num)",
            "a dtype is told by its letter",
            "test_dtypes.py",
        ),
    ],
    "_dispatch.py": [
        Fault(
            "kept = numbers if self.spec.numbers_decide else ()",
            "kept = numbers",
            "a slope must be finite in the dtype of what was saved",
            "test_users.py::test_a_slope_goes_with_the_gradient_and_not_with_what_was_saved",
        ),
        Fault(
            "number.of(saved) if decide else 0.0",
            "number.of(saved)",
            "a slope must be finite in the dtype of what was saved, the long way",
            "test_users.py::test_a_slope_goes_with_the_gradient_and_not_with_what_was_saved",
        ),
        Fault(
            "came[id(array)] = array, value",
            "came[id(array)] = None, value",
            "a result that has the id of an array that is gone passes for that",
            "test_users.py::TestTensors",
        ),
        Fault(
            "bound.kept_in(model) if draw else bound.of(model)",
            "bound.of(model)",
            "slopes are drawn that are infinite in a half float",
            "test_rrelu.py::test_bounds_must_fit_the_slopes_that_are_drawn",
        ),
        Fault(
            "            y = self._by_arrays(*given)",
            "            y = None",
            "tensors cost many times what arrays do",
            "test_users.py::TestTensors",
        ),
        Fault(
            "            cpu.written(given)",
            "            pass",
            "a backward pass uses what was overwritten",
            "test_users.py::TestTensors",
        ),
        Fault(
            "back(other, *operands[1:2])",
            "back(other, x)",
            "an array's gradient comes back as a tensor",
            "test_users.py::test_results_are_written_to_what_was_given",
        ),
        Fault(
            "slopes.astype(np.float64) if exact else slopes",
            "slopes",
            "sums of blocks are rounded before they are added up",
            "test_dask.py::test_half_floats_are_rounded_once_for_all_blocks",
        ),
        Fault(
            "active, kept = (_is_set, 0) if is_bool else (spec.active, len(spec.numbers_kept))",
            "active, kept = (_is_set, 0)",
            "of another dtype, all that is positive is active",
            "test_arguments.py::test_saved_of_another_type",
        ),
        Fault(
            '    return not _arguments.flag("inplace", inplace)',
            "    return True",
            "a number is overwritten in place",
            "test_users.py::test_one_number_for_all_gradients",
        ),
        Fault(
            "cpu.empty_like(model if model.dtype == spread.dtype else spread)",
            "cpu.empty_like(spread)",
            "one gradient for all loses the memory order",
            "test_users.py::test_one_number_for_all_gradients",
        ),
        Fault(
            "        return engine.as_came(y, *came)",
            "        return y",
            "a tensor comes back as an array",
            "test_users.py::test_arrays_of_other_libraries_come_back_as_theirs",
        ),
        Fault(
            '_arguments.distinct("out[0]", written, "out[1]", sums)',
            "pass",
            "both gradients are written to the same memory",
            "test_arguments.py::test_out_of_two",
        ),
        Fault(
            'checked = _arguments.like("x", saved, "grad_output", grad)',
            'checked = _arguments.accepted("x", saved)',
            "prelu_backward takes an x of another shape",
            "test_arguments.py::test_saved_of_another_shape",
            "crashes",
        ),
        Fault(
            "operands.append((BITS, (bits, mask.axes)))",
            "operands.append((BITS, (bits, None)))",
            "the order of a mask is forgotten the long way",
            "test_values.py::test_mask_of_another_layout[relu-fortran]",
        ),
    ],
    "_sums.py": [
        Fault(
            "return (a - (total - of_b)) + (b - of_b)",
            "return 0.0",
            "sums are not compensated",
            "test_prelu.py::test_half_products_are_not_rounded "
            "test_prelu.py::test_long_sums",
        ),
    ],
    "_layout.py": [
        Fault(
            "if abs(x.strides[axis]) < reach:",
            "if abs(x.strides[axis]) < x.itemsize:",
            "windows that overlap each other pass for an output",
            "test_arguments.py::test_out_with_elements_that_share_memory",
        ),
        Fault(
            "reach += abs(x.strides[axis]) * (x.shape[axis] - 1)",
            "reach = abs(x.strides[axis])",
            "an axis may step over less than the finer ones reach",
            "test_arguments.py::test_out_with_elements_that_share_memory",
        ),
        Fault(
            "and x.ctypes.data == y.ctypes.data",
            "and True",
            "arrays that overlap pass for the same",
            "test_arguments.py::test_overlap",
        ),
        Fault(
            "and (x.strides == y.strides or (",
            "and (True or (",
            "the same memory in another order passes for the same",
            "test_arguments.py::test_overlap",
        ),
        Fault(
            "return np.array(weight, row.product,",
            "return np.asarray(weight, row.product,",
            "a weight within the output is overwritten before it is read",
            "test_arguments.py::test_weight_within_the_output_of_an_input_that_is_copied "
            "test_arguments.py::test_weight_within_the_output",
        ),
        Fault(
            "if weight[axis] == 1 and shape[axis] > 1",
            "if False",
            "an axis between those of a weight is taken for one of them",
            "test_prelu.py::test_shapes",
        ),
    ],
    "nn.py": [
        Fault(
            "    if out is x or both:",
            "    if out is x:",
            "a layer writes over what its backward pass needs",
            "test_nn.py::test_wrong_arguments_are_named",
        ),
    ],
    "cpu/libraries.py": [
        Fault(
            "    if not types.isdisjoint(LISTS):",
            "    if False:",
            "gaps are dropped in silence in lists of lists",
            "test_users.py::test_nothing_in_a_list_is_dropped_in_silence",
        ),
        Fault(
            "    if remedy is not None:",
            "    if False:",
            "units and labels are dropped in silence",
            "test_users.py::test_nothing_is_dropped_in_silence",
        ),
        Fault(
            "    if all(map(is_number, given)):",
            "    if False:",
            "a number comes back as an array",
            "test_users.py::test_a_number_in_a_number_out",
        ),
        Fault(
            "return any(theirs) and type_.__module__",
            "return not type_.__module__",
            "plain subclasses are refused",
            "test_users.py::test_a_subclass_that_says_nothing_is_an_array",
        ),
    ],
    "cpu/calls.py": [
        Fault(
            "            _keep_layout(w, layout)",
            "            pass",
            "a loop goes by the shape of another array",
            "test_threads.py::test_shapes_that_others_change_meanwhile",
        ),
        Fault(
            "            reach = _reach(w, w[loops.Y_STRIDES], table[row + ITEM])\n        if",
            "        if",
            "a sum is written between the elements of the other result",
            "test_paths.py::test_other_gradients_are_left_to_python",
        ),
        Fault(
            "    incref(beside)  # which",
            "    # which",
            "bits go while the loop writes them, if somebody drops the mask",
            "test_threads.py::test_bits_that_are_dropped_while_they_are_used",
        ),
        Fault(
            "                kind, w[_BODY] = SOME_BITS, WITH_BITS\n",
            "                kind = SOME_BITS\n",
            "bits are taken by the loop for inputs",
            "test_interpreted.py::test_masks",
            "crashes",
        ),
        Fault(
            "BEYOND_SINGLE if table[row + SINGLE] != 0 else np.inf",
            "np.inf",
            "a slope that float32 has not is taken for an infinity by quick calls",
            "test_arguments.py::test_slopes_that_float32_has_not",
        ),
        Fault(
            "short = loops.SHORT if size >= many * channels * inner else loops.NARROW",
            "short = loops.SHORT",
            "a few short rows are taken as columns, which are as many sums",
            "test_paths.py::test_short_rows_are_columns_where_rows_cost_more",
        ),
        Fault(
            "_plan(table, row, y, result == 0, loops.MANY_SUMMED, w, strides)",
            "_plan(table, row, y, result == 0, loops.MANY, w, strides)",
            "the quick call sums in other groups than the long way",
            "test_paths.py::test_short_rows_are_columns_where_rows_cost_more",
        ),
        Fault(
            "if other != target and overlap(other, nbytes, target, nbytes):",
            "if False:",
            "an output may overlap its input",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "if not is_like(out, x) or not is_writeable(out):",
            "if not is_like(out, x):",
            "read-only memory is written",
            "test_arguments.py::test_out",
            "crashes",
        ),
        Fault(
            "return x if is_writeable(x) else -1",
            "return x",
            "read-only memory is written in place",
            "test_arguments.py::test_in_place_needs_a_writeable_array",
            "crashes",
        ),
        Fault(
            "if result == 0 and nbytes >= SMALLEST and not is_pool_ready(table):",
            "if False:",
            "a large result is asked of a pool that is not ready",
            "test_pool.py::test_a_loop_may_be_ready_before_the_pool",
        ),
        Fault(
            "    if in_place:\n        return IN",
            "    if in_place and moved < cache:\n        return IN",
            "in place, stores go past the cache",
            "test_paths.py::test_which_loop_runs",
        ),
        Fault(
            "if moved >= 2 * threads.SHARE and not threads.is_ready():",
            "if False:",
            "the team is not started",
            "test_interpreted.py::test_a_large_array_waits_for_the_team",
        ),
        Fault(
            "for k in range(0 if fresh else arrays):",
            "for k in range(0 if fresh else 1):",
            "what was saved is overwritten before it is read",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "        elif w[_NEW_BITS] < 0 and not in_order:",
            "        elif False:",
            "bits go with elements that lie in another order",
            "test_paths.py::test_other_arguments_are_left_to_python",
        ),
        Fault(
            "if size_of(value) != (size + 7) >> 3:",
            "if size_of(value) != size >> 3:",
            "a mask lacks the bits of the last elements",
            "test_interpreted.py::test_masks",
        ),
        Fault(
            "if dtype_of(value) != table[objects.BYTE] or ndim_of(value) != 1:",
            "if ndim_of(value) != 1:",
            "the bits may be of another dtype",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "if not _fits(table, row, weight) or place == NO_AXIS:",
            "if not _fits(table, row, weight):",
            "what is no axis passes for one",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "return dtype == table[row] or dtype == table[row + WEIGHT]",
            "return True",
            "a weight of another dtype is read as if it were x's",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "place += ndim if place < 0 else 0",
            "place += ndim - 1 if place < 0 else 0",
            "a negative axis is another",
            "test_prelu.py::test_the_axis_is_never_guessed",
        ),
        Fault(
            "inner = steps[along] // itemsize",
            "inner = 1",
            "a channel's elements are counted wrong",
            "test_prelu.py::test_the_axis_is_never_guessed",
        ),
        Fault(
            "        if overlap(low, reach, w[loops.BESIDE], length):",
            "        if False:",
            "a weight within the output is overwritten before it is read",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "if not is_plain(table, value) or not is_like(value, x):",
            "if not is_plain(table, value):",
            "x is read as if it were shaped as the gradient is",
            "test_interpreted.py::test_gradients_that_are_left_to_python",
        ),
        Fault(
            "        if overlap(target, reach, into, length):",
            "        if False:",
            "both gradients are written to the same memory",
            "test_interpreted.py::test_gradients_that_are_left_to_python",
        ),
        Fault(
            "            _round(table, row, memory, into, channels, wide != 0)\n",
            "            _round(table, row, memory, into, channels, False)\n",
            "a half weight's gradient is written as floats",
            "test_interpreted.py::test_weights_of_half_floats",
        ),
        Fault(
            "    _free(memory)\n    if wide != -1:\n",
            "    if wide != -1:\n",
            "the memory of sums is lost",
            "test_interpreted.py::test_quick_calls_of_gradients",
        ),
        Fault(
            "along = place if more == 1 else ndim - more + k",
            "along = place if more == 1 else k",
            "a weight's axes are x's first ones",
            "test_prelu.py::test_shapes",
        ),
        Fault(
            "if overlap(first, _reach(w, steps, itemsize), low, reach):",
            "if False:",
            "an output may overlap its input where neither lies flat",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "        if length > 1 and steps != words(other)[axis]:\n"
            "            return False\n",
            "",
            "the same memory in another order passes for the same",
            "test_arguments.py::test_overlap[relu-x-transposed-400]",
        ),
        Fault(
            "            decref(bits)\n            decref(y)\n            return _leave",
            "            decref(bits)\n            return _leave",
            "an output that is left to Python has one owner too many",
            "test_paths.py::test_the_quick_call_refers_to_what_it_returns",
        ),
        Fault(
            "        decref(y)\n        decref(dw)\n",
            "        pass\n",
            "outputs of gradients that are left have one owner too many",
            "test_paths.py::test_the_quick_call_of_gradients_refers_to_what_it_returns",
        ),
    ],
    "cpu/objects.py": [
        Fault(
            "return tuple_item(out, which) if tuple_size(out) == 2 else 0",
            "return tuple_item(out, which)",
            "of three outputs the third is forgotten",
            "test_interpreted.py::test_gradients_that_are_left_to_python",
        ),
        Fault(
            "            if axis < last:\n",
            "            if axis < -1:\n",
            "a mask of C order is taken for one of another order",
            "test_paths.py::test_other_arguments_are_left_to_python",
        ),
        Fault(
            "== table[ARRAY] and words(x)[FLAGS] & ALIGNED != 0",
            "== table[ARRAY]",
            "misaligned arrays are read as if they were not",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "if dtype_of(x) != dtype_of(y) or ndim_of(x) != ndim_of(y):",
            "if ndim_of(x) != ndim_of(y):",
            "the dtype of an output is not looked at",
            "test_interpreted.py::test_what_is_left_to_python",
            "crashes",
        ),
        Fault(
            "if dtype_of(x) != dtype_of(y) or ndim_of(x) != ndim_of(y):",
            "if dtype_of(x) != dtype_of(y):",
            "the dimensions of an output are not counted",
            "test_interpreted.py::test_what_is_left_to_python",
            "crashes",
        ),
        Fault(
            "        if shape[axis] != other[axis]:",
            "        if shape[axis] > other[axis]:",
            "an output may be smaller than its input",
            "test_interpreted.py::test_what_is_left_to_python",
            "crashes",
        ),
        Fault(
            "    if nbytes < SMALLEST:\n"
            "        return _call_empty_like(table[_EMPTY_LIKE], arguments)\n",
            "    if nbytes < 2 * SMALLEST:\n"
            "        return _call_empty_like(table[_EMPTY_LIKE], arguments)\n",
            "large results do not come from the pool",
            "test_paths.py::test_memory_is_recycled",
        ),
        Fault(
            "return answer if abs(answer) < bound else np.nan",
            "return answer if answer < bound else np.nan",
            "the slope may be -inf",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "        forget()\n        return otherwise\n",
            "        return otherwise\n",
            "an error is left behind where an axis is huge",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "    incref(result)\n    return result\n",
            "    return result\n",
            "results have one owner too few",
            "test_paths.py::test_the_quick_call_refers_to_what_it_returns",
            "crashes",
        ),
        Fault(
            "_BRIEF = 1 << 15",
            "_BRIEF = 1 << 60",
            "the interpreter's lock is held while a loop runs",
            "test_paths.py::test_other_threads_go_on",
        ),
        Fault(
            "    if certainty == 2 and _INEXACT < bound:",
            "    if False:",
            "an integer is taken that a float64 may have rounded",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "for code in _CODES), int\n",
            "for code in _CODES), int, bool\n",
            "True passes for a number",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "type_of, first, floats, stop = dtype_of(value), _SCALARS, _FLOAT_CODES, LENGTH",
            "return 1",
            "an array without dimensions is a number whatever its dtype",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "        forget()\n        return np.nan\n",
            "        return np.nan\n",
            "an error is left behind where a number is huge",
            "test_paths.py::test_other_arguments_are_left_to_python",
        ),
        Fault(
            "    set_item(pair, 0, first)\n    set_item(pair, 1, second)\n",
            "        pass\n",
            "other threads find a pair of nothing",
            "test_prelu.py::test_other_threads_find_no_pair_that_is_not_whole",
            "crashes",
        ),
        Fault(
            "if words(mask)[MASK_PREDICATE] != predicate:",
            "if False:",
            "a mask of another predicate is taken",
            "test_arguments.py::test_mask_of_another_function",
        ),
        Fault(
            "    if not _is_tuple_of(table, axes, order.ctypes.data, ndim_of(x)):",
            "    if False:",
            "a mask of another order is taken",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "return words(mask)[MASK_BITS] if axes == table[NONE] else 0",
            "return words(mask)[MASK_BITS]",
            "a mask of another order is taken for one of C order",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "    if not _is_tuple_of(table, shape, words(x)[SHAPE], ndim_of(x)):",
            "    if False:",
            "a mask of another shape is taken",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "    if value == 0 or words(value)[TYPE] != table[TUPLE] or",
            "    if words(value)[TYPE] != table[TUPLE] or",
            "a shape that was deleted is read",
            "test_paths.py::test_other_arguments_are_left_to_python",
            "crashes",
        ),
        Fault(
            "    if words(value)[TYPE] != table[INT]:\n        return otherwise\n",
            "",
            "True passes for an axis, and for a length",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "while place > 0 and _step(x, order[place - 1]) < step:",
            "while place > 0 and _step(x, order[place - 1]) > step:",
            "a mask says the wrong order of its bits",
            "test_interpreted.py::test_quick_calls",
        ),
        Fault(
            "    incref(predicate)\n",
            "",
            "a predicate has one owner too few for each mask",
            "test_paths.py::test_the_quick_call_refers_to_what_it_returns",
            "crashes",
        ),
        Fault(
            "        decref(shape)\n",
            "",
            "a tuple stays where there is no memory for a mask",
            "test_interpreted.py::test_no_memory_for_a_mask",
        ),
        Fault(
            "        decref(bits)\n",
            "",
            "bits stay where there is no memory for a mask",
            "test_interpreted.py::test_no_memory_for_a_mask",
        ),
    ],
    "cpu/walk.py": [
        Fault(
            "together = together and axes[last * FIELDS + k] == reach",
            "together = together or axes[last * FIELDS + k] == reach",
            "axes are merged that do not lie behind one another",
            "test_values.py::test_forward_of_every_layout[numpy-relu-float32-step]",
            "crashes",
        ),
        Fault(
            "places[k] -= counts[axis] * axes[axis * FIELDS + k]",
            "pass",
            "an axis that is done does not go back to its start",
            "test_values.py::test_forward_of_every_layout[numpy-relu-float32-step]",
            "crashes",
        ),
        Fault(
            "    most = LINE\n    if axes",
            "    most = length\n    if axes",
            "a line is longer than its place on the stack",
            "test_values.py::test_large[relu-float32-step]",
            "crashes",
        ),
        Fault(
            "column, at = start % length, start",
            "column, at = 0, start",
            "each part begins with the start of a line",
            "test_values.py::test_large[relu-float32-step]",
        ),
        Fault(
            "source = places[_BESIDE] + column * step",
            "source = places[_BESIDE]",
            "every piece of a line has the first one's weights",
            "test_prelu.py::test_half_weights_have_the_same_bits_in_any_layout",
        ),
        Fault(
            "        if axes[STRIDE + k] != itemsize:",
            "        if _magnitude(axes[STRIDE + k]) != itemsize:",
            "a reversed array passes for a flat one",
            "test_values.py::test_forward_of_every_layout[numpy-relu-float32-negative]",
            "crashes",
        ),
        Fault(
            "        if stride < reach:",
            "        if stride < itemsize:",
            "windows that overlap each other pass for an output",
            "test_interpreted.py::test_what_is_left_to_python",
        ),
        Fault(
            "few = smaller(length - column, count - done)",
            "few = smaller(length, count - done)",
            "elements behind the end of an axis are taken for those of a line",
            "test_paths.py::test_gradients_of_other_layouts_are_not_copied",
            "crashes",
        ),
        Fault(
            "line[BESIDE] = w[BESIDE] + at // 8",
            "line[BESIDE] = w[BESIDE] + start // 8",
            "all lines of a part have the bits of its first",
            "test_paths.py::test_masks_of_other_layouts_are_not_copied",
        ),
        Fault(
            "            ordered = 0\n",
            "            pass\n",
            "bits in the order of one array are taken for those of another",
            "test_paths.py::test_other_arguments_are_left_to_python",
        ),
        Fault(
            "if step != channels * w[WEIGHT_SIZE]:",
            "if step < 0:",
            "weights in another order than the axes are taken for a view",
            "test_paths.py::test_other_gradients_are_left_to_python",
        ),
    ],
    "cpu/fast.py": [
        Fault(
            "        one = np.zeros(1, y.dtype)",
            "        one = np.zeros(0, y.dtype)",
            "an output is written to before its loop is there",
            "test_arguments.py::test_no_output_is_touched_before_its_loop_is_compiled",
        ),
        Fault(
            "    y = out if _is_written_to(out, [grad, x]) else empty_like(out)\n    arrays",
            "    y = out\n    arrays",
            "a gradient is written over what is still to be read",
            "test_arguments.py::test_overlap",
        ),
        Fault(
            "own = np.array(bits) if np.may_share_memory(bits, out) else bits",
            "own = bits",
            "a mask within the output is overwritten before it is read",
            "test_arguments.py::test_bits_within_the_output",
        ),
        Fault(
            "    if not np.may_share_memory(y, out):\n        np.copyto(out, y)\n",
            "",
            "an output that is not aligned is not written",
            "test_values.py::test_out[relu-float32-misaligned]",
        ),
        Fault(
            "    if y is not out:\n        np.copyto(out, y)\n",
            "",
            "beside a mask, a strided output is not written",
            "test_values.py::test_mask_of_another_layout[relu-step]",
        ),
        Fault(
            "    return all(lies_on(x, out) or not np.may_share_memory(x, out) for x in inputs)",
            "    return True",
            "a loop writes to what it has yet to read",
            "test_arguments.py::test_overlap[relu-x-ahead-400]",
        ),
        Fault(
            'others += [np.array(weight, order="C"),',
            "others += [np.ascontiguousarray(weight),",
            "a weight within the output stays there",
            "test_arguments.py::test_weight_within_the_output",
        ),
    ],
    "cpu/blocks.py": [
        Fault(
            "block = (start + _PAGE - 1) & -_PAGE",
            "block = start",
            "blocks do not start with a page",
            "test_interpreted.py::test_the_pool[malloc]",
            "crashes",
        ),
        Fault(
            "        words[IDLE] -= size\n        chain = block\n",
            "        chain = block\n",
            "blocks in use are counted as idle",
            "test_interpreted.py::test_the_pool",
            "crashes",
        ),
        Fault(
            "    words[USED] -= size\n",
            "",
            "what came back is counted as in use",
            "test_interpreted.py::test_the_pool",
        ),
        Fault(
            "if size <= lends < least:",
            "if lends < least:",
            "a block is lent that is too small",
            "test_interpreted.py::test_the_pool",
            "crashes",
        ),
        Fault(
            "best, least = number, lends\n",
            "return number\n",
            "the newest block that is large enough is lent, not the smallest",
            "test_interpreted.py::test_the_pool",
        ),
        Fault(
            "- size > size >> 3\n",
            "- size > size >> 2\n",
            "a quarter may be wasted",
            "test_pool.py::test_the_smallest_block_that_fits",
        ),
        Fault(
            "        block = _take_out(pool, number, number + 1)\n    elif",
            "        block = words[_entry(number) + _BLOCK]\n    elif",
            "a block is handed out again while it is in use",
            "test_interpreted.py::test_the_pool",
            "crashes",
        ),
        Fault(
            "    words[IDLE] -= size + _PAGE\n",
            "    words[IDLE] -= size\n",
            "a block that was cut is still counted as whole",
            "test_interpreted.py::test_the_pool[mmap]",
        ),
        Fault(
            "= block + size + _PAGE, rest\n",
            "= block + size, rest\n",
            "what is cut overlaps the rest",
            "test_interpreted.py::test_the_pool[mmap]",
            "crashes",
        ),
        Fault(
            "    if number < 0 and cuts:\n",
            "    if False:\n",
            "blocks that adjoin are not joined",
            "test_pool.py::test_a_block_is_cut_and_joined_again",
        ),
        Fault(
            "words[IDLE] > room and words[MAP] != 0",
            "words[IDLE] > room",
            "malloc's blocks are cut",
            "test_interpreted.py::test_the_pool[malloc]",
        ),
        Fault(
            "words[IDLE] > room and words[MAP] != 0",
            "words[MAP] != 0",
            "blocks are cut where there is room for fresh ones",
            "test_pool.py::test_the_smallest_block_that_fits",
        ),
        Fault(
            "    return smaller(words[LIMIT], peak - used)\n",
            "    return words[LIMIT]\n",
            "more is held than was ever in use at once",
            "test_pool.py::test_batches_of_varying_size",
        ),
        Fault(
            "    return smaller(words[LIMIT], peak - used)\n",
            "    return peak - used\n",
            "what is kept idle knows no limit",
            "test_paths.py::test_idle_memory_is_bounded",
        ),
        Fault(
            "or words[COUNT] - number > MOST:",
            "or False:",
            "the list outgrows its memory",
            "test_interpreted.py::test_a_list_that_is_full",
        ),
        Fault(
            "if block == 0 and free_idle(pool, 0):",
            "if block == 0:",
            "idle blocks stay where there is no memory",
            "test_interpreted.py::test_the_pool",
        ),
        Fault(
            "    if malloced or not enter(pool):\n",
            "    if malloced:\n",
            "the list is changed while somebody else has it",
            "test_pool.py::test_a_fork_behind_pythons_back",
        ),
        Fault(
            "        _words(block)[NEXT] = 0\n        _hand_back",
            "        _hand_back",
            "blocks that were handed back before are so again",
            "test_interpreted.py::test_a_list_that_somebody_has",
            "crashes",
        ),
        Fault(
            "_room(pool, words[USED]) if _keeps(pool, ANSWER) else 0",
            "_room(pool, words[USED])",
            "what was idle stays when a limit comes",
            "test_pool.py::test_a_limit_that_comes_later",
        ),
        Fault(
            "            if words[answer] != words[NO_LIMIT]:",
            "            if False:",
            "memory is kept where it is limited",
            "test_pool.py::test_a_program_that_runs_with_numpy",
        ),
        Fault(
            "    return words[BELL] != 0",
            "    return True",
            "memory is kept that nobody gives back",
            "test_pool.py::test_without_a_janitor_nothing_is_kept",
        ),
        Fault(
            "words[MAP] == 0 or words[LIMIT] < size or not _keeps(pool, ANSWER):",
            "words[MAP] == 0:",
            "every result has page faults where nothing is kept",
            "test_pool.py::test_where_nothing_is_kept_malloc_does_what_it_can",
        ),
        Fault(
            "malloced = words[MAP] != 0 and _words(block)[START] != 0",
            "malloced = False",
            "what malloc gave is listed among what is mapped",
            "test_interpreted.py::test_what_is_not_kept_is_mallocs",
        ),
        Fault(
            "    _words(block + size + _PAGE)[START] = 0\n",
            "",
            "the rest of a block that was cut is taken for malloc's",
            "test_interpreted.py::test_the_pool[mmap]",
            "crashes",
        ),
        Fault(
            "for what in (words[SPACE], words[DATA]):",
            "for what in (words[SPACE], words[SPACE]):",
            "limited data is not noticed",
            "test_pool.py::test_a_program_that_runs_with_numpy",
        ),
        Fault(
            "not keeps or words[",
            "words[",
            "idle memory stays when a limit comes",
            "test_pool.py::test_a_limit_that_comes_later",
        ),
        Fault(
            "    if rings:\n        _wake(words[BELL])\n",
            "",
            "the janitor sleeps on",
            "test_pool.py::test_idle_memory_goes_after_a_while",
        ),
        Fault(
            "words[ASLEEP] = 0 if idle else 1\n",
            "words[ASLEEP] = 0\n",
            "nobody rings for the janitor",
            "test_pool.py::test_idle_memory_goes_after_a_while",
        ),
        Fault(
            "    if not idle:\n        _sleep(words[BELL], -1, 0)\n",
            "",
            "the janitor wakes for nothing",
            "test_pool.py::test_idle_memory_goes_after_a_while",
        ),
        Fault(
            "words[PERIODS] - _AGE\n",
            "words[PERIODS] - 1000 * _AGE\n",
            "idle memory is kept for ever",
            "test_pool.py::test_idle_memory_goes_after_a_while",
        ),
        Fault(
            "        words[EARLIER], words[PEAK] = words[PEAK], words[USED]\n",
            "        pass\n",
            "a peak is remembered for ever",
            "test_pool.py::test_a_peak_is_forgotten",
        ),
        Fault(
            "    while _offer(pool):\n        pass\n",
            "",
            "the system cannot take what is idle",
            "test_pool.py::test_the_system_may_take_what_is_idle",
        ),
        Fault(
            "words[entry + _BLOCK] + _PAGE  # the first",
            "words[entry + _BLOCK]  # the first",
            "a block's head is offered too",
            "test_interpreted.py::test_the_janitor",
        ),
        Fault(
            "elif size >= _HUGE and words[HUGE_PAGES] != 0:",
            "elif words[HUGE_PAGES] == 1:",
            "no huge pages are asked for",
            "test_interpreted.py::test_huge_pages_are_asked_for",
        ),
    ],
    "cpu/handler.py": [
        Fault(
            "        _call_take_back(_words(pool)[TAKER], (pool, address, 0))\n",
            "",
            "a block that was too small is lost",
            "test_interpreted.py::test_the_pool",
        ),
        Fault(
            "            _bytes(address)[i] = 0\n",
            "            _bytes(address)[i] = 1\n",
            "zeros are not zeros",
            "test_interpreted.py::test_the_pool",
        ),
        Fault(
            "    elif result != 0:\n        _let_go(result)\n        result = 0\n",
            "",
            "a result is returned beside an error",
            "test_interpreted.py::test_a_call_from_the_pool",
        ),
        Fault(
            "    own = _set_handler(_words(pool)[SET_HANDLER], (before,))\n",
            "    own = _words(pool)[HANDLER]\n",
            "NumPy takes all its memory from the pool",
            "test_pool.py::test_numpy_has_its_own_memory_again",
            "crashes",
        ),
    ],
    "cpu/pool.py": [
        Fault(
            "return self._borrow(np.empty_like, x, None, order, False)",
            "return self._borrow(np.empty_like, x, None, 'C', False)",
            "large results lose the memory order",
            "test_paths.py::test_other_layouts_of_dense_arrays_are_not_copied",
        ),
        Fault(
            "    if number < 0:\n        msg",
            "    if False:\n        msg",
            "the limit may be negative",
            "test_pool.py::test_a_limit_is_not_negative",
            "crashes",
        ),
        Fault(
            "    return min(number, sys.maxsize)\n",
            "    return number\n",
            "a large limit does not fit its word",
            "test_pool.py::test_a_limit_may_be_any_number",
        ),
        Fault(
            "default=_MOST_IDLE) // 4, _MOST_IDLE)",
            "default=_MOST_IDLE) // 4, 1 << 60)",
            "a quarter of a large machine's memory is kept idle",
            "test_pool.py::test_how_much_is_kept",
        ),
        Fault(
            "        pool._words[[blocks.HANDLER, blocks.BELL, blocks.ASLEEP]] = 0\n",
            "        pool._words[[blocks.HANDLER, blocks.ASLEEP]] = 0\n",
            "a child keeps what its parent's janitor would give back",
            "test_pool.py::test_a_child_keeps_nothing_of_its_parents",
        ),
        Fault(
            "    for pool in _held:\n        pool._shrink(0)\n",
            "",
            "a child copies its parent's idle pages",
            "test_pool.py::test_a_child_keeps_nothing_of_its_parents",
        ),
        Fault(
            "        before=_before_fork,\n"
            "        after_in_parent=_after_fork,\n"
            "        after_in_child=_after_fork_in_child,\n",
            "        before=lambda: None,\n"
            "        after_in_parent=lambda: None,\n"
            "        after_in_child=lambda: None,\n",
            "a child waits for a janitor that it does not have",
            "test_pool.py::test_a_child_keeps_nothing_of_its_parents",
        ),
        Fault(
            "with signals_elsewhere(), sufficient_stack(_STACK):",
            "with sufficient_stack(_STACK):",
            "the janitor takes signals",
            "test_pool.py::test_a_janitor_leaves_signals_to_its_host",
        ),
        Fault(
            "with signals_elsewhere(), sufficient_stack(_STACK):",
            "with signals_elsewhere():",
            "the janitor has as small a stack as the process's own threads",
            "test_pool.py::test_a_janitor_has_a_sufficient_stack",
        ),
    ],
    "cpu/halves.py": [
        Fault(
            "nearest = np.float32(value)\n    bits",
            "nearest = np.float32(value)\n    return nearest\n    bits",
            "a sum is rounded twice",
            "test_prelu.py::test_a_sum_is_rounded_once",
        ),
        Fault(
            "half = np.uint32(0x7FFF) + (",
            "half = np.uint32(0x8000) + (",
            "bfloat16 ties are not rounded to even",
            "test_values.py::test_every_half_float[bfloat16-3.3]",
        ),
        Fault(
            "bits | np.uint32(0x400000) if np.isnan(value) else np.uint32(bits + half)",
            "np.uint32(bits + half)",
            "a NaN becomes another number in bfloat16",
            "test_prelu.py::test_a_weight_may_be_any_nan",
        ),
        Fault(
            "magnitude >= np.uint32(0x47800000)",
            "magnitude >= np.uint32(0x48000000)",
            "70000 is no infinity in float16, without the processor's instructions",
            "test_interpreted.py::test_numbers_beyond_half_floats",
        ),
        Fault(
            "+ np.uint32(0xFFF) + odd",
            "+ np.uint32(0x1000)",
            "float16 ties are not rounded to even, without those instructions",
            "test_interpreted.py::test_every_way_to_round_to_half",
        ),
    ],
    "cpu/vector.py": [
        Fault(
            "builder.store(args[2], builder.gep(target, [args[1]]), align=1)",
            "builder.store(args[2], target, align=1)",
            "all words of a mask are written to one place",
            "test_values.py::test_large_with_a_mask[relu-float32]",
        ),
        Fault(
            "builder.store(spread, builder.gep(target, [loop.index]), align=1)",
            "builder.store(spread, target, align=1)",
            "all words of a mask are unpacked to one place",
            "test_values.py::test_large_with_a_mask[relu-float32]",
        ),
    ],
    "cpu/loops.py": [
        Fault(
            "    for i in range(lead + whole * STRIP, y.size):\n",
            "    for i in range(lead + whole * STRIP, y.size - 1):\n",
            "past the cache, the last element is not written",
            "test_interpreted.py::test_forward_and_backward",
        ),
        Fault(
            "(lead + whole * np.uintp(STRIP), size)):",
            "(size, size)):",
            "in place, the last elements are not written",
            "test_interpreted.py::test_forward_and_backward",
        ),
        Fault(
            "((np.uintp(0), lead), ",
            "((lead, lead), ",
            "in place, what lies before the first line is not written",
            "test_interpreted.py::test_parts",
        ),
        Fault(
            "        write_strip(y, first, buffer)\n    for i in",
            "        write_strip(y, first - lead, buffer)\n    for i in",
            "past the cache, words are written where no line starts",
            "test_interpreted.py::test_forward_and_backward",
            "crashes",
        ),
        Fault(
            "    bits = piece(b, start // 8, b.size)\n",
            "    bits = b\n",
            "every thread writes the first bits",
            "test_interpreted.py::test_parts",
        ),
        Fault(
            "        carry |= bit(a, s, i) << np.uint64(i)\n"
            "        y[i] = element(a, b, s, i)\n",
            "        y[i] = element(a, b, s, i)\n"
            "        carry |= bit(a, s, i) << np.uint64(i)\n",
            "in place, the first bits are those of the results",
            "test_interpreted.py::test_masks",
        ),
        Fault(
            "        flags |= bit(a, s, i) << np.uint64(i - first)\n"
            "        y[i] = element(a, b, s, i)\n",
            "        y[i] = element(a, b, s, i)\n"
            "        flags |= bit(a, s, i) << np.uint64(i - first)\n",
            "in place, the last bits are those of the results",
            "test_interpreted.py::test_masks",
        ),
        Fault(
            "        for j in range(np.uintp(STRIP)):\n"
            "            ones[j] = bit(a, s, first + j)\n"
            "        for j in range(np.uintp(STRIP)):\n"
            "            buffer[j] = element(a, b, s, first + j)\n",
            "        for j in range(np.uintp(STRIP)):\n"
            "            buffer[j] = element(a, b, s, first + j)\n"
            "        write_strip(y, first, buffer)\n"
            "        for j in range(np.uintp(STRIP)):\n"
            "            ones[j] = bit(a, s, first + j)\n",
            "in place, the bits are those of the results",
            "test_interpreted.py::test_masks",
        ),
        Fault(
            "carry = flags >> rest if lead > 0 else np.uint64(0)",
            "carry = np.uint64(0)",
            "bits that cross a word are lost",
            "test_interpreted.py::test_masks",
        ),
        Fault(
            "if place < 8 else flags >> rest",
            "if place < 9 else flags >> rest",
            "bits that cross the last word are lost",
            "test_interpreted.py::test_masks",
        ),
        Fault(
            "(bits[i // 8] >> np.uint8(i % 8)) & np.uint8(1)",
            "(bits[i // 8] >> np.uint8(7 - i % 8)) & np.uint8(1)",
            "the last bits are read from the other end",
            "test_interpreted.py::test_masks",
        ),
        Fault(
            "whole = smaller(-(-(stop - base) // STRIP), (y.size - base) // STRIP)",
            "whole = -(-(stop - base) // STRIP)",
            "bits are read past the last",
            "test_memory_bounds.py::test_beside_guarded_pages",
        ),
        Fault(
            "passes = piece(flags, done - base, flags.size)",
            "passes = flags",
            "flags go with other elements than their own",
            "test_interpreted.py::test_parts",
        ),
        Fault(
            "row = (start + first) // inner",
            "row = first // inner",
            "every thread begins with the first weight, and comes back to it",
            "test_interpreted.py::test_parts",
            "hangs",
        ),
        Fault(
            "row = -(start % length)",
            "row = 0",
            "every thread begins with the first column",
            "test_interpreted.py::test_parts",
        ),
        Fault(
            "fit = piece(weights, first - base, last - base)",
            "fit = weights",
            "a part that begins within a row is out of step with its weights",
            "test_interpreted.py::test_parts",
        ),
        Fault(
            "            row += length\n",
            "            pass\n",
            "a part begins before itself",
            "test_interpreted.py::test_parts",
        ),
        Fault(
            "if length > WIDE and inner > 1:",
            "if False:",
            "long rows of narrow ones are laid out beyond their place on the stack",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "repeat(piece(b, left // inner, b.size), inner, weights)",
            "repeat(b, inner, weights)",
            "each piece of a long row gets the first one's weights",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "weight = w[row % w.size]\n        for column",
            "weight = w[row // (wide.size // inner // w.size)]\n        for column",
            "narrow rows get each other's weights",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "length = (smaller(WIDE, y.size // 8) // width or 1) * width",
            "length = (y.size // width or 1) * width",
            "short rows are repeated beyond their place on the stack",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "    return (s[0],)\n",
            "    return (s[-1],)\n",
            "a mask is told another number than its threshold",
            "test_interpreted.py::test_masks",
        ),
    ],
    "cpu/sums.py": [
        Fault(
            "column = start - row - left",
            "column = start - row",
            "columns far to the right add to the sums of others",
            "test_prelu.py",
            "crashes",
        ),
        Fault(
            "            _scatter(axes, y, start, count, results)\n        _fold",
            "        _fold",
            "rows of elements that lie apart are not written",
            "test_paths.py::test_gradients_of_other_layouts_are_not_copied",
        ),
        Fault(
            "        _keep(few, totals, lost)\n    finished()",
            "    finished()",
            "the last rows add nothing to the sums",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "    if value > 0:  # Python",
            "    if value >= 0:  # Python",
            "units at 0 add nothing to the weight's gradient",
            "test_prelu.py::test_special_sums_stay_in_their_channel",
        ),
        Fault(
            "        product = 0.0\n    return product\n",
            "        product *= 0.0\n    return product\n",
            "an active unit's infinite gradient makes the sum NaN",
            "test_prelu.py::test_special_sums_stay_in_their_channel",
        ),
        Fault(
            "copies = 2 if columns == width else 1",
            "copies = 1",
            "a word that ends in the next row has no weights there",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "few[i] += few[columns + i]",
            "few[i] += 0.0",
            "what the last word of a row has of the next one is forgotten",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "                if done % FEW_ROWS == 0:\n",
            "                if (done + (column > columns)) % FEW_ROWS == 0:\n",
            "where a row's last word ends decides which rows are summed together",
            "test_prelu.py::test_gradients_have_the_same_bits_wherever_they_start",
        ),
        Fault(
            "channel = cell // segments % channels",
            "channel = cell % channels",
            "parts of long rows are added to other channels",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "return begin, smaller(begin + SEGMENT, (row + 1) * inner)",
            "return begin, (row + 1) * inner",
            "parts of long rows overlap",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "half = LANES // 2",
            "half = LANES // 4",
            "half of the sums are forgotten",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "cells = -(-size // (rows * width)) * width",
            "cells = (size // (rows * width) or 1) * width",
            "rows that do not fill a block are left out",
            "test_interpreted.py::test_channels",
        ),
        Fault(
            "    return total + error if np.isfinite(total) else total\n",
            "    return total + error\n",
            "an infinite sum is NaN",
            "test_prelu.py::test_special_sums_stay_in_their_channel",
        ),
    ],
    "cpu/abi.py": [
        Fault(
            "    if HEAD != 16 or not _has_gil():",
            "    if HEAD != 16:",
            "fast loops run where threads run Python at once",
            "test_abi.py::test_what_does_not_hold_is_said",
        ),
        Fault(
            "        if word(value, TYPE) != id(type(value)):",
            "        if False:",
            "types are looked for where they are not",
            "test_abi.py::test_what_does_not_hold_is_said",
        ),
        Fault(
            "        if word(a, place) != value:",
            "        if False:",
            "an array's words are taken for others",
            "test_abi.py::test_what_does_not_hold_is_said",
            "crashes",
        ),
        Fault(
            "    if version >> 24 != ABI_VERSION:",
            "    if False:",
            "functions are called of a table that is another one",
            "test_abi.py::test_functions_that_do_something_else",
        ),
    ],
    "cpu/portable.py": [
        Fault(
            "            if not done[i]:",
            "            if False:",
            "what fell to threads in another mode is not done",
            "test_portable.py::test_parts_of_threads_in_another_mode_are_done_by_the_caller",
        ),
        Fault(
            "        if mode(probe) == ours:\n            body(a, b, y",
            "        if True:\n            body(a, b, y",
            "threads compute in a mode of their own",
            "test_portable.py::test_parts_of_threads_in_another_mode_are_done_by_the_caller",
        ),
        Fault(
            'layer in ("omp", "tbb") and not _forked and',
            'layer in ("omp", "tbb") and',
            "a child goes parallel, and GNU OpenMP ends it",
            "test_portable.py::test_a_child_does_not_use_threads_that_it_has_not",
        ),
        Fault(
            "    name = digest(function, kinds, parallel)\n",
            '    name = "one"\n',
            "Numba keeps two loops under one name",
            "test_portable.py::test_loops_of_two_dtypes_are_kept_apart",
        ),
    ],
    "cpu/__init__.py": [
        Fault(
            "            total = rounded(total, out_weight.dtype)",
            "            pass",
            "a sum is rounded to bfloat16 twice",
            "test_prelu.py::test_a_sum_is_rounded_once_the_long_way",
        ),
        Fault(
            "    if upper - lower > float(np.finfo(dtype).max):\n",
            "    if False:\n",
            "bounds that are far apart give infinite slopes",
            "test_rrelu.py::test_bounds_whose_difference_is_no_number",
        ),
        Fault(
            "        except abi.Unproven as error:\n"
            "            give_up(error)\n"
            "            return function(*arguments, **options)\n",
            "        except abi.Unproven as error:\n"
            "            give_up(error)\n"
            "            raise\n",
            "a Numba that has changed is an error of ours",
            "test_abi.py::test_a_misaligned_array_where_numba_has_changed",
        ),
        Fault(
            "        if y is not out:\n            np.copyto(out, y)\n",
            "",
            "a strided output is not written",
            "test_values.py::test_out[prelu-float32-step]",
        ),
        Fault(
            "        out_weight[...] = 0\n",
            "        pass\n",
            "the weight's gradient of no elements is left as it was",
            "test_prelu.py::test_shapes",
        ),
        Fault(
            "axes = sorted(range(x.ndim), key=order.__getitem__)",
            "axes = order",
            "the weight's gradient has its axes in the order of memory",
            "test_prelu.py::test_layouts",
        ),
    ],
    "cpu/host.py": [
        Fault(
            "(group, *group.parents)",
            "(group,)",
            "what bounds the groups outside is not known",
            "test_pool.py::test_how_much_is_kept",
        ),
        Fault(
            'elif kind in kinds.split(","):',
            "elif kind == kinds:",
            "memory's group is not found beside another kind",
            "test_pool.py::test_how_much_is_kept",
        ),
        Fault(
            "most = min(most, math.ceil(share))",
            "most = min(most, int(share))",
            "half a processor is none",
            "test_host.py::test_how_many_processors_are_left",
        ),
        Fault(
            "if share > 0:",
            "if True:",
            "-1 is a limit",
            "test_host.py::test_how_many_processors_are_left",
        ),
    ],
    "cpu/openmp.py": [
        Fault(
            "- was > half",
            "- was >= 0",
            "whoever is there passes for awake",
            "test_openmp.py::test_a_process_without_products",
        ),
        Fault(
            "return 0  # it has ended",
            "pass",
            "a thread that has ended passes for another",
            "test_openmp.py::test_who_is_counted",
        ),
        Fault(
            "    with no_fork:\n",
            "    if True:\n",
            "a child that was forked while threads of PyTorch's end hangs",
            "test_openmp.py::test_a_child_that_is_forked_while_threads_end",
        ),
    ],
    "cpu/threads.py": [
        Fault(
            "return team[k + 1] > now",
            "return True",
            "who was awake for a moment passes for awake",
            "test_team_model.py::test_who_is_awake",
        ),
        Fault(
            "if now < 0 or now == before:",
            "if now < 0:",
            "who sleeps is asked twice",
            "test_team_model.py::test_who_is_awake",
        ),
        Fault(
            "if _own_number() != team[_OWNER]:",
            "if False:",
            "each thread takes another's for its own",
            "test_team_model.py::test_for_whom_they_are_awake "
            "test_openmp.py::test_each_thread_has_others_of_its_own",
        ),
        Fault(
            "openmp.dismiss(pause)",
            "pass",
            "a thread without products is given threads of OpenMP's, which slows down all",
            "test_openmp.py::test_a_thread_without_products_is_given_no_threads",
        ),
        Fault(
            "if sure >= 0 and sure % _AGAIN != 0:",
            "if sure >= 0:",
            "once all came, clocks are never read again",
            "test_team_model.py::test_after_loops_that_went_well_they_are_looked_at_now_and_"
            "then",
        ),
        Fault(
            "looks = team[_LOOKS] // _GRACE",
            "looks = 0",
            "on many processors somebody always is late",
            "test_team_model.py::test_whether_somebody_was_late",
        ),
        Fault(
            "_learn(team, _load(team, _JOINED) < team[_THEIRS])",
            "_learn(team, False)",
            "nobody learns that somebody came late",
            "test_team_model.py::test_whether_somebody_was_late",
        ),
        Fault(
            "team[_WELL], team[_DOUBT] = 0, _DOUBTFUL",
            "team[_WELL] = 0",
            "who came late passes for awake although others have its processor",
            "test_team_model.py::test_after_a_loop_that_somebody_came_late_to",
        ),
        Fault(
            "if team[_WELL] >= _PAID:",
            "if False:",
            "one delay in hours counts as much as one in milliseconds",
            "test_team_model.py::test_loops_that_somebody_came_late_to_while_no_clock_was_"
            "read",
        ),
        Fault(
            "        if team[_OTHERS] >= _FORGOTTEN:\n",
            "        if False:\n",
            "the first to have threads is the only one for ever",
            "test_openmp.py::test_a_thread_that_is_not_the_main_one",
        ),
        Fault(
            "        if after != mode:  # it is theirs again\n",
            "        if False:\n",
            "PyTorch's threads keep the mode of a loop",
            "test_team_model.py::test_all_of_pytorchs_threads_have_a_part "
            "test_openmp.py::test_whoever_takes_a_piece_has_the_mode_of_whoever_brought_"
            "the_loop",
        ),
        Fault(
            "_memory[:], _was_forked = 0, True",
            "_memory[:] = 0",
            "a child calls on threads that it has not",
            "test_openmp.py::test_a_child_leaves_them_alone",
        ),
        Fault(
            "if _add(team, _PENDING, -1) == 1 and",
            "if _add(team, _PENDING, -1) == 0 and",
            "nobody wakes the owner of a loop",
            "test_team_model.py",
        ),
        Fault(
            "            if _swap(team, part, pieces, rest):\n",
            "            if True:\n                _store(team, part, rest)\n",
            "two members take the same piece",
            "test_team_model.py",
        ),
        Fault(
            "if _load(team, _PENDING) > 0 or not _swap(team, _WAITING, 1, 0):",
            "if True:",
            "an owner sleeps after its loop is done",
            "test_team_model.py",
        ),
        Fault(
            "            if me < _load(team, _MEMBERS):\n",
            "            if True:\n",
            "members work on loops that they have no part in",
            "test_team_model.py",
        ),
        Fault(
            "smaller(moved // (2 * members * SHARE), _MOST_PIECES)",
            "_PIECES",
            "the last piece of a long loop takes longer than members wait",
            "test_team_model.py::test_pieces_are_of_two_shares_where_that_is_many",
        ),
        Fault(
            "if _load(team, _PENDING) == 0:  # those",
            "if False:  # those",
            "members are woken for what others have done",
            "test_team_model.py::test_no_more_are_woken_than_there_is_work_for",
        ),
        Fault(
            "int(number * _PATIENCE / max(min(seconds), 1e-6))",
            "int(number * _PATIENCE / max(max(seconds), 1e-6))",
            "a team that was started on a busy machine sleeps at once for ever",
            "test_team_model.py::test_how_often_one_looks_for_work",
        ),
        Fault(
            "_store(team, words + _ASLEEP, 1)",
            "_store(team, words + _ASLEEP, 0)",
            "a member sleeps for ever",
            "test_team_model.py",
        ),
        Fault(
            "pieces * member // members, pieces * (member + 1) // members",
            "pieces // members * member, pieces // members * (member + 1)",
            "the last pieces are nobody's",
            "test_team_model.py",
        ),
        Fault(
            "        _call_fork(team[_FORK], (team[_JOIN], 0, team[_THEIRS], 0))\n",
            "        _call_fork(team[_FORK], (team[_JOIN], 0, team[_THEIRS], 0))\n"
            "        _store(team, _BUSY, 0)\n"
            "        return\n",
            "a loop ends while a member of ours that came late is at work",
            "test_team_model.py::test_a_member_that_comes_late_to_a_loop_of_pytorchs_threads",
        ),
        Fault(
            "    _memory[:], _was_forked = 0, True",
            "    _was_forked = True",
            "a child waits for threads that it does not have",
            "test_threads.py::test_a_child_has_a_team_of_its_own",
        ),
        Fault(
            "&= ~(1 << (here & 63))",
            "|= 1 << (here & 63)",
            "members are woken on their caller's processor",
            "test_threads.py::test_members_keep_off_the_callers_processor",
        ),
        Fault(
            "                    _set_mode(mode)\n",
            "",
            "members compute in the floating-point mode they were started in",
            "test_threads.py::test_threads_with_modes_of_their_own",
        ),
        Fault(
            "if team[_MODE] != mode:",
            "if mode < 0:",
            "a piece is worked on in the mode of the loop before",
            "test_team_model.py::test_every_schedule_of_two_modes",
        ),
        Fault(
            "if mode < 0 or not _swap(",
            "if members < 2 or not _swap(",
            "a loop is shared whose mode is not known",
            "test_team_model.py::test_a_mode_that_must_stay_with_its_thread",
        ),
        Fault(
            "builder.select(may_trap, _WORD(-1), mode)",
            "mode",
            "an operation traps in a thread that its host does not know",
            "test_threads.py::test_where_an_operation_may_trap_no_loop_is_shared",
        ),
        Fault(
            "return _WORD(-1)\n",
            "return _WORD(0)\n",
            "a loop is shared on a processor whose modes are not known",
            "test_threads.py::test_how_a_mode_is_read_and_written",
        ),
        Fault(
            "if team[_MASK + i] != team[ours + i]:",
            "if False:",
            "a processor is put back into a mask that somebody else set",
            "test_team_model.py::test_what_an_administrator_changes_stays_changed",
        ),
        Fault(
            " or not team[_MAIN + word] & bit:",
            ":",
            "a processor is put back that was taken from the process",
            "test_threads.py::test_members_stay_where_an_administrator_puts_them",
        ),
        Fault(
            "not team[_MAIN + word] & bit:\n            return\n        ",
            "not team[_MAIN + word] & bit:\n"
            "            pass\n"
            "        else:\n"
            "            ",
            "processors are taken from a member one by one",
            "test_team_model.py::test_where_the_main_thread_is_bound",
        ),
        Fault(
            "with sufficient_stack(_STACK), signals_elsewhere():",
            "with signals_elsewhere():",
            "members have a stack as small as the program's own threads",
            "test_threads.py::test_a_member_has_a_sufficient_stack",
        ),
        Fault(
            "smaller(2 * team[_PAUSE] + 1, _LONGEST_PAUSE)",
            "0",
            "members are woken over and over in vain",
            "test_threads.py::test_wakings_that_do_not_pay_become_rare",
        ),
        Fault(
            "members = smaller(members, _call_int(team[_LIMIT], ()))",
            "pass",
            "numba.set_num_threads is not respected",
            "test_paths.py::test_one_thread_where_one_was_asked_for",
        ),
        Fault(
            "_own_word(team[_ALONE]) != 0:\n        members = 1",
            "_own_word(team[_ALONE]) != 0:\n        pass",
            "the loops of Dask's workers are shared with more threads than processors",
            "test_paths.py::test_a_thread_that_is_alone_shares_nothing",
        ),
        Fault(
            '_NAME = f"{COPY}.team"',
            '_NAME = "fastrelu.team"',
            "two copies have one team, whose memory they lay out twice",
            "test_processes.py::test_a_second_copy_under",
            "crashes",
        ),
    ],
    "_dask.py": [
        Fault(
            "    with cpu.alone():\n        return call(*arguments)",
            "    return call(*arguments)",
            "each of Dask's threads asks for a team",
            "test_dask.py::test_a_thread_of_a_pool_has_its_loops_to_itself",
        ),
        Fault(
            "spawn_key=block_id)",
            "spawn_key=())",
            "all blocks have the same random slopes",
            "test_dask.py::test_random_slopes",
        ),
        Fault(
            "and value.chunks != common:",
            "and False:",
            "a mask's blocks are cut as if they were arrays",
            "test_dask.py::test_forward_and_backward",
        ),
        Fault(
            "        if array.numblocks != arrays[0].numblocks:",
            "        if False:",
            "blocks meet others that are not theirs",
            "test_dask.py::test_unknown_chunk_sizes",
        ),
        Fault(
            "np.where(np.isfinite(total), total + errors, total)",
            "(total + errors)",
            "an infinite weight gradient becomes NaN",
            "test_dask.py::test_infinities_in_blocks",
        ),
        Fault(
            "pool.set_limit(min(pool.get_limit(), limit // _PART))",
            "pass",
            "a worker's idle memory counts against its limit",
            "test_dask.py::test_more_than_the_workers_may_hold",
        ),
    ],
    "cpu/templates.py": [
        Fault(
            "    fits(grad, g)\n",
            "",
            "one number for all gradients wraps within Numba",
            "test_inside_numba.py::test_compiled_numbers_that_do_not_fit",
        ),
        Fault(
            "1, lead + whole * strip_size, flat.size)",
            "1, lead + whole * strip_size, lead)",
            "what is behind the last whole line is not written",
            "test_inside_numba.py::test_in_strips_it_writes_where_it_is_told",
        ),
        Fault(
            "lead = min(-flat.ctypes.data % 64 // flat.itemsize, flat.size)",
            "lead = 0",
            "lines are written past the cache that do not start one",
            "test_inside_numba.py::test_in_strips_it_writes_where_it_is_told",
        ),
        Fault(
            "    return overlap(x, y) and not (same and x.strides == y.strides)",
            "    return False",
            "an input is read after it was overwritten",
            "test_inside_numba.py::test_as_python_it_writes_where_it_is_told",
        ),
        Fault(
            "        axis = x.ndim - 1 - k if reverse else k\n        lengths",
            "        axis = k\n        lengths",
            "weights of arrays in Fortran's order are of other channels",
            "test_inside_numba.py::test_as_python_weights_of_all_shapes",
        ),
        Fault(
            "        if weight.size != x.shape[axis % x.ndim]:",
            "        if False:",
            "a weight that is too short is read past its end",
            "test_inside_numba.py::test_as_python_wrong_values_are_errors",
        ),
        Fault(
            "    if bits.size != (g.size + 7) >> 3:",
            "    if False:",
            "bits are read past their end",
            "test_inside_numba.py::test_as_python_wrong_values_are_errors",
        ),
        Fault(
            "    if overlap(y, dw):",
            "    if False:",
            "one gradient is written over the other",
            "test_inside_numba.py::test_as_python_wrong_values_are_errors",
        ),
        Fault(
            "    return np.empty(x.shape[::-1], scalar).T",
            "    return np.empty(x.shape, scalar)",
            "results of arrays in Fortran's order are in C order",
            "test_inside_numba.py::test_as_python_it_computes_the_same",
        ),
    ],
    "_overloads.py": [
        Fault(
            '{"error_model": "numpy", "fastmath": False}',
            '{"error_model": "numpy", "fastmath": True}',
            "NaNs and signed zeros are lost",
            "test_inside_numba.py::test_fastmath_of_the_caller_is_not_ours",
        ),
        Fault(
            "    if not y.mutable:",
            "    if False:",
            "read-only arrays are written to",
            "test_inside_numba.py::test_what_types_tell_is_a_typing_error",
        ),
    ],
    "cpu/shield.py": [
        Fault(
            "signal.SIG_BLOCK, signal.valid_signals()",
            "signal.SIG_BLOCK, []",
            "members take signals that their host waits for",
            "test_platforms.py::test_members_leave_signals_to_their_host",
        ),
        Fault(
            '            getattr(global_compiler_lock, "is_locked", bool)()  # by',
            '            threading.current_thread() is not threading.main_thread() or getattr(global_compiler_lock, "is_locked", bool)()  # by',
            "compiling overflows the stack of a small thread",
            "test_platforms.py::test_what_is_compiled_elsewhere_for_other_threads",
        ),
        Fault(
            "            with sufficient_stack():\n                _thread",
            "            if True:\n                _thread",
            "compiling overflows a stack that its host made small",
            "test_platforms.py::test_first_calls_where_stacks_are_small[32768]",
        ),
        Fault(
            "threading.stack_size(max(before, size))",
            "threading.stack_size(size)",
            "a larger stack that its host needs is made smaller",
            "test_platforms.py::test_a_sufficient_stack",
        ),
        Fault(
            "        finally:\n            threading.stack_size(before)\n",
            "        finally:\n            pass\n",
            "the program's threads have another stack from then on",
            "test_threads.py::test_a_member_has_a_sufficient_stack",
        ),
    ],
    "cpu/jit.py": [
        Fault(
            "if check == hashlib.blake2s(key + data).digest():",
            "if True:",
            "a damaged file is believed",
            "test_cache.py::test_a_damaged_file_is_not_believed",
        ),
        Fault(
            "key = repr((self.digest, codegen.magic_tuple())).encode()",
            "key = repr(self.digest).encode()",
            "code for another processor is run",
            "test_cache.py::test_code_for_another_processor",
        ),
        Fault(
            "        name, key = self._file(context.codegen())\n",
            "        context.refresh()\n"
            "        name, key = self._file(context.codegen())\n",
            "every process loads all that Numba compiles with",
            "test_processes.py::test_from_the_disk_nothing_is_loaded_that_compiles",
        ),
        Fault(
            "if result.library.has_dynamic_globals or digest",
            "if digest",
            "code is kept that has addresses in it",
            "test_cache.py::test_what_is_not_kept",
        ),
        Fault(
            "has_dynamic_globals or digest(*self.made_of) != self.digest:",
            "has_dynamic_globals:",
            "what was changed while it was compiled is kept as what it was before",
            "test_cache.py::test_what_is_not_kept",
        ),
        Fault(
            "made_of = COPY, settings(), SOURCES, signature, function",
            "made_of = COPY, SOURCES, signature, function",
            "code is run that is not optimised as Numba is told",
            "test_processes.py::test_settings_of_numba",
        ),
        Fault(
            "made_of = COPY, settings(), SOURCES, signature, function",
            "made_of = COPY, settings(), signature, function",
            "code is run that was compiled in another way",
            "test_processes.py::test_from_an_archive",
        ),
        Fault(
            'isinstance(getattr(type_, "dispatcher", None), _Inlined)',
            "False",
            "nothing is kept with NUMBA_OPT=0",
            "test_processes.py::test_settings_of_numba",
        ),
        Fault(
            "for name in names if not llvm.address_of_symbol(name))",
            "for name in names)",
            "a package that is imported twice has one team for both",
            "test_processes.py::test_a_second_copy_under",
        ),
    ],
    "_digest.py": [
        Fault(
            "uses += [(name, globals_[name]) for name in names if name in globals_]",
            "pass",
            "a global that was changed is not seen",
            "test_cache.py::test_a_limit_that_was_changed",
        ),
        Fault(
            "            uses.append((name, cell.cell_contents))",
            "            pass",
            "a closure that was changed is not seen",
            "test_cache.py::test_a_limit_that_was_changed",
        ),
        Fault(
            '("defaults", function.__defaults__)',
            '("defaults", None)',
            "a default that was changed is not seen",
            "test_cache.py::test_a_limit_that_was_changed",
        ),
        Fault(
            "uses += (function.__kwdefaults__ or {}).items()",
            "pass",
            "the default of a keyword is not seen",
            "test_cache.py::test_functions_that_differ",
        ),
        Fault(
            "            and all(map(operator.is_, values, node.values))\n",
            "",
            "what has changed since the first look is not seen",
            "test_cache.py::test_what_changes_between_two_looks",
        ),
        Fault(
            "            and all(self.function(inner) == digest for inner, digest in node.inner)\n",
            "",
            "what has changed in a helper since the first look is not seen",
            "test_cache.py::test_what_changes_between_two_looks",
        ),
        Fault(
            "        if self.reach >= depth:",
            "        if True:",
            "functions that call each other pass for others that do",
            "test_cache.py::test_functions_that_call_each_other",
        ),
        Fault(
            "        if _jitted.setdefault(value, repr(inside)) != repr(inside):\n"
            "            raise _Unknown\n",
            "",
            "yesterday's helper is kept as today's",
            "test_cache.py::test_a_compiled_function_stays_what_it_was",
        ),
        Fault(
            'if is_ours and "__getattr__" in held:',
            "if False:",
            "what a module makes when it is asked is taken for nothing",
            "test_cache.py::test_a_module_that_makes_what_it_is_asked_for",
        ),
        Fault(
            "if value.isbuiltin != 1:",
            "if False:",
            "another package's dtype goes by its letter",
            "test_cache.py::test_values_that_cannot_be_known",
        ),
        Fault(
            "    return found is value\n",
            "    return True\n",
            "an object passes for the library's of its name",
            "test_cache.py::test_values_that_cannot_be_known",
        ),
        Fault(
            "more = None if key == value.name else self.known(key)",
            "more = None",
            "C functions with other arguments pass for each other",
            "test_cache.py::test_values_that_differ",
        ),
        Fault(
            "for each in (numba, np, llvmlite)]",
            "for each in (np, llvmlite)]",
            "code of another version of Numba is run",
            "test_cache.py::test_a_library_goes_by_its_version "
            "test_processes.py::test_a_cache_of_another_version",
        ),
        Fault(
            "_hash((__name__, own,",
            "_hash((own,",
            "copies under two names pass for each other",
            "test_cache.py::test_a_library_goes_by_its_version",
        ),
    ],
}


def numbered():
    """(number, file, fault) of every fault"""
    rows = ((file, fault) for file, faults in FAULTS.items() for fault in faults)
    return [(i, file, fault) for i, (file, fault) in enumerate(rows, 1)]


NONE = 5  # pytest's status where there are no tests


def run(tests, home, limit=None):
    """What the tests print, and their status or "hangs", with the package in a folder

    Their short forms, or what has none.
    """
    output, status = run_marked("not long", tests, home, limit)
    return (
        run_marked("long", tests, home, limit) if status == NONE else (output, status)
    )


def run_marked(marks, tests, home, limit):
    environment = {
        **os.environ,
        "PYTHONPATH": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-xqm", marks, "-p", "no:cacheprovider"]
        + [f"tests/{name}" for name in tests.split()],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # what hangs may have children that do
    )
    try:
        return process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        return "", "hangs"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def verdict(fault, status):
    if status == "hangs":
        return "caught" if fault.ends == "hangs" else "HUNG"
    if status < 0:
        return "caught" if fault.ends == "crashes" else f"CRASHED ({-status})"
    return {0: "SURVIVED", 1: "caught"}.get(status, f"DID NOT RUN ({status})")


def is_meant(name, number, file):
    """Whether "17", "17-20", or "pool" means a fault"""
    if not name[0].isdigit():
        return name == Path(file).stem
    first, _, last = name.partition("-")
    return int(first) <= number <= int(last or first)


def main(chosen):
    rows = [
        (number, file, fault)
        for number, file, fault in numbered()
        if not chosen or any(is_meant(name, number, file) for name in chosen)
    ]
    if not rows:
        print("no such fault")
        return 2
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for part in ("fastrelu", "tests"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(HOME / part, home / part, ignore=ignored)
        shutil.copy(HOME / "pyproject.toml", home)
        tests = " ".join(dict.fromkeys(fault.tests for _, _, fault in rows))
        output, status = run(tests, home)
        if status != 0:
            print(f"{output}\nThe tests fail without a fault.")
            return 2
        for number, file, fault in rows:
            path = home / "fastrelu" / file
            source = path.read_text()
            assert source.count(fault.text) == 1, f"{file}: {fault.text!r}"
            start = time.perf_counter()
            path.write_text(source.replace(fault.text, fault.new))
            output, status = run(
                fault.tests, home, 30 if fault.ends == "hangs" else 120
            )
            path.write_text(source)
            seconds = time.perf_counter() - start
            verdicts.append(verdict(fault, status))
            print(f"{number:3} {verdicts[-1]:8} {seconds:4.0f} s  {file}: {fault.why}")
            if verdicts[-1] not in ("caught", "SURVIVED"):
                print(output[-2000:])
            sys.stdout.flush()
    caught = verdicts.count("caught")
    print(f"{caught} of {len(verdicts)} caught")
    return 0 if caught == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
