"""The benchmark on a GPU, run on a GPU that is none: see gpu_on_cpu.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("bench is not installed", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="needs numba-cuda: see the extra cuda13")
pytest.importorskip("matplotlib")

sys.path.append(str(BENCH))  # behind tests/, which has a gpu.py of its own
_spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

HERE = str(Path(__file__).parent)
BEFORE, AFTER = "Title\n<!-- gpu:begin -->", "<!-- gpu:end -->\nThe rest"
INSTALLED = [
    name for name in ("torch", "triton", "jax") if importlib.util.find_spec(name)
]
LIBRARIES = 1 + ("torch" in INSTALLED)


def worker(before="", without="torch triton jax"):
    """The command of a worker that does something before it starts"""
    start = f"import os, sys; sys.path.insert(0, {HERE!r})\n"
    start += f"os.environ['GPU_ON_CPU_WITHOUT'] = {without!r}\nimport gpu_on_cpu\n"
    return [sys.executable, "-c", f"{start}{before}\ngpu_on_cpu.main()"]


@pytest.fixture
def run(tmp_path, capfd):
    readme, out = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"{BEFORE}\nstale words\n{AFTER}")

    def run(*arguments, **options):
        places = ["--readme", str(readme), "--out", str(out), "--name", "it"]
        status = bench.main([*arguments, *places], worker(**options))
        file = out / "it.json"
        kept = json.loads(file.read_text()) if file.exists() else None
        return status, readme.read_text(), kept, capfd.readouterr()

    run.out = out
    return run


def verdicts(kept):
    return {name: verdict for name, verdict, _ in kept["about"]["gpu"]["checks"]}


CASES = ["relu-fresh-float32-1k", "relu-out-float32-16k", "relu-inplace-float16-1k"]
CASES += ["relu_backward_mask-fresh-float32-1k", "leaky_relu-fresh-bfloat16-1k"]
CASES += ["prelu_last-fresh-float32-1k", "prelu_backward-fresh-float32-1k"]
CASES += ["relu_mask-fresh-float32-1k", "prelu_both-fresh-float32-1k"]


def test_everything_that_is_timed(run):
    status, readme, kept, printed = run(
        *("--only", "host*", "*-*", "--cases", *CASES), without=""
    )
    assert status == 0, printed.err
    assert kept["about"]["gpu"]["errors"] == []
    peers = kept["peers"]
    assert {"fastrelu", "cupy", "cupy.maximum", *INSTALLED} == set(peers)
    assert len(kept["cells"]) == len(CASES)
    for op, mode, dtype, n, work, limit, times in kept["cells"]:
        assert times[0], (op, mode, dtype, n)
        assert work > 0
        assert limit > 0
    host = kept["about"]["gpu"]["host"]
    assert set(host) == {name.replace("-", " ") for name in bench.HOST}
    ours = {"fastrelu on CuPy", "fastrelu on PyTorch"}
    assert all(len(ours & set(row)) == LIBRARIES for row in host.values())
    for word in ("`relu` out", "a copy", "fastrelu on CuPy"):
        assert word in readme
    assert readme.startswith(f"{BEFORE}\n\nHow many times as long")
    assert "NVIDIA None, 0 GiB" in readme
    assert readme.endswith(AFTER)
    for name in ("gpu-time.svg", "gpu-bandwidth.svg", "it.md"):
        assert (run.out / name).stat().st_size > 100


@pytest.mark.long
def test_everything_that_is_checked(run):
    patterns = ["relu float32 *", "relu uint8 cupy", "prelu bfloat16 cupy"]
    patterns += ["leaky_relu float64 cupy", "weight gradient cupy"]
    patterns += ["streams *", "graphs *", "memory of graphs *", "threads *"]
    patterns += ["beyond *", "sanitizer *"]
    status, _, kept, printed = run("--only", *patterns, without="triton jax")
    assert status == 0, printed.err
    found = verdicts(kept)
    skipped = [name for name, verdict in found.items() if verdict != "ok"]
    may = "beyond", "sanitizer"
    assert all(name.startswith(may) for name in skipped), printed.out
    assert len(found) == 7 * LIBRARIES + 4
    assert all(f"- {name}: skipped" in printed.out for name in skipped)


def test_what_takes_other_processes(run):
    status, _, kept, printed = run("--only", "processes *", "first call")
    assert status == 0, printed.err
    assert verdicts(kept) == {"processes cupy": "ok"}
    first = kept["about"]["gpu"]["first"]
    assert 0 < first["warm"] < first["empty"]
    assert "The first call of a process: " in printed.out


def test_without_cupy(run):
    pytest.importorskip("torch")
    absent = "def cupy(): raise ImportError('libcupy')\n"
    before = f"{absent}import gpu_device\ngpu_device.LIBRARIES['cupy'] = cupy"
    cases = "relu_mask-fresh-bfloat16-1k", "prelu-out-float32-1k"
    patterns = "relu float16*", "*-fresh-*", "*-out-*"
    status, readme, kept, printed = run(
        *("--only", *patterns, "--cases", *cases),
        before=before,
        without="triton jax",
    )
    assert status == 0, printed.err
    assert verdicts(kept) == {"relu float16 torch": "ok"}
    assert "- without cupy: ImportError: libcupy" in readme
    assert "cupy" not in kept["peers"]
    assert all(cell[-1][kept["peers"].index("fastrelu")] for cell in kept["cells"])


WRONG = """
import device
launch = device.Machine.launch
def lazy(self, kernel, *arguments):
    if getattr(kernel.options.get("function"), "__name__", "") != "_relu":
        launch(self, kernel, *arguments)
