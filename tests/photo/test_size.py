import pytest

from error import UserError
from photo.size import Size, steps


@pytest.mark.parametrize(
    ('size', 'result'),
    [
        (Size(2), (200, 300)),
        (Size(1.5), (150, 225)),
        (Size(0.005), (1, 1)),
        (Size(width=450), (300, 450)),
        (Size(height=301), (301, 452)),  # 451.5 is rounded up
        (Size(width=600, height=300), (300, 450)),
        (Size(width=300, height=9999), (200, 300)),
        (Size(width=75, height=75), (50, 75)),
    ],
)
def test_sizes_by_hand(size, result):
    assert size.of(100, 150) == result


def test_more_than_eight_times_is_refused():
    assert Size(width=1200).of(100, 150) == (800, 1200)
    with pytest.raises(UserError, match=r'150x100 pixels would be enlarged 8\.007 times'):
        Size(width=1201).of(100, 150)


@pytest.mark.parametrize(
    ('factor', 'scales', 'result'),
    [
        (0.5, [2], ()),
        (1, [2, 4], ()),
        (1.1, [2, 3, 4], (2,)),
        (2, [2, 3, 4], (2,)),
        (2.5, [2, 3, 4], (3,)),
        (2.5, [4], (4,)),
        (4, [2, 3, 4], (4,)),
        (4, [2, 3], (2, 2)),
        (5, [2, 3, 4], (3, 2)),
        (6.5, [2, 3, 4], (4, 2)),
        (8, [4], (4, 4)),
    ],
)
def test_the_least_networks_that_are_enough(factor, scales, result):
    assert steps((100, 200), (round(100 * factor), round(200 * factor)), scales) == result


def test_both_sides_have_to_be_reached():
    """7 pixels by 1.5 are 11, which x2 reaches, as it does 3 pixels by 1.5; 1 by 2.5 is 3, which takes x3."""
    assert steps((7, 3), (11, 5), [2, 3]) == (2,)
    assert steps((1, 100), (3, 200), [2, 3]) == (3,)


def test_weights_that_are_not_enough_are_told():
    with pytest.raises(UserError, match=r'10x10 pixels become 80x80 with no two .*\(x2\)'):
        steps((10, 10), (80, 80), [2])
