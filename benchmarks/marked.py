"""Parts of a page that a script makes, between two marks."""

from __future__ import annotations


def replaced(page: str, begin: str, content: str, end: str) -> str:
    """A page with other content between its marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    before, first, rest = page.partition(begin)
    _former, last, after = rest.partition(end)
    if not (first and last) or begin in rest or end in after:
        raise ValueError(f"the page needs {begin} and {end}, once each and in this order")
    return f"{before}{first}\n\n{content}\n\n{last}{after}"
