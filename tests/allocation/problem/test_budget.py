import pytest

from bitknap.allocation import Budget, CostTable, Units, formats
from bitknap.allocation.problem.budget import parse_size
from bitknap.errors import InfeasibleError, InputError

UNITS = Units.build(
    layer=[0, 1],
    role=["routed"] * 2,
    expert=[0] * 2,
    projection=["up"] * 2,
    rows=[80, 80],
    cols=[100, 100],
)
TABLE = CostTable.from_arrays(
    [[2.0, 1.0]] * 2,
    units=UNITS,
    formats=formats(bits=(2, 4), group_size="row"),
    provenance={"fixed_bytes": 500, "source_bytes": 33_000},
)


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("2.5bpw", 5000),
        ("2.0001 bpw", 4000),
        ("5000B", 4500),
        ("5 kB", 4500),
        ("5KiB", 5120 - 500),
        ("0.005MB", 4500),
        ("5000B units", 5000),
        ("40%", 13_200 - 500),
    ],
)
def test_texts(text, bound):
    budget = Budget.parse(text)
    limit = budget.limit(TABLE)
    assert str(budget) == text
    assert (limit.name, limit.bound) == ("memory", bound)
    assert (limit.weight == TABLE.nbytes).all()


@pytest.mark.parametrize(
    "budget", [Budget.bits(2.5), Budget.bytes(5000), Budget.checkpoint(5500), Budget.share(0.15)]
)
def test_what_is_built_can_be_parsed(budget):
    again = Budget.parse(str(budget))
    assert again.limit(TABLE).bound == budget.limit(TABLE).bound
    assert again.kind == budget.kind
    assert again.value == pytest.approx(budget.value)


def test_large_sizes():
    assert Budget.parse("12GiB").value == 12 * 2**30
    assert Budget.parse("9007199254740993B").value == 9007199254740993


def test_sizes_alone():
    assert parse_size(" 1.5 KiB ") == 1536
    assert parse_size("9007199254740993B") == 9007199254740993
    for text in ("", "12", "2.5bpw", "40%", "5B units", "-1GiB"):
        with pytest.raises(InputError) as error:
            parse_size(text)
        assert str(error.value) == f"{text!r} is not a size; examples: 12GiB, 800MB, 4096B"


@pytest.mark.parametrize(
    "text", ["", "12", "GiB", "-3GiB", "2.5 bits", "nan%", "1e9B", "2bpw units"]
)
def test_texts_that_cannot_be_read(text):
    with pytest.raises(InputError) as error:
        Budget.parse(text)
    assert "cannot be read; examples: 2.5bpw, 12GiB, 800MB, 40%" in str(error.value)


def test_a_budget_is_above_zero():
    with pytest.raises(InputError, match="budget '0bpw': must be above 0; examples"):
        Budget.bits(0)
    with pytest.raises(InputError, match="budget 'nan%': must be above 0"):
        Budget.share(float("nan"))
    with pytest.raises(InputError, match="budget '0%': must be above 0"):
        Budget.parse("0%")


def test_a_budget_needs_what_it_refers_to():
    bare = CostTable.from_arrays([[1.0]], [[1]])
    with pytest.raises(InputError, match=r"2\.5bpw: the units have no shapes; use Budget\.bytes"):
        Budget.bits(2.5).limit(bare)
    with pytest.raises(InputError, match="100B: the table has no fixed_bytes"):
        Budget.checkpoint(100).limit(bare)
    with pytest.raises(InputError, match="50%: the table has no source_bytes"):
        Budget.share(0.5).limit(bare)


def test_a_checkpoint_smaller_than_its_fixed_parts():
    with pytest.raises(InfeasibleError, match=r"not quantized take 500 B, limit is 400 B; raise"):
        Budget.checkpoint(400).limit(TABLE)
