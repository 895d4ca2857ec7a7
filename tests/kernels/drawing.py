"""How hypothesis draws cases for kernels: the same ones each time, not shrunk, as the interpreter is slow."""

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["CONTIGUOUS", "Layout", "drawn", "laid_out", "layouts"]


def drawn(examples: int) -> settings:
    """Settings that draw so many cases beside the explicit ones."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate), database=None
    )


class Layout(NamedTuple):
    """Where the elements of a tensor of up to four dimensions lie in memory; between them is NaN.

    Attributes:
        order: of the dimensions, the one with the longest stride first.
        starts: elements in front of the first one, by dimension.
        steps: distance of elements, by dimension.
        repeated: the dimension all of whose entries are the first one, by a stride of zero; None for none.
    """

    order: Sequence[int] = (0, 1, 2, 3)
    starts: Sequence[int] = (0, 0, 0, 0)
    steps: Sequence[int] = (1, 1, 1, 1)
    repeated: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The elements of ``x``, or of its first entry repeated, laid out so."""
        shape = x.shape
        if self.repeated is not None and self.repeated < x.ndim:
            x = x.narrow(self.repeated, 0, 1)
        order = [dim for dim in self.order if dim < x.ndim]
        sizes = [self.starts[dim] + self.steps[dim] * x.shape[dim] for dim in range(x.ndim)]
        memory = x.new_full([sizes[dim] for dim in order], torch.nan)
        view = memory.permute([order.index(dim) for dim in range(x.ndim)])
        view = view[tuple(slice(self.starts[dim], None, self.steps[dim]) for dim in range(x.ndim))]
        return view.copy_(x).expand(shape)


CONTIGUOUS = (Layout(),)


def layouts(repeatable: Sequence[int] = (0, 1, 2, 3)) -> st.SearchStrategy[tuple[Layout, ...]]:
    """Of one to three tensors; one of the dimensions ``repeatable`` of each may be repeated."""
    four = [0, 1, 2, 3]
    strided = st.builds(
        Layout,
        st.one_of(st.just(four), st.permutations(four)),
        st.tuples(*[st.integers(0, 3)] * 4),
        st.tuples(*[st.sampled_from([1, 1, 2])] * 4),
        st.sampled_from([None, None, *repeatable]),
    )
    return st.lists(st.one_of(st.just(Layout()), strided), min_size=1, max_size=3).map(tuple)


def laid_out(tensors: Sequence[Tensor], drawn: Sequence[Layout]) -> list[Tensor]:
    """Each tensor in a layout, these taken in turn."""
    return [layout(x) for x, layout in zip(tensors, cycle(drawn), strict=False)]
