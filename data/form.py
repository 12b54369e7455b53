"""What each image of a dataset becomes, whatever its file is."""

from dataclasses import dataclass

from codegrid.engine.sizes import Size

FIT_CHOICES = ("crop", "pad", "stretch")


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns)."""
        return self.channels, *self.size
