"""The whole model, or layer by layer: which of them fits a limit of memory."""

import pytest

from bitknap.errors import InputError
from bitknap.estimators.costs.dense_profiling import Measured
from bitknap.estimators.costs.fisher import Fisher
from bitknap.estimators.costs.moments import SecondMoments
from bitknap.estimators.group_kl.calibrated import Calibrated
from bitknap.estimators.sparse.on_demand import Sampled
from bitknap.estimators.sweep.peak_memory import layer_bytes, peak_bytes, way_to_calibrate
from bitknap.quantization.models.headers_only import walk_headers
from bitknap.quantization.source.checkpoint import Checkpoint
from bitknap.testing import tiny_model

ESTIMATORS = (
    *(Calibrated(), SecondMoments(), Fisher(), Fisher("output"), Sampled()),
    *(Measured(), Measured(kind="layer"), Measured(kind="block")),
)


def model_of(folder, layers):
    """Save a Mixtral of so many layers; return its checkpoint and its layout."""
    tiny_model("mixtral", num_hidden_layers=layers, hidden_size=64).save_pretrained(folder)
    source = Checkpoint.open(folder)
    return source, walk_headers(source.config, source.shapes, ())


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("model"), 8)


def way(model, needs, limit):
    source, layout = model
    return way_to_calibrate(source, layout, 64, needs, limit)


def peak(model, needs):
    source, layout = model
    return peak_bytes(source, layout, 64, needs)


def alone(model, needs, *, tokens=64):
    source, layout = model
    return layer_bytes(source, layout, tokens, needs)


def test_the_whole_model_where_it_fits(deep):
    assert way(deep, {"moments"}, None) == "whole"
    most = peak(deep, {"moments"})
    assert way(deep, {"moments"}, most) == "whole"
    assert way(deep, {"moments"}, most - 1) == "layers"


def test_gradients_one_layer_at_a_time(deep):
    for needs in ({"curvature"}, {"traces", "gradients"}):
        assert way(deep, needs, alone(deep, needs)) == "layers"
        assert way(deep, needs, peak(deep, needs)) == "whole"


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_every_estimator_works_layer_by_layer(estimator, deep):
    needs = estimator.needs
    assert way(deep, needs, None) == "whole"
    assert way(deep, needs, alone(deep, needs)) == "layers"


def test_less_than_a_layer_is_refused(deep):
    least = alone(deep, {"moments"})
    assert way(deep, {"moments"}, least) == "layers"
    with pytest.raises(InputError, match=r"take fewer tokens, or use an estimator of weights"):
        way(deep, {"moments"}, least - 1)


def test_more_layers_take_hardly_more(deep, tmp_path):
    twice = model_of(tmp_path, 16)
    more = alone(twice, {"moments"}) - alone(deep, {"moments"})
    sums = sum(x.experts * (x.hidden + 3 * x.intermediate) for x in deep[1].layers)
    assert more == 8 * sums


@pytest.mark.parametrize("need", ["full", "traces", "curvature", "gradients"])
def test_what_is_recorded_takes_more(need, deep):
    one = alone(deep, {"moments", need}, tokens=640)
    assert one > alone(deep, {"moments"}, tokens=640)