device.Machine.launch = lazy
"""


def test_what_is_wrong_is_not_timed(run):
    status, readme, kept, printed = run(
        *("--only", "relu float32 cupy", "*-*", "--cases"),
        *("relu-fresh-float32-1k", "leaky_relu-fresh-float32-1k"),
        before=WRONG,
    )
    assert status == 1
    assert verdicts(kept) == {"relu float32 cupy": "failed"}
    assert "relu float32 cupy: " in printed.err
    assert "- relu float32 cupy: failed" in readme
    timed = {cell[0]: cell[-1] for cell in kept["cells"]}
    ours = kept["peers"].index("fastrelu")
    assert timed["relu"][ours] is None
    assert timed["leaky_relu"][ours]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("relu float32 cupy", "relu-out-float32-1k", "relu-out-float16-1k"),
        (
            "relu float32 cupy",
            "relu_mask-fresh-float32-1k",
            "leaky_relu-out-float32-1k",
        ),
        (
            "weight gradient torch",
            "prelu_both-fresh-float16-1k",
            "prelu-out-float16-1k",
        ),
        ("streams torch", None, "prelu_both-fresh-float32-1k"),
    ],
)
def test_what_a_check_speaks_for(name, wrong, right):
    parse = bench.Case.parse
    assert not bench.speak_for(parse(right), [name])
    assert wrong is None or bench.speak_for(parse(wrong), ["graphs cupy", name])


DEADLY = """
import os, gpu_checks
gpu_checks.check_streams = lambda *_: os._exit(3)
gpu_checks.check_graphs = lambda *_: 1 / 0
"""


def test_a_worker_may_die(run):
    steps = ["streams cupy", "graphs cupy", "threads cupy"]
    status, _, kept, printed = run("--only", *steps, before=DEADLY)
    assert status == 1
    assert list(verdicts(kept).values()) == ["failed", "failed", "ok"]
    assert "streams cupy: its process ended with status 3" in printed.err
    assert "graphs cupy: ZeroDivisionError" in printed.err
    assert "function(self.device" in printed.err  # and where it came from


def test_what_has_no_time_is_named(run, monkeypatch):
    def late(run, name):
        run.deadline = run.last_check = 0

    monkeypatch.setattr(bench.Run, "check", late)
    status, _, kept, printed = run("--only", "streams cupy", "threads cupy", "*-1k")
    dropped = ["threads cupy", *(name for name in bench.cases() if name[-3:] == "-1k")]
    assert status == 0
    assert kept["about"]["gpu"]["dropped"][0] == "threads cupy"
    assert set(dropped) <= set(kept["about"]["gpu"]["dropped"])
    assert "no time was left for threads cupy, " in printed.out


def test_a_request_that_hangs_is_ended(run, monkeypatch):
    check = bench.Run.check

    def impatient(run, name):
        monkeypatch.setattr(bench, "PATIENCE", 3)
        check(run, name)

    monkeypatch.setattr(bench.Run, "check", impatient)
    hang = (
        "import time, gpu_checks\ngpu_checks.check_streams = lambda *_: time.sleep(600)"
    )
    status, _, kept, printed = run("--only", "streams cupy", before=hang)
    assert status == 1
    assert "after 3 s" in printed.err
    assert verdicts(kept) == {"streams cupy": "failed"}


def test_interrupted(run, monkeypatch):
    def interrupt(run, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Run, "measure", interrupt)
    status, _, kept, printed = run("--only", "threads cupy", "relu-fresh-float32-1k")
    assert status == 130
    assert verdicts(kept) == {"threads cupy": "ok"}
    assert "interrupted" in printed.err


def test_what_no_time_was_left_to_check_is_timed_and_marked(run, monkeypatch):
    monkeypatch.setattr(bench, "REST", 1)
    case = "relu-fresh-float32-1k"
    status, _, kept, printed = run("--only", "relu float32 *", case, "--peers", "cupy")
    assert status == 0
    assert [cell[0] for cell in kept["cells"]] == ["relu"]
    assert kept["peers"] == ["fastrelu", "cupy"]
    assert kept["about"]["gpu"]["unchecked"] == [case]
    assert f"timed, but not checked: {case}" in printed.out


def test_checks_of_an_earlier_run_count(run):
    run("--only", "streams cupy", "graphs cupy", before=DEADLY)
    before = run.out / "before.json"
    (run.out / "it.json").rename(before)
    given = "--only", "streams cupy", "graphs cupy", "threads cupy"
    status, _, kept, printed = run(*given, "--checked", str(before))
    assert status == 1
    assert list(verdicts(kept).values()) == ["failed", "failed", "ok"]
    assert "graphs cupy: ZeroDivisionError" in printed.err


def test_texts_that_are_too_long_keep_both_ends():
    sys.path.insert(0, HERE)
    import gpu_checks

    text = "first" + 4000 * "x" + "last"
    short = gpu_checks.clip(text)
    assert (short[:5], short[-4:], len(short)) == ("first", "last", 3007)
    assert gpu_checks.clip("text") == "text"


def test_other_constants(run, monkeypatch):
    variants = {"": "*", "THREADS=128,BLOCKS=9": "*", "BLOCKS=7": "prelu*"}
    monkeypatch.setattr(bench, "VARIANTS", variants)
    monkeypatch.setattr(bench, "RIVALS", ["cupy"])
    monkeypatch.setattr(
        bench, "TUNED", ["relu-out-float32", "prelu_last-fresh-float32"]
    )
    status, _, kept, printed = run("--tune", "--size", "16k", "1k")
    assert (status, kept) == (0, None)
    head, *rows = printed.out.splitlines()
    columns = ["as", "it", "is", "cupy", "THREADS=128,BLOCKS=9", "BLOCKS=7"]
    assert head.split()[1:] == columns
    assert [row.split()[0][-3:] for row in rows] == ["16k", "16k", "-1k", "-1k"]
    assert all(float(time) > 0 for row in rows for time in row.split()[1:4])
    assert [row.split()[4] == "-" for row in rows] == [True, False, True, False]
    assert (run.out / "tune.json").exists()


def test_a_run_with_other_constants(run):
    before = """
