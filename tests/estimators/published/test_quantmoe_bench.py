"""The outlier ratio by hand."""

import pytest
import torch

from bitknap.estimators.published.quantmoe_bench import OutlierRatio


def test_outlier_ratio_by_hand(evidence_of):
    # Columns (1, 1), (1, 3), (0, 0): ratios 1, 1.5 and 1.
    weights = torch.tensor([[[1.0, 1, 0], [-1, 3, 0]]])
    assert OutlierRatio().score(evidence_of(weights))[0] == pytest.approx(1.5)
