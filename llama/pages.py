"""Advise the kernel about a tensor's memory pages (madvise(2)), and release freed ones."""

import ctypes
import mmap
import sys

from torch import Tensor


def release_pages(tensor: Tensor) -> None:
    """Release the pages of a memory-mapped tensor; they are read from the file again if needed."""
    _advise(tensor, "MADV_DONTNEED", whole_pages=True)


def will_read_in_order(tensor: Tensor) -> None:
    """Announce that a memory-mapped tensor is read once from start to end: the kernel reads further
    ahead, and the disk serves larger requests."""
    _advise(tensor, "MADV_SEQUENTIAL", whole_pages=False)


def use_huge_pages(tensor: Tensor) -> None:
    """Request 2 MiB pages for a tensor that is mapped from a file but not read yet: with 4 KiB
    pages, address translation takes up to a tenth of a decoding step."""
    _advise(tensor, "MADV_HUGEPAGE", whole_pages=False)


def release_freed_memory() -> None:
    """Return the free blocks of glibc's heap to the kernel (malloc_trim(3)); elsewhere, nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _advise(tensor: Tensor, advice: str, *, whole_pages: bool) -> None:
    """``whole_pages``: skip pages that also hold other data."""
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
        ctypes.CDLL(None).madvise(  # the result is ignored: this is only advice
            ctypes.c_void_p(start), ctypes.c_size_t(stop - start), getattr(mmap, advice)
        )
