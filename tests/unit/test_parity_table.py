"""The table of measured errors, from a report of pytest."""

import json
import pathlib
import runpy
from xml.sax.saxutils import quoteattr

TABLE = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "benchmarks" / "parity_table.py"))


def test_a_row_is_the_largest_error_of_what_was_compared(tmp_path):
    facts = [
        dict(checkpoint="SANA", compared="velocity", error=2e-7, bound=1e-4),
        dict(checkpoint="SANA", compared="velocity", error=3e-6, bound=5e-5),
        dict(checkpoint="DC-AE", compared="decode", error=0.93, bound=1),
    ]
    cases = [
        f'<testcase><properties><property name="parity" value={quoteattr(json.dumps(fact))}/></properties></testcase>'
        for fact in facts
    ]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    rows = TABLE["read_rows"](report)
    assert rows[1] == dict(checkpoint="SANA", compared="velocity", error=3e-6, bound=1e-4, comparisons=2)
    assert TABLE["markdown"](rows).splitlines()[2:] == [
        "| DC-AE | decode | 1 | 1 | 0.93 |",
        "| SANA | velocity | 2 | 0.0001 | 3e-06 |",
    ]
