"""Mean and standard deviation of pictures that come one by one (Welford 1962)."""

from jaxtyping import Float
from torch import Tensor

from ldmkit.pixels import OneImage

Moments = Float[Tensor, "channels height width"]


class RunningSpread:
    """Takes in pictures of one shape, and keeps two numbers for each value of a picture, in float64.

    Args:
        first: the first picture.
    """

    def __init__(self, first: OneImage) -> None:
        self.count = 1
        self.mean: Moments = first.double()
        self._squares: Moments = self.mean.new_zeros(self.mean.shape)

    def add(self, image: OneImage) -> None:
        """Take in one more."""
        self.count += 1
        off = image.double() - self.mean
        self.mean = self.mean + off / self.count
        self._squares = self._squares + off * (image.double() - self.mean)

    @property
    def std(self) -> Moments:
        """Standard deviation with n - 1 in the denominator; NaN of a single picture."""
        return (self._squares / (self.count - 1 if self.count > 1 else float("nan"))).sqrt()
