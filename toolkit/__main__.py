"""`python -m toolkit`, and `accelerate launch toolkit ...`, for which Python runs this folder."""

import sys


def _import_package_not_folder() -> None:
    """Let `import toolkit` find the package when Python was given its folder as a script.

    `sys.path[0]` is then the folder itself, where our module names (`data`, `runs`, ...) would
    hide packages of the same name.
    """
    from pathlib import Path

    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != folder]
    sys.path.insert(0, str(folder.parent))


if __name__ == "__main__":
    if not __package__:
        _import_package_not_folder()
    from toolkit.cli.main import main

    main()
