"""Random packed rows, as strategies of hypothesis."""

from hypothesis import strategies as st

from ptp_ds.packing.row import Block


@st.composite
def blocks(draw):
    """A block of 1 to 5 segments, each the child of an earlier one; depth-first order is kept by construction."""
    parents, path = [-1], [0]
    for segment in range(1, draw(st.integers(1, 5))):
        keep = draw(st.integers(1, len(path)))
        path = path[:keep]
        parents.append(path[-1])
        path.append(segment)
    lengths = [draw(st.integers(1, 6)) for _ in parents]
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    return Block(sum(lengths), tuple(starts), tuple(parents))


open_blocks = st.integers(1, 12).map(lambda length: Block(length, (0,), (-1,), causal=False))  # an encoder's
packed_rows = st.one_of(st.lists(blocks(), min_size=1, max_size=5), st.lists(open_blocks, min_size=1, max_size=5))
