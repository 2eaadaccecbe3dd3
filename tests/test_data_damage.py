"""Parquet that was damaged, drawn with a seed: a sentence or the right rows, and never other rows without a word."""

import random

import pyarrow
import pyarrow.parquet
import pytest

from trl_opsd.cli import UserError
from trl_opsd.data import load_prompts


FILES = 1000
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{number}+{number % 7}="}],
        "answer": str(number + number % 7),
        "completion_ids": [number, 3, number % 5],
    }
    for number in range(24)
]


def damage(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    kind = draw.randrange(6)
    if kind <= 2:  # one bit, anywhere, in the pages, in the footer
        place = (place, draw.randrange(len(data) // 2), draw.randrange(len(data) - 900, len(data)))[kind]
        return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
    if kind == 3:
        return data[:place]
    if kind == 4:
        return data[:place] + bytes(draw.randrange(256) for _ in range(16)) + data[place + 16 :]
    other = draw.randrange(len(data) - 40)
    return data[:place] + data[other : other + 40] + data[place + 40 :]


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_damaged_parquet(tmp_path, compression):
    """
    With checksums of its pages, as the banks of rollouts are written: without them no reader can see a changed letter. The
    format has none of the names of columns: one that is called otherwise is missed where it is needed.
    """
    whole = tmp_path / "whole.parquet"
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, whole, compression=compression, write_page_checksum=True)
    assert load_prompts(str(whole)).to_list() == ROWS
    data, draw, refused = whole.read_bytes(), random.Random(compression), 0
    path = tmp_path / "damaged.parquet"
    for number in range(FILES // 2):
        path.write_bytes(damage(data, draw))
        try:
            rows = load_prompts(str(path)).to_list()
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 600, str(error)
            refused += 1
        else:
            assert len(rows) == len(ROWS)
            for name in {"prompt", *ROWS[0]} & rows[0].keys():
                assert [row[name] for row in rows] == [row[name] for row in ROWS], (number, name)
    assert refused > FILES / 4
