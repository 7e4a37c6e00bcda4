"""Write files as a whole or not at all."""

import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path` and rename: whoever reads it finds the old content or the new one.

    Raises OSError where that is not possible; nothing is left behind then.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            file.write(content)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
