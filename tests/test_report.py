"""From made-up measurements to the README's table, the pictures and the check."""

import importlib.util
import json
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[1] / "bench" / "report.py"
if not REPORT.exists():
    pytest.skip("bench is not installed", allow_module_level=True)
pytest.importorskip("matplotlib")

_spec = importlib.util.spec_from_file_location("report", REPORT)
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)

KI, MI = 1 << 10, 1 << 20
TIMES = {  # (op, mode, dtype, n): microseconds of each peer
    ("relu", "fresh", "float32", 1): {"fastrelu": 0.2, "numpy": 0.5, "torch": 1.0},
    ("relu", "fresh", "float32", MI): {"fastrelu": 400, "numpy": 1600, "torch": 800},
    ("relu", "out", "float32", MI): {"fastrelu": 500, "torch": 450, "c": 100},
    ("relu", "inplace", "float32", MI): {"numpy": 1000},
    ("prelu_last_backward", "fresh", "float32", KI): {"fastrelu": 3, "c": 1},
    ("relu", "fresh", "float16", MI): {"fastrelu": 100, "numpy": 1280},
}
FOUND = [  # the ratios against the fastest rival, the worst first
    (0.9, "torch", "`relu` out float32 1M 0.90x torch"),
    (2.0, "torch", "`relu` fresh float32 1M 2.0x torch"),
    (2.5, "numpy", "`relu` fresh float32 1 2.5x numpy"),
    (12.8, "numpy", "`relu` fresh float16 1M 13x numpy"),
]
BEFORE, AFTER = "# Title\r\n\nBefore\n<!-- bench:begin -->", "<!-- bench:end -->\nAfter"


def benchmark(case, peer, microseconds):
    op, mode, dtype, n = case
    extra = {"op": op, "mode": mode, "dtype": dtype, "n": n, "peer": peer}
    extra |= {"peer_version": f"1.{len(peer)}", "bytes": 8 * n, "gb_per_s": None}
    extra["limit_gb_per_s"] = 25.0 if n == MI else None
    median = microseconds * 1.000001e-6  # more digits than anybody needs
    stats = {"median": median, "q1": median * 0.9, "q3": median * 1.2}
    name = f"{op}-{mode}-{dtype}-{n}"
    return {"group": name, "stats": stats, "extra_info": extra}


def write(path, times, machine="A machine, 2 cores"):
    benchmarks = [
        benchmark(case, peer, microseconds)
        for case, peers in times.items()
        for peer, microseconds in peers.items()
    ]
    benchmarks.append({"stats": {}, "extra_info": {}})  # of other suites
    other = benchmark(("relu", "out", "float32", MI), "fastrelu", 9)
    benchmarks.append(other | {"group": "busy-relu-out-float32-1M"})
    about = {"machine": machine, "versions": {"fastrelu": "0.1"}, "command": "pytest b"}
    data = {"machine_info": {"fastrelu": about}, "benchmarks": benchmarks}
    path.write_text(json.dumps(data | {"datetime": "2030-01-02T03:04:05"}))
    return path


@pytest.fixture
def measured(tmp_path):
    return write(tmp_path / "results.json", TIMES)


@pytest.fixture
def results(measured):
    return report.load([measured])


@pytest.fixture
def pictures():
    """For tests that want them: they take a second"""


@pytest.fixture
def run(tmp_path, monkeypatch, request):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(report, "draw", lambda results, folder: None)
    readme, out = tmp_path / "README.md", tmp_path / "results"
    readme.write_bytes(f"{BEFORE}\nstale words\n{AFTER}".encode())

    def run(*arguments):
        options = ["--readme", str(readme), "--out", str(out)]
        report.main([*map(str, arguments), *options])
        return readme.read_bytes().decode(), out

    return run


def rows(text):
    """The cells of the tables' rows by the first one; both tables have a float32"""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in reversed(cells)}


def test_the_table_has_times_ratios_losses_and_dashes(results):
    table = rows(report.markdown(results))
    assert table["float32"][:4] == ["1", "1k", "1M", "GB/s, of the limit"]
    assert table["`relu` fresh"] == [
        "200 ns · 2.5x numpy",
        "-",
        "400 µs · 2.0x torch",
        "21.0, 84% (1M)",
    ]
    out = ["-", "-", "**500 µs · 0.90x torch**", "16.8, 67% (1M)"]
    assert table["`relu` out"] == out
    assert table["`relu` in place"] == ["-", "-", "-", "-"]
    assert table["`prelu_last_backward` fresh"] == ["-", "3.0 µs · -", "-", "-"]


