"""The table of faults: each can still be planted, and its tests are still there.

Whether the tests catch them, `python tests/mutation.py` tells.
"""

import re
from pathlib import Path

import mutation

import fastrelu


def test_every_fault_can_be_planted():
    package, tests = Path(fastrelu.__file__).parent, Path(__file__).parent
    seen = set()
    for number, file, fault in mutation.numbered():
        source = (package / file).read_text()
        assert source.count(fault.text) == 1, f"{number}: {fault.text!r} in {file}"
        compile(source.replace(fault.text, fault.new), file, "exec")
        assert fault.text != fault.new
        assert fault.ends in ("", "hangs", "crashes")
        assert (file, fault.text, fault.new) not in seen
        seen.add((file, fault.text, fault.new))
        for name in fault.tests.split():
            path, _, function = name.partition("::")
            found = rf"^(def|class) {function.partition('[')[0]}\b" if function else ""
            assert re.search(found, (tests / path).read_text(), re.MULTILINE), name
    assert len(seen) > 100
