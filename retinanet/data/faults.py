"""What is wrong with an entry of a data set: it stops training, and a check of the data lists it and reads on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from retinanet.errors import UserError


class Fault(NamedTuple):
    """What is wrong, or worth knowing, and where. `kind` is a key of `retinanet.checks.kinds.KINDS`."""

    kind: str
    file: str  # the image's, or the annotation file where reading refuses an entry
    annotation: int | None
    message: str


class DataError(UserError):
    """A `UserError` about one entry, which says of what kind the fault is."""

    def __init__(self, kind: str, message: str, *, file: object = "", annotation: int | None = None) -> None:
        super().__init__(message)
        self.fault = Fault(kind, str(file), annotation, message)


@contextmanager
def reading(faults: list[Fault] | None, file: object = "") -> Iterator[None]:
    """Around one entry of `file`: with a list, an error is noted there and the entry left out; with None it is raised."""
    try:
        yield
    except UserError as error:
        if faults is None:
            raise
        fault = error.fault if isinstance(error, DataError) else Fault("unusable entry", "", None, str(error))
        faults.append(fault if fault.file else fault._replace(file=str(file)))