def test_the_readme_has_a_short_table(tmp_path, measured, run):
    _, _, text = run(measured)[0].partition("bench:begin")
    head = "| float32 | NumPy, 1k | 1M | PyTorch, 1k | 1M |\n|---|---:|---:|---:|---:|"
    assert head in text
    assert rows(text)["`relu`"] == ["-", "4.0x", "-", "2.0x"]
    assert rows(text)["`relu` in place"] == ["-"] * 4  # which were not measured
    assert "`relu` out" not in rows(text)
    name = "bench/results/a-machine-2-cores-2030-01-02.md"
    assert f"({name})" in text
    more = write(
        tmp_path / "more.json",
        {("prelu", "fresh", "float32", MI): {"fastrelu": 2, "torch": 1.999}},
    )
    text, _ = run(measured, more)
    assert rows(text)["`prelu`"] == ["-", "-", "-", "**0.99x**"]


def test_the_summary_has_means_losses_and_the_worst(results):
    text = report.markdown(results)
    assert "A machine, 2 cores, 2030-01-02; fastrelu 0.1, numpy 1.5, " in text
    assert "Made by `pytest b`." in text
    mean = (0.9 * 2.0 * 2.5 * 12.8) ** (1 / 4)
    assert f"rival: {mean:.1f}x as the geometric mean, 4 cells, 1 of them below" in text
    assert "Worst: `relu` out float32 1M 0.90x torch." in text
    assert f"{(2.5 * 4 * 12.8) ** (1 / 3):.1f}x numpy" in text
    assert "alone" not in text
    assert rows(text)["float16"] == [
        *("1", "13x", "13x", "-", "0", "`relu` fresh 1M 13x numpy")
    ]


def test_duels_are_against_the_fastest_and_the_roof_is_no_rival(results):
    found = report.duels(results)
    assert [duel.ratio for duel in found] == pytest.approx([f[0] for f in FOUND])
    assert [(duel.rival, str(duel)) for duel in found] == [f[1:] for f in FOUND]
    assert [d.ratio for d in report.duels(results, "torch", "float32")] == (
        pytest.approx([0.9, 2.0, 5.0])
    )


def test_another_allocator_gets_a_line_of_its_own(tmp_path, measured):
    case = ("relu", "fresh", "float32", MI)
    more = write(tmp_path / "more.json", {case: {"torch-tcmalloc": 420}})
    text = report.markdown(report.load([measured, more]))
    assert "Against torch-tcmalloc alone: 1.1x as the geometric mean, 1 cells" in text
    assert "400 µs · 1.1x torch-tcmalloc" in text


def test_other_arguments_have_a_table_of_their_own(tmp_path, measured, run):
    name = "a-machine-2-cores-2030-01-02"
    short, out = run(measured)
    before = (out / f"{name}.md").read_text()
    times = {("relu:columns", "out", "float32", MI): {"fastrelu": 200, "numpy": 100}}
    more = write(tmp_path / "more.json", times)
    assert run(measured, more)[0] == short
    text = (out / f"{name}.md").read_text()
    plain, _, part = text.partition("\n\nArguments one step off the plainest. ")
    assert before.startswith(plain)
    assert part.startswith("`columns`: `x[:, :k]` of an array twice as wide.")
    figures = ["**200 µs · 0.50x numpy**", "41.9, 168% (1M)"]
    assert rows(part)["`relu:columns` out"] == figures
    assert "Against the fastest rival: 0.50x as the geometric mean, 1 cells, 1" in part
    run(out / f"{name}.json")
    assert (out / f"{name}.md").read_text() == text
    with pytest.raises(SystemExit):
        run(more, "--check")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.5, "0.50x"), (0.949, "0.94x"), (0.9999, "0.99x"), (1, "1.0x"), (99.6, "100x")],
)
def test_a_loss_is_never_rounded_up(ratio, text):
    assert report.times(ratio) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(1, "1"), (64, "64"), (KI, "1k"), (1 << 17, "128k"), (1 << 30, "1G")],
)
def test_sizes_have_the_letters_of_powers_of_two(n, text):
    assert report.size(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-9, "2.0 ns"), (9.96e-8, "100 ns"), (1e-6, "1.0 µs"), (0.0029, "2.9 ms")],
)
def test_durations_have_two_digits(seconds, text):
    assert report.duration(seconds) == text


def test_text_outside_the_markers_stays(run, measured):
    text, _ = run(measured)
    assert text.startswith(f"{BEFORE}\n\nHow many times as long")
    assert text.endswith(f" torch.\n\n{AFTER}")
    assert "stale words" not in text
    assert run(measured)[0] == text


@pytest.mark.parametrize(
    "text", ["", "<!-- bench:begin -->", f"{AFTER}{BEFORE}", f"{BEFORE}{AFTER}{BEFORE}"]
)
def test_without_the_markers_the_readme_stays(tmp_path, text):
    path = tmp_path / "other.md"
    path.write_bytes(text.encode())
    with pytest.raises(SystemExit, match=r"bench:begin.*bench:end"):
        report.insert(path, "new")
    assert path.read_bytes() == text.encode()


