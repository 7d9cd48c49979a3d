"""DVC, with the params that are really used in place of ``params.yaml``: ``python -m pipeline.repro <arguments>``.

DVC compares the values in ``params.yaml`` with those that it noted when a stage last ran. A preset or an override is
no change of that file, so that DVC would rerun nothing and note values that nobody used. Here it reads the document
that the stages will read. The file itself is never written, so nothing needs to be restored after a crash; and a
plain ``dvc repro`` later on compares with the file again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dvc.cli import main
from dvc.dependency import param

from pipeline import overrides


def show(document: object) -> None:
    """Let DVC read a document wherever it would read ``params.yaml`` of this folder."""
    file, read = Path(overrides.DEFAULT).resolve(), param.load_path

    def load_path(path: str, *arguments: object, **named: object) -> object:
        return document if Path(path).resolve() == file else read(path, *arguments, **named)

    param.load_path = load_path


if __name__ == "__main__":
    show(overrides.read())
    sys.exit(main(sys.argv[1:]))
