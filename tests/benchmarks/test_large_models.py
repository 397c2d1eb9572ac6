"""Forecasts of the main job on published models: headers are enough, and limits are kept."""

import pytest

from bitknap.benchmarks.large_models import job_on, markdown
from bitknap.benchmarks.models.random_checkpoint import without_weights

# GiB of memory and hours on two cores that are allowed: an eighth of what Mixtral took, 94 hours.
LIMITS = {"OLMoE-1B-7B": (6, 1.6), "Mixtral-8x7B": (12, 94 / 8)}


@pytest.mark.slow
def test_forecasts_keep_to_their_limits():
    rows = [job_on(model) for model in LIMITS]
    for row, (memory, hours) in zip(rows, LIMITS.values(), strict=True):
        assert row["memory_bytes"] <= memory * 2**30
        assert sum(row["seconds"].values()) <= hours * 3600
    page = markdown(rows)
    assert page.count("| OLMoE-1B-7B | 12.9 GiB |") == 1
    assert "| calibrate | gains | group readings | round rows | pack |" in page


def test_headers_alone_take_no_room_on_the_disk(tmp_path):
    folder = without_weights("OLMoE-1B-7B", tmp_path / "olmoe")
    file = folder / "model.safetensors"
    assert file.stat().st_size > 13e9
    assert file.stat().st_blocks * 512 < 1 << 22
    with pytest.raises(FileExistsError):
        without_weights("OLMoE-1B-7B", folder)