def test_the_compact_copy_gives_the_same_again(run, measured, pictures):
    text, out = run(measured)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    name = "a-machine-2-cores-2030-01-02"
    kept = {f"{name}.json", f"{name}.md", "time.svg", "bandwidth.svg"}
    assert set(first) == kept
    assert run(out / f"{name}.json")[0] == text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_the_pictures_name_who_and_what(run, measured, pictures):
    _, out = run(measured, "--name", "mine")
    assert (out / "mine.json").exists()
    for name, unit in (("time", "ns per element"), ("bandwidth", "GB/s")):
        svg = (out / f"{name}.svg").read_text(encoding="utf-8")
        words = {unit, "elements", "relu in place", "PyTorch", "hand-written C"}
        assert not [word for word in words if f"<!-- {word} -->" not in svg]


def test_a_gpu_has_a_place_of_its_own(tmp_path, measured, results, run, pictures):
    gpu = {
        "checks": [["relu float32 cupy", "ok", ""], ["graphs", "failed", "7 differ"]]
    }
    gpu |= {
        "absent": {"jax": "jax is not installed"},
        "dropped": ["relu-out-float32-1G"],
    }
    gpu |= {
        "errors": ["prelu: torch, out of memory"],
        "first": {"empty": 1, "warm": 0.04},
    }
    gpu["host"] = {
        "relu fresh": {"fastrelu": [3e-6] * 3, "torch": [4e-6] * 3},
        "a b": {},
    }
    path = tmp_path / "gpu.json"
    path.write_text(
        report.to_copy(report.Results(results.about | {"gpu": gpu}, results.cells))
    )
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() + "<!-- gpu:begin --><!-- gpu:end -->")
    assert "stale words" in run(path)[0]
    text, out = run(measured, path)
    assert "stale words" not in text
    _, _, part = text.partition("<!-- gpu:begin -->")
    assert "| float32 | PyTorch, 1k | 1M |" in part
    assert rows(part)["`relu`"] == ["-", "2.0x"]
    assert "| a call on the host | fastrelu | torch |" in part
    assert "| `relu` fresh | 3.0 µs | 4.0 µs |" in part
    for line in (
        "Checks on the device: 1 ok, 1 failed, 0 skipped.",
        "The first call of a process: 40 ms, or 1.0 s if the code has to be compiled.",
        "- graphs: failed, 7 differ",
        "- without jax: jax is not installed",
        "- prelu: torch, out of memory",
        "- no time was left for relu-out-float32-1G",
        "![Time against size](bench/results/gpu-time.svg)",
    ):
        assert line in part.splitlines()
    assert {"gpu-time.svg", "gpu-bandwidth.svg"} < {file.name for file in out.iterdir()}
    assert "a copy on the device" in (out / "gpu-bandwidth.svg").read_text()


def test_the_check_names_the_losses(measured, run, capsys):
    with pytest.raises(SystemExit) as exit:
        run(measured, "--check")
    assert exit.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["relu out float32 1M 0.90x torch", "1 of 4 cells are below 0.95"]


@pytest.mark.parametrize(("torch", "code"), [(94, 1), (96, 0)])
def test_the_check_allows_for_noise(tmp_path, run, torch, code):
    times = {("relu", "out", "float32", MI): {"fastrelu": 100, "torch": torch, "c": 1}}
    with pytest.raises(SystemExit) as exit:
        run(write(tmp_path / "close.json", times), "--check")
    assert exit.value.code == code


def test_the_check_wants_something_to_compare(tmp_path, run):
    times = {("relu", "out", "float32", MI): {"fastrelu": 100, "c": 1}}
    with pytest.raises(SystemExit, match="no cell has both"):
        run(write(tmp_path / "alone.json", times), "--check")


def test_times_of_two_machines_are_not_mixed(tmp_path, measured):
    other = write(tmp_path / "other.json", TIMES, machine="Another")
    with pytest.raises(SystemExit, match="another machine"):
        report.load([measured, other])


def test_no_measurement_is_lost_to_another(tmp_path, measured):
    data = json.loads(measured.read_text())
    data["benchmarks"].insert(0, data["benchmarks"][0])
    measured.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match="fastrelu is there twice"):
        report.load([measured])


def test_results_of_other_suites_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no benchmark here"):
        report.load([write(tmp_path / "other.json", {})])
    path = tmp_path / "bare.json"
    path.write_text('{"machine_info": {}, "benchmarks": []}')
    with pytest.raises(SystemExit, match="machine_info has no fastrelu"):
        report.load([path])
