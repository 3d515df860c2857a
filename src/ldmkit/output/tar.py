"""Files as members of a tar: ustar headers in which all that is chance or a person is zero."""

import tarfile

from ldmkit.data.tar_members import BLOCK


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and filling of one file; same bytes for same name and data, whoever writes it.

    Args:
        name: in ASCII, at most 100 signs.
        data: the file's bytes.
    """
    header = tarfile.TarInfo(name)  # mode 0644, time 0, no owner
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
