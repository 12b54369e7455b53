"""What each image of a dataset becomes, whatever its file is."""

from dataclasses import dataclass

from codegrid.engine.sizes import Size

FIT_CHOICES = ("crop", "pad", "stretch")
OWN_SIZE = "own"  # the fit of a form without a size
# More rows and columns than any image has, so that none is decoded at a fraction of its size.
UNBOUNDED = (2**24, 2**24)


@dataclass(frozen=True)
class Form:
    """Pixels (channels, rows, columns).

    size       (rows, columns)
    channels   of each pixel
    fit        how an image of other proportions gets the size: "crop" cuts its middle out, "pad" adds borders of the lowest
               value, "stretch" changes its proportions
    """

    size: Size
    channels: int
    fit: str = "crop"

    @classmethod
    def square(cls, side: int, channels: int) -> "Form":
        """A square, cut out of the middle."""
        return cls((side, side), channels)

    @classmethod
    def of_own_size(cls, channels: int) -> "Form":
        """Images as large as they are; `size` is larger than any."""
        return cls(UNBOUNDED, channels, OWN_SIZE)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns)."""
        return self.channels, *self.size
