"""What the comparison with Math-Verify promises: a table in which the right verdict is known, and a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_lora.scripts.benchmarks.compare_math_verify import CompareMathConfig, run


def test_the_table_counts_the_right_verdicts_of_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.jsonl"
    rows = [{"answer": "2+2 = 4\n#### 4"}, {"answer": r"\frac{1}{2}"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    run(CompareMathConfig(files=[str(path)], show=1))
    printed = capsys.readouterr().out
    assert "| two | in a box | correct | 2 | 2 | 2 | 0 | 0 |" in printed
    assert "| two | denied | wrong | 1 | 1 | 0 | 1 | 0 |" in printed
    assert "only ours is right: 'The answer is not 4.' for '4'" in printed


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"solution": 4}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: no column 'answer'; there are solution"):
        run(CompareMathConfig(files=[str(path)]))
    with pytest.raises(ValueError, match="name at least one"):
        run(CompareMathConfig())
