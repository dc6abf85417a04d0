"""Markdown tables whose cells hold what a table is made of."""

from __future__ import annotations

from mole_diffusion.tables import markdown_table


def test_a_cell_stays_one_cell_in_one_line() -> None:
    table = markdown_table(["name", "value"], [["a|b", "1"], ["two\nlines", "2"]])
    assert table.splitlines() == ["| name | value |", "| --- | --- |", r"| a\|b | 1 |", "| two lines | 2 |"]
