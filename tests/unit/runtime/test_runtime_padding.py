from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import published_hashes, run_inline, small_recipe

PAD = 0


@pytest.mark.parametrize("packing", [False, True])
def test_padded_and_unpadded_data_give_the_same_bytes(tmp_path: Path, packing: bool) -> None:
    """A job on padded rows with their mask publishes what a job on the bare rows does, byte for byte."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 128, rng.integers(4, 30)).tolist() for _ in range(40)]
    filled = [row + [PAD] * (32 - len(row)) if i % 2 else [PAD] * (32 - len(row)) + row for i, row in enumerate(rows)]
    real = [
        [1] * len(row) + [0] * (32 - len(row)) if i % 2 else [0] * (32 - len(row)) + [1] * len(row)
        for i, row in enumerate(rows)
    ]
    hashes = []
    for output, columns in (("bare", {"input_ids": rows}), ("filled", {"input_ids": filled, "attention_mask": real})):
        pq.write_table(pa.table(columns), tmp_path / f"{output}.parquet")
        changed = small_recipe(
            tmp_path,
            output,
            num_layers=2,
            calibration={"data": str(tmp_path / f"{output}.parquet"), "packing": packing, "num_samples": 12},
        )
        run_inline(changed)
        hashes.append(published_hashes(changed))
    assert hashes[0] == hashes[1]
    assert hashes[0]
