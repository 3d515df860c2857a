"""What a scanned collection of pictures consists of.

A source is scanned once into a list of items; each item knows where its bytes lie, so that a tar is
as random access as a folder and any order of reading can be resumed. Items travel to reading
processes, so all of this can be pickled, and there may be millions, so paths are plain strings.
"""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

from ldmkit.errors import DataError
from ldmkit.label_names import ClassColour, LabelSet

NO_LABEL = -1
MAX_BYTES = 4 << 30


@runtime_checkable
class Blob(Protocol):
    """The bytes of one encoded picture, wherever they lie; a format may bring its own kind."""

    @property
    def name(self) -> str:
        """What to call it in errors."""
        ...

    @property
    def size(self) -> int:
        """How many bytes, or another number that changes when they do; it is part of a set's recipe."""
        ...

    def read(self) -> bytes:
        """The bytes of a picture file that `pictures.decode_array` knows (`.npy` is one).

        Raises:
            DataError: they cannot be read, are too many or have changed since the scan.
            StorageError: the network or the disk fails.
        """
        ...


class Span(NamedTuple):
    """Bytes of a local file: a whole file, or a member of a tar."""

    file: str
    offset: int
    size: int
    member: str = ""
    """Its name in the file; "" for the whole file."""

    @property
    def name(self) -> str:
        """The file, or the member in its file."""
        return f"{self.file}/{self.member}" if self.member else self.file

    def read(self) -> bytes:
        """The bytes.

        Raises:
            DataError: the file cannot be read, is too large or has changed since it was listed.
        """
        if self.size > MAX_BYTES:
            raise DataError(f"{self.name} has {self.size:,} bytes; at most {MAX_BYTES:,} are read")
        try:
            with open(self.file, "rb") as file:  # noqa: PTH123 - a Path costs as much as the reading
                file.seek(self.offset)
                data = file.read(self.size if self.member else self.size + 1)
        except OSError as error:
            raise DataError(f"cannot read {self.file}: {error.strerror}") from error
        if len(data) < self.size and self.member:
            raise DataError(f"{self.file} is cut off at {self.member}; copy it again")
        if len(data) != self.size:
            raise DataError(f"{self.file} has changed since it was listed; run the command again")
        return data


class Box(NamedTuple):
    """A labelled rectangle, in shares of the picture's width (x) and height (y), 0 <= low < high <= 1."""

    category: int
    """Index into `Source.box_names`."""
    x0: float
    y0: float
    x1: float
    y1: float


class Item(NamedTuple):
    """One picture: its name, where its bytes lie, and what is known about it."""

    key: str
    """Unique in the source; the same wherever the data set lies."""
    picture: Blob
    label: int = NO_LABEL
    """Class index, or -1; where there are several label sets, of the first."""
    caption: str = ""
    """One caption in each line, where there are several."""
    mask: Blob | None = None
    """The picture that says which pixels count, where there is one."""
    labelmap: Blob | None = None
    """The picture whose values are the classes of the pixels, where there is one."""
    boxes: tuple[Box, ...] = ()
    group: str = ""
    """What it belongs to (a patient, a scene): a group is held back as a whole; "" = on its own."""
    scalars: tuple[float, ...] = ()
    """Numbers that were asked for by name (`Source.scalar_names`); NaN = not known."""
    hole: Blob | None = None
    """The picture that is white where something is to be painted in, where there is one."""
    labels: tuple[int, ...] = ()
    """Class index in each label set (`Source.label_sets`), or -1; nothing where there is one set alone."""

    @property
    def name(self) -> str:
        """What to call it in errors."""
        return self.picture.name


class Problem(NamedTuple):
    """Something wrong with a source, found without decoding pictures."""

    kind: str
    """A few words, the same for all of its kind: "duplicate key"."""
    where: str
    """The file, member or line."""
    text: str
    """One sentence: what, where, what to do."""
    severity: Literal["fatal", "error", "warning"] = "error"
    """fatal = the source cannot be used, error = this picture cannot, warning = used, but look."""


class Source(NamedTuple):
    """A scanned collection of pictures, in a fixed order."""

    items: list[Item]
    class_names: tuple[str, ...] = ()
    box_names: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    scalar_names: tuple[str, ...] = ()
    label_sets: tuple[LabelSet, ...] = ()
    """All of them, where there are several; `class_names` are those of the first."""
    labelmap_colours: tuple[ClassColour, ...] = ()
    """What colours mean in label maps that are RGB pictures; nothing where no table is given."""
