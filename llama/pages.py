"""Advice to the system about the pages of a tensor's memory (madvise(2))."""

import ctypes
import mmap

from torch import Tensor


def release_pages(tensor: Tensor) -> None:
    """Release the mapped pages from a tensor's first to its last element; they are read from the
    file again if needed."""
    _advise(tensor, "MADV_DONTNEED", whole_pages=True)


def use_huge_pages(tensor: Tensor) -> None:
    """Ask for pages of 2 MiB where a tensor is mapped from a file and not read yet: with pages of
    4 KiB, address translation takes up to a tenth of a decoding step."""
    _advise(tensor, "MADV_HUGEPAGE", whole_pages=False)


def _advise(tensor: Tensor, advice: str, *, whole_pages: bool) -> None:
    """Args:
    whole_pages: leave out pages that also hold other data.
    """
    if not hasattr(mmap, advice):
        return
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start, stop = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
    page = mmap.PAGESIZE
    if whole_pages:
        start, stop = -(-start // page) * page, stop // page * page
    else:
        start = start // page * page
    if start < stop:
        ctypes.CDLL(None).madvise(  # the result doesn't matter: it is only advice
            ctypes.c_void_p(start), ctypes.c_size_t(stop - start), getattr(mmap, advice)
        )
