#!/usr/bin/env bash
# pyarrow 25.0.1 and 26.0.0: a cast from list_view to list, or to large_list, gives other values, without an error: the
# last list comes out empty, and of a slice the first ones come out as nulls.
#
# polars, arro3 and pyarrow itself write list views; a reader that casts its list columns to one type, as one does to
# take them by one code path, loses tokens. `list_flatten` and `list_value_length` are right on the same arrays.
#
# Valid input: [[1, 2], [3, 4]] as list_view<int32>. Seen with both versions:
#   cast to list<int32>: [[1, 2], []]         cast of slice(1), which is [[3, 4]]: [[]]
# Exits 0 while this holds, 1 once a version casts right.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
for version in 25.0.1 26.0.0; do
  "$place/venv/bin/pip" install -q --disable-pip-version-check "pyarrow==$version"
  "$place/venv/bin/python" - <<'P'
import sys
import pyarrow as pa
import pyarrow.compute as pc

views = pa.array([[1, 2], [3, 4]], pa.list_view(pa.int32()))
views.validate(full=True)
assert views.to_pylist() == [[1, 2], [3, 4]]
assert pc.list_flatten(views).to_pylist() == [1, 2, 3, 4]
lists = views.cast(pa.list_(pa.int32())).to_pylist()
part = views.slice(1).cast(pa.large_list(pa.int32())).to_pylist()
print(f"pyarrow {pa.__version__}: cast {lists}, of the slice [[3, 4]] {part}")
sys.exit(lists != [[1, 2], []] or part != [[]])
P
done
