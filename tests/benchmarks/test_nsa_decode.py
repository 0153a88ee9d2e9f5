"""The benchmark of decode steps on a machine without a GPU."""

import json
import sys

import pytest

from benchmarks import nsa_decode


def test_every_batch_has_a_row_with_its_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "decode.json"
    monkeypatch.setattr(nsa_decode, "STEPS", 4)
    monkeypatch.setattr(nsa_decode, "WARM_UP_STEPS", 4)
    options = "--device cpu --keys 70 --head-dim 16 --compression mean --batches 1 2 --json"
    monkeypatch.setattr(sys, "argv", ["nsa_decode", *options.split(), str(file)])
    nsa_decode.main()
    document = json.loads(file.read_text())
    assert document["keys"] == 70
    assert document["machine"]["device"]
    assert [row["num_sequences"] for row in document["rows"]] == [1, 2]
    assert all(row["step_seconds"] >= row["host_seconds"] > 0 for row in document["rows"])
    assert all(row["launches"] is None for row in document["rows"])
