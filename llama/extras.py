"""Packages that come with an extra of this one."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(need: str, extra: str) -> Iterator[None]:
    """For imports of the packages of an extra.

    Args:
        need: what needs which packages, for the message.

    Raises:
        ImportError: a package isn't installed; the message has the command.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{need} ({error}): pip install -c constraints.txt -e ".[{extra}]"'
        ) from None
