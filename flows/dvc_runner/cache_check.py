"""DVC's cache, hashed when something comes out of it.

DVC hashes what goes in, makes it read-only, and believes a read-only file from then on: a bit that flips there would come back each time that the
artifact is removed to be made again.
"""

import time
from pathlib import Path
from typing import Any


def distrust() -> None:
    """Let DVC, in this process, hash what it finds in its cache, once, and remove what is no longer what was stored: it makes that again then.

    What was put there since this process began, by this process as a rule, has just been hashed on its way in.
    """
    from dvc_data.hashfile.db.local import LocalHashFileDB
    from dvc_data.hashfile.hash import file_md5
    from dvc_objects.errors import ObjectFormatError

    believe = LocalHashFileDB.check  # of dvc-data 3.18; a test tells when it is elsewhere
    began, hashed = time.time(), dict[str, float]()

    def check(self: Any, oid: str, *arguments: Any, **named: Any) -> Any:
        meta = believe(self, oid, *arguments, **named)
        path = self.oid_to_path(oid)
        changed = Path(path).stat().st_ctime
        if changed < began and hashed.get(path) != changed:
            if file_md5(path, self.fs) != oid.removesuffix(".dir"):
                Path(path).unlink(missing_ok=True)
                print(
                    f"{path} was not what DVC had stored there, and is removed: what it belongs to is made again",
                    flush=True,
                )
                raise ObjectFormatError(f"{path} is corrupted")
            hashed[path] = changed
        return meta

    LocalHashFileDB.check = check
