"""The checks of bench/gpu.py on the GPU of this machine, a test each."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")

from fastrelu.cuda import launch

if launch.SIMULATED:
    pytest.skip("a simulated GPU is none", allow_module_level=True)

from cuda import core

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # tests/ has a gpu.py, too
import gpu_checks
import gpu_device
import gpu_worker

try:
    core.Device(0).set_current()
except Exception as error:  # noqa: BLE001 - whatever the driver lacks
    pytest.skip(f"needs a GPU: {error}", allow_module_level=True)

LIBRARIES, ABSENT = gpu_worker.libraries()
if not LIBRARIES:
    pytest.skip(f"needs CuPy or PyTorch on the GPU: {ABSENT}", allow_module_level=True)


@pytest.fixture(scope="module")
def worker():
    return gpu_worker.Worker(gpu_device.Device(), LIBRARIES, ABSENT)


@pytest.mark.parametrize("name", gpu_checks.checks(LIBRARIES))
def test_on_the_gpu(name, worker):
    answer = worker.check(name)
    if answer["verdict"] == "skipped":
        pytest.skip(answer["why"])
    assert answer["verdict"] == "ok", answer["why"]
