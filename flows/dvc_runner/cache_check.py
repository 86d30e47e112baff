"""A check of DVC's cache: hash what is taken out of it.

DVC hashes what goes in, makes it read-only, and trusts a read-only file from then on: a bit that
flips there would come back every time the artifact is removed to be made again.
"""

import time
from pathlib import Path
from typing import Any


def hash_on_read() -> None:
    """Make DVC, in this process, hash each file of its cache once when it reads it.

    A file whose hash is wrong is removed, so that DVC makes it again. Files that were stored since
    the call, usually by this process, were hashed on the way in.
    """
    from dvc_data.hashfile.db.local import LocalHashFileDB
    from dvc_data.hashfile.hash import file_md5
    from dvc_objects.errors import ObjectFormatError

    trusting_check = LocalHashFileDB.check  # of dvc-data 3.18; a test fails if it has moved
    began = time.time()
    hashed: dict[str, float] = {}  # the time of the last change, by path

    def check(self: Any, oid: str, *arguments: Any, **named: Any) -> Any:
        meta = trusting_check(self, oid, *arguments, **named)
        path = self.oid_to_path(oid)
        changed = Path(path).stat().st_ctime
        if changed < began and hashed.get(path) != changed:
            if file_md5(path, self.fs) != oid.removesuffix(".dir"):
                Path(path).unlink(missing_ok=True)
                print(
                    f"{path} was not what DVC had stored there, and is removed: "
                    "what it belongs to is made again",
                    flush=True,
                )
                raise ObjectFormatError(f"{path} is corrupted")
            hashed[path] = changed
        return meta

    LocalHashFileDB.check = check
