"""Print the digests of the smallest run, artifact by artifact: `python -m benchmarks.digests`.

A change that must not change a result leaves all of them as they were: compare before and after.
"""

import tempfile
from pathlib import Path

from tests.small_run import STAGES, make_run
from vla_opd.artifacts.manifest import MANIFEST, Manifest


def main() -> None:
    """Make the run in a temporary folder, and print a line per artifact."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder)) / "artifacts/small"
        for name in STAGES:
            text = (run / name / MANIFEST).read_text()
            manifest = Manifest.model_validate_json(text)
            print(f"{name:<22} {manifest.digest}")


if __name__ == "__main__":
    main()
