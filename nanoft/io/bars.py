"""Progress bars on stderr with the time left, for work that takes longer than a second, and only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar that disappears when the work is done."""

    enabled = True  # logging.progress_bar, on rank 0

    def __init__(self, *args: Any, **options: Any):
        hidden = None if Bar.enabled else True  # None: tqdm asks whether stderr is a terminal
        looks = {"disable": hidden, "leave": False, "delay": 1.0, "dynamic_ncols": True, "unit_scale": True}
        super().__init__(*args, **looks | options)


def track(
    items: Iterable[Item], what: str, unit: str, total: int | None = None, size: Callable[[Any], int] = lambda _: 1
) -> Iterator[Item]:
    """Iterate over the items and show a bar: of their number, or of `total` in units of which each has `size(item)`."""
    with Bar(desc=what, total=len(items) if isinstance(items, Sized) else total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update(size(item))
