"""How long an evaluation still takes, from what each attack cost so far.

Attacks differ a hundredfold in cost, and one that breaks most images ends early: a mean over everything done so far would mislead. So each attack has a rate of
its own, seconds an image, and where it has none yet, the planned one times how the others' plans came out.
"""

from collections import Counter
from collections.abc import Mapping


class TimeLeft:
    """Rates of the attacks by name; ``planned`` are seconds an image that resists all of each, as far as somebody knows."""

    def __init__(self, planned: Mapping[str, float] | None = None) -> None:
        self._planned = dict(planned or {})
        self._images: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}

    def note(self, name: str, images: int, seconds: float) -> None:
        """This many more images met the attack, in so many seconds."""
        self._images[name] += images
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def rate(self, name: str) -> float | None:
        """Seconds an image; None where nothing is known of this attack."""
        if self._images[name]:
            return self._seconds[name] / self._images[name]
        return self._planned[name] * self._optimism() if name in self._planned else None

    def seconds(self, remaining: Mapping[str, int]) -> float | None:
        """For so many more images of each attack; None as long as some attack's rate is unknown."""
        total = 0.0
        for name, images in remaining.items():
            if images:
                rate = self.rate(name)
                if rate is None:
                    return None
                total += rate * images
        return total

    def _optimism(self) -> float:
        """Measured by planned seconds of the attacks that have both; 1 before there is any."""
        both = [name for name, images in self._images.items() if images and self._planned.get(name)]
        planned = sum(self._planned[name] * self._images[name] for name in both)
        return sum(self._seconds[name] for name in both) / planned if planned else 1.0


def duration(seconds: float) -> str:
    """Seconds as people say them: ``40 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
