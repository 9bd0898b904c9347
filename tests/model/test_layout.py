import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from umedtrain.model.layout import Layout


@st.composite
def trees(draw):
    count = draw(st.integers(1, 8))
    return [
        (draw(st.integers(1, 5)), draw(st.sampled_from([None, *range(index)])) if index else None)
        for index in range(count)
    ]


def test_a_prompt_with_two_answers_by_hand():
    layout = Layout.tree([(3, None), (2, 0), (1, 0), (2, None)])
    assert layout.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert layout.segment_of_T.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert layout.leaves == (1, 2, 3)
    assert layout.starts == (0, 3, 5, 6)
    assert layout.last_rows == (2, 4, 5, 7)
    assert layout.context_ranges == ((), ((0, 3),), ((0, 3),), ())


@given(trees())
def test_positions_continue_along_the_path_from_the_root(segments):
    layout = Layout.tree(segments)
    for index, (length, _) in enumerate(segments):
        path, segment = [], index
        while segment is not None:
            path.append(segment)
            segment = segments[segment][1]
        before = sum(segments[ancestor][0] for ancestor in path[1:])
        own = layout.positions_T[layout.segment_of_T == index].tolist()
        assert own == list(range(before, before + length))
        assert [r[1] - r[0] for r in layout.context_ranges[index]] == [segments[a][0] for a in reversed(path[1:])]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "at least one segment"),
        ([(0, None)], "segment 0 has length 0"),
        ([(1, None), (2, 1)], "segment 1 has parent 1"),
        ([(1, None), (2, -1)], "parent -1"),
    ],
)
def test_impossible_trees_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        Layout.tree(segments)


def test_moving_to_the_same_device_is_free():
    layout = Layout.packed([2, 3])
    assert layout.to("cpu") is layout
    assert layout.to(torch.device("meta")).positions_T.device.type == "meta"
