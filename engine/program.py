"""How the user starts this program."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository, or the folder of the installed packages

# What a sentence says: an installed program has a command of its own.
PROGRAM = "python train.py" if (ROOT / "pyproject.toml").is_file() else "codegrid"