import gpu_checks
def show(*_):
    from fastrelu.cuda import kernels, launch, work
    raise AssertionError(f"now {launch.THREADS} {work.BLOCKS} {kernels.ACROSS}")
gpu_checks.check_streams = show
"""
    given = "--only", "streams cupy", "--set", "THREADS=64", "BLOCKS=9"
    status, _, _, printed = run(*given, before=before)
    assert status == 1
    assert "streams cupy: now 64 9 8" in printed.err


def test_no_gpu_is_one_line(run):
    with pytest.raises(SystemExit, match="no GPU to work on"):
        run(before="import gpu_worker\ngpu_worker.libraries = lambda: ({}, {})")


ON_DEVICE = """
import types
import pytest
from cuda import core
made = gpu_on_cpu.install()
core.Device = lambda number: types.SimpleNamespace(set_current=lambda: None)
import gpu_checks, gpu_device
gpu_device.Device = gpu_on_cpu.Device
gpu_checks.SIZES, gpu_checks.CHANNELS = [0, 17], {}
{spoil}
names = "relu and uint8 and cupy or streams and cupy or beyond"
options = ["-q", "-rs", "-p", "no:cacheprovider", "-k", names]
sys.exit(pytest.main([*options, f"{HERE}/test_device.py"]))
"""


@pytest.mark.parametrize("right", [True, False])
def test_the_suite_has_the_same_checks(right):
    spoil = "" if right else "gpu_checks.assert_same = lambda *_: 1 / 0"
    script = ON_DEVICE.replace("{spoil}", spoil).replace("{HERE}", HERE)
    start, _, _ = worker(without="torch triton jax")[-1].rpartition("\n")
    done = subprocess.run(
        [sys.executable, "-c", start + script],
        capture_output=True,
        text=True,
        check=False,
        # Others' plugins would ask a CuPy that is made up for what it has not.
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == (0 if right else 1), done.stdout + done.stderr
    assert "2 passed" in done.stdout or not right
    assert "SKIPPED" in done.stdout
